"""Packing gather and unpacking scatter in host memory: the CPU versions of the CUDA kernels."""

from typing import Any, Final

import numpy as np
from numba import prange
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvortex.codecs.packing import FORMATS, GROUP_UNITS, NOT_FINITE, Packing
from kvortex.codecs.reference import relative_errors
from kvortex.kernels.conversions import Emitter, make_conversions
from kvortex.kernels.digest import LENGTH, MASK
from kvortex.kernels.host import mix, one_parallel_region, word_starts
from kvortex.kernels.tables import arena_base, arena_nbytes, array_at, validate_block_ids
from kvortex.layout import KVLayout
from kvortex.runtime.jit import njit

_conversions = [make_conversions(Emitter(fmt), intrinsic) for fmt in FORMATS]
_largest_0, _largest_1, _largest_2, _largest_3 = (c.largest for c in _conversions)
_encode_0, _encode_1, _encode_2, _encode_3 = (c.encode for c in _conversions)
_decode_0, _decode_1, _decode_2, _decode_3 = (c.decode for c in _conversions)
_exponent, _scale_byte = _conversions[0].exponent, _conversions[0].scale_byte
_ONE, _NONE, _NOT_FINITE = np.uint64(1), np.uint64(0), np.uint64(NOT_FINITE)
_LAST_OF_WORD: Final = 7

# Below, a format is its index in FORMATS: compiled code without closures can be cached on disk.


@njit(inline="always")
def _largest(kind: Any, unit: Any) -> Any:
    if kind == 0:
        return _largest_0(unit[:2])
    if kind == 1:
        return _largest_1(unit[:2])
    if kind == 2:
        return _largest_2(unit)
    return _largest_3(unit[:2])


@njit(inline="always")
def _encode(kind: Any, unit: Any, exponent: Any) -> Any:
    if kind == 0:
        return _encode_0(unit[:2], exponent)
    if kind == 1:
        return _encode_1(unit[:2], exponent)
    if kind == 2:
        return _encode_2(unit, exponent)
    return _encode_3(unit[:2], exponent)


@njit(inline="always")
def _decode_to(kind: Any, arena: Any, start: Any, word: Any, scales: Any, shift: Any) -> None:
    if kind == 2:
        arena[start], arena[start + 1], arena[start + 2], arena[start + 3] = _decode_2(word, scales, shift)
    elif kind == 0:
        arena[start], arena[start + 1] = _decode_0(word, scales, shift)
    elif kind == 1:
        arena[start], arena[start + 1] = _decode_1(word, scales, shift)
    else:
        arena[start], arena[start + 1] = _decode_3(word, scales, shift)


@njit(inline="always")
def _unit(arena: Any, start: Any, lanes: Any) -> Any:
    if lanes == 1:
        return arena[start], arena[start + 1], _NONE, _NONE
    return arena[start], arena[start + 1], arena[start + 2], arena[start + 3]


