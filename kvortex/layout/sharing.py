"""Which groups of layers lie in the same memory, so that their blocks exclude each other."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from kvortex.layout.layout import KVLayout, Segment


class Sharing(IntEnum):
    """What two groups of layers have in common; of several answers the largest counts."""

    NOTHING = 0
    SAME_BLOCKS = 1  # only blocks with the same id lie in the same memory
    OTHER_BLOCKS = 2  # blocks with different ids do, too


def sharing(first: KVLayout, second: KVLayout) -> Sharing:
    """How the blocks of two groups overlap. The answer is exact, however their tensors are interleaved."""
    starts, ends = np.array([_range(s, second.num_blocks) for s in second.segments], dtype=np.int64).T
    found = Sharing.NOTHING
    for segment in first.segments:
        start, end = _range(segment, first.num_blocks)
        for position in np.flatnonzero((starts < end) & (start < ends)).tolist():
            pair = _of_segments(segment, first.num_blocks, second.segments[position], second.num_blocks)
            found = max(found, pair)
            if found is Sharing.OTHER_BLOCKS:
                return found
    return found


def block_spaces(layouts: Sequence[KVLayout]) -> tuple[int, ...]:
    """For each group the number of the first group that is connected with it by shared memory, or its own."""
    spaces: list[int] = []
    for number, layout in enumerate(layouts):
        met = {spaces[n] for n in range(number) if sharing(layouts[n], layout)}
        space = min(met, default=number)
        spaces = [space if other in met else other for other in spaces] + [space]
    return tuple(spaces)


def _range(segment: Segment, num_blocks: int) -> tuple[int, int]:
    """The first address of a segment, and that behind its last block."""
    return segment.address, segment.address + (num_blocks - 1) * segment.block_stride + segment.nbytes


def _of_segments(first: Segment, num_first: int, second: Segment, num_second: int) -> Sharing:
    if first.block_stride != second.block_stride:
        return _by_enumeration(first, num_first, second, num_second)
    # Block b of the first overlaps block b + shift of the second if and only if
    # -second.nbytes < distance + shift * stride < first.nbytes.
    stride, distance = first.block_stride, second.address - first.address
    least = max((-second.nbytes - distance) // stride + 1, 1 - num_first)
    most = min(-((distance - first.nbytes) // stride) - 1, num_second - 1)
    if least > most:
        return Sharing.NOTHING
    return Sharing.SAME_BLOCKS if least == most == 0 else Sharing.OTHER_BLOCKS


def _by_enumeration(first: Segment, num_first: int, second: Segment, num_second: int) -> Sharing:
    starts = first.address + first.block_stride * np.arange(num_first)
    others = second.address + second.block_stride * np.arange(num_second)
    begin = np.searchsorted(others + second.nbytes, starts, side="right")
    end = np.searchsorted(others, starts + first.nbytes, side="left")
    meets = end > begin
    if not meets.any():
        return Sharing.NOTHING
    same = (begin == np.arange(num_first)) & (end == begin + 1)
    return Sharing.SAME_BLOCKS if same[meets].all() else Sharing.OTHER_BLOCKS
