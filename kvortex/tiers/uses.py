"""Times of use, by which tiers order their blocks for eviction."""

import time

import numpy as np
from numpy.typing import NDArray

STEP_S = 1e-6
"""Seconds between neighbours of a chain. A float64 resolves a quarter of this in today's seconds since the epoch."""


class UseClock:
    """Seconds since the epoch that never go back, even if the system's clock does.

    When a chain is used, its head counts as used last. So eviction takes the tail of a chain before its head.
    """

    def __init__(self) -> None:
        self._last_s = 0.0

    def now(self) -> float:
        """The present time, later than every time before."""
        self._last_s = max(self._last_s + STEP_S, time.time())
        return self._last_s

    def at(self, time_s: float | None) -> float:
        """Take in a time that another clock has given, so that `now` is later; None gives the present time."""
        if time_s is None:
            return self.now()
        self._last_s = max(self._last_s, time_s)
        return time_s

    def chain(self, num_blocks: int) -> NDArray[np.float64]:
        """Times for the blocks of a chain that is used now, from its head, `float64 [num_blocks]`."""
        self._last_s = max(self._last_s + STEP_S * (num_blocks + 1), time.time())
        times: NDArray[np.float64] = self._last_s - STEP_S * np.arange(num_blocks, dtype=np.float64)
        return times