@njit()
def _pack_tile(
    kind: Any, lanes: Any, scaled: Any, too_large: Any, arena: Any, source: Any, tile: Any, pool: Any, block: Any
) -> Any:
    codes, count, scale_at = tile[2], tile[3], tile[4]
    total = lost = there = scales = _NONE
    worst = np.int32(0)
    for group in range((count + GROUP_UNITS - 1) // GROUP_UNITS):
        units = range(group * GROUP_UNITS, min((group + 1) * GROUP_UNITS, count))
        largest = np.int32(0)
        for u in units:
            largest = max(largest, _largest(kind, _unit(arena, source + 2 * lanes * u, lanes)))
        worst = max(worst, largest)
        exponent = _exponent(largest)
        for u in units:
            word, gone, been = _encode(kind, _unit(arena, source + 2 * lanes * u, lanes), exponent)
            pool[block + codes + u] = word
            total += mix(word, np.uint64(codes + u) + _ONE)
            lost += gone
            there += been
        if scaled:
            place = group & _LAST_OF_WORD
            scales |= _scale_byte(exponent, 8 * place)
            if place == _LAST_OF_WORD or units.stop == count:
                pool[block + scale_at] = scales
                total += mix(scales, np.uint64(scale_at) + _ONE)
                scale_at += 1
                scales = _NONE
    if worst > too_large:
        lost += _NOT_FINITE
    return total, lost, there


@njit()
def _unpack_tile(kind: Any, lanes: Any, scaled: Any, arena: Any, target: Any, tile: Any, pool: Any, block: Any) -> Any:
    codes, count, scale_at = tile[2], tile[3], tile[4]
    total, scales = _NONE, _NONE
    for u in range(count):
        group = u // GROUP_UNITS
        if scaled and u % (GROUP_UNITS * (_LAST_OF_WORD + 1)) == 0:
            position = scale_at + group // (_LAST_OF_WORD + 1)
            scales = pool[block + position]
            total += mix(scales, np.uint64(position) + _ONE)
        word = pool[block + codes + u]
        total += mix(word, np.uint64(codes + u) + _ONE)
        _decode_to(kind, arena, target + 2 * lanes * u, word, scales, 8 * (group & _LAST_OF_WORD))
    return total


@njit(parallel=True, nogil=True, cache=True)
def _pack(
    kind: Any,
    lanes: Any,
    scaled: Any,
    too_large: Any,
    arena: Any,
    tiles: Any,
    ids: Any,
    pool: Any,
    starts: Any,
    sums: Any,
) -> None:
    num_tiles = tiles.shape[0]
    for item in prange(ids.shape[0] * num_tiles):
        b, t = item // num_tiles, item % num_tiles
        source = 2 * (tiles[t, 0] + ids[b] * tiles[t, 1])
        sums[0, b, t], sums[1, b, t], sums[2, b, t] = _pack_tile(
            kind, lanes, scaled, too_large, arena, source, tiles[t], pool, starts[b]
        )


@njit(parallel=True, nogil=True, cache=True)
def _unpack(
    kind: Any, lanes: Any, scaled: Any, arena: Any, tiles: Any, ids: Any, pool: Any, starts: Any, sums: Any
) -> None:
    num_tiles = tiles.shape[0]
    for item in prange(ids.shape[0] * num_tiles):
        b, t = item // num_tiles, item % num_tiles
        target = 2 * (tiles[t, 0] + ids[b] * tiles[t, 1])
        sums[b, t] = _unpack_tile(kind, lanes, scaled, arena, target, tiles[t], pool, starts[b])


class HostPackKernels:
    """Launcher of the packing CPU kernels for one layout in host memory.

    Args:
        layout: layout of the cache; its tensors must outlive this object.
        packing: packing of the layout's blocks.
        pool: `uint8 [capacity_bytes]`, the memory that holds the extents; 8-byte aligned.
    """

    def __init__(self, layout: KVLayout, packing: Packing, pool: NDArray[np.uint8]) -> None:
        self._num_blocks = layout.num_blocks
        fmt = packing.format
        self._format = FORMATS.index(fmt), fmt.lanes, fmt.has_scales
        self._too_large = fmt.largest_bits
        self._tiles = packing.tiles
        self._words = packing.block_nbytes // 8
        self._length_term = np.uint64(self._words * LENGTH & MASK)
        self._arena = array_at(arena_base(layout), arena_nbytes(layout))
        self._pool = pool[: pool.size // 8 * 8].view(np.uint64)

    def gather(
        self, block_ids: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """Pack blocks into the pool at byte `offsets` (`int64 [n]`, multiples of 8).

        Returns:
            Digests of the packed payloads, `uint64 [n]`, and the blocks' relative errors, `float32 [n]`: see
            `kvortex.codecs.pack_reference`.

        Raises:
            InvalidBlockIdError: an id out of range (a block may be read twice).
            ValueError: an offset is not aligned, or a block does not fit into the pool there.
        """
        ids = validate_block_ids(block_ids, self._num_blocks, allow_duplicates=True)
        starts = word_starts(ids.size, offsets, self._words, self._pool.size)
        sums = np.empty((3, ids.size, len(self._tiles)), dtype=np.uint64)
        if ids.size:
            limit = np.int32(self._too_large)
            with one_parallel_region:
                _pack(*self._format, limit, self._arena, self._tiles, ids.astype(np.int64), self._pool, starts, sums)
        digests, lost, there = sums.sum(axis=2, dtype=np.uint64)
        return digests + self._length_term, relative_errors(lost, there)

    def scatter(self, block_ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Unpack blocks out of the pool; returns digests `uint64 [n]` of the bytes read, for the caller to compare.

        Raises the errors of `gather`, and `InvalidBlockIdError` for a duplicate id.
        """
        ids = validate_block_ids(block_ids, self._num_blocks)
        starts = word_starts(ids.size, offsets, self._words, self._pool.size)
        sums = np.empty((ids.size, len(self._tiles)), dtype=np.uint64)
        if ids.size:
            with one_parallel_region:
                _unpack(*self._format, self._arena, self._tiles, ids.astype(np.int64), self._pool, starts, sums)
        digests: NDArray[np.uint64] = sums.sum(axis=1, dtype=np.uint64) + self._length_term
        return digests
