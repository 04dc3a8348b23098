"""The lower tier behind an owner's pool, as a client sees it: the calls of `Tiering`, answered by the owner.

A call that takes long has a number; while one is in flight, the client asks how far all of them are. If the owner is
lost, they end as if the tier had nothing.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import OwnerError
from kvortex.owner.client import OwnerLost
from kvortex.owner.control import RemoteControl
from kvortex.owner.protocol import Kind, TierCall, numbers
from kvortex.owner.tickets import AWAITED, IN_TIER, TicketState
from kvortex.stats import BreakerFigures, LinkFigures, TieringFigures
from kvortex.tiering.keys import split_keys

ASK_INTERVAL_S: Final = 0.002
"""Seconds between two questions how far the calls are. One takes some 0.1 ms."""

_NO_KEYS = np.empty((0, 4), dtype=np.uint64)


class RemoteCall:
    """A call that the owner carries out.

    Attributes:
        settled: how many of its leading blocks are settled.
        state: how far it is.
        flags: of a fetch's blocks, `uint8 [n]`.
    """

    def __init__(self, number: int, generation: int, flags: NDArray[np.uint8] | None = None) -> None:
        self.number = number
        self.generation = generation
        self.settled = 0
        self.state = TicketState.RUNNING
        self.flags = flags

    @property
    def is_over(self) -> bool:
        return self.state is not TicketState.RUNNING


class RemoteCalls:
    """The calls of one client that are not over, on one thread.

    Args:
        control: the remote control plane.
    """

    def __init__(self, control: RemoteControl) -> None:
        self._control = control
        self._open: dict[tuple[int, int], RemoteCall] = {}  # by connection and number

    def __len__(self) -> int:
        return len(self._open)

    def fetch(self, keys: NDArray[np.uint64], groups: NDArray[np.uint8], *, leading: bool = False) -> RemoteCall:
        """Begin a fetch; one that is over if the owner is lost, or no block comes.

        Args:
            keys: block hashes, `uint64 [n, 4]`.
            groups: the number of each block's group, `uint8 [n]`.
            leading: only of the leading blocks that the tier is known to have.
        """
        client = self._control.client
        try:
            with client.exclusive():
                number, flags = client.ask(
                    Kind.FETCH, numbers(leading), self._control.own(keys), np.ascontiguousarray(groups)
                )
                return self._added(RemoteCall(int(number[0]), client.generation, flags))
        except OwnerLost:
            return self._lost(0 if leading else len(keys))

    def start(self, call: TierCall, keys: NDArray[np.uint64] = _NO_KEYS) -> RemoteCall:
        """Begin another call; one that has failed if the owner is lost."""
        client = self._control.client
        try:
            with client.exclusive():
                (number,) = client.ask(Kind.TIER_CALL, numbers(call), self._control.own(keys))
                return self._added(RemoteCall(int(number[0]), client.generation))
        except OwnerLost:
            return self._lost(0)

    def _added(self, call: RemoteCall) -> RemoteCall:
        if call.number:
            self._open[call.generation, call.number] = call
        else:
            _end(call, TicketState.DONE)
        return call

    def end_all(self) -> None:
        """Ask for no call any more: all end as if they had failed."""
        for call in self._open.values():
            _end(call, TicketState.FAILED)
        self._open.clear()

    @staticmethod
    def _lost(count: int) -> RemoteCall:
        call = RemoteCall(0, -1, np.zeros(count, dtype=np.uint8))
        _end(call, TicketState.FAILED)
        return call

    def ask(self) -> None:
        """Ask how far all calls are."""
        if not self._open:
            return
        client = self._control.client
        try:
            with client.exclusive():
                (found,) = client.ask(Kind.CALLS)
                self._take(found.reshape(-1, 3).tolist(), client.generation)
        except OwnerLost:
            self.end_all()

    def _take(self, rows: list[list[int]], generation: int) -> None:
        told = {number: (settled, state) for number, settled, state in rows}
        for place, call in list(self._open.items()):
            if call.generation != generation or call.number not in told:  # of a connection that was lost
                del self._open[place]
                _end(call, TicketState.FAILED)
                continue
            call.settled, state = told[call.number]
            if state != TicketState.RUNNING:
                if call.flags is not None:
                    _, call.flags = self._control.client.ask(Kind.END_FETCH, numbers(call.number, False))
                del self._open[place]
                _end(call, TicketState(state))

    def cancel(self, call: RemoteCall) -> None:
        """Blocks of a fetch whose read has not begun, and that nobody else wants, are not fetched."""
        if self._open.pop((call.generation, call.number), None) is None:
            return
        client = self._control.client
        with client.exclusive():
            if client.generation == call.generation:
                client.tell(Kind.END_FETCH, numbers(call.number, True))
        _end(call, TicketState.FAILED)


def _end(call: RemoteCall, state: TicketState) -> None:
    call.state = state
    if call.flags is not None:
        call.settled = len(call.flags)


class RemoteFetch:
    """The blocks of one load that the owner fetches; see `Fetch`.

    Args:
        tiering: asks how far it is.
        keys: block hashes of the call, `uint64 [n, 4]`.
        call: the call.
    """

    def __init__(self, tiering: "RemoteTiering", keys: NDArray[np.uint64], call: RemoteCall) -> None:
        self._tiering = tiering
        self._keys = keys
        self._call = call

    @property
    def num_pending(self) -> int:
        """Blocks that may not be there yet."""
        assert self._call.flags is not None
        return 0 if self._call.is_over else int(np.count_nonzero(self._call.flags & AWAITED))

    @property
    def in_tier(self) -> set[int]:
        """Positions of the blocks that the tier had, and the pool had not, at the time of the look-up."""
        assert self._call.flags is not None
        return set(np.flatnonzero(self._call.flags & IN_TIER).tolist())

    async def wait(self, keys: Sequence[bytes] | None = None, *, timeout_s: float | None = None) -> list[bytes]:
        """See `Fetch.wait`."""
        flags = self._call.flags
        assert flags is not None
        of_call = split_keys(self._keys)
        awaited = set(np.flatnonzero(flags & AWAITED).tolist())
        if keys is not None:
            wanted = set(keys)
            awaited = {position for position in awaited if of_call[position] in wanted}
        if not awaited:
            return []
        last = max(awaited)
        await self._tiering.until(self._call, last + 1, timeout_s)
        return [of_call[n] for n in sorted(awaited) if n >= self._call.settled and not self._call.is_over]

    def cancel(self) -> None:
        """See `Fetch.cancel`."""
        self._tiering.cancel(self._call)


class RemoteTiering:
    """The tiering of a cache in an owner's pool; methods and results are those of `Tiering`. On one event loop.

    The owner sees what is saved, loaded and used, and writes and touches blocks by itself.

    Args:
        control: the remote control plane, of a cache that has a lower tier.
    """

    def __init__(self, control: RemoteControl) -> None:
        self._control = control
        self._calls = RemoteCalls(control)
        self._progress: list[asyncio.Future[None]] = []
        self._asking: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Ask no more, and end every wait; idempotent."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
            self._asking = None
        self._calls.end_all()
        self._tell_progress()

    async def ready(self) -> bool:
        """See `Tiering.ready`."""
        return await self._result(TierCall.READY)

    async def flush(self) -> None:
        """See `Tiering.flush`."""
        await self._result(TierCall.FLUSH)

    async def invalidate(self, keys: NDArray[np.uint64], forget: Callable[[], None]) -> bool:
        """See `Tiering.invalidate`; the owner itself drops what has come from the tier meanwhile."""
        return await self._result(TierCall.INVALIDATE, keys)

    async def clear(self, forget: Callable[[], None]) -> bool:
        """See `Tiering.clear`; the blocks of other engines with the same namespace as well."""
        return await self._result(TierCall.CLEAR)

    async def _result(self, which: TierCall, keys: NDArray[np.uint64] = _NO_KEYS) -> bool:
        call = self._calls.start(which, keys)
        await self.until(call, 1, None)
        return call.state is TicketState.DONE

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """See `Fetches.known`."""
        return known_to_tier(self._control, keys).mask

    def fetch(self, keys: NDArray[np.uint64], groups: NDArray[np.uint8] | None = None) -> RemoteFetch:
        """See `Tiering.fetch`."""
        of_blocks = np.zeros(len(keys), dtype=np.uint8) if groups is None else groups
        call = self._calls.fetch(keys, of_blocks)
        self._keep_asking()
        return RemoteFetch(self, keys, call)

    def cancel(self, call: RemoteCall) -> None:
        """End a fetch; see `Fetch.cancel`."""
        self._calls.cancel(call)

    def figures(self) -> TieringFigures | None:
        """See `Tiering.figures`; None if the owner is lost. Of the cache, all its engines together."""
        return tier_figures(self._control)

    async def until(self, call: RemoteCall, settled: int, timeout_s: float | None) -> None:
        """Wait until so many leading blocks of a call are settled, or the call is over, or the time is."""
        self._keep_asking()
        loop = asyncio.get_running_loop()
        due_s = None if timeout_s is None else loop.time() + timeout_s
        while not call.is_over and call.settled < settled:
            left_s = None if due_s is None else due_s - loop.time()
            if left_s is not None and left_s <= 0:
                return
            progress: asyncio.Future[None] = loop.create_future()
            self._progress.append(progress)
            await asyncio.wait([progress], timeout=left_s)

    def _keep_asking(self) -> None:
        if len(self._calls) and (self._asking is None or self._asking.done()):
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        try:
            while len(self._calls):
                await asyncio.sleep(ASK_INTERVAL_S)
                self._calls.ask()
                self._tell_progress()
        finally:  # whatever has happened, nobody waits for ever
            self._calls.end_all()
            self._tell_progress()

    def _tell_progress(self) -> None:
        waiting, self._progress = self._progress, []
        for progress in waiting:
            if not progress.done():
                progress.set_result(None)


class Known(NamedTuple):
    """What a tier is known to have.

    Attributes:
        mask: which of the blocks, `bool [n]`.
        asks_store: True if its store may have more of them, and answers.
        knows_all: True if the tier will never have others than those that are known.
    """

    mask: NDArray[np.bool_]
    asks_store: bool
    knows_all: bool


def known_to_tier(control: RemoteControl, keys: NDArray[np.uint64]) -> Known:
    """Which blocks, `uint64 [n, 4]`, the tier is known to have; none if the owner is lost."""
    try:
        found, answers = control.client.ask(Kind.TIER_KNOWN, control.own(keys))
    except OwnerLost:
        return Known(np.zeros(len(keys), dtype=np.bool_), asks_store=False, knows_all=False)
    return Known(found.astype(np.bool_), *map(bool, answers[:2]))


def tier_figures(control: RemoteControl) -> TieringFigures | None:
    """The figures of the cache's tier; None if the owner is lost."""
    try:
        (text,) = control.client.ask(Kind.TIER_FIGURES)
    except OwnerLost:
        return None
    return _figures_from(text.tobytes())


def _figures_from(text: bytes) -> TieringFigures:
    try:
        found = json.loads(text)
        links = tuple(LinkFigures(**{**link, "breakers": _breakers(link)}) for link in found["links"])
        return TieringFigures(**{**found, "breakers": _breakers(found), "links": links})
    except (ValueError, TypeError, KeyError) as error:
        raise OwnerError(f"the figures of a tier are not described as they should be: {error}") from error


def _breakers(found: dict[str, Any]) -> dict[str, BreakerFigures]:
    return {name: BreakerFigures(**figures) for name, figures in found["breakers"].items()}
