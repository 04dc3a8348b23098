"""What goes wrong with a store, in the log once and not for every block."""

import logging
import threading
import time
from typing import Final, Protocol

logger = logging.getLogger(__name__)

SILENCE_S: Final = 60.0
"""Seconds in which the same kind of failure is not logged again."""


class HasKind(Protocol):
    """A failure that says of which kind it is; its text is what the store said."""

    kind: str


class FailureLog:
    """Logs the first failure of each kind, and the next one of that kind a minute later at the earliest.

    Args:
        subject: what fails, in words.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._lock = threading.Lock()
        self._last_s: dict[str, float] = {}

    def failed(self, failure: HasKind) -> None:
        """Log a failure, or not; from any thread."""
        now_s = time.monotonic()
        with self._lock:
            is_new = now_s - self._last_s.get(failure.kind, -SILENCE_S) >= SILENCE_S
            if is_new:
                self._last_s[failure.kind] = now_s
        logger.log(logging.WARNING if is_new else logging.DEBUG, "%s: %s", self._subject, failure)

    def works_again(self) -> None:
        """Log that there is a connection after there was none; the next failure is logged, too."""
        with self._lock:
            self._last_s.clear()
        logger.info("%s: connected again", self._subject)
