"""The CUDA kernels that pack blocks as they are gathered, and unpack them as they are scattered."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvortex.codecs.packing import Format
from kvortex.kernels._cuda import DEVICE_OPS, SIMULATED, WARP, cuda, device_function, int32, pack_ops
from kvortex.kernels.tables import MAX_BATCH_BLOCKS

THREADS: Final = WARP if SIMULATED else 512


def pack_kernel(fmt: Format, compute_capability: tuple[int, int]) -> Callable[..., None]:
    """The body of the packing gather. One launch packs all segments of all blocks.

    A warp packs a tile of up to 256 units, four a lane at a time: the largest magnitude of each group of 16 by
    shuffles, the scale from it, codes, what rounding lost. Digest and error are added up as in `copy_kernel`.

    Arguments of the kernel: arena and staging; the tile table and its length; block ids in host memory and their
    number; a block's distance in staging, in words; scratch, three words a block, zero; digests and the bits of
    squared errors in host memory.
    """
    base, ops = DEVICE_OPS, pack_ops(fmt, compute_capability)
    load, key, mix, as_int32 = base.load, base.key, base.mix, base.int32
    largest, exponent_of, encode, scale_byte = ops.largest, ops.exponent, ops.encode, ops.scale_byte
    error_bits, group_largest, warp_largest = ops.error_bits, ops.group_largest, ops.warp_largest
    warp_sum, warp_total, other_half = ops.warp_sum, ops.warp_total, ops.other_half
    store_word = ops.store_word
    load_unit = _unit_loader(fmt, load)
    lanes, has_scales = fmt.lanes, fmt.has_scales
    zero, no_loss = 0 if SIMULATED else np.uint64(0), np.float32(0)

    @device_function
    def pack_unit(unit: Any, place: Any, count: Any, shift: Any, lane: Any, staging: Any, into: Any, first: Any) -> Any:
        # A lane behind the end has loaded the last unit again: its group may be real, its own unit is not.
        magnitude = largest(unit)
        exponent = exponent_of(group_largest(lane, magnitude))
        word, lost, there = encode(unit, exponent)
        scale = zero
        if place - lane % 16 < count:
            scale = scale_byte(exponent, shift)
        if place < count:
            store_word(staging, into + place, word)
            return mix(word, key(first + place)), lost, there, scale, magnitude
        return zero, no_loss, no_loss, scale, magnitude

    @device_function
    def pack_tile(
        arena: Any, source: Any, staging: Any, block: Any, codes: Any, count: Any, scales: Any, lane: Any
    ) -> Any:
        total, lost, there = zero, no_loss, no_loss
        worst = as_int32(0)
        half, last = 8 * (lane // 16), count - 1
        place = lane
        while place - lane < count:
            a = load_unit(arena, source + lanes * min(place, last))
            b = load_unit(arena, source + lanes * min(place + 32, last))
            c = load_unit(arena, source + lanes * min(place + 64, last))
            d = load_unit(arena, source + lanes * min(place + 96, last))
            into = block + codes
            ta, la, ra, sa, ma = pack_unit(a, place, count, half, lane, staging, into, codes)
            tb, lb, rb, sb, mb = pack_unit(b, place + 32, count, half + 16, lane, staging, into, codes)
            tc, lc, rc, sc, mc = pack_unit(c, place + 64, count, half + 32, lane, staging, into, codes)
            td, ld, rd, sd, md = pack_unit(d, place + 96, count, half + 48, lane, staging, into, codes)
            total += ta + tb + tc + td
            lost += (la + lb) + (lc + ld)
            there += (ra + rb) + (rc + rd)
            worst = max(max(worst, ma), max(mb, max(mc, md)))
            if has_scales:
                mine = sa | sb | sc | sd
                word = mine | other_half(lane, mine)
                if lane == 0:
                    store_word(staging, block + scales, word)
                    total += mix(word, key(scales))
                scales += 1
            place += 128
        total = warp_sum(lane, total)
        return total, error_bits(warp_total(lane, lost), warp_total(lane, there), warp_largest(lane, worst))

    return _over_tiles("kvortex_pack", pack_tile, measures_errors=True)


def unpack_kernel(fmt: Format, compute_capability: tuple[int, int]) -> Callable[..., None]:
    """The body of the unpacking scatter; arguments as `pack_kernel`, the errors left alone."""
    base, ops = DEVICE_OPS, pack_ops(fmt, compute_capability)
    key, mix = base.key, base.mix
    decode, warp_sum, load_word = ops.decode, ops.warp_sum, ops.load_word
    store_unit = _unit_storer(fmt, base.store)
    lanes, has_scales = fmt.lanes, fmt.has_scales
    zero = 0 if SIMULATED else np.uint64(0)

    @device_function
    def unpack_unit(
        word: Any, scales: Any, shift: Any, place: Any, count: Any, arena: Any, target: Any, first: Any
    ) -> Any:
        if place < count:
            store_unit(arena, target + lanes * place, decode(word, scales, shift))
            return mix(word, key(first + place))
        return zero

    @device_function
    def unpack_tile(
        arena: Any, target: Any, staging: Any, block: Any, codes: Any, count: Any, scales: Any, lane: Any
    ) -> Any:
        total, scale = zero, zero
        half, last = 8 * (lane // 16), count - 1
        place = lane
        while place - lane < count:
            source = block + codes
            a = load_word(staging, source + min(place, last))
            b = load_word(staging, source + min(place + 32, last))
            c = load_word(staging, source + min(place + 64, last))
            d = load_word(staging, source + min(place + 96, last))
            if has_scales:
                scale = load_word(staging, block + scales)
                if lane == 0:
                    total += mix(scale, key(scales))
                scales += 1
            total += unpack_unit(a, scale, half, place, count, arena, target, codes)
            total += unpack_unit(b, scale, half + 16, place + 32, count, arena, target, codes)
            total += unpack_unit(c, scale, half + 32, place + 64, count, arena, target, codes)
            total += unpack_unit(d, scale, half + 48, place + 96, count, arena, target, codes)
            place += 128
        return warp_sum(lane, total), zero

    return _over_tiles("kvortex_unpack", unpack_tile, measures_errors=False)


def _over_tiles(name: str, move_tile: Any, *, measures_errors: bool) -> Callable[..., None]:
    """A kernel whose warps move one tile after another; the one that finishes a block reports it."""
    base = DEVICE_OPS
    fetch_add, fetch_max = base.fetch_add, base.fetch_max
    as_int32, as_word = base.int32, base.word
    zero, one = (0, 1) if SIMULATED else (np.uint64(0), np.uint64(1))

    def kernel(
        arena: Any, staging: Any, tiles: Any, num_tiles: Any, ids: Any, num_blocks: Any, block_words: Any,
        scratch: Any, digests: Any, errors: Any,
    ) -> None:  # fmt: skip
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
            paged = tiles[5 * t] + block_ids[b] * tiles[5 * t + 1]
            total, error = move_tile(
                arena, paged, staging, b * block_words, tiles[5 * t + 2], tiles[5 * t + 3], tiles[5 * t + 4], lane
            )
            if lane == 0:
                fetch_add(scratch, 3 * b, total)
                if measures_errors:
                    fetch_max(scratch, 3 * b + 2, error)
                cuda.threadfence()
                finished = fetch_add(scratch, 3 * b + 1, one) + one
                if finished == as_word(num_tiles):
                    digests[b] = fetch_add(scratch, 3 * b, zero)
                    scratch[3 * b] = zero
                    scratch[3 * b + 1] = zero
                    if measures_errors:
                        errors[b] = fetch_max(scratch, 3 * b + 2, zero)
                        scratch[3 * b + 2] = zero
            b += step_b
            t += step_t
            if t >= tile_count:
                t -= tile_count
                b += 1

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def _unit_loader(fmt: Format, load: Any) -> Any:
    @device_function
    def load_one(arena: Any, lane: Any) -> Any:
        return load(arena, lane)

    @device_function
    def load_two(arena: Any, lane: Any) -> Any:
        first, second = load(arena, lane), load(arena, lane + 1)
        return first[0], first[1], second[0], second[1]

    return load_one if fmt.lanes == 1 else load_two


def _unit_storer(fmt: Format, store: Any) -> Any:
    @device_function
    def store_one(arena: Any, lane: Any, words: Any) -> None:
        store(arena, lane, words[0], words[1])

    @device_function
    def store_two(arena: Any, lane: Any, words: Any) -> None:
        store(arena, lane, words[0], words[1])
        store(arena, lane + 1, words[2], words[3])

    return store_one if fmt.lanes == 1 else store_two
