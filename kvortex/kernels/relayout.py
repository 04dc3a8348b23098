"""Re-laying a block between its payload in the pool and its canonical payload, with the digests of both on the way."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.kernels.digest import LENGTH, MASK
from kvortex.kernels.host import mix
from kvortex.layout.canonical import WORD_BYTES, BlockRuns, PartRuns
from kvortex.runtime.jit import njit

_ONE = np.uint64(1)


class Relaid(NamedTuple):
    """What was seen of a block that was re-laid.

    Args:
        parts: digest of each part in the pool, `uint64 [parts]`; 0 for a part without bytes.
        canonical: digest of the canonical payload.
        agrees: False if ranks that should hold the same do not.
    """

    parts: NDArray[np.uint64]
    canonical: int
    agrees: bool


# Both release the GIL. A word is mixed twice: once for its place in the pool, once for its canonical place.
@njit(nogil=True, cache=True)
def _to_canonical(payload: Any, canonical: Any, runs: Any, start: Any) -> Any:
    of_part, of_all, differing = np.uint64(0), np.uint64(0), np.uint64(0)
    for r in range(runs.shape[0]):
        here, there, count, is_first = runs[r, 0], runs[r, 1], runs[r, 2], runs[r, 3]
        if is_first:
            for i in range(count):
                word = payload[here + i]
                canonical[there + i] = word
                of_part += mix(word, np.uint64(here - start + i) + _ONE)
                of_all += mix(word, np.uint64(there + i) + _ONE)
        else:
            for i in range(count):
                word = payload[here + i]
                differing |= word ^ canonical[there + i]
                of_part += mix(word, np.uint64(here - start + i) + _ONE)
    return of_part, of_all, differing


@njit(nogil=True, cache=True)
def _from_canonical(payload: Any, canonical: Any, runs: Any, start: Any) -> Any:
    of_part, of_all = np.uint64(0), np.uint64(0)
    for r in range(runs.shape[0]):
        here, there, count, is_first = runs[r, 0], runs[r, 1], runs[r, 2], runs[r, 3]
        if is_first:
            for i in range(count):
                word = canonical[there + i]
                payload[here + i] = word
                of_part += mix(word, np.uint64(here - start + i) + _ONE)
                of_all += mix(word, np.uint64(there + i) + _ONE)
        else:
            for i in range(count):
                word = canonical[there + i]
                payload[here + i] = word
                of_part += mix(word, np.uint64(here - start + i) + _ONE)
    return of_part, of_all, np.uint64(0)


@njit(nogil=True, cache=True)
def _bytes_to_canonical(payload: Any, canonical: Any, runs: Any) -> Any:
    differing = np.uint8(0)
    for r in range(runs.shape[0]):
        here, there, count, is_first = runs[r, 0], runs[r, 1], runs[r, 2], runs[r, 3]
        for i in range(count):
            if is_first:
                canonical[there + i] = payload[here + i]
            else:
                differing |= payload[here + i] ^ canonical[there + i]
    return differing


@njit(nogil=True, cache=True)
def _bytes_from_canonical(payload: Any, canonical: Any, runs: Any) -> Any:
    for r in range(runs.shape[0]):
        here, there, count = runs[r, 0], runs[r, 1], runs[r, 2]
        for i in range(count):
            payload[here + i] = canonical[there + i]
    return np.uint8(0)


@njit(nogil=True, cache=True)
def _sum(words: Any, first: Any, count: Any, position: Any) -> Any:
    total = np.uint64(0)
    for i in range(count):
        total += mix(words[first + i], np.uint64(position + i) + _ONE)
    return total


def to_canonical(runs: BlockRuns, payload: NDArray[np.uint8], canonical: NDArray[np.uint8]) -> Relaid:
    """Lay a block of the pool out canonically.

    Args:
        runs: of which the block consists.
        payload: the block in the pool, `uint8 [runs.payload_nbytes]`.
        canonical: takes the canonical payload, `uint8 [runs.nbytes]`.

    Raises:
        ValueError: an array has another length.
    """
    return _relay(_to_canonical, _bytes_to_canonical, runs, payload, canonical)


def from_canonical(runs: BlockRuns, payload: NDArray[np.uint8], canonical: NDArray[np.uint8]) -> Relaid:
    """Lay a canonical payload out as the pool has it, and put the digests of several parts behind them.

    Arguments and errors are those of `to_canonical`. What lies between parts is left as it is.
    """
    relaid = _relay(_from_canonical, _bytes_from_canonical, runs, payload, canonical)
    if runs.digests_at is not None:
        payload[runs.digests_at * WORD_BYTES :].view(np.uint64)[:] = relaid.parts
    return relaid


def digests_behind_parts(runs: BlockRuns, payload: NDArray[np.uint8]) -> NDArray[np.uint64] | None:
    """The digests that stand behind the parts of a block, `uint64 [parts]`; None for one part."""
    return None if runs.digests_at is None else payload[runs.digests_at * WORD_BYTES :].view(np.uint64)


def _relay(
    kernel: Any, of_bytes: Any, runs: BlockRuns, payload: NDArray[np.uint8], canonical: NDArray[np.uint8]
) -> Relaid:
    if (payload.size, canonical.size) != (runs.payload_nbytes, runs.nbytes):
        raise ValueError(
            f"payloads of {payload.size} and {canonical.size} bytes instead of {runs.payload_nbytes} and {runs.nbytes}"
        )
    words, ordered = payload.view(np.uint64), canonical.view(np.uint64)
    digests, total, differing = [], runs.nbytes // WORD_BYTES * LENGTH, 0
    for part in runs.parts:
        of_part, of_all, differs = kernel(words, ordered, part.words, part.start)
        differing |= int(differs) | int(of_bytes(payload, canonical, part.bytes))
        in_bytes = sum(int(_sum(words, first, count, first - part.start)) for first, count in part.of_bytes)
        digests.append((int(of_part) + in_bytes + part.num_words * LENGTH) & MASK)
        total += int(of_all)
    total += sum(int(_sum(ordered, first, count, first)) for first, count in runs.of_bytes)
    return Relaid(np.array(digests, dtype=np.uint64), total & MASK, not differing)


def warm_up() -> None:
    """Compile both directions, or load them from numba's cache."""
    word, byte = (np.array([[start, start, 1, 1]], dtype=np.int64) for start in (0, WORD_BYTES))
    part = PartRuns(0, 2, word, byte, ((1, 1),))
    runs = BlockRuns(2 * WORD_BYTES, 2 * WORD_BYTES, (part,), ((1, 1),), None)
    payload, canonical = np.zeros(2 * WORD_BYTES, dtype=np.uint8), np.zeros(2 * WORD_BYTES, dtype=np.uint8)
    to_canonical(runs, payload, canonical)
    from_canonical(runs, payload, canonical)
