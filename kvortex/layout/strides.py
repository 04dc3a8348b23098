"""The arithmetic of paged layouts: the block dimension, the runs of a block, overlaps.

All functions work on plain integers and need no tensor library. Strides count elements; addresses and lengths count
bytes, unless a docstring says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import LayoutError

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockRuns:
    """The contiguous runs of one block, in payload order; offsets and lengths in elements.

    `block_shape` is the block's logical shape without dimensions of size 1; `payload_order` lists its axes in the order
    of the payload, outermost first. Together they define the meaning of every byte of the payload.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    block_shape: tuple[int, ...]
    payload_order: tuple[int, ...]


def find_block_dim(name: str, shape: Sequence[int], block_size: int, num_blocks: int | None) -> int:
    """The dimension of a tensor that counts blocks: the only multiple of `num_blocks`, or else that of the shape table.

    Args:
        name: the tensor's name, for messages.
        shape: the tensor's shape.
        block_size: tokens of a block. Without `num_blocks`, another dimension must have this size.
        num_blocks: blocks of the cache; None if it is not known. If it is, caches of opaque bytes (Mamba states) are
            accepted, too.

    Raises:
        LayoutError: no dimension fits, or more than one.
    """
    if num_blocks is None:
        dim = _block_dim_by_shape(name, shape)
        if block_size not in [size for d, size in enumerate(shape) if d != dim]:
            raise LayoutError(
                f"tensor {name!r} of shape {tuple(shape)}: no dimension beside the block dimension {dim} is "
                f"block_size = {block_size}; correct block_size, or pass num_blocks= or block_dim="
            )
        return dim
    candidates = [d for d, size in enumerate(shape) if size > 0 and size % num_blocks == 0]
    if not candidates:
        raise LayoutError(
            f"tensor {name!r} of shape {tuple(shape)}: no dimension is a multiple of "
            f"num_blocks = {num_blocks}; correct num_blocks"
        )
    if len(candidates) == 1:
        return candidates[0]
    dim = _block_dim_by_shape(name, shape)
    if dim not in candidates:
        raise _ambiguous(name, shape, f"num_blocks = {num_blocks} fits dimensions {candidates}")
    return dim


def _block_dim_by_shape(name: str, shape: Sequence[int]) -> int:
    """The shape table. nb = blocks, bs = tokens of a block, H = heads, D = head size, L = layers.

    | dims | shapes                                             | block dimension |
    |------|----------------------------------------------------|-----------------|
    | 3    | [nb, bs, X]                                        | 0               |
    | 4    | [nb, H, bs, 2D], [nb, bs, H, D], [nb, 1, bs, X]    | 0               |
    | 5    | [2, nb, bs, H, D]                                  | 1               |
    | 5    | [nb, 2, bs, H, D]                                  | 0               |
    | 6    | [2, L, nb, bs, H, D]                               | 2               |
    | 6    | [nb, L, 2, bs, H, D], [nb, 2, L, bs, H, D]         | 0               |

    bs and H may be exchanged. A shape in which a 2 could be either K/V or the number of blocks is refused.
    """
    match len(shape):
        case 3 | 4:
            return 0
        case 5 if (shape[0] == 2) != (shape[1] == 2):
            return 1 if shape[0] == 2 else 0
        case 5 if shape[0] == 2:
            raise _ambiguous(name, shape, "both dimensions 0 and 1 could be the K/V pair")
        case 6 if shape[0] != 2:
            return 0
        case 6 if shape[1] != 2 and shape[2] != 2:
            return 2
        case 6:
            raise _ambiguous(name, shape, "more than one dimension could be the K/V pair")
        case _:
            raise _ambiguous(name, shape, "not a known shape of a paged KV cache")


def _ambiguous(name: str, shape: Sequence[int], why: str) -> LayoutError:
    return LayoutError(
        f"tensor {name!r} of shape {tuple(shape)}: cannot tell which dimension counts blocks ({why}); pass block_dim="
    )


