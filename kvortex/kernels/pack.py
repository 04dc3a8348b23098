"""The CUDA kernels that pack blocks as they are gathered, and unpack them as they are scattered."""

from collections.abc import Callable
from typing import Any, Final

from kvortex.codecs.packing import UNITS_A_TILE, Format
from kvortex.kernels._cuda import DEVICE_OPS, device_function, int32_constant, pack_ops, word_constant
from kvortex.kernels.digest import MASK, POSITION
from kvortex.kernels.tiles import tile_kernel

COLUMNS: Final = 5


def pack_kernel(fmt: Format, compute_capability: tuple[int, int]) -> Callable[..., None]:
    """The body of the packing gather.

    A warp packs a tile of up to 256 units, four a lane at a time: the largest magnitude of each group of 16 by
    shuffles, the scale from it, codes, what rounding lost. The arena is counted in 16-byte lanes, staging in words.
    """
    base, ops = DEVICE_OPS, pack_ops(fmt, compute_capability)
    key, mix, load_unit = base.key, base.mix, _unit_loader(fmt, base.load)
    largest, exponent_of, encode, scale_byte = ops.largest, ops.exponent, ops.encode, ops.scale_byte
    group_largest, other_half, store_word = base.group_largest, base.other_half, base.store_word
    lanes, has_scales, full_tile = fmt.lanes, fmt.has_scales, UNITS_A_TILE
    zero, nothing = word_constant(0), int32_constant(0)
    lane_step, half_tile = word_constant(32 * POSITION & MASK), word_constant(128 * POSITION & MASK)

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
        return zero, zero, zero, scale, magnitude

    @device_function
    def pack_inner(unit: Any, shift: Any, lane: Any, staging: Any, into: Any, unit_key: Any) -> Any:
        magnitude = largest(unit)
        exponent = exponent_of(group_largest(lane, magnitude))
        word, lost, there = encode(unit, exponent)
        store_word(staging, into, word)
        return mix(word, unit_key), lost, there, scale_byte(exponent, shift), magnitude

    @device_function
    def pack_four(arena: Any, source: Any, staging: Any, into: Any, first_key: Any, half: Any, lane: Any) -> Any:
        a, b = load_unit(arena, source), load_unit(arena, source + 32 * lanes)
        c, d = load_unit(arena, source + 64 * lanes), load_unit(arena, source + 96 * lanes)
        k = first_key
        ta, la, ra, sa, ma = pack_inner(a, half, lane, staging, into, k)
        k += lane_step
        tb, lb, rb, sb, mb = pack_inner(b, half + 16, lane, staging, into + 32, k)
        k += lane_step
        tc, lc, rc, sc, mc = pack_inner(c, half + 32, lane, staging, into + 64, k)
        k += lane_step
        td, ld, rd, sd, md = pack_inner(d, half + 48, lane, staging, into + 96, k)
        scale = sa | sb | sc | sd
        if has_scales:
            scale |= other_half(lane, scale)
        total, lost, there = ta + tb + tc + td, la + lb + lc + ld, ra + rb + rc + rd
        return total, lost, there, scale, max(max(ma, mb), max(mc, md))

    @device_function
    def pack_full_tile(
        arena: Any, source: Any, staging: Any, start: Any, codes: Any, scales: Any, half: Any, lane: Any
    ) -> Any:
        source += lanes * lane
        place = codes + lane
        first_key = key(place)
        ta, la, ra, sa, ma = pack_four(arena, source, staging, start + place, first_key, half, lane)
        first_key += half_tile
        source += 128 * lanes
        tb, lb, rb, sb, mb = pack_four(arena, source, staging, start + place + 128, first_key, half, lane)
        total = ta + tb
        if has_scales and lane == 0:
            store_word(staging, start + scales, sa)
            store_word(staging, start + scales + 1, sb)
            total += mix(sa, key(scales)) + mix(sb, key(scales + 1))
        return total, la + lb, ra + rb, max(ma, mb)

    @device_function
    def pack_tile(arena: Any, staging: Any, tiles: Any, row: Any, block_id: Any, start: Any, lane: Any) -> Any:
        source = tiles[row] + block_id * tiles[row + 1]
        codes, count, scales = tiles[row + 2], tiles[row + 3], tiles[row + 4]
        half = 8 * (lane // 16)
        if count == full_tile:
            return pack_full_tile(arena, source, staging, start, codes, scales, half, lane)
        total, lost, there, worst = zero, zero, zero, nothing
        last, into = count - 1, start + codes
        place = lane
        while place - lane < count:
            a = load_unit(arena, source + lanes * min(place, last))
            b = load_unit(arena, source + lanes * min(place + 32, last))
            c = load_unit(arena, source + lanes * min(place + 64, last))
            d = load_unit(arena, source + lanes * min(place + 96, last))
            ta, la, ra, sa, ma = pack_unit(a, place, count, half, lane, staging, into, codes)
            tb, lb, rb, sb, mb = pack_unit(b, place + 32, count, half + 16, lane, staging, into, codes)
            tc, lc, rc, sc, mc = pack_unit(c, place + 64, count, half + 32, lane, staging, into, codes)
            td, ld, rd, sd, md = pack_unit(d, place + 96, count, half + 48, lane, staging, into, codes)
            total += ta + tb + tc + td
            lost += la + lb + lc + ld
            there += ra + rb + rc + rd
            worst = max(max(worst, ma), max(mb, max(mc, md)))
            if has_scales:
                mine = sa | sb | sc | sd
                word = mine | other_half(lane, mine)
                if lane == 0:
                    store_word(staging, start + scales, word)
                    total += mix(word, key(scales))
                scales += 1
            place += 128
        return total, lost, there, worst

    return tile_kernel("kvortex_pack", pack_tile, COLUMNS, fmt.largest_bits)


def unpack_kernel(fmt: Format, compute_capability: tuple[int, int]) -> Callable[..., None]:
    """The body of the unpacking scatter."""
    base, ops = DEVICE_OPS, pack_ops(fmt, compute_capability)
    key, mix, decode, load_word = base.key, base.mix, ops.decode, base.load_word
    store_unit = _unit_storer(fmt, base.store)
    lanes, has_scales, full_tile = fmt.lanes, fmt.has_scales, UNITS_A_TILE
    zero, nothing = word_constant(0), int32_constant(0)
    lane_step = word_constant(32 * POSITION & MASK)

    @device_function
    def unpack_unit(
        word: Any, scales: Any, shift: Any, place: Any, count: Any, arena: Any, target: Any, first: Any
    ) -> Any:
        if place < count:
            store_unit(arena, target + lanes * place, decode(word, scales, shift))
            return mix(word, key(first + place))
        return zero

    @device_function
    def unpack_inner(word: Any, scale: Any, shift: Any, arena: Any, target: Any, word_key: Any) -> Any:
        store_unit(arena, target, decode(word, scale, shift))
        return mix(word, word_key)

    @device_function
    def unpack_full_tile(
        arena: Any, target: Any, staging: Any, start: Any, codes: Any, scales: Any, half: Any, lane: Any
    ) -> Any:
        place = codes + lane
        source = start + place
        a, b = load_word(staging, source), load_word(staging, source + 32)
        c, d = load_word(staging, source + 64), load_word(staging, source + 96)
        e, f = load_word(staging, source + 128), load_word(staging, source + 160)
        g, h = load_word(staging, source + 192), load_word(staging, source + 224)
        total, first, second = zero, zero, zero
        if has_scales:
            first, second = load_word(staging, start + scales), load_word(staging, start + scales + 1)
            if lane == 0:
                total += mix(first, key(scales)) + mix(second, key(scales + 1))
        target += lanes * lane
        k = key(place)
        total += unpack_inner(a, first, half, arena, target, k)
        k += lane_step
        total += unpack_inner(b, first, half + 16, arena, target + 32 * lanes, k)
        k += lane_step
        total += unpack_inner(c, first, half + 32, arena, target + 64 * lanes, k)
        k += lane_step
        total += unpack_inner(d, first, half + 48, arena, target + 96 * lanes, k)
        k += lane_step
        total += unpack_inner(e, second, half, arena, target + 128 * lanes, k)
        k += lane_step
        total += unpack_inner(f, second, half + 16, arena, target + 160 * lanes, k)
        k += lane_step
        total += unpack_inner(g, second, half + 32, arena, target + 192 * lanes, k)
        k += lane_step
        total += unpack_inner(h, second, half + 48, arena, target + 224 * lanes, k)
        return total, zero, zero, nothing

    @device_function
    def unpack_tile(arena: Any, staging: Any, tiles: Any, row: Any, block_id: Any, start: Any, lane: Any) -> Any:
        target = tiles[row] + block_id * tiles[row + 1]
        codes, count, scales = tiles[row + 2], tiles[row + 3], tiles[row + 4]
        half = 8 * (lane // 16)
        if count == full_tile:
            return unpack_full_tile(arena, target, staging, start, codes, scales, half, lane)
        total, scale = zero, zero
        last, source = count - 1, start + codes
        place = lane
        while place - lane < count:
            a = load_word(staging, source + min(place, last))
            b = load_word(staging, source + min(place + 32, last))
            c = load_word(staging, source + min(place + 64, last))
            d = load_word(staging, source + min(place + 96, last))
            if has_scales:
                scale = load_word(staging, start + scales)
                if lane == 0:
                    total += mix(scale, key(scales))
                scales += 1
            total += unpack_unit(a, scale, half, place, count, arena, target, codes)
            total += unpack_unit(b, scale, half + 16, place + 32, count, arena, target, codes)
            total += unpack_unit(c, scale, half + 32, place + 64, count, arena, target, codes)
            total += unpack_unit(d, scale, half + 48, place + 96, count, arena, target, codes)
            place += 128
        return total, zero, zero, nothing

    return tile_kernel("kvortex_unpack", unpack_tile, COLUMNS)


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
