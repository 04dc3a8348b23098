"""The CUDA kernels that gather blocks as they are, and scatter them."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvortex.kernels._cuda import DEVICE_OPS, SIMULATED, cuda, device_function, int32
from kvortex.kernels.tables import MAX_BATCH_BLOCKS, TILE_LANES


def copy_kernel(to_staging: bool) -> Callable[..., None]:
    """The kernel body: gather (`to_staging`) or scatter. One launch moves all segments of all blocks.

    A warp moves a tile of up to 256 16-byte lanes with eight accesses a thread, all loads before the first
    store so that they are in flight together, and adds the tile's part of the digest to its block's sum. The
    warp that finishes a block last writes the sum to host memory and clears the block's scratch words, so
    that nothing has to be set or fetched by further operations on the stream.

    Arguments of the kernel, sizes in 16-byte lanes: arena and staging; the tile table and its length; block
    ids in host memory and their number; a block's distance in staging; scratch, two words a block, zero; the
    digests in host memory.
    """
    ops = DEVICE_OPS
    load, store, key, mix, fetch_add = ops.load, ops.store, ops.key, ops.mix, ops.fetch_add
    warp_sum, as_int32, as_word = ops.warp_sum, ops.int32, ops.word
    key_step, lane_step, adders = ops.key_step, ops.lane_step, ops.adders
    zero, one = (0, 1) if SIMULATED else (np.uint64(0), np.uint64(1))
    last_lane = TILE_LANES - 1

    @device_function
    def put(target: Any, lane: Any, words: Any, key_low: Any) -> Any:
        store(target, lane, words[0], words[1])
        return mix(words[0], key_low) + mix(words[1], key_low + key_step)

    @device_function
    def copy_full_tile(source: Any, start: Any, target: Any, into: Any, first_key: Any) -> Any:
        a, b, c, d = load(source, start), load(source, start + 32), load(source, start + 64), load(source, start + 96)
        e, f, g, h = (
            load(source, start + 128),
            load(source, start + 160),
            load(source, start + 192),
            load(source, start + 224),
        )
        k = first_key
        total = put(target, into, a, k)
        k += lane_step
        total += put(target, into + 32, b, k)
        k += lane_step
        total += put(target, into + 64, c, k)
        k += lane_step
        total += put(target, into + 96, d, k)
        k += lane_step
        total += put(target, into + 128, e, k)
        k += lane_step
        total += put(target, into + 160, f, k)
        k += lane_step
        total += put(target, into + 192, g, k)
        k += lane_step
        total += put(target, into + 224, h, k)
        return total

    @device_function
    def copy_tile(source: Any, start: Any, target: Any, into: Any, first_key: Any, count: Any) -> Any:
        total = zero
        k = first_key
        step = 0
        while count - step > 96:
            a, b = load(source, start + step), load(source, start + step + 32)
            c, d = load(source, start + step + 64), load(source, start + step + 96)
            total += put(target, into + step, a, k)
            k += lane_step
            total += put(target, into + step + 32, b, k)
            k += lane_step
            total += put(target, into + step + 64, c, k)
            k += lane_step
            total += put(target, into + step + 96, d, k)
            k += lane_step
            step += 128
        while count > step:
            total += put(target, into + step, load(source, start + step), k)
            k += lane_step
            step += 32
        return total

    def kernel(
        arena: Any,
        staging: Any,
        tiles: Any,
        num_tiles: Any,
        ids: Any,
        num_blocks: Any,
        block_lanes: Any,
        scratch: Any,
        digests: Any,
    ) -> None:
        block_ids = cuda.shared.array(MAX_BATCH_BLOCKS, int32)
        for i in range(cuda.threadIdx.x, num_blocks, cuda.blockDim.x):
            block_ids[i] = ids[i]
        cuda.syncthreads()
        lane = cuda.threadIdx.x % 32
        warps = as_int32(cuda.gridDim.x * cuda.blockDim.x // 32)
        item = as_int32((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // 32)
        tile_count = as_int32(num_tiles)
        step_b, step_t = warps // tile_count, warps % tile_count
        b, t = item // tile_count, item % tile_count
        while b < num_blocks:
            paged = tiles[4 * t] + block_ids[b] * tiles[4 * t + 1] + lane
            payload = tiles[4 * t + 2] + lane
            dense = b * block_lanes + payload
            count = tiles[4 * t + 3]
            first_key = key(2 * payload)
            if to_staging:
                if count > last_lane:
                    total = copy_full_tile(arena, paged, staging, dense, first_key)
                else:
                    total = copy_tile(arena, paged, staging, dense, first_key, count - lane)
            else:
                if count > last_lane:
                    total = copy_full_tile(staging, dense, arena, paged, first_key)
                else:
                    total = copy_tile(staging, dense, arena, paged, first_key, count - lane)
            total = warp_sum(total)
            if lane < adders:
                fetch_add(scratch, 2 * b, total)
                cuda.threadfence()
                finished = fetch_add(scratch, 2 * b + 1, one) + one
                if finished == as_word(num_tiles * adders):
                    digests[b] = fetch_add(scratch, 2 * b, zero)
                    scratch[2 * b] = zero
                    scratch[2 * b + 1] = zero
            b += step_b
            t += step_t
            if t >= tile_count:
                t -= tile_count
                b += 1

    kernel.__name__ = kernel.__qualname__ = "kvortex_gather" if to_staging else "kvortex_scatter"
    return kernel


GATHER: Final = copy_kernel(to_staging=True)
SCATTER: Final = copy_kernel(to_staging=False)
