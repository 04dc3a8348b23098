"""Calls of a client that take long, as those of lower tiers: the client gets a number, and asks how far they are."""

import asyncio
import itertools
import logging
from collections.abc import Coroutine
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import OwnerError
from kvortex.tiering import Tiering
from kvortex.tiering.fetches import Fetch

logger = logging.getLogger(__name__)

IN_TIER: Final = 1
"""Flag of a block of a fetch: the tier has it, and the pool had not."""
AWAITED: Final = 2
"""Flag of a block of a fetch: it may still come."""

MAX_TICKETS: Final = 1 << 16


class TicketState(IntEnum):
    """How far a call is."""

    RUNNING = 0
    DONE = 1
    FAILED = 2


class Tickets:
    """The long calls of one client.

    Args:
        tiering: that of the client's cache.
    """

    def __init__(self, tiering: Tiering) -> None:
        self._tiering = tiering
        self._numbers = itertools.count(1)
        self._fetches: dict[int, Fetch] = {}
        self._calls: dict[int, asyncio.Task[bool]] = {}

    def fetch(
        self, keys: NDArray[np.uint64], groups: NDArray[np.uint8], *, leading: bool = False
    ) -> tuple[int, NDArray[np.uint8]]:
        """Begin a fetch; see `Tiering.fetch`.

        Args:
            keys: the cache's own keys, `uint64 [n, 4]`.
            groups: the number of each block's group, `uint8 [n]`.
            leading: only of the leading blocks that the tier is known to have.

        Returns:
            Its number, 0 if none of the blocks is on its way, and the flags of its blocks, `uint8 [m]`.
        """
        self._check_room()
        if leading:
            known = self._tiering.known(keys)
            count = len(known) if known.all() else int(known.argmin())
            keys, groups = keys[:count], groups[:count]
        fetch = self._tiering.fetch(keys, groups)
        number = 0
        if fetch.num_pending:
            number = next(self._numbers)
            self._fetches[number] = fetch
        return number, _flags(fetch)

    def start(self, call: Coroutine[Any, Any, bool]) -> int:
        """Begin another call; returns its number."""
        try:
            self._check_room()
        except OwnerError:
            call.close()
            raise
        number = next(self._numbers)
        self._calls[number] = asyncio.get_running_loop().create_task(call)
        return number

    def _check_room(self) -> None:
        if len(self._fetches) + len(self._calls) >= MAX_TICKETS:
            raise OwnerError(f"a client has {MAX_TICKETS} calls in flight, and does not ask for them")

    def report(self) -> NDArray[np.int64]:
        """All calls, `int64 [n, 3]`: number, leading blocks that are settled, state. Calls that are over are forgotten.

        A fetch stays until `end_fetch`.
        """
        rows = []
        for number, fetch in self._fetches.items():
            is_over = not fetch.num_pending
            settled = len(fetch.keys) if is_over else next(iter(fetch.pending.values()))
            rows.append((number, settled, TicketState.DONE if is_over else TicketState.RUNNING))
        for number, task in list(self._calls.items()):
            state = TicketState.RUNNING
            if task.done():
                del self._calls[number]
                state = TicketState.DONE if _succeeded(task) else TicketState.FAILED
            rows.append((number, 0, state))
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def end_fetch(self, number: int, *, cancels: bool) -> NDArray[np.uint8]:
        """Forget a fetch; returns the flags of its blocks, `uint8 [n]`.

        Args:
            number: its number.
            cancels: blocks whose read has not begun, and that nobody else wants, are not fetched.

        Raises:
            OwnerError: there is no such fetch.
        """
        fetch = self._fetches.pop(number, None)
        if fetch is None:
            raise OwnerError(f"there is no fetch {number}")
        flags = _flags(fetch)
        if cancels:
            fetch.cancel()
        return flags

    def close(self) -> None:
        """The client is gone: cancel all its calls."""
        for fetch in self._fetches.values():
            fetch.cancel()
        for task in self._calls.values():
            task.cancel()
        self._fetches.clear()
        self._calls.clear()


def _succeeded(task: "asyncio.Task[bool]") -> bool:
    if task.cancelled():
        return False
    if (error := task.exception()) is not None:
        logger.error("a call of a lower tier ended with an unexpected error", exc_info=error)
        return False
    return task.result()


def _flags(fetch: Fetch) -> NDArray[np.uint8]:
    flags = np.zeros(len(fetch.keys), dtype=np.uint8)
    flags[list(fetch.in_tier)] |= IN_TIER
    flags[list(fetch.pending.values())] |= AWAITED
    return flags
