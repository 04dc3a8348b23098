"""Packing and unpacking in plain NumPy: the definition that the kernels must match bit for bit.

E4M3 is the OCP 8-bit float: exponent bias 7, three bits of mantissa, largest value 448, no infinities. Values are
rounded to nearest, ties to even.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs.packing import GROUP_UNITS, LOST_STEPS, NOT_FINITE, THERE_STEPS, Format, Packing

LEAST_EXPONENT: Final = 9
"""The least scale byte: with a lower one, the scale would not be a normal number."""

_F32: Final = np.dtype(np.float32)


def to_floats(words: NDArray[np.uint64], dtype: str) -> NDArray[np.float32]:
    """Convert words of the cache into their elements as `float32`, without rounding."""
    if dtype == "bfloat16":
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return words.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def from_floats(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint64]:
    """Convert elements into words of the cache. The cache's `dtype` must represent all of them exactly."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint64)
    return values.astype(np.float16 if dtype == "float16" else np.float32).view(np.uint64)


def scale_exponents(largest: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the scale byte of each group, from the float32 bits of its largest magnitude."""
    exponents = (largest.astype(np.int64) + 0x1FFFFF) >> 23
    clipped: NDArray[np.int32] = np.clip(exponents, LEAST_EXPONENT, 255).astype(np.int32)
    return clipped


def pack_factor(exponents: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the factor of each group by which its elements are multiplied before rounding."""
    return ((262 - exponents.astype(np.int32)) << 23).view(np.float32)


def unpack_factor(exponents: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the factor of each group by which its codes are multiplied: 1 / `pack_factor`."""
    return ((exponents.astype(np.int32) - 8) << 23).view(np.float32)


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round finite values to E4M3 codes. Magnitudes above 448 become 448."""
    bits = values.astype(_F32, copy=False).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    small = (magnitude.view(np.float32) + np.float32(16384)).view(np.uint32) - np.uint32(0x46800000)
    code = np.where(magnitude < 0x3C800000, small, rounded - np.uint32(960))
    signed: NDArray[np.uint32] = np.minimum(code, 0x7E) | ((bits >> np.uint32(24)) & np.uint32(0x80))
    return signed.astype(np.uint8)


def from_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the values of E4M3 codes. The two NaN codes, which `to_e4m3` never returns, become 480 and -480."""
    bits = codes.astype(np.uint32)
    magnitude = ((bits & np.uint32(0x7F)) << np.uint32(20)).view(np.float32) * np.float32(2.0**120)
    return (magnitude.view(np.uint32) | ((bits & np.uint32(0x80)) << np.uint32(24))).view(np.float32)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite values to bfloat16 and return the bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def encode_units(
    words: NDArray[np.uint64], exponents: NDArray[np.int32], fmt: Format
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Pack units, and sum the squares from which a block's error is computed.

    Args:
        words: the units as words of the cache, `uint64 [n, 2 * lanes]`.
        exponents: scale bytes of the units' groups, `int32 [n]`.
        fmt: the packed format of the units.

    Returns:
        Packed words, `uint64 [n]`; for each unit the sum of the squares of the rounding errors, and that of the squares
        of the elements, `uint64 [n]`. Both are relative to the group's scale and counted in whole steps. They mean
        nothing where an element is not finite.
    """
    with np.errstate(all="ignore"):
        values = to_floats(words.reshape(-1), fmt.dtype).reshape(len(words), fmt.elements)
        factor = pack_factor(exponents)[:, None]
        scaled = values * factor
        if fmt.has_scales:
            codes = to_e4m3(scaled)
            packed, rounded = codes.view(np.uint64).reshape(-1), from_e4m3(codes)
        else:
            halves = to_bf16(values.reshape(-1)).reshape(values.shape)
            packed = halves.view(np.uint64).reshape(-1)
            rounded = to_floats(packed, "bfloat16").reshape(values.shape) * factor
        lost = ((scaled - rounded) ** 2).sum(axis=1, dtype=np.float32) * np.float32(LOST_STEPS)
        there = (scaled**2).sum(axis=1, dtype=np.float32) * np.float32(THERE_STEPS)
        return packed, lost.astype(np.uint64), there.astype(np.uint64)


def decode_units(packed: NDArray[np.uint64], exponents: NDArray[np.int32], fmt: Format) -> NDArray[np.uint64]:
    """Unpack units.

    Args:
        packed: packed words, `uint64 [n]`.
        exponents: scale byte of each unit's group, `int32 [n]`; not read if the format has no scales.
        fmt: the packed format.

    Returns:
        Words of the cache, `uint64 [n, 2 * lanes]`.
    """
    with np.errstate(all="ignore"):
        if fmt.has_scales:
            codes = packed.view(np.uint8).reshape(len(packed), 8)
            values = from_e4m3(codes) * unpack_factor(exponents)[:, None]
        else:
            values = to_floats(packed, "bfloat16")
    return from_floats(np.ascontiguousarray(values).reshape(-1), fmt.dtype).reshape(len(packed), 2 * fmt.lanes)


def largest_bits(words: NDArray[np.uint64], fmt: Format) -> NDArray[np.int32]:
    """Return the float32 bits of each unit's largest magnitude, `int32 [n]`. `words` is `uint64 [n, 2 * lanes]`."""
    values = to_floats(words.reshape(-1), fmt.dtype).reshape(len(words), fmt.elements)
    bits = values.view(np.int32) & np.int32(0x7FFFFFFF)
    largest: NDArray[np.int32] = bits.max(axis=1)
    return largest


def pack_reference(packing: Packing, payloads: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pack the payloads of blocks.

    The error of a block is the square root of a ratio: the sum of the squares of the rounding errors over the sum of
    the squares of the elements. All are relative to the scales of their groups, so groups of small and of large numbers
    count the same. The error is infinite where an element is infinite or NaN, or so large that it may become infinite.
    """
    fmt = packing.format
    packed = np.zeros((len(payloads), packing.block_nbytes // 8), dtype=np.uint64)
    sums = np.zeros((len(payloads), 2), dtype=np.uint64)
    for block, payload in enumerate(payloads):
        units = payload.view(np.uint64).reshape(-1, 2 * fmt.lanes)
        for _lane, _stride, first, count, scale_word in packing.tiles.tolist():
            tile = units[first : first + count]
            groups = np.arange(count) // GROUP_UNITS
            largest = np.zeros(groups[-1] + 1, dtype=np.int32)
            np.maximum.at(largest, groups, largest_bits(tile, fmt))
            exponents = scale_exponents(largest)
            codes, lost, there = encode_units(tile, exponents[groups], fmt)
            packed[block, first : first + count] = codes
            if fmt.has_scales:
                packed[block].view(np.uint8)[8 * scale_word :][: exponents.size] = exponents
            sums[block] += lost.sum(), there.sum()
            if largest.max() > fmt.largest_bits:
                sums[block, 0] += np.uint64(NOT_FINITE)
    return packed.view(np.uint8), relative_errors(sums[:, 0], sums[:, 1])


def relative_errors(lost: NDArray[np.uint64], there: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Errors of blocks, `float32 [n]`, from their sums of squares in steps, `uint64 [n]`."""
    ratio = lost.astype(np.float64) / (np.maximum(there, 1) * (LOST_STEPS / THERE_STEPS))
    return np.where(lost >= NOT_FINITE, np.inf, np.sqrt(ratio)).astype(np.float32)


def too_lossy(errors: NDArray[np.float32], max_error: float) -> NDArray[np.bool_]:
    """Which blocks packing would change by more than `max_error`, `bool [n]`; an error that is not a number is more."""
    within = errors <= max_error  # False for NaN, too
    return ~within


def unpack_reference(packing: Packing, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Unpack payloads `uint8 [n, packing.block_nbytes]` into raw ones, `uint8 [n, layout.block_nbytes]`."""
    fmt = packing.format
    raw = np.empty((len(packed), packing.code_words, 2 * fmt.lanes), dtype=np.uint64)
    for block, payload in enumerate(packed):
        words = payload.view(np.uint64)
        for _lane, _stride, first, count, scale_word in packing.tiles.tolist():
            groups = np.arange(count) // GROUP_UNITS
            scales = payload[8 * scale_word :] if fmt.has_scales else np.zeros(GROUP_UNITS, dtype=np.uint8)
            exponents = scales[groups].astype(np.int32)
            raw[block, first : first + count] = decode_units(words[first : first + count], exponents, fmt)
    return raw.reshape(len(packed), packing.code_words * 2 * fmt.lanes).view(np.uint8)
