"""Blocks that are looked up together before they are written, on several threads."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvortex.tiers.base import WriteRequest
from kvortex.tiers.redis.failures import StoreFailure


class LookUp:
    """A question for the server. The first thread that needs the answer asks, and the others wait for it.

    Args:
        ask: asks it; raises `StoreFailure`.
    """

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._attempts = 0  # that are over
        self._failure: StoreFailure | None = None  # of the last attempt; None if it was answered

    def ensure(self) -> None:
        """Return once it is answered. If an attempt fails, it fails for all who waited for it; the next one asks again.

        Raises:
            StoreFailure: the server cannot be asked.
        """
        before = self._attempts
        with self._lock:
            if self._attempts == before and (self._failure is not None or not before):
                self._try()
            if self._failure is not None:
                raise self._failure

    def _try(self) -> None:
        try:
            self._ask()
        except StoreFailure as failure:
            self._failure = failure
        else:
            self._failure = None
        self._attempts += 1


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """A block to write, and the look-up that comes before it."""

    request: WriteRequest
    lookup: LookUp
