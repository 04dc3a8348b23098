"""Small integer tables that describe a layout to the kernels, and the checks before a launch."""

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import InvalidBlockIdError
from kvortex.layout import KVLayout
from kvortex.runtime.jit import njit

LANE_BYTES = 16  # one access of one thread
TILE_LANES = 256  # of one warp: eight accesses per lane, all in flight together
MAX_BATCH_BLOCKS = 1000  # per launch: block ids are launch arguments, which are limited to 4,096 bytes


def arena_base(layout: KVLayout) -> int:
    """Lowest address of the layout. Segments are offsets from it, so that one pointer reaches all tensors."""
    return min(segment.address for segment in layout.segments)


def arena_nbytes(layout: KVLayout) -> int:
    """Distance from the lowest address to the end of the highest segment of the last block."""
    last = layout.num_blocks - 1
    end = max(s.address + last * s.block_stride + s.nbytes for s in layout.segments)
    return end - arena_base(layout)


def segment_table(layout: KVLayout) -> NDArray[np.int64]:
    """`[num_segments, 4]` in 8-byte words: offset in the arena, block stride, offset in the payload, length."""
    base = arena_base(layout)
    rows = [
        (segment.address - base, segment.block_stride, offset, segment.nbytes)
        for segment, offset in zip(layout.segments, layout.payload_offsets, strict=True)
    ]
    return np.array(rows, dtype=np.int64) // 8


def tile_table(layout: KVLayout) -> NDArray[np.int64]:
    """`[num_tiles, 4]` in 16-byte lanes, columns as `segment_table`: segments cut into even tiles of at most 4 KiB."""
    rows: list[tuple[int, int, int, int]] = []
    base = arena_base(layout)
    for segment, offset in zip(layout.segments, layout.payload_offsets, strict=True):
        lanes = segment.nbytes // LANE_BYTES
        source, target = (segment.address - base) // LANE_BYTES, offset // LANE_BYTES
        for start, stop in _even_cuts(lanes):
            rows.append((source + start, segment.block_stride // LANE_BYTES, target + start, stop - start))
    return np.array(rows, dtype=np.int64)


def _even_cuts(lanes: int) -> list[tuple[int, int]]:
    # Multiples of 32 lanes where possible: 576 lanes become 3 x 192, not 256 + 256 + 64.
    tiles = -(-lanes // TILE_LANES)
    step = -(-lanes // tiles)
    step = min(TILE_LANES, -(-step // 32) * 32)
    return [(start, min(start + step, lanes)) for start in range(0, lanes, step)]


def validate_block_ids(
    block_ids: Sequence[int] | NDArray[np.integer], num_blocks: int, *, allow_duplicates: bool = False
) -> NDArray[np.int32]:
    """Block ids as `int32 [n]`, checked: in range and, unless `allow_duplicates`, without duplicates.

    Raises:
        InvalidBlockIdError: an id is outside `[0, num_blocks)` or occurs twice.
    """
    ids = np.asarray(block_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidBlockIdError(f"block ids are a flat list of integers, not {ids.dtype} of shape {ids.shape}")
    if ids.dtype != np.int32 or not ids.flags.c_contiguous:
        ids = np.ascontiguousarray(ids, np.int64)
    if not ids.flags.writeable:
        ids = ids.copy()  # one array type for the compiled step
    narrowed = ids if ids.dtype == np.int32 else np.empty(len(ids), np.int32)
    position = _narrow(ids, narrowed, num_blocks, not allow_duplicates)
    if position >= 0:
        wrong = int(ids[position])
        why = "is named twice" if 0 <= wrong < num_blocks else f"is not in [0, {num_blocks})"
        raise InvalidBlockIdError(f"block id {wrong} {why}")
    return narrowed


@njit(cache=True)
def _narrow(ids: NDArray[np.integer], narrowed: NDArray[np.int32], num_blocks: int, each_once: bool) -> int:
    """Copy ids; returns the position of the first that is out of range or a duplicate, or -1."""
    seen = np.zeros((num_blocks + 63) // 64 if each_once else 1, np.uint64)
    for position, block_id in enumerate(ids):
        if not 0 <= block_id < num_blocks:
            return position
        narrowed[position] = block_id
        if each_once:
            word, bit = block_id >> 6, np.uint64(1) << np.uint64(block_id & 63)
            if seen[word] & bit:
                return position
            seen[word] |= bit
    return -1


def array_at(address: int, nbytes: int) -> NDArray[np.uint64]:
    """`nbytes // 8` words of memory at `address`; the caller keeps the memory alive."""
    words = (ctypes.c_uint64 * (nbytes // 8)).from_address(address)
    return np.ctypeslib.as_array(words)
