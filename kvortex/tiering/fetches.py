"""Fetches: blocks move up, from the lower tier into the pool, when they are asked for."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.tiering.backing import NOT_KNOWN, BackingTier
from kvortex.tiering.keys import join_keys, split_keys
from kvortex.tiers import Cause, ReadOutcome, ReadRequest
from kvortex.types import Direction, MissReason

FETCH_BATCH: Final = 16
ASK_BATCH: Final = 64


class Fetch:
    """The blocks that one call waits for.

    Args:
        fetches: all fetches of the tier.
        keys: block hashes that are wanted, `uint64 [n, 4]`, a chain from its head.
        used_s: times at which the blocks count as used, `float64 [n]`.
        groups: the number of each block's group, `uint8 [n]`; None if all belong to the first.
    """

    def __init__(
        self,
        fetches: "Fetches",
        keys: NDArray[np.uint64],
        used_s: NDArray[np.float64],
        groups: NDArray[np.uint8] | None = None,
    ) -> None:
        self.keys = keys
        self.groups = groups
        self.used_s = used_s
        self.pending: dict[bytes, int] = {}
        """The blocks that it still waits for: block hash -> position in the call."""
        self._in_tier: set[int] = set()
        self._fetches = fetches
        self._waits: list[tuple[set[bytes], asyncio.Future[None]]] = []

    @property
    def num_pending(self) -> int:
        """Blocks that it still waits for."""
        return len(self.pending)

    @property
    def in_tier(self) -> set[int]:
        """Positions of the blocks that the tier had, and the pool had not, at the time of the look-up."""
        return self._in_tier

    async def wait(self, keys: Sequence[bytes] | None = None, *, timeout_s: float | None = None) -> list[bytes]:
        """Wait until each block is in the pool, or is known not to come.

        Args:
            keys: block hashes to wait for; all of the call by default.
            timeout_s: seconds; None waits as long as it takes.

        Returns:
            The blocks that are still pending after that time.
        """
        awaited = set(self.pending) if keys is None else self.pending.keys() & set(keys)
        if not awaited:
            return []
        wait = (awaited, asyncio.get_running_loop().create_future())
        self._waits.append(wait)
        try:
            await asyncio.wait([wait[1]], timeout=timeout_s)
        finally:
            self._waits = [other for other in self._waits if other is not wait]
        return [key for key in (self.pending if keys is None else dict.fromkeys(keys)) if key in awaited]

    def stop_waiting_for(self, key: bytes) -> None:
        """A block is in the pool, or will not come."""
        self.pending.pop(key, None)
        for awaited, future in self._waits:
            awaited.discard(key)
            if not awaited and not future.done():
                future.set_result(None)

    def cancel(self) -> None:
        """End the call. A block that no other call wants is not fetched, unless its read has begun."""
        self._fetches.cancel(self)


class _Wanted:
    """A block that calls wait for."""

    __slots__ = ("calls", "encoding", "group", "key", "reading")

    def __init__(self, key: bytes, group: int, encoding: int) -> None:
        self.key = key
        self.group = group
        self.encoding = encoding
        self.calls: list[Fetch] = []
        self.reading = False


class Fetches:
    """All fetches from one tier. A block is read once, however many calls wait for it, and few are read at a time.

    A wanted block waits with the calls that want it, in the order of the calls; it leaves when no call wants it any
    more. If the tier is known to have it, it waits in `_queue` for a free place and is read. If that is not known yet,
    because the tier's scan is not complete, it waits in `_unknown` until the store has been asked.

    Args:
        backing: the tier behind the pool.
        deletes_fetched: the tier deletes a block that has been fetched into the pool.
    """

    def __init__(self, backing: BackingTier, *, deletes_fetched: bool) -> None:
        self._backing = backing
        self._deletes_fetched = deletes_fetched
        self._wanted: dict[bytes, _Wanted] = {}
        self._unknown: dict[bytes, _Wanted] = {}  # wanted, and the store has to be asked for them
        self._queue: dict[bytes, _Wanted] = {}  # wanted, in the tier, and not being read yet
        self._reading: set[bytes] = set()  # in flight: the tier owns their memory, perhaps long after their deadline
        self._num_reads = 0  # calls of the tier that are not over
        self._asking = self._pump_is_due = False
        self.fetched_blocks = 0

    @property
    def num_arriving(self) -> int:
        """Blocks that at least one call waits for."""
        return len(self._wanted)

    # -- asking for blocks -------------------------------------------------------------------------

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which blocks the tier is known to have, and can be read now. From memory, from any thread.

        Args:
            keys: block hashes, `uint64 [n, 4]`.

        Returns:
            `bool [n]`.
        """
        if not self._backing.state.usable or self._backing.guard.reads.refuses:
            return np.zeros(len(keys), dtype=np.bool_)
        found: NDArray[np.bool_] = self._backing.encodings_known(keys) != NOT_KNOWN
        return found

    def fetch(self, keys: NDArray[np.uint64], groups: NDArray[np.uint8] | None = None) -> Fetch:
        """Begin to fetch the blocks that the tier has and the pool has not, in order.

        Args:
            keys: block hashes, `uint64 [n, 4]`, a chain from its head.
            groups: the number of each block's group, `uint8 [n]`; None if all belong to the first.
        """
        backing = self._backing
        fetch = Fetch(self, keys, backing.uses.chain(len(keys)), groups)
        refuses = backing.guard.reads.refuses
        if not backing.state.may_work:
            return fetch
        positions = np.flatnonzero(~backing.control.index.contains_mask(keys))
        found = np.full(positions.size, NOT_KNOWN, dtype=np.int8)
        asks = not refuses
        if backing.state.usable and positions.size:
            found = backing.encodings_known(keys[positions])
            asks = asks and backing.tier.may_have_unknown
        fetch.in_tier.update(positions[found != NOT_KNOWN].tolist())
        if refuses:
            found[:] = NOT_KNOWN
        if not asks and not self._wanted:
            positions, found = positions[found != NOT_KNOWN], found[found != NOT_KNOWN]
        columns = zip(split_keys(keys[positions]), positions.tolist(), found.tolist(), strict=True)
        for key, position, encoding in columns:
            if encoding != NOT_KNOWN or asks or key in self._wanted:  # if its read has begun, it may still come
                self._add(fetch, key, position, encoding)
        self._pump()
        return fetch

    def _add(self, fetch: Fetch, key: bytes, position: int, encoding: int) -> None:
        wanted = self._wanted.get(key)
        if wanted is None:
            group = 0 if fetch.groups is None else int(fetch.groups[position])
            wanted = self._wanted[key] = _Wanted(key, group, encoding)
            (self._queue if encoding != NOT_KNOWN else self._unknown)[key] = wanted
        if key not in fetch.pending:
            fetch.pending[key] = position
            wanted.calls.append(fetch)

    def cancel(self, fetch: Fetch) -> None:
        """A call waits no more. Its reads that have begun go on."""
        for key in list(fetch.pending):
            wanted = self._wanted[key]
            wanted.calls.remove(fetch)
            fetch.stop_waiting_for(key)
            if not wanted.calls and not wanted.reading:
                self._stop_waiting_for([wanted])

    def tier_opened(self) -> None:
        """Look up the blocks that calls have asked for while the tier was opening."""
        keys = list(self._unknown)
        found = self._backing.encodings_known(join_keys(keys)).tolist() if keys else []
        is_final = not self._backing.tier.may_have_unknown
        self._queue_found(
            [(key, encoding) for key, encoding in zip(keys, found, strict=True) if encoding != NOT_KNOWN or is_final]
        )
        self._pump()

    def stop_waiting(self) -> None:
        """No block comes any more: end every wait."""
        self._stop_waiting_for(list(self._wanted.values()))

    # -- reading -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start as many reads and questions to the store as is possible now."""
        backing = self._backing
        if not backing.state.usable or backing.state.closing:
            return
        if self._unknown and not self._asking:
            self._asking = True
            backing.tasks.spawn(self._ask_store()).add_done_callback(self._store_answered)
        while self._queue:
            room = backing.config.tier.fetch_blocks - len(self._reading)
            if room <= 0 and not self._num_reads:
                break  # no call is in progress, so the reads that take all places hang
            if room <= 0:
                return
            batch = self._next_batch(min(room, FETCH_BATCH))
            admitted = backing.guard.reads.admit(len(batch))
            if admitted:
                self._plan_reads(batch[:admitted])
            elif backing.guard.reads.refuses:
                break
            else:
                return  # the breaker tries the tier with another block just now
        self._stop_waiting_for(list(self._queue.values()))

    def _next_batch(self, most: int) -> list[_Wanted]:
        """The next blocks of the queue, up to `most`, all wanted by the same call."""
        batch: list[_Wanted] = []
        for wanted in self._queue.values():
            if len(batch) == most or (batch and wanted.calls[0] is not batch[0].calls[0]):
                break
            batch.append(wanted)
        return batch

    def _plan_reads(self, batch: Sequence[_Wanted]) -> None:
        backing, call = self._backing, batch[0].calls[0]
        for wanted in batch:
            del self._queue[wanted.key]
        forms = np.array([backing.form_of(wanted.group, wanted.encoding) for wanted in batch], dtype=np.uint8)
        # Blocks before these in their chain must not be evicted to make room for them.
        chain = call.keys[: max(call.pending[wanted.key] for wanted in batch) + 1]
        plan = backing.control.plan_fetch(join_keys([wanted.key for wanted in batch]), forms, "fetch", chain=chain)
        reads = [batch[position] for position in plan.positions.tolist()]
        columns = zip(reads, *(c.tolist() for c in (plan.slots, plan.offsets, plan.forms)), strict=True)
        requests = [self._read_request(call, *column) for column in columns]
        for wanted in reads:
            wanted.reading = True
            self._reading.add(wanted.key)
        self._stop_waiting_for(
            [wanted for wanted in batch if not wanted.reading]
        )  # the pool has no room, or a save of the block is in flight
        if not requests:
            backing.guard.reads.give_up()
            return
        begun = asyncio.Event()
        self._num_reads += 1
        task = backing.tasks.spawn(self._read(requests, begun))
        task.add_done_callback(partial(self._read_ended, reads, requests, begun))

    def _read_request(self, call: Fetch, wanted: _Wanted, slot: int, offset: int, form: int) -> ReadRequest:
        backing = self._backing
        return ReadRequest(
            backing.key_of(wanted.key, form),
            backing.pool.payload(offset, form),
            partial(self._arrived, wanted, slot, offset, form),
            used_s=float(call.used_s[call.pending[wanted.key]]),
            form=form,
        )

    async def _read(self, requests: Sequence[ReadRequest], begun: asyncio.Event) -> None:
        begun.set()
        started = time.perf_counter()
        outcomes = await self._backing.guard.read(requests)
        good = [outcome.payload_bytes for outcome in outcomes if outcome.reason is None]
        self._backing.record(Direction.LOAD, len(good), sum(good), time.perf_counter() - started)

    def _read_ended(
        self, reads: Sequence[_Wanted], requests: Sequence[ReadRequest], begun: asyncio.Event, _: object
    ) -> None:
        self._num_reads -= 1
        if not begun.is_set():  # the task was cancelled before its first step: the tier was not called
            self._backing.guard.reads.give_up()
            for request in requests:
                request.settle(ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.CANCELLED))
        self._stop_waiting_for(reads)  # a block that still comes after that ends no wait
        self._pump()

    def _arrived(self, wanted: _Wanted, slot: int, offset: int, form: int, outcome: ReadOutcome) -> None:
        backing = self._backing
        expected = backing.encodings.codecs[form], backing.encodings.payloads[form]
        if outcome.reason is None and (outcome.codec, outcome.payload_bytes) == expected:
            digest = backing.pool.digest_in_pool(offset, form, outcome.digest)
            backing.control.finish_fetch(slot, offset, form, digest)
            self.fetched_blocks += 1
            if self._deletes_fetched and not backing.state.closing:
                backing.tasks.spawn(backing.delete(join_keys([wanted.key])))
        else:
            backing.control.abandon_fetch(slot, offset, outcome.reason or MissReason.TRANSFER_FAILED)
            if backing.on_lost is not None:
                backing.on_lost(wanted.key)
        self._reading.remove(wanted.key)
        self._stop_waiting_for([wanted])
        self._schedule_pump()

    def _schedule_pump(self) -> None:
        """Pump once for all blocks that settle in the same pass of the loop."""
        if self._queue and not self._pump_is_due and not self._backing.state.closing:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._run_scheduled_pump)

    def _run_scheduled_pump(self) -> None:
        self._pump_is_due = False
        self._pump()

    # -- asking the store --------------------------------------------------------------------------

    async def _ask_store(self) -> None:
        backing = self._backing
        while self._unknown:
            keys = list(self._unknown)[:ASK_BATCH]
            if not backing.guard.reads.admit(1):
                self._stop_waiting_for(list(self._unknown.values()))
                return
            found = await backing.ask_encodings(keys)
            self._queue_found(list(zip(keys, found, strict=True)))
            self._pump()

    def _store_answered(self, _: object) -> None:
        self._asking = False
        self._pump()

    def _queue_found(self, found: Iterable[tuple[bytes, int]]) -> None:
        for key, encoding in found:
            wanted = self._unknown.pop(key, None)
            if wanted is not None and encoding == NOT_KNOWN:
                self._stop_waiting_for([wanted])
            elif wanted is not None:
                wanted.encoding = encoding
                self._queue[key] = wanted
                for call in wanted.calls:
                    call.in_tier.add(call.pending[key])

    def _stop_waiting_for(self, blocks: Iterable[_Wanted]) -> None:
        """End the waits for these blocks: they are in the pool, or they will not come.

        A block that was evicted in the meantime may be wanted again, by another call: that is another entry.
        """
        for wanted in blocks:
            if self._wanted.get(wanted.key) is wanted:
                del self._wanted[wanted.key]
                self._queue.pop(wanted.key, None)
                self._unknown.pop(wanted.key, None)
                for call in wanted.calls:
                    call.stop_waiting_for(wanted.key)
