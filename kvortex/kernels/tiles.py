"""The common part of all kernels: warps move one tile after another and add up sums for each block."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kvortex.codecs.packing import NOT_FINITE
from kvortex.kernels._cuda import DEVICE_OPS, cuda, int32, int32_constant, word_constant

WARP_TILES = 4
"""Number of neighbouring tiles that a warp moves: sums stay in registers, and a warp ends within microseconds."""


class TileSums(NamedTuple):
    """Sums of one lane over a tile; only packing uses more than the digest."""

    digest: Any  # its part of the digest's sum
    lost: Any  # sum of the squares of what packing changed, in the codec's steps
    there: Any  # sum of the squares of the values, likewise
    largest: Any  # bit pattern of the largest magnitude


def scratch_words(max_blocks: int) -> int:
    """Words of scratch memory for batches of up to `max_blocks`: a count of thread blocks, and three sums per block."""
    return 3 * max_blocks + 1


def grid_size(num_blocks: int, num_tiles: int, threads: int) -> int:
    """Number of thread blocks needed to move all tiles of a batch."""
    return -(-num_blocks * num_tiles // (threads // 32 * WARP_TILES))


def tile_kernel(name: str, move_tile: Any, columns: int, largest_bits: int | None = None) -> Callable[..., None]:
    """The body of a kernel that moves all tiles of all blocks in one launch.

    Each warp moves a few neighbouring tiles and ends. The hardware starts thread blocks in order, so concurrent
    accesses are close together in memory, and a model's kernels get their multiprocessors back within microseconds.
    Sums stay in registers until a warp comes to another block; then one lane adds them to the block's sums, without
    waiting. The thread block that ends last writes the sums of all blocks to host memory and clears the scratch words,
    so that the stream needs no further operations for that.

    Arguments of the kernel: arena and staging, as 16-byte lanes or words as `move_tile` takes them; the tile table and
    its length; block ids, which are passed by value, and their number; distance from one block to the next in staging;
    scratch, `scratch_words` words of zero; results in host memory, three words per block: the digest, and for packing
    the sums of squares of the rounding errors and of the values.

    Args:
        name: name of the kernel in profiles.
        move_tile: `(arena, staging, tiles, row, block id, start in staging, lane)` -> the lane's `TileSums`.
        columns: number of columns of the tile table.
        largest_bits: bit pattern of the largest magnitude that may be packed; None for raw blocks.
    """
    ops = DEVICE_OPS
    fetch_add, warp_sum, warp_largest, as_int64 = ops.fetch_add, ops.warp_sum, ops.warp_largest, ops.int64
    table_entry = ops.table_entry
    as_word, nothing = ops.word, int32_constant(0)
    zero, one, not_finite = word_constant(0), word_constant(1), word_constant(NOT_FINITE)
    packs, limit = largest_bits is not None, int32_constant(largest_bits or 0)

    def kernel(
        arena: Any,
        staging: Any,
        tiles: Any,
        num_tiles: Any,
        ids: Any,
        num_blocks: Any,
        distance: Any,
        scratch: Any,
        results: Any,
    ) -> None:
        is_last = cuda.shared.array(1, int32)
        lane = as_int64(cuda.threadIdx.x % 32)
        warp = as_int64((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // 32)
        item = WARP_TILES * warp
        stop = min(item + WARP_TILES, num_blocks * num_tiles)
        b = item // num_tiles
        t = item - b * num_tiles
        while item < stop:
            run = min(stop - item, num_tiles - t)
            block_id = as_int64(table_entry(ids, b))
            total, lost, there, worst = zero, zero, zero, nothing
            for row in range(columns * t, columns * (t + run), columns):
                sums = move_tile(arena, staging, tiles, row, block_id, b * distance, lane)
                total += sums.digest
                if packs:
                    lost += sums.lost
                    there += sums.there
                    worst = max(worst, sums.largest)
            total = warp_sum(lane, total)
            if packs:
                lost, there, worst = warp_sum(lane, lost), warp_sum(lane, there), warp_largest(lane, worst)
            if lane == 0:
                fetch_add(scratch, 3 * b + 1, total)
                if packs:
                    if worst > limit:
                        lost += not_finite
                    fetch_add(scratch, 3 * b + 2, lost)
                    fetch_add(scratch, 3 * b + 3, there)
            item += run
            b += 1
            t = as_int64(0)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            cuda.threadfence()
            is_last[0] = fetch_add(scratch, 0, one) + one == as_word(cuda.gridDim.x)
        cuda.syncthreads()
        if is_last[0]:
            cuda.threadfence()
            for i in range(cuda.threadIdx.x, 3 * num_blocks, cuda.blockDim.x):
                results[i] = fetch_add(scratch, i + 1, zero)
                scratch[i + 1] = zero
            if cuda.threadIdx.x == 0:
                scratch[0] = zero

    kernel.__name__ = kernel.__qualname__ = name
    return kernel
