"""Gather and scatter between a paged cache in host memory and extents: the CPU versions of the CUDA kernels."""

import threading
from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from kvortex.kernels.digest import FIRST, LENGTH, MASK, POSITION, SECOND
from kvortex.kernels.tables import arena_base, arena_nbytes, array_at, segment_table, validate_block_ids
from kvortex.layout import KVLayout
from kvortex.runtime.jit import njit

# numba's fallback threading layer must not be entered from two threads at once.
one_parallel_region = threading.Lock()

_POSITION, _FIRST, _SECOND = (np.uint64(c) for c in (POSITION, FIRST, SECOND))
_ONE, _29, _32 = np.uint64(1), np.uint64(29), np.uint64(32)


@njit(inline="always")
def mix(word: Any, position: Any) -> Any:
    """The term that one word adds to the digest; `position` counts from 1. Both are uint64."""
    x = word ^ (position * _POSITION)
    x = (x ^ (x >> _32)) * _FIRST
    x = (x ^ (x >> _29)) * _SECOND
    return x ^ (x >> _32)


@njit(inline="always")
def copy_words(source: Any, start: Any, target: Any, into: Any, position: Any, length: Any) -> Any:
    """Copy `length` words and return their part of the digest; `position` is the first word's place in the payload."""
    total = np.uint64(0)
    for i in range(length):
        word = source[start + i]
        target[into + i] = word
        total += mix(word, np.uint64(position + i) + _ONE)
    return total


@njit(parallel=True, nogil=True, cache=True)
def _gather(arena: Any, segments: Any, ids: Any, pool: Any, starts: Any, partial: Any) -> None:
    num_segments = segments.shape[0]
    for item in prange(ids.shape[0] * num_segments):
        b, s = item // num_segments, item % num_segments
        source = segments[s, 0] + ids[b] * segments[s, 1]
        partial[b, s] = copy_words(arena, source, pool, starts[b] + segments[s, 2], segments[s, 2], segments[s, 3])


@njit(parallel=True, nogil=True, cache=True)
def _scatter(arena: Any, segments: Any, ids: Any, pool: Any, starts: Any, partial: Any) -> None:
    num_segments = segments.shape[0]
    for item in prange(ids.shape[0] * num_segments):
        b, s = item // num_segments, item % num_segments
        target = segments[s, 0] + ids[b] * segments[s, 1]
        partial[b, s] = copy_words(pool, starts[b] + segments[s, 2], arena, target, segments[s, 2], segments[s, 3])


class HostKernels:
    """Launcher of the CPU kernels for one layout in host memory.

    Args:
        layout: layout of the cache; its tensors must outlive this object.
        pool: `uint8 [capacity_bytes]`, the memory that holds the extents; 8-byte aligned.
    """

    def __init__(self, layout: KVLayout, pool: NDArray[np.uint8]) -> None:
        self._num_blocks = layout.num_blocks
        self._payload_words = layout.block_nbytes // 8
        self._length_term = np.uint64(self._payload_words * LENGTH & MASK)
        self._segments = segment_table(layout)
        self._arena = array_at(arena_base(layout), arena_nbytes(layout))
        self._pool = pool[: pool.size // 8 * 8].view(np.uint64)

    def gather(self, block_ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Copy blocks to the pool at byte `offsets` (`int64 [n]`, multiples of 8); returns digests `uint64 [n]`.

        Raises:
            InvalidBlockIdError: an id out of range (a block may be read twice).
            ValueError: an offset is not aligned, or a block does not fit into the pool there.
        """
        ids = validate_block_ids(block_ids, self._num_blocks, allow_duplicates=True)
        return self._run(_gather, ids, offsets)

    def scatter(self, block_ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Copy blocks out of the pool; returns digests `uint64 [n]` of the bytes read, for the caller to compare.

        Raises the errors of `gather`, and `InvalidBlockIdError` for a duplicate id.
        """
        return self._run(_scatter, validate_block_ids(block_ids, self._num_blocks), offsets)

    def _run(self, kernel: Any, ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
        starts = word_starts(ids.size, offsets, self._payload_words, self._pool.size)
        partial = np.empty((ids.size, self._segments.shape[0]), dtype=np.uint64)
        if ids.size:
            with one_parallel_region:
                kernel(self._arena, self._segments, ids.astype(np.int64), self._pool, starts, partial)
        digests: NDArray[np.uint64] = partial.sum(axis=1, dtype=np.uint64) + self._length_term
        return digests


def word_starts(count: int, offsets: NDArray[np.int64], block_words: int, pool_words: int) -> NDArray[np.int64]:
    """Check the byte offsets of `count` blocks and return them as word offsets.

    Raises:
        ValueError: the number of offsets is wrong, one is not aligned, or a block does not fit into the pool.
    """
    if offsets.shape != (count,):
        raise ValueError(f"{count} blocks need {count} offsets, got shape {offsets.shape}")
    starts: NDArray[np.int64] = offsets // 8
    if count and ((offsets % 8).any() or starts.min() < 0):
        raise ValueError("offsets are multiples of 8 and not negative")
    if count and starts.max() + block_words > pool_words:
        raise ValueError(f"a block at offset {offsets.max()} does not fit a pool of {8 * pool_words} bytes")
    return starts
