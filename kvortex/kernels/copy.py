"""The CUDA kernels that gather and scatter raw blocks."""

from collections.abc import Callable
from typing import Any, Final

from kvortex.kernels.cuda_ops import DEVICE_OPS, device_function, int32_constant, word_constant
from kvortex.kernels.tables import TILE_LANES
from kvortex.kernels.tiles import TileSums, tile_kernel

COLUMNS: Final = 4


def copy_kernel(to_staging: bool) -> Callable[..., None]:
    """The kernel body: gather (`to_staging`) or scatter.

    A warp moves a tile of up to 256 16-byte lanes with eight accesses per thread. All loads come before the first
    store, so that they are in flight together. Sizes are in 16-byte lanes.
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
        # All loads come first: they are in flight together.
        words_0, words_1 = load(source, start), load(source, start + 32)
        words_2, words_3 = load(source, start + 64), load(source, start + 96)
        words_4, words_5 = load(source, start + 128), load(source, start + 160)
        words_6, words_7 = load(source, start + 192), load(source, start + 224)
        word_key = first_key
        digest = put(target, into, words_0, word_key)
        word_key += lane_step
        digest += put(target, into + 32, words_1, word_key)
        word_key += lane_step
        digest += put(target, into + 64, words_2, word_key)
        word_key += lane_step
        digest += put(target, into + 96, words_3, word_key)
        word_key += lane_step
        digest += put(target, into + 128, words_4, word_key)
        word_key += lane_step
        digest += put(target, into + 160, words_5, word_key)
        word_key += lane_step
        digest += put(target, into + 192, words_6, word_key)
        word_key += lane_step
        digest += put(target, into + 224, words_7, word_key)
        return digest

    @device_function
    def copy_tile(source: Any, start: Any, target: Any, into: Any, first_key: Any, count: Any) -> Any:
        digest = zero
        word_key = first_key
        step = 0
        while count - step > 96:
            words_0, words_1 = load(source, start + step), load(source, start + step + 32)
            words_2, words_3 = load(source, start + step + 64), load(source, start + step + 96)
            digest += put(target, into + step, words_0, word_key)
            word_key += lane_step
            digest += put(target, into + step + 32, words_1, word_key)
            word_key += lane_step
            digest += put(target, into + step + 64, words_2, word_key)
            word_key += lane_step
            digest += put(target, into + step + 96, words_3, word_key)
            word_key += lane_step
            step += 128
        while count > step:
            digest += put(target, into + step, load(source, start + step), word_key)
            word_key += lane_step
            step += 32
        return digest

    @device_function
    def move_tile(arena: Any, staging: Any, tiles: Any, row: Any, block_id: Any, start: Any, lane: Any) -> Any:
        paged = tiles[row] + block_id * tiles[row + 1] + lane
        payload = tiles[row + 2] + lane
        dense = start + payload
        count = tiles[row + 3]
        first_key = key(2 * payload)
        if to_staging:
            if count > last_lane:
                digest = copy_full_tile(arena, paged, staging, dense, first_key)
            else:
                digest = copy_tile(arena, paged, staging, dense, first_key, count - lane)
        else:
            if count > last_lane:
                digest = copy_full_tile(staging, dense, arena, paged, first_key)
            else:
                digest = copy_tile(staging, dense, arena, paged, first_key, count - lane)
        return TileSums(digest, zero, zero, nothing)

    return tile_kernel("kvortex_gather" if to_staging else "kvortex_scatter", move_tile, COLUMNS)


GATHER: Final = copy_kernel(to_staging=True)
SCATTER: Final = copy_kernel(to_staging=False)
