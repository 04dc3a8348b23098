"""A circuit breaker: a tier that hangs or fails is left alone for a while, and costs one wait instead of one a block.

Closed is the normal state. A call that hangs opens it at once, and so do calls that fail, after `FAILURES_TO_OPEN` in a
row; then nothing is asked of the tier until a pause is over. After that it is half-open: one block is tried. If that
works the breaker is closed again, otherwise the next pause is twice as long.

Reads and writes have a breaker each: a device that takes no more writes may read as well as ever.
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

_UNSAID = (Cause.CLOSED, Cause.CANCELLED)  # these say nothing of the device


class BreakerState(StrEnum):
    """Whether a tier is asked for anything."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Of one tier and direction. Changed on one thread; `refuses` and `figures` may be read from any.

    Args:
        name: the tier and direction in words, for the log.
        clock: seconds.
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
        """Open, and the pause is not over: whoever asks now gets nothing."""
        return self._state is BreakerState.OPEN and self._clock() < self._retry_at_s

    def figures(self) -> BreakerFigures:
        """For statistics."""
        return BreakerFigures(self._state, self._opened)

    def admit(self, count: int) -> int:
        """How many of `count` blocks may be tried now; what comes of them is to be told to `judge`, or `give_up`.

        All of them where it is closed. After the pause one, and while that is under way none.
        """
        if self._state is BreakerState.CLOSED:
            return count
        if self._state is BreakerState.HALF_OPEN or self.refuses or not count:
            return 0
        self._state = BreakerState.HALF_OPEN
        return 1

    def give_up(self) -> None:
        """What was admitted has not been tried, or says nothing: another may be tried."""
        if self._state is BreakerState.HALF_OPEN:
            self._state = BreakerState.OPEN

    def judge(self, outcomes: Iterable[ReadOutcome] | Iterable[WriteOutcome]) -> None:
        """What came of one call."""
        causes = {outcome.cause for outcome in outcomes}.difference(_UNSAID)
        if Cause.DEADLINE in causes:
            self.hung()
        elif causes == {Cause.IO_ERROR}:
            self.failed()
        elif causes:
            self.worked()
        else:
            self.give_up()

    def worked(self) -> None:
        """A call came to an answer. One that began before the breaker was opened does not close it."""
        self._failures = 0
        if self._state is BreakerState.HALF_OPEN:
            logger.info("%s work again", self._name)
        if self._state is not BreakerState.OPEN:
            self._state = BreakerState.CLOSED
            self._pause_s = FIRST_PAUSE_S

    def failed(self) -> None:
        """A call came to nothing."""
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN or self._state is BreakerState.HALF_OPEN:
            self._open()

    def hung(self) -> None:
        """A call was not over in time."""
        self._open()

    def _open(self) -> None:
        if self._state is BreakerState.OPEN:
            return  # of the calls that hang together the first has said it
        if self._state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        else:
            level = logging.DEBUG if interpreter_ends() else logging.WARNING  # then threads are refused to everybody
            logger.log(
                level, "%s hang or fail: none is tried for %g s, then one from time to time", self._name, self._pause_s
            )
        self._state = BreakerState.OPEN
        self._opened += 1
        self._failures = 0
        self._retry_at_s = self._clock() + self._pause_s
