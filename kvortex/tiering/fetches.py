"""Up: blocks are brought from the lower tier into the pool when they are asked for."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.tiering.link import TierLink, join_keys, split_keys
from kvortex.tiers import Cause, ReadOutcome, ReadRequest
from kvortex.types import Direction, MissReason

FETCH_BATCH: Final = 16

_Awaited: TypeAlias = "dict[bytes, asyncio.Future[None]]"


class Fetch:
    """Blocks on their way from a tier, as one call asked for them."""

    def __init__(self, task: "asyncio.Task[None] | None", arriving: "dict[bytes, asyncio.Future[None]]") -> None:
        self._task = task
        self._arriving = arriving

    @property
    def num_blocks(self) -> int:
        """Blocks that were not in the pool when the call began."""
        return len(self._arriving)

    async def wait(self, keys: Sequence[bytes] | None = None, *, timeout_s: float | None = None) -> list[bytes]:
        """Wait until blocks (all by default) are in the pool or will not be; those that take longer."""
        wanted = self._arriving if keys is None else [key for key in keys if key in self._arriving]
        pending = {key: self._arriving[key] for key in wanted if not self._arriving[key].done()}
        if not pending:
            return []
        await asyncio.wait(pending.values(), timeout=timeout_s)
        return [key for key, future in pending.items() if not future.done()]

    def cancel(self) -> None:
        """Give up what no read has been started for; what has been started arrives."""
        if self._task is not None:
            self._task.cancel()


class Fetches:
    """Blocks on their way from one tier: a bounded number, each read once however many ask for it.

    Args:
        link: to the tier.
        takes_away: the tier loses what the pool has got.
    """

    def __init__(self, link: TierLink, *, takes_away: bool) -> None:
        self._link = link
        self._takes_away = takes_away
        self._arriving: _Awaited = {}
        self._reading: _Awaited = {}
        self._batch = min(FETCH_BATCH, link.config.fetch_blocks)
        self._room = asyncio.Semaphore(link.config.fetch_blocks)
        self._takes_room = asyncio.Lock()  # one after the other: two that wait with half of it each would wait for ever
        self.fetched_blocks = 0

    @property
    def num_arriving(self) -> int:
        """Blocks that somebody waits for."""
        return len(self._arriving)

    def end(self) -> None:
        """Nobody needs to wait any longer."""
        self._not_coming(self._arriving.copy())

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """`bool [n]`: what the tier is known to have. From memory, from any thread."""
        if not self._link.usable:
            return np.zeros(len(keys), dtype=np.bool_)
        return np.array(self._link.lookup(split_keys(keys)), dtype=np.int64) > 0

    def fetch(self, keys: NDArray[np.uint64]) -> "Fetch":
        """Begin to bring what the pool has not, and the tier has, into the pool: in order, within the bounds."""
        missing = keys[~self._link.control.index.contains_mask(keys)]
        wanted = split_keys(missing) if self._link.may_work else []
        loop = asyncio.get_running_loop()
        new = {key: loop.create_future() for key in wanted if key not in self._arriving}
        self._arriving.update(new)
        task = self._link.spawn(self._fetch_all(new)) if new else None
        if task is not None:  # not in the task itself: cancelled before its first step, it never runs
            task.add_done_callback(lambda _: self._not_coming(self._unread(new)))
        return Fetch(task, {key: self._arriving[key] for key in split_keys(missing) if key in self._arriving})

    def _unread(self, awaited: _Awaited) -> _Awaited:
        return {key: future for key, future in awaited.items() if self._reading.get(key) is not future}

    async def _fetch_all(self, awaited: _Awaited) -> None:
        await self._link.opened.wait()
        keys = list(awaited)
        for start in range(0, len(keys), self._batch) if self._link.usable else ():
            await self._fetch_batch({key: awaited[key] for key in keys[start : start + self._batch]})

    async def _fetch_batch(self, awaited: _Awaited) -> None:
        keys = list(awaited)
        sizes = await self._sizes_of(keys)
        found = [(key, nbytes) for key, nbytes in zip(keys, sizes, strict=True) if nbytes]
        self._not_coming({key: awaited[key] for key, nbytes in zip(keys, sizes, strict=True) if not nbytes})
        try:
            async with asyncio.timeout(self._link.config.tier_timeout_s), self._takes_room:
                await self._take_room(len(found))
        except TimeoutError:  # whatever holds the places hangs
            self._not_coming({key: awaited[key] for key, _ in found})
        else:
            self._plan_reads(found, awaited)

    async def _sizes_of(self, keys: list[bytes]) -> list[int]:
        link = self._link
        sizes = link.lookup(keys)
        unknown = [i for i, nbytes in enumerate(sizes) if not nbytes]
        if unknown and not link.tier.stats().scan.complete:
            asked = [link.key_of(keys[i]) for i in unknown]
            there = await link.tier.contains(asked, deadline_s=link.config.tier_timeout_s)
            for i, is_there in zip(unknown, there, strict=True):
                sizes[i] = link.forms.extents.packed if is_there else 0  # what most blocks take
        return sizes

    async def _take_room(self, count: int) -> None:
        taken = 0
        try:
            while taken < count:
                await self._room.acquire()
                taken += 1
        except asyncio.CancelledError:
            for _ in range(taken):
                self._room.release()
            raise

    def _plan_reads(self, found: list[tuple[bytes, int]], awaited: _Awaited) -> None:
        sizes = self._link.forms.payloads
        packed = np.array([sizes.rests_packed(nbytes) for _, nbytes in found], dtype=np.bool_)
        keys = [key for key, _ in found]
        plan = self._link.control.plan_fetch(join_keys(keys), packed, "fetch")
        planned = {key: awaited[key] for key in (keys[position] for position in plan.positions.tolist())}
        for key in keys:
            if key not in planned:  # no room in the pool, or somebody saves it just now
                self._room.release()
                self._not_coming({key: awaited[key]})
        columns = zip(planned, *(c.tolist() for c in (plan.slots, plan.offsets, plan.nbytes)), strict=True)
        requests = [self._read_request(*column) for column in columns]
        self._reading.update(planned)
        if requests:
            begun = asyncio.Event()
            task = self._link.spawn(self._read(planned, requests, begun))
            task.add_done_callback(partial(_settle_unread, requests, begun))

    def _read_request(self, key: bytes, slot: int, offset: int, nbytes: int) -> ReadRequest:
        payload = self._link.payload(offset, nbytes)
        return ReadRequest(self._link.key_of(key), payload, partial(self._arrived, key, slot, offset, nbytes))

    async def _read(self, awaited: _Awaited, requests: Sequence[ReadRequest], begun: asyncio.Event) -> None:
        begun.set()
        started = time.perf_counter()
        outcomes = await self._link.tier.read(requests, deadline_s=self._link.config.tier_timeout_s)
        self._not_coming(awaited)  # what is later than that comes for somebody else
        good = sum(outcome.reason is None for outcome in outcomes)
        self._link.record(Direction.LOAD, good, time.perf_counter() - started)

    def _arrived(self, key: bytes, slot: int, offset: int, nbytes: int, outcome: ReadOutcome) -> None:
        packed = self._link.control.is_packed(nbytes)
        expected = self._link.forms.codec_number(packed), self._link.forms.payload_nbytes(packed)
        if outcome.reason is None and (outcome.codec, outcome.payload_bytes) == expected:
            self._link.control.finish_fetch(slot, offset, nbytes, outcome.digest)
            self.fetched_blocks += 1
            if self._takes_away and not self._link.closing:
                self._link.spawn(self._link.delete([key]))
        else:
            self._link.control.abandon_fetch(slot, offset, outcome.reason or MissReason.TRANSFER_FAILED)
        del self._reading[key]
        self._room.release()
        if key in self._arriving:
            self._not_coming({key: self._arriving[key]})

    def _not_coming(self, awaited: _Awaited) -> None:
        """Whoever waits for these need not wait any longer: they are in the pool, or they will not be.

        A block that was evicted meanwhile may be awaited anew by somebody else: that is another future.
        """
        for key, future in awaited.items():
            if self._arriving.get(key) is future:
                del self._arriving[key]
                future.set_result(None)


def _settle_unread(requests: Sequence[ReadRequest], begun: asyncio.Event, _: object) -> None:
    """A read that was cancelled before its first step has asked nothing of the tier."""
    for request in () if begun.is_set() else requests:
        request.settle(ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.CANCELLED))
