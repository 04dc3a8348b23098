"""The CUDA kernels that gather blocks as they are, and scatter them."""

from collections.abc import Callable
from typing import Any, Final

from kvortex.kernels._cuda import DEVICE_OPS, device_function, int32_constant, word_constant
from kvortex.kernels.tables import TILE_LANES
from kvortex.kernels.tiles import tile_kernel

COLUMNS: Final = 4


def copy_kernel(to_staging: bool) -> Callable[..., None]:
    """The kernel body: gather (`to_staging`) or scatter.

    A warp moves a tile of up to 256 16-byte lanes with eight accesses a thread, all loads before the first store so
    that they are in flight together. Sizes are in 16-byte lanes.
    """
    ops = DEVICE_OPS
    load, store, key, mix = ops.load, ops.store, ops.key, ops.mix
    key_step, lane_step = ops.key_step, ops.lane_step
    zero, nothing = word_constant(0), int32_constant(0)
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

    @device_function
    def move_tile(arena: Any, staging: Any, tiles: Any, row: Any, block_id: Any, start: Any, lane: Any) -> Any:
        paged = tiles[row] + block_id * tiles[row + 1] + lane
        payload = tiles[row + 2] + lane
        dense = start + payload
        count = tiles[row + 3]
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
        return total, zero, zero, nothing

    return tile_kernel("kvortex_gather" if to_staging else "kvortex_scatter", move_tile, COLUMNS)


GATHER: Final = copy_kernel(to_staging=True)
SCATTER: Final = copy_kernel(to_staging=False)
