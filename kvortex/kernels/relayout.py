"""Re-laying a block in host memory between its payload in the pool and its canonical payload."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.layout.canonical import WORD_BYTES, BlockRuns, PartRuns
from kvortex.runtime.jit import njit


# Both release the GIL. They take words as well as bytes.
@njit(nogil=True, cache=True)
def _gather_runs(payload: Any, canonical: Any, runs: Any) -> Any:
    """Copy runs that are stored, and compare the others; returns the number of runs that differ."""
    differing = 0
    for r in range(runs.shape[0]):
        here, there, count = runs[r, 0], runs[r, 1], runs[r, 2]
        if runs[r, 3]:
            canonical[there : there + count] = payload[here : here + count]
        else:
            for i in range(count):
                if payload[here + i] != canonical[there + i]:
                    differing += 1
                    break
    return differing


@njit(nogil=True, cache=True)
def _scatter_runs(payload: Any, canonical: Any, runs: Any) -> None:
    for r in range(runs.shape[0]):
        here, there, count = runs[r, 0], runs[r, 1], runs[r, 2]
        payload[here : here + count] = canonical[there : there + count]


def to_canonical(runs: BlockRuns, payload: NDArray[np.uint8], canonical: NDArray[np.uint8]) -> bool:
    """Lay a block of the pool out canonically.

    Args:
        runs: of which the block consists.
        payload: the block in the pool, `uint8 [runs.payload_nbytes]`.
        canonical: takes the canonical payload, `uint8 [runs.nbytes]`.

    Returns:
        False if parts that should have the same bytes do not.

    Raises:
        ValueError: an array has another length.
    """
    words, ordered = _words(runs, payload, canonical)
    differing = 0
    for part in runs.parts:
        differing += _gather_runs(words, ordered, part.words)
        differing += _gather_runs(payload, canonical, part.bytes)
    return not differing


def from_canonical(runs: BlockRuns, payload: NDArray[np.uint8], canonical: NDArray[np.uint8]) -> None:
    """Lay a canonical payload out as the pool has it; what lies between and behind the parts is left as it is.

    Arguments and errors are those of `to_canonical`.
    """
    words, ordered = _words(runs, payload, canonical)
    for part in runs.parts:
        _scatter_runs(words, ordered, part.words)
        _scatter_runs(payload, canonical, part.bytes)


def _words(
    runs: BlockRuns, payload: NDArray[np.uint8], canonical: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    if (payload.size, canonical.size) != (runs.payload_nbytes, runs.nbytes):
        raise ValueError(
            f"payloads of {payload.size} and {canonical.size} bytes instead of {runs.payload_nbytes} and {runs.nbytes}"
        )
    return payload.view(np.uint64), canonical.view(np.uint64)


def warm_up() -> None:
    """Compile both directions, or load them from numba's cache."""
    run = np.array([[0, 0, 1, 1]], dtype=np.int64)
    runs = BlockRuns(WORD_BYTES, WORD_BYTES, (PartRuns(slice(0, WORD_BYTES), run, run),), None)
    payload, canonical = np.zeros(WORD_BYTES, dtype=np.uint8), np.zeros(WORD_BYTES, dtype=np.uint8)
    to_canonical(runs, payload, canonical)
    from_canonical(runs, payload, canonical)