def dense_runs(name: str, shape: Sequence[int], strides: Sequence[int], min_run: int) -> BlockRuns:
    """Split one block into maximal contiguous runs.

    Dimensions that are dense in memory, in any order, form a run. The other dimensions are enumerated row-major, in
    their logical order.

    Args:
        name: the tensor's name, for messages.
        shape: the shape of one block.
        strides: the strides of the same dimensions, in elements.
        min_run: elements that a run must have.

    Raises:
        LayoutError: the runs are shorter than `min_run`.
    """
    # The stride of a dimension of size 1 is never used, so it may have any value.
    axes = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    run = 1
    inner: list[int] = []
    for axis in sorted(range(len(axes)), key=lambda axis: axes[axis][1]):
        size, stride = axes[axis]
        if stride != run:
            break
        run *= size
        inner.insert(0, axis)
    if run < min_run:
        # Checked before the enumeration, because a wrong block dimension could give millions of runs.
        raise LayoutError(
            f"tensor {name!r}: a block is not dense, its contiguous runs are {run} element(s) long and "
            f"at least {min_run} are needed (per-block shape {tuple(shape)}, strides {tuple(strides)}); "
            "pass a contiguous tensor, or the right block_dim="
        )
    outer = [axis for axis in range(len(axes)) if axis not in inner]
    starts = [0]
    for axis in outer:
        size, stride = axes[axis]
        starts = [start + i * stride for start in starts for i in range(size)]
    offsets, lengths = _join_adjacent(starts, run)
    return BlockRuns(offsets, lengths, tuple(size for size, _ in axes), (*outer, *inner))


def _join_adjacent(starts: Sequence[int], run: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Join runs that follow each other both in the payload and in memory; returns (offsets, lengths)."""
    offsets: list[int] = []
    lengths: list[int] = []
    for start in starts:
        if offsets and offsets[-1] + lengths[-1] == start:
            lengths[-1] += run
        else:
            offsets.append(start)
            lengths.append(run)
    return tuple(offsets), tuple(lengths)


def find_overlap(
    addresses: Int64Array, block_strides: Int64Array, nbytes: Int64Array, num_blocks: int
) -> tuple[int, int] | None:
    """Find two segments that share a byte in any of their blocks. The check is exact.

    Args:
        addresses, block_strides, nbytes: address, stride and length of each segment in bytes, `int64 [num_segments]`.
        num_blocks: blocks of the cache.

    Returns:
        Their indices, or None if no two overlap; `(i, i)` if blocks of segment i overlap each other.
    """
    if num_blocks > 1:
        too_long = np.flatnonzero(nbytes > block_strides)
        if len(too_long):
            return int(too_long[0]), int(too_long[0])
    order = np.argsort(addresses, kind="stable")
    ends = (addresses + (num_blocks - 1) * block_strides + nbytes)[order]
    reach = np.maximum.accumulate(ends)
    # Only segments whose bounding ranges intersect can overlap.
    borders = np.flatnonzero(addresses[order][1:] >= reach[:-1]) + 1
    for group in np.split(order, borders):
        if len(group) == 1:
            continue
        pair = _overlap_in_group(addresses[group], block_strides[group], nbytes[group], num_blocks)
        if pair is not None:
            return int(group[pair[0]]), int(group[pair[1]])
    return None


def _overlap_in_group(
    addresses: Int64Array, block_strides: Int64Array, nbytes: Int64Array, num_blocks: int
) -> tuple[int, int] | None:
    if _disjoint_modulo_stride(addresses, block_strides, nbytes):
        return None
    blocks = np.arange(num_blocks, dtype=np.int64)
    starts = (addresses[:, None] + block_strides[:, None] * blocks).ravel()
    owners = np.repeat(np.arange(len(addresses)), num_blocks)
    order = np.argsort(starts, kind="stable")
    starts, owners = starts[order], owners[order]
    # The runs are sorted by start: if any two overlap, then two neighbours do.
    clashes = np.flatnonzero(starts[:-1] + nbytes[owners[:-1]] > starts[1:])
    return (int(owners[clashes[0]]), int(owners[clashes[0] + 1])) if len(clashes) else None


def _disjoint_modulo_stride(addresses: Int64Array, block_strides: Int64Array, nbytes: Int64Array) -> bool:
    """True if all segments have one stride and are disjoint within one period of it: then they never overlap.

    Layers that are interleaved in one allocation are like this. The check avoids sorting `num_segments * num_blocks`
    runs. False does not mean that they overlap.
    """
    stride = int(block_strides[0])
    if np.any(block_strides != stride):
        return False
    phases = addresses % stride
    order = np.argsort(phases)
    starts = np.append(phases[order], phases[order[0]] + stride)
    return bool(np.all(starts[:-1] + nbytes[order] <= starts[1:]))
