"""When blocks were used, as tiers order them."""

import time

import numpy as np
from numpy.typing import NDArray

STEP_S = 1e-6
"""Between neighbours of a chain: floats of today's seconds since the epoch tell a quarter of it apart."""


class UseClock:
    """Seconds since the epoch that always go on, whatever is done to the system's clock.

    Where a chain is used its head counts as used last, so that a chain loses its tail before its head.
    """

    def __init__(self) -> None:
        self._last_s = 0.0

    def now(self) -> float:
        """This moment, after all others."""
        self._last_s = max(self._last_s + STEP_S, time.time())
        return self._last_s

    def at(self, time_s: float | None) -> float:
        """A moment that somebody else's clock has given, which is not after `now` then; None for now."""
        if time_s is None:
            return self.now()
        self._last_s = max(self._last_s, time_s)
        return time_s

    def chain(self, num_blocks: int) -> NDArray[np.float64]:
        """For the blocks of a chain that is used now, from its head, `float64 [n]`."""
        self._last_s = max(self._last_s + STEP_S * (num_blocks + 1), time.time())
        times: NDArray[np.float64] = self._last_s - STEP_S * np.arange(num_blocks, dtype=np.float64)
        return times
