"""The CUDA kernels that pack blocks as they are gathered, and unpack them as they are scattered."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kvortex.codecs.packing import UNITS_A_TILE, Format
from kvortex.kernels.cuda_ops import DEVICE_OPS, device_function, int32_constant, pack_ops, word_constant
from kvortex.kernels.digest import MASK, POSITION
from kvortex.kernels.tiles import TileSums, tile_kernel

COLUMNS: Final = 5


class Packed(NamedTuple):
    """Result of packing some units: a lane's part of it, or a group's."""

    digest: Any
    lost: Any  # sum of the squares of what rounding changed, in the codec's steps
    there: Any  # sum of the squares of the values, likewise
    scale: Any  # scale bytes of the groups, each at its place in a word
    largest: Any  # bit pattern of the largest magnitude


def pack_kernel(fmt: Format, compute_capability: tuple[int, int]) -> Callable[..., None]:
    """The body of the packing gather.

    A warp packs a tile of up to 256 units, four per lane at a time. Shuffles find the largest magnitude of each group
    of 16; from it follow the scale, the codes and the rounding error. The arena is counted in
    16-byte lanes, staging in words.
    """
    base, ops = DEVICE_OPS, pack_ops(fmt, compute_capability)
    key, mix, load_unit = base.key, base.mix, _unit_loader(fmt, base.load)
    largest, exponent_of, encode, scale_byte = ops.largest, ops.exponent, ops.encode, ops.scale_byte
    group_largest, other_half, store_word = base.group_largest, base.other_half, base.store_word
    lanes, has_scales, full_tile = fmt.lanes, fmt.has_scales, UNITS_A_TILE
    zero, nothing = word_constant(0), int32_constant(0)
    lane_step, half_tile = word_constant(32 * POSITION & MASK), word_constant(128 * POSITION & MASK)

    @device_function
    def sums_of(a: Any, b: Any, c: Any, d: Any) -> Any:
        return TileSums(
            a.digest + b.digest + c.digest + d.digest,
            a.lost + b.lost + c.lost + d.lost,
            a.there + b.there + c.there + d.there,
            max(max(a.largest, b.largest), max(c.largest, d.largest)),
        )

    @device_function
    def pack_unit_of_full_tile(unit: Any, shift: Any, lane: Any, staging: Any, into: Any, unit_key: Any) -> Any:
        magnitude = largest(unit)
        exponent = exponent_of(group_largest(lane, magnitude))
        word, lost, there = encode(unit, exponent)
        store_word(staging, into, word)
        return Packed(mix(word, unit_key), lost, there, scale_byte(exponent, shift), magnitude)

    @device_function
    def pack_half_tile(arena: Any, source: Any, staging: Any, into: Any, first_key: Any, half: Any, lane: Any) -> Any:
        # All loads come first: they are in flight together.
        unit_0, unit_1 = load_unit(arena, source), load_unit(arena, source + 32 * lanes)
        unit_2, unit_3 = load_unit(arena, source + 64 * lanes), load_unit(arena, source + 96 * lanes)
        key_0 = first_key
        packed_0 = pack_unit_of_full_tile(unit_0, half, lane, staging, into, key_0)
        key_1 = key_0 + lane_step
        packed_1 = pack_unit_of_full_tile(unit_1, half + 16, lane, staging, into + 32, key_1)
        key_2 = key_1 + lane_step
        packed_2 = pack_unit_of_full_tile(unit_2, half + 32, lane, staging, into + 64, key_2)
        key_3 = key_2 + lane_step
        packed_3 = pack_unit_of_full_tile(unit_3, half + 48, lane, staging, into + 96, key_3)
        scale = packed_0.scale | packed_1.scale | packed_2.scale | packed_3.scale
        if has_scales:
            scale |= other_half(lane, scale)  # before the sums, which are added up while the lanes exchange it
        sums = sums_of(packed_0, packed_1, packed_2, packed_3)
        return Packed(sums.digest, sums.lost, sums.there, scale, sums.largest)

    @device_function
    def pack_full_tile(
        arena: Any, source: Any, staging: Any, start: Any, codes: Any, scales: Any, half: Any, lane: Any
    ) -> Any:
        source += lanes * lane
        place = codes + lane
        first_key = key(place)
        first = pack_half_tile(arena, source, staging, start + place, first_key, half, lane)
        second_key = first_key + half_tile
        second = pack_half_tile(arena, source + 128 * lanes, staging, start + place + 128, second_key, half, lane)
        digest = first.digest + second.digest
        if has_scales and lane == 0:
            store_word(staging, start + scales, first.scale)
            store_word(staging, start + scales + 1, second.scale)
            digest += mix(first.scale, key(scales)) + mix(second.scale, key(scales + 1))
        largest_of_both = max(first.largest, second.largest)
        return TileSums(digest, first.lost + second.lost, first.there + second.there, largest_of_both)

    @device_function
    def pack_unit(unit: Any, place: Any, count: Any, shift: Any, lane: Any, staging: Any, into: Any, first: Any) -> Any:
        # A lane past the end has loaded the last unit again: its group may count, its own unit does not.
        magnitude = largest(unit)
        exponent = exponent_of(group_largest(lane, magnitude))
        word, lost, there = encode(unit, exponent)
        scale = zero
        if place - lane % 16 < count:
            scale = scale_byte(exponent, shift)
        if place < count:
            store_word(staging, into + place, word)
            return Packed(mix(word, key(first + place)), lost, there, scale, magnitude)
        return Packed(zero, zero, zero, scale, magnitude)

    @device_function
    def pack_tile(arena: Any, staging: Any, tiles: Any, row: Any, block_id: Any, start: Any, lane: Any) -> Any:
        source = tiles[row] + block_id * tiles[row + 1]
        codes, count, scales = tiles[row + 2], tiles[row + 3], tiles[row + 4]
        half = 8 * (lane // 16)
        if count == full_tile:
            return pack_full_tile(arena, source, staging, start, codes, scales, half, lane)
        digest, lost, there, worst = zero, zero, zero, nothing
        last, into = count - 1, start + codes
        place = lane
        while place - lane < count:
            unit_0 = load_unit(arena, source + lanes * min(place, last))
            unit_1 = load_unit(arena, source + lanes * min(place + 32, last))
            unit_2 = load_unit(arena, source + lanes * min(place + 64, last))
            unit_3 = load_unit(arena, source + lanes * min(place + 96, last))
            packed_0 = pack_unit(unit_0, place, count, half, lane, staging, into, codes)
            packed_1 = pack_unit(unit_1, place + 32, count, half + 16, lane, staging, into, codes)
            packed_2 = pack_unit(unit_2, place + 64, count, half + 32, lane, staging, into, codes)
            packed_3 = pack_unit(unit_3, place + 96, count, half + 48, lane, staging, into, codes)
            sums = sums_of(packed_0, packed_1, packed_2, packed_3)
            digest += sums.digest
            lost += sums.lost
            there += sums.there
            worst = max(worst, sums.largest)
            if has_scales:
                scale = packed_0.scale | packed_1.scale | packed_2.scale | packed_3.scale
                scale |= other_half(lane, scale)
                if lane == 0:
                    store_word(staging, start + scales, scale)
                    digest += mix(scale, key(scales))
                scales += 1
            place += 128
        return TileSums(digest, lost, there, worst)

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
    def unpack_unit_of_full_tile(word: Any, scale: Any, shift: Any, arena: Any, target: Any, word_key: Any) -> Any:
        store_unit(arena, target, decode(word, scale, shift))
        return mix(word, word_key)

    @device_function
    def unpack_full_tile(
        arena: Any, target: Any, staging: Any, start: Any, codes: Any, scales: Any, half: Any, lane: Any
    ) -> Any:
        place = codes + lane
        source = start + place
        # All loads come first: they are in flight together.
        word_0, word_1 = load_word(staging, source), load_word(staging, source + 32)
        word_2, word_3 = load_word(staging, source + 64), load_word(staging, source + 96)
        word_4, word_5 = load_word(staging, source + 128), load_word(staging, source + 160)
        word_6, word_7 = load_word(staging, source + 192), load_word(staging, source + 224)
        digest, first, second = zero, zero, zero  # scales of the first and of the second half
        if has_scales:
            first, second = load_word(staging, start + scales), load_word(staging, start + scales + 1)
            if lane == 0:
                digest += mix(first, key(scales)) + mix(second, key(scales + 1))
        target += lanes * lane
        word_key = key(place)
        digest += unpack_unit_of_full_tile(word_0, first, half, arena, target, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_1, first, half + 16, arena, target + 32 * lanes, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_2, first, half + 32, arena, target + 64 * lanes, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_3, first, half + 48, arena, target + 96 * lanes, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_4, second, half, arena, target + 128 * lanes, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_5, second, half + 16, arena, target + 160 * lanes, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_6, second, half + 32, arena, target + 192 * lanes, word_key)
        word_key += lane_step
        digest += unpack_unit_of_full_tile(word_7, second, half + 48, arena, target + 224 * lanes, word_key)
        return TileSums(digest, zero, zero, nothing)

    @device_function
    def unpack_unit(
        word: Any, scales: Any, shift: Any, place: Any, count: Any, arena: Any, target: Any, first: Any
    ) -> Any:
        if place < count:
            store_unit(arena, target + lanes * place, decode(word, scales, shift))
            return mix(word, key(first + place))
        return zero

    @device_function
    def unpack_tile(arena: Any, staging: Any, tiles: Any, row: Any, block_id: Any, start: Any, lane: Any) -> Any:
        target = tiles[row] + block_id * tiles[row + 1]
        codes, count, scales = tiles[row + 2], tiles[row + 3], tiles[row + 4]
        half = 8 * (lane // 16)
        if count == full_tile:
            return unpack_full_tile(arena, target, staging, start, codes, scales, half, lane)
        digest, scale = zero, zero
        last, source = count - 1, start + codes
        place = lane
        while place - lane < count:
            word_0 = load_word(staging, source + min(place, last))
            word_1 = load_word(staging, source + min(place + 32, last))
            word_2 = load_word(staging, source + min(place + 64, last))
            word_3 = load_word(staging, source + min(place + 96, last))
            if has_scales:
                scale = load_word(staging, start + scales)
                if lane == 0:
                    digest += mix(scale, key(scales))
                scales += 1
            digest += unpack_unit(word_0, scale, half, place, count, arena, target, codes)
            digest += unpack_unit(word_1, scale, half + 16, place + 32, count, arena, target, codes)
            digest += unpack_unit(word_2, scale, half + 32, place + 64, count, arena, target, codes)
            digest += unpack_unit(word_3, scale, half + 48, place + 96, count, arena, target, codes)
            place += 128
        return TileSums(digest, zero, zero, nothing)

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
