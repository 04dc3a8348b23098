"""Digest and copy of payloads in contiguous host memory; `kvortex.kernels.digest` defines the digest."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.kernels.digest import FIRST, LENGTH, MASK, POSITION, SECOND
from kvortex.runtime.jit import njit

_WORD = 8
_POSITION, _FIRST, _SECOND = (np.uint64(c) for c in (POSITION, FIRST, SECOND))
_ONE, _29, _32 = np.uint64(1), np.uint64(29), np.uint64(32)


def _sum(words: Any) -> Any:
    total = np.uint64(0)
    for i in range(words.size):
        x = words[i] ^ ((np.uint64(i) + _ONE) * _POSITION)
        x = (x ^ (x >> _32)) * _FIRST
        x = (x ^ (x >> _29)) * _SECOND
        total += x ^ (x >> _32)
    return total


def _copy_and_sum(words: Any, target: Any) -> Any:
    total = np.uint64(0)
    for i in range(words.size):
        word = words[i]
        target[i] = word
        x = word ^ ((np.uint64(i) + _ONE) * _POSITION)
        x = (x ^ (x >> _32)) * _FIRST
        x = (x ^ (x >> _29)) * _SECOND
        total += x ^ (x >> _32)
    return total


# Both release the GIL: 15 to 30 GB/s a thread, at the same time as disk I/O.
_compiled_sum: Callable[[NDArray[np.uint64]], int] = njit(nogil=True, cache=True)(_sum)
_compiled_copy: Callable[[NDArray[np.uint64], NDArray[np.uint64]], int] = njit(nogil=True, cache=True)(_copy_and_sum)


def address_of(array: NDArray[np.uint8]) -> int:
    """The address of the array's memory."""
    address: int = array.__array_interface__["data"][0]
    return address


def payload_digest(payload: NDArray[np.uint8]) -> int:
    """Digest of a payload, `uint8 [n]`, padded with zeros to a multiple of 8 bytes."""
    whole = payload.size // _WORD * _WORD
    total = int(_compiled_sum(payload[:whole].view(np.uint64)))
    return _finish(total, payload, whole)


def copy_payload(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> int:
    """Copy `source` to the equally long `target` and return its digest, in one pass."""
    whole = source.size // _WORD * _WORD
    total = int(_compiled_copy(source[:whole].view(np.uint64), target[:whole].view(np.uint64)))
    target[whole:] = source[whole:]
    return _finish(total, source, whole)


def _finish(total: int, payload: NDArray[np.uint8], whole: int) -> int:
    """Add the last, partial word and the length term."""
    num_words = whole // _WORD
    if payload.size > whole:
        last = int.from_bytes(payload[whole:].tobytes(), "little")
        x = last ^ ((num_words + 1) * POSITION & MASK)
        x = (x ^ (x >> 32)) * FIRST & MASK
        x = (x ^ (x >> 29)) * SECOND & MASK
        total += x ^ (x >> 32)
        num_words += 1
    return (total + num_words * LENGTH) & MASK


def warm_up() -> None:
    """Compile both kernels, or load them from numba's cache. The first time on a machine this takes about a second."""
    words = np.zeros(2 * _WORD, dtype=np.uint8)
    copy_payload(words[:_WORD], words[_WORD:])
    payload_digest(words)
    unaligned = np.zeros(3 * _WORD, dtype=np.uint8)[1 : 1 + _WORD]
    payload_digest(unaligned)
    copy_payload(words[:_WORD], unaligned)
