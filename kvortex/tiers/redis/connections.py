"""The connections to one server: kept, given out, made anew with growing pauses, and all ended at once."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.resp import ReplyError, Wire

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0


class Pauses:
    """Pauses between attempts to connect, which grow. Its caller holds a lock.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failure: OSError | ReplyError | None = None  # of the last attempt
        self._pause_s = self._retry_at_s = 0.0

    def check(self) -> None:
        """Raise the last failure again during the pause after it.

        Raises:
            OSError, ReplyError: nobody may try yet.
        """
        if self._failure is not None and self._clock() < self._retry_at_s:
            raise type(self._failure)(*self._failure.args)

    def failed(self, error: OSError | ReplyError) -> None:
        """An attempt has failed: the next pause begins."""
        if self._clock() >= self._retry_at_s:  # else other threads have just failed, too
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self._retry_at_s = self._clock() + self._pause_s
        self._failure = type(error)(*error.args)  # without a traceback, whose frames know connections

    def worked(self) -> bool:
        """An attempt has worked; True if the one before it had not."""
        was_failing, self._failure, self._pause_s = self._failure is not None, None, 0.0
        return was_failing


class Connections:
    """As many connections as threads use at a time. After a failed attempt to connect nobody tries for a while.

    Args:
        dial: makes a connection; it raises `OSError` or `ReplyError`.
        log: is told of all failures.
        clock: returns seconds.
    """

    def __init__(self, dial: Callable[[], Wire], log: FailureLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._dial = dial
        self._log = log
        self._pauses = Pauses(clock)
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._used: set[Wire] = set()
        self._is_closed = False

    @property
    def num_open(self) -> int:
        """Connections that there are."""
        with self._lock:
            return len(self._idle) + len(self._used)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Wire]:
        """A connection for commands and all their replies. It is closed if any of this fails.

        Raises:
            StoreFailure: there is no connection, or it has broken.
        """
        wire = None
        try:
            wire = self._take()
            yield wire
        except (OSError, ReplyError) as error:
            failure = StoreFailure(error)
            if not self._is_closed:
                self._log.failed(failure)
            raise failure from error
        except BaseException:
            if wire is not None:
                wire.is_spoiled = True
            raise
        else:
            self._give_back(wire)
            wire = None
        finally:
            if wire is not None:
                self._end(wire)

    def close_idle(self) -> None:
        """Close the connections that nobody uses now."""
        with self._lock:
            for wire in self._idle:
                wire.close()
            self._idle.clear()

    def abort(self) -> None:
        """Close all connections, and have the threads that use one fail at once; no new ones are made."""
        with self._lock:
            self._is_closed = True
            for wire in self._used:
                wire.abort()
        self.close_idle()

    # -- inside ------------------------------------------------------------------------------------

    def _take(self) -> Wire:
        with self._lock:
            self._check_open()
            while self._idle:
                wire = self._idle.pop()
                if wire.is_fresh():
                    self._used.add(wire)
                    return wire
                wire.close()
            self._pauses.check()
        try:
            wire = self._dial()
        except (OSError, ReplyError) as error:
            with self._lock:
                self._pauses.failed(error)
            raise
        self._connected(wire)
        return wire

    def _connected(self, wire: Wire) -> None:
        with self._lock:
            was_failing = self._pauses.worked()
            if self._is_closed:
                wire.close()
            self._check_open()
            self._used.add(wire)
        if was_failing:
            self._log.works_again()

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            self._used.discard(wire)
            if self._is_closed or wire.is_spoiled:
                wire.close()
            else:
                self._idle.append(wire)

    def _end(self, wire: Wire) -> None:
        with self._lock:
            self._used.discard(wire)
            wire.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionAbortedError("the tier was closed")
