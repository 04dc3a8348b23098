"""A circuit breaker: a tier that hangs or fails is not used for a while, so it costs one wait instead of one a block.

Closed is the normal state. A call that hangs opens the breaker at once; calls that fail open it after
`FAILURES_TO_OPEN` in a row. While it is open the tier is not called. When the pause is over it is half-open: one block
is tried. If that works the breaker is closed again, otherwise the next pause is twice as long.

    closed ── hung, or failed several times ──> open ── pause is over ──> half-open ── it worked ──> closed
                                                  ^────────── hung or failed ────┘

Reads and writes have a breaker each: a device that accepts no writes may still serve reads.
"""

import logging
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final

from kvortex.runtime.blocking import interpreter_ends
from kvortex.stats import BreakerFigures
from kvortex.tiers.base import Cause, ReadOutcome, WriteOutcome

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
FAILURES_TO_OPEN: Final = 3

_INCONCLUSIVE = (Cause.CLOSED, Cause.CANCELLED)  # these do not show whether the device works


class BreakerState(StrEnum):
    """Whether a tier is used."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """The breaker of one tier and direction. One thread changes it; any may read `refuses` and `figures`.

    Args:
        name: the tier and the direction in words, for the log.
        clock: returns seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        self._state = BreakerState.CLOSED
        self._opened = self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._retry_at_s = 0.0

    @property
    def refuses(self) -> bool:
        """True while the breaker is open and its pause is not over: no call is admitted."""
        return self._state is BreakerState.OPEN and self._clock() < self._retry_at_s

    def figures(self) -> BreakerFigures:
        """State and counters, for statistics."""
        return BreakerFigures(self._state, self._opened)

    def admit(self, count: int) -> int:
        """Ask to try `count` blocks. The caller reports their outcomes to `judge`, or calls `give_up`.

        Returns:
            How many may be tried now: all if the breaker is closed, one when the pause is over, otherwise none.
        """
        if self._state is BreakerState.CLOSED:
            return count
        if self._state is BreakerState.HALF_OPEN or self.refuses or not count:
            return 0
        self._state = BreakerState.HALF_OPEN
        return 1

    def give_up(self) -> None:
        """The admitted block was not tried, or its outcome shows nothing: another one may be tried."""
        if self._state is BreakerState.HALF_OPEN:
            self._state = BreakerState.OPEN

    def judge(self, outcomes: Iterable[ReadOutcome] | Iterable[WriteOutcome]) -> None:
        """Take in the outcomes of one call."""
        causes = {outcome.cause for outcome in outcomes}.difference(_INCONCLUSIVE)
        if Cause.DEADLINE in causes:
            self.hung()
        elif causes == {Cause.IO_ERROR}:
            self.failed()
        elif causes:
            self.worked()
        else:
            self.give_up()

    def worked(self) -> None:
        """A call got an answer. If it began before the breaker was opened, it does not close it."""
        self._failures = 0
        if self._state is BreakerState.HALF_OPEN:
            logger.info("%s work again", self._name)
        if self._state is not BreakerState.OPEN:
            self._state = BreakerState.CLOSED
            self._pause_s = FIRST_PAUSE_S

    def failed(self) -> None:
        """A call failed."""
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN or self._state is BreakerState.HALF_OPEN:
            self._open()

    def hung(self) -> None:
        """A call did not end in time."""
        self._open()

    def _open(self) -> None:
        if self._state is BreakerState.OPEN:
            return  # several calls hang at the same time, and the first has opened it
        if self._state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        else:
            level = logging.DEBUG if interpreter_ends() else logging.WARNING  # no thread can be started at the end
            logger.log(
                level, "%s hang or fail: none is tried for %g s, then one from time to time", self._name, self._pause_s
            )
        self._state = BreakerState.OPEN
        self._opened += 1
        self._failures = 0
        self._retry_at_s = self._clock() + self._pause_s
