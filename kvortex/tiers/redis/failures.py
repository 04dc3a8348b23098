"""What goes wrong with a server, as our causes, and in the log once and not for every block."""

import logging
import threading
import time
from typing import Final

from kvortex.tiers.base import Cause
from kvortex.tiers.redis.resp import ReplyError

logger = logging.getLogger(__name__)

SILENCE_S: Final = 60.0
"""Seconds in which the same kind of failure is not logged again."""

_CAUSES: Final = {
    "OOM": Cause.NO_SPACE,
    "NOPERM": Cause.PERMISSION,
    "NOAUTH": Cause.PERMISSION,
    "WRONGPASS": Cause.PERMISSION,
    "TLS": Cause.PERMISSION,
    "READONLY": Cause.READ_ONLY,
}
_LASTING: Final = ("NOPERM", "NOAUTH", "WRONGPASS", "TLS", "ERR")


class StoreFailure(Exception):
    """The server did not do what it was asked to.

    Args:
        error: what the socket or the server said.
    """

    def __init__(self, error: OSError | ReplyError) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.kind = error.code if isinstance(error, ReplyError) else type(error).__name__
        self.cause = _CAUSES.get(self.kind, Cause.IO_ERROR) if isinstance(error, ReplyError) else Cause.IO_ERROR

    @property
    def is_lasting(self) -> bool:
        """True if the server refuses this client, so that another attempt is of no use before somebody acts."""
        return self.kind in _LASTING


class FailureLog:
    """Logs the first failure of each kind, and the next one of that kind a minute later at the earliest.

    Args:
        subject: what fails, in words.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._lock = threading.Lock()
        self._last_s: dict[str, float] = {}

    def failed(self, failure: StoreFailure) -> None:
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
