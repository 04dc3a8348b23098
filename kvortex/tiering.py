"""Between the pool and a lower tier: blocks are written behind their save, and fetched back when they are asked for.

All on the event loop, and all of it bounded: blocks that wait to be written, blocks on their way back, bytes that were
evicted and are not written yet. What is too much is shed and counted; a block that is not written is only a miss later.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Forms
from kvortex.config import KVortexConfig
from kvortex.control import ControlPlane
from kvortex.errors import EngineStateError, KVortexError
from kvortex.hashing import Namespace, cache_key
from kvortex.index import Evicted
from kvortex.stats import EngineStats, TieringFigures
from kvortex.tiers import (
    Cause,
    DiskTier,
    DiskTierConfig,
    ReadOutcome,
    ReadRequest,
    Tier,
    WriteOutcome,
    WriteRequest,
)
from kvortex.types import BlockHash, Direction, MissReason

logger = logging.getLogger(__name__)

WRITE_BATCH: Final = 16
FETCH_BATCH: Final = 16
DEMOTED_SHARE: Final = 0.1
"""Of the pool: what was evicted and waits for the lower tier may hold so much."""
DIRECT_ROUNDING: Final = 4096
"""A tier may round a payload up to what its device reads at once when it says how large a block is."""


_Awaited: TypeAlias = "dict[bytes, asyncio.Future[None]]"


@dataclass(frozen=True, slots=True)
class _Demoted:
    """A block that was evicted and holds its extent until it is written."""

    key: bytes
    offset: int
    nbytes: int
    digest: int


class Tiering:
    """Moves blocks between one pool and one lower tier.

    Args:
        config: inclusion, admission, bounds.
        control: of the pool; its `on_evicted` is taken for an exclusive tier.
        pool: its bytes.
        forms: of the blocks.
        namespace: of the blocks.
        tier: opened by `start`, closed by `aclose`.
        stats: counts what moves.
    """

    def __init__(
        self,
        config: KVortexConfig,
        control: ControlPlane,
        pool: NDArray[np.uint8],
        forms: Forms,
        namespace: Namespace,
        tier: Tier,
        stats: EngineStats,
    ) -> None:
        self.tier = tier
        self._config = config
        self._control = control
        self._pool = pool
        self._forms = forms
        self._namespace = namespace
        self._stats = stats
        self._exclusive = config.tier_inclusion == "exclusive"
        self._queue: deque[bytes] = deque()
        self._queued: set[bytes] = set()
        self._demoted: deque[_Demoted] = deque()
        self._demoted_bytes = 0
        self._demoted_limit = int(DEMOTED_SHARE * pool.size)
        self._work = asyncio.Event()
        self._writing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._arriving: _Awaited = {}
        self._reading: _Awaited = {}
        self._batch = min(FETCH_BATCH, config.fetch_blocks)
        self._room = asyncio.Semaphore(config.fetch_blocks)
        self._takes_room = asyncio.Lock()  # one after the other: two that wait with half of it each would wait for ever
        self._tasks: dict[asyncio.Task[None], None] = {}  # in the order of their start
        self._opened = asyncio.Event()
        self._usable = False
        self._closing = False
        self._shed_blocks = self._demoted_blocks = self._written_blocks = self._fetched_blocks = 0
        self._failed_writes = 0

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the tier and begin to write; nothing has to wait for it."""
        if self._exclusive:
            self._control.on_evicted = self._take_over
        self._spawn(self._open())

    async def _open(self) -> None:
        try:
            await self.tier.open()
            self._usable = True
        except KVortexError as error:
            logger.error("the %s tier cannot be used, blocks stay in the pool alone: %s", self.tier.name, error)
        finally:
            self._opened.set()
        if not self._usable:
            self._control.on_evicted = None
            self._give_up_writing()
        if self._usable:
            await self._write_behind()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a tier's task ended in an unexpected error", exc_info=error)

    async def aclose(self) -> None:
        """Drop what waits, let what moves settle, close the tier; idempotent."""
        self._closing = True
        self._control.on_evicted = None
        self._give_up_writing()
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        # Whoever waits for one of them need not wait any longer.
        self._opened.set()
        self._idle.set()
        self._not_coming(self._arriving.copy())
        await self.tier.aclose()
        self._pool = self._pool[:0].copy()  # the pool can be unmapped unless a late read still holds a part of it

    async def ready(self) -> bool:
        """Wait until the tier is open and knows what it holds; False if it cannot be used."""
        await self._opened.wait()
        if self._usable:
            await self.tier.scanned()
        return self._usable

    async def flush(self) -> None:
        """Wait until everything that waits to be written is written or given up."""
        await self._opened.wait()
        await self._idle.wait()

    def figures(self) -> TieringFigures:
        """Counters since the start, and what waits now."""
        tier = self.tier.stats()
        return TieringFigures(
            tier=self.tier.name,
            usable=self._usable,
            written_blocks=self._written_blocks,
            failed_writes=self._failed_writes,
            fetched_blocks=self._fetched_blocks,
            shed_blocks=self._shed_blocks,
            demoted_blocks=self._demoted_blocks,
            waiting_blocks=len(self._queue) + len(self._demoted) + self._writing,
            arriving_blocks=len(self._arriving),
            used_bytes=tier.used_bytes,
            capacity_bytes=tier.capacity_bytes,
            causes={cause.value: count for cause, count in tier.causes.items()},
        )

    # -- down --------------------------------------------------------------------------------------

    def saved(self, keys: NDArray[np.uint64]) -> None:
        """Blocks have come into the pool: offer them to the tier, unless they have to be asked for first."""
        if not self._exclusive and self._config.tier_admission == "always":
            self._offer(keys)

    def used(self, keys: NDArray[np.uint64]) -> None:
        """Blocks of the pool were asked for again."""
        if not self._exclusive:
            self._offer(keys)

    def damaged(self, keys: NDArray[np.uint64]) -> None:
        """Blocks turned out to be wrong: the tier's copies may be where they came from."""
        if len(keys) and self._usable and not self._closing:
            self._spawn(self._delete(_as_bytes(keys)))

    def _offer(self, keys: NDArray[np.uint64]) -> None:
        if self._opened.is_set() and not self._usable:
            return
        for key in _as_bytes(keys):
            if key in self._queued:
                continue
            if len(self._queue) >= self._config.tier_queue_blocks:
                self._shed_blocks += 1
                if self._config.tier_shed == "newest":
                    continue
                self._queued.discard(self._queue.popleft())
            self._queue.append(key)
            self._queued.add(key)
        self._look_for_work()

    def _take_over(self, evicted: Evicted) -> int:
        """Blocks that are evicted while there is room: the tier's copies are made before their extents are free."""
        fitting = int(np.searchsorted(np.cumsum(evicted.nbytes), self._demoted_limit - self._demoted_bytes, "right"))
        keys = _as_bytes(evicted.keys[:fitting])
        columns = zip(evicted.offsets.tolist(), evicted.nbytes.tolist(), evicted.digests.tolist(), strict=True)
        for key, (offset, nbytes, digest) in zip(keys, columns, strict=False):
            self._demoted.append(_Demoted(key, offset, nbytes, digest))
            self._demoted_bytes += nbytes
        self._demoted_blocks += fitting
        self._shed_blocks += len(evicted.offsets) - fitting
        self._look_for_work()
        return fitting

    def _look_for_work(self) -> None:
        if (self._queue or self._demoted) and not self._closing:
            self._idle.clear()
            self._work.set()

    def _give_up_writing(self) -> None:
        self._shed_blocks += len(self._queue) + len(self._demoted)
        self._queue.clear()
        self._queued.clear()
        while self._demoted:
            self._free_demoted(self._demoted.popleft())
        self._rest()

    def _rest(self) -> None:
        if not self._queue and not self._demoted and not self._writing:
            self._idle.set()

    async def _write_behind(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._queue or self._demoted:
                requests = [*self._next_demoted(), *self._next_queued()]
                started = time.perf_counter()
                outcomes = await self.tier.write(requests, deadline_s=self._config.tier_timeout_s)
                self._writing -= len(requests)
                stored = sum(outcome.outcome.is_stored for outcome in outcomes)
                self._record(Direction.SAVE, stored, time.perf_counter() - started)
            self._rest()

    def _next_demoted(self) -> list[WriteRequest]:
        taken = [self._demoted.popleft() for _ in range(min(WRITE_BATCH, len(self._demoted)))]
        self._writing += len(taken)
        return [
            self._write_request(block.key, block.offset, block.nbytes, block.digest, partial(self._demoted_done, block))
            for block in taken
        ]

    def _next_queued(self) -> list[WriteRequest]:
        keys = [self._queue.popleft() for _ in range(min(WRITE_BATCH, len(self._queue)))]
        self._queued.difference_update(keys)
        known = self.tier.lookup([self._tier_key(key) for key in keys])
        keys = [key for key, nbytes in zip(keys, known, strict=True) if not nbytes]
        held = self._control.hold(_as_array(keys))
        self._writing += len(held.slots)
        columns = (held.positions, held.slots, held.offsets, held.nbytes, held.digests)
        return [
            self._write_request(keys[position], offset, nbytes, digest, partial(self._queued_done, slot))
            for position, slot, offset, nbytes, digest in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _write_request(
        self, key: bytes, offset: int, nbytes: int, digest: int, done: Callable[[WriteOutcome], None]
    ) -> WriteRequest:
        packed = self._control.is_packed(nbytes)
        payload = self._pool[offset : offset + self._forms.payload_nbytes(packed)]
        return WriteRequest(
            self._tier_key(key), payload, digest, self._forms.payloads.raw, self._forms.codec_number(packed), done
        )

    def _queued_done(self, slot: int, outcome: WriteOutcome) -> None:
        self._control.release(np.array([slot], dtype=np.int32))
        self._count_write(outcome)

    def _demoted_done(self, block: _Demoted, outcome: WriteOutcome) -> None:
        self._free_demoted(block)
        self._count_write(outcome)

    def _free_demoted(self, block: _Demoted) -> None:
        self._demoted_bytes -= block.nbytes
        self._control.free(block.offset)

    def _count_write(self, outcome: WriteOutcome) -> None:
        if outcome.outcome.is_stored:
            self._written_blocks += 1
        else:
            self._failed_writes += 1

    # -- up ----------------------------------------------------------------------------------------

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """`bool [n]`: what the tier is known to have. From memory, from any thread."""
        if not self._usable:
            return np.zeros(len(keys), dtype=np.bool_)
        return np.array(self.tier.lookup([self._tier_key(key) for key in _as_bytes(keys)]), dtype=np.int64) > 0

    def fetch(self, keys: NDArray[np.uint64]) -> "Fetch":
        """Begin to bring what the pool has not, and the tier has, into the pool: in order, within the bounds."""
        missing = keys[~self._control.index.contains_mask(keys)]
        wanted = () if self._closing or (self._opened.is_set() and not self._usable) else _as_bytes(missing)
        loop = asyncio.get_running_loop()
        new = {key: loop.create_future() for key in wanted if key not in self._arriving}
        self._arriving.update(new)
        task = self._spawn(self._fetch_all(new)) if new else None
        if task is not None:  # not in the task itself: cancelled before its first step, it never runs
            task.add_done_callback(lambda _: self._not_coming(self._unread(new)))
        return Fetch(task, {key: self._arriving[key] for key in _as_bytes(missing) if key in self._arriving})

    def _unread(self, awaited: _Awaited) -> _Awaited:
        return {key: future for key, future in awaited.items() if self._reading.get(key) is not future}

    async def _fetch_all(self, awaited: _Awaited) -> None:
        await self._opened.wait()
        keys = list(awaited)
        for start in range(0, len(keys), self._batch) if self._usable else ():
            await self._fetch_batch({key: awaited[key] for key in keys[start : start + self._batch]})

    async def _fetch_batch(self, awaited: _Awaited) -> None:
        keys = list(awaited)
        sizes = await self._sizes_of([self._tier_key(key) for key in keys])
        found = [(key, nbytes) for key, nbytes in zip(keys, sizes, strict=True) if nbytes]
        self._not_coming({key: awaited[key] for key, nbytes in zip(keys, sizes, strict=True) if not nbytes})
        try:
            async with asyncio.timeout(self._config.tier_timeout_s), self._takes_room:
                await self._take_room(len(found))
        except TimeoutError:  # whatever holds the places hangs
            self._not_coming({key: awaited[key] for key, _ in found})
        else:
            self._plan_reads(found, awaited)

    async def _sizes_of(self, tier_keys: list[bytes]) -> list[int]:
        sizes = self.tier.lookup(tier_keys)
        unknown = [i for i, nbytes in enumerate(sizes) if not nbytes]
        if unknown and not self.tier.stats().scan.complete:
            there = await self.tier.contains([tier_keys[i] for i in unknown], deadline_s=self._config.tier_timeout_s)
            for i, is_there in zip(unknown, there, strict=True):
                sizes[i] = self._forms.extents.packed if is_there else 0  # what most blocks take
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
        packed = np.array([self._rests_packed(nbytes) for _, nbytes in found], dtype=np.bool_)
        keys = [key for key, _ in found]
        plan = self._control.plan_fetch(_as_array(keys), packed, "fetch")
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
            task = self._spawn(self._read(planned, requests, begun))
            task.add_done_callback(partial(_settle_unread, requests, begun))

    def _rests_packed(self, nbytes: int) -> bool:
        raw, packed = self._forms.payloads.raw, self._forms.payloads.packed
        return packed != raw and nbytes != raw and nbytes <= -(-packed // DIRECT_ROUNDING) * DIRECT_ROUNDING

    def _read_request(self, key: bytes, slot: int, offset: int, nbytes: int) -> ReadRequest:
        payload = self._pool[offset : offset + self._forms.payload_nbytes(self._control.is_packed(nbytes))]
        return ReadRequest(self._tier_key(key), payload, partial(self._arrived, key, slot, offset, nbytes))

    async def _read(self, awaited: _Awaited, requests: Sequence[ReadRequest], begun: asyncio.Event) -> None:
        begun.set()
        started = time.perf_counter()
        outcomes = await self.tier.read(requests, deadline_s=self._config.tier_timeout_s)
        self._not_coming(awaited)  # what is later than that comes for somebody else
        good = sum(outcome.reason is None for outcome in outcomes)
        self._record(Direction.LOAD, good, time.perf_counter() - started)

    def _arrived(self, key: bytes, slot: int, offset: int, nbytes: int, outcome: ReadOutcome) -> None:
        packed = self._control.is_packed(nbytes)
        expected = self._forms.codec_number(packed), self._forms.payload_nbytes(packed)
        if outcome.reason is None and (outcome.codec, outcome.payload_bytes) == expected:
            self._control.finish_fetch(slot, offset, nbytes, outcome.digest)
            self._fetched_blocks += 1
            if self._exclusive and not self._closing:
                self._spawn(self._delete([key]))
        else:
            self._control.abandon_fetch(slot, offset, outcome.reason or MissReason.TRANSFER_FAILED)
        del self._reading[key]
        self._room.release()
        if key in self._arriving:
            self._not_coming({key: self._arriving[key]})

    async def _delete(self, keys: Sequence[bytes]) -> None:
        with contextlib.suppress(EngineStateError):  # closed meanwhile
            await self.tier.delete([self._tier_key(key) for key in keys], deadline_s=self._config.tier_timeout_s)

    def _not_coming(self, awaited: _Awaited) -> None:
        """Whoever waits for these need not wait any longer: they are in the pool, or they will not be.

        A block that was evicted meanwhile may be awaited anew by somebody else: that is another future.
        """
        for key, future in awaited.items():
            if self._arriving.get(key) is future:
                del self._arriving[key]
                future.set_result(None)

    # -- both --------------------------------------------------------------------------------------

    def _tier_key(self, block_hash: bytes) -> bytes:
        return cache_key(self._namespace, BlockHash(block_hash))

    def _record(self, direction: Direction, blocks: int, seconds: float) -> None:
        if blocks:
            nbytes = blocks * self._forms.payloads.packed
            self._stats.record_transfer(direction, self.tier.name, blocks=blocks, nbytes=nbytes, seconds=seconds)


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


class Arrival:
    """What one load waits for: the lower tier's blocks, until its deadline.

    Args:
        tiering: of the engine.
        keys: of the call, `uint64 [n, 4]`.
        deadline_s: from now; None waits as long as it takes.
    """

    def __init__(self, tiering: Tiering, keys: NDArray[np.uint64], deadline_s: float | None) -> None:
        self._tiering = tiering
        self._keys = keys
        self._fetch = tiering.fetch(keys)
        self._loop = asyncio.get_running_loop()
        self._due_s = None if deadline_s is None else self._loop.time() + deadline_s
        self._late: set[bytes] = set()

    async def wait(self, keys: NDArray[np.uint64]) -> None:
        """Wait for some of the call's blocks; what is late is remembered."""
        if self._fetch.num_blocks:
            timeout_s = None if self._due_s is None else max(self._due_s - self._loop.time(), 0.0)
            self._late.update(await self._fetch.wait(_as_bytes(keys), timeout_s=timeout_s))

    def explain(self, outcomes: tuple[MissReason | None, ...]) -> tuple[MissReason | None, ...]:
        """The call's outcomes, with the deadline as the reason where a block was on its way."""
        if not self._late:
            return outcomes
        return tuple(
            MissReason.DEADLINE if outcome is not None and key in self._late else outcome
            for key, outcome in zip(_as_bytes(self._keys), outcomes, strict=True)
        )


def tier_of(config: KVortexConfig, namespace: Namespace) -> Tier | None:
    """The lower tier that a configuration names, not opened; None if it names none.

    Raises:
        ConfigError: it cannot be made like that.
    """
    if not config.disk_path:
        return None
    settings = DiskTierConfig(path=config.disk_path, capacity_bytes=config.disk_capacity_bytes, fsync=config.disk_fsync)
    return DiskTier(settings, namespace=namespace.digest)


def _settle_unread(requests: Sequence[ReadRequest], begun: asyncio.Event, _: object) -> None:
    """A read that was cancelled before its first step has asked nothing of the tier."""
    for request in () if begun.is_set() else requests:
        request.settle(ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.CANCELLED))


def _as_bytes(keys: NDArray[np.uint64]) -> list[bytes]:
    joined = np.ascontiguousarray(keys).tobytes()
    return [joined[start : start + 32] for start in range(0, len(joined), 32)]


def _as_array(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(len(keys), 4)
