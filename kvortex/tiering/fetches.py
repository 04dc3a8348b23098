"""Up: blocks are brought from the lower tier into the pool when they are asked for."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.tiering.keys import join_keys, split_keys
from kvortex.tiering.link import NOT_KNOWN, PACKED, TierLink
from kvortex.tiers import Cause, ReadOutcome, ReadRequest
from kvortex.types import Direction, MissReason

FETCH_BATCH: Final = 16
ASK_BATCH: Final = 64


class Fetch:
    """One call's blocks on their way from a tier.

    Args:
        keys: block hashes that are wanted, `uint64 [n, 4]`, a chain from its head.
        used_s: when its blocks count as used, `float64 [n]`.
    """

    def __init__(self, fetches: "Fetches", keys: NDArray[np.uint64], used_s: NDArray[np.float64]) -> None:
        self.keys = keys
        self.used_s = used_s
        self.left: dict[bytes, int] = {}
        """What it still waits for: block -> its position in the call."""
        self.in_tier: set[int] = set()
        """Positions of the blocks that only the tier had when it was looked at."""
        self._fetches = fetches
        self._waits: list[tuple[set[bytes], asyncio.Future[None]]] = []

    @property
    def num_left(self) -> int:
        """Blocks that are still on their way."""
        return len(self.left)

    async def wait(self, keys: Sequence[bytes] | None = None, *, timeout_s: float | None = None) -> list[bytes]:
        """Wait until blocks (all by default) are in the pool or will not be; those that take longer."""
        awaited = set(self.left) if keys is None else self.left.keys() & set(keys)
        if not awaited:
            return []
        wait = (awaited, asyncio.get_running_loop().create_future())
        self._waits.append(wait)
        try:
            await asyncio.wait([wait[1]], timeout=timeout_s)
        finally:
            self._waits = [other for other in self._waits if other is not wait]
        return [key for key in (self.left if keys is None else dict.fromkeys(keys)) if key in awaited]

    def ended(self, key: bytes) -> None:
        """A block has come, or will not."""
        self.left.pop(key, None)
        for awaited, future in self._waits:
            awaited.discard(key)
            if not awaited and not future.done():
                future.set_result(None)

    def cancel(self) -> None:
        """Nobody waits for this call's blocks any more: what no other wants, and is not being read, is not fetched."""
        self._fetches.give_up(self)


class _Wanted:
    """A block that calls wait for."""

    __slots__ = ("calls", "encoding", "key", "reading")

    def __init__(self, key: bytes, encoding: int) -> None:
        self.key = key
        self.encoding = encoding
        self.calls: list[Fetch] = []
        self.reading = False


class Fetches:
    """Blocks on their way from one tier: a bounded number, each read once however many ask for it.

    What is wanted stands in one queue, in the order in which it was asked for, with the calls that wait for it; a block
    that none waits for any more leaves it. What the tier is known to have is read at once, as far as there are places;
    before its scan is over the store is asked for the rest.

    Args:
        link: to the tier.
        takes_away: the tier loses what the pool has got.
    """

    def __init__(self, link: TierLink, *, takes_away: bool) -> None:
        self._link = link
        self._takes_away = takes_away
        self._wanted: dict[bytes, _Wanted] = {}
        self._unknown: dict[bytes, _Wanted] = {}  # of these, the store has to be asked
        self._queue: dict[bytes, _Wanted] = {}  # of these, what can be read
        self._reading: set[bytes] = set()  # their memory belongs to the tier, perhaps long after their deadline
        self._num_reads = 0  # calls of the tier that are not over
        self._asking = self._pump_is_due = False
        self.fetched_blocks = 0

    @property
    def num_arriving(self) -> int:
        """Blocks that somebody waits for."""
        return len(self._wanted)

    # -- asking for blocks -------------------------------------------------------------------------

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """`bool [n]`: what the tier is known to have, and would give. From memory, from any thread."""
        if not self._link.usable or self._link.guard.reads.refuses:
            return np.zeros(len(keys), dtype=np.bool_)
        found: NDArray[np.bool_] = self._link.encodings_known(keys) != NOT_KNOWN
        return found

    def fetch(self, keys: NDArray[np.uint64]) -> Fetch:
        """Begin to bring what the pool has not, and the tier has, into the pool: in order, within the bounds."""
        link = self._link
        fetch = Fetch(self, keys, link.uses.chain(len(keys)))
        refuses = link.guard.reads.refuses
        if not link.may_work:
            return fetch
        positions = np.flatnonzero(~link.control.index.contains_mask(keys))
        found = np.full(positions.size, NOT_KNOWN, dtype=np.int8)
        asks = not refuses
        if link.usable and positions.size:
            found = link.encodings_known(keys[positions])
            asks = asks and not link.tier.stats().scan.complete
        fetch.in_tier.update(positions[found != NOT_KNOWN].tolist())
        if refuses:
            found[:] = NOT_KNOWN
        if not asks and not self._wanted:
            positions, found = positions[found != NOT_KNOWN], found[found != NOT_KNOWN]
        columns = zip(split_keys(keys[positions]), positions.tolist(), found.tolist(), strict=True)
        for key, position, encoding in columns:
            if encoding != NOT_KNOWN or asks or key in self._wanted:  # what is being read already may still come
                self._want(fetch, key, position, encoding)
        self._go_on()
        return fetch

    def _want(self, fetch: Fetch, key: bytes, position: int, encoding: int) -> None:
        wanted = self._wanted.get(key)
        if wanted is None:
            wanted = self._wanted[key] = _Wanted(key, encoding)
            (self._queue if encoding != NOT_KNOWN else self._unknown)[key] = wanted
        if key not in fetch.left:
            fetch.left[key] = position
            wanted.calls.append(fetch)

    def give_up(self, fetch: Fetch) -> None:
        """A call does not wait any more; what is being read arrives nevertheless."""
        for key in list(fetch.left):
            wanted = self._wanted[key]
            wanted.calls.remove(fetch)
            fetch.ended(key)
            if not wanted.calls and not wanted.reading:
                self._ended([wanted])

    def tier_is_open(self) -> None:
        """What was asked for before can be looked up now."""
        keys = list(self._unknown)
        found = self._link.encodings_known(join_keys(keys)).tolist() if keys else []
        complete = self._link.tier.stats().scan.complete
        self._sort_in(
            [(key, encoding) for key, encoding in zip(keys, found, strict=True) if encoding != NOT_KNOWN or complete]
        )
        self._go_on()

    def end(self) -> None:
        """Nobody needs to wait any longer."""
        self._ended(list(self._wanted.values()))

    # -- reading -----------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Ask and read as far as that is possible now."""
        link = self._link
        if not link.usable or link.closing:
            return
        if self._unknown and not self._asking:
            self._asking = True
            link.spawn(self._ask()).add_done_callback(self._asked)
        while self._queue:
            room = link.config.tier.fetch_blocks - len(self._reading)
            if room <= 0 and not self._num_reads:
                break  # what holds the places hangs
            if room <= 0:
                return
            batch = self._next_batch(min(room, FETCH_BATCH))
            admitted = link.guard.reads.admit(len(batch))
            if admitted:
                self._plan_reads(batch[:admitted])
            elif link.guard.reads.refuses:
                break
            else:
                return  # another block is tried just now
        self._ended(list(self._queue.values()))

    def _next_batch(self, most: int) -> list[_Wanted]:
        """The next blocks that one call has asked for."""
        batch: list[_Wanted] = []
        for wanted in self._queue.values():
            if len(batch) == most or (batch and wanted.calls[0] is not batch[0].calls[0]):
                break
            batch.append(wanted)
        return batch

    def _plan_reads(self, batch: Sequence[_Wanted]) -> None:
        link, call = self._link, batch[0].calls[0]
        for wanted in batch:
            del self._queue[wanted.key]
        packed = np.array(
            [wanted.encoding == PACKED and link.encodings.payloads.packs for wanted in batch], dtype=np.bool_
        )
        # What stands in front of these in their chain must not go to make room for them.
        chain = call.keys[: max(call.left[wanted.key] for wanted in batch) + 1]
        plan = link.control.plan_fetch(join_keys([wanted.key for wanted in batch]), packed, "fetch", chain=chain)
        reads = [batch[position] for position in plan.positions.tolist()]
        columns = zip(reads, *(c.tolist() for c in (plan.slots, plan.offsets, plan.nbytes)), strict=True)
        requests = [self._read_request(call, *column) for column in columns]
        for wanted in reads:
            wanted.reading = True
            self._reading.add(wanted.key)
        self._ended([wanted for wanted in batch if not wanted.reading])  # no room, or somebody saves it just now
        if not requests:
            link.guard.reads.give_up()
            return
        begun = asyncio.Event()
        self._num_reads += 1
        task = link.spawn(self._read(requests, begun))
        task.add_done_callback(partial(self._read_ended, reads, requests, begun))

    def _read_request(self, call: Fetch, wanted: _Wanted, slot: int, offset: int, nbytes: int) -> ReadRequest:
        link = self._link
        return ReadRequest(
            link.key_of(wanted.key, link.control.is_packed(nbytes)),
            link.payload(offset, nbytes),
            partial(self._arrived, wanted, slot, offset, nbytes),
            used_s=float(call.used_s[call.left[wanted.key]]),
        )

    async def _read(self, requests: Sequence[ReadRequest], begun: asyncio.Event) -> None:
        begun.set()
        started = time.perf_counter()
        outcomes = await self._link.guard.read(requests)
        good = sum(outcome.reason is None for outcome in outcomes)
        self._link.record(Direction.LOAD, good, time.perf_counter() - started)

    def _read_ended(
        self, reads: Sequence[_Wanted], requests: Sequence[ReadRequest], begun: asyncio.Event, _: object
    ) -> None:
        self._num_reads -= 1
        if not begun.is_set():  # cancelled before its first step: it has asked nothing of the tier
            self._link.guard.reads.give_up()
            for request in requests:
                request.settle(ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.CANCELLED))
        self._ended(reads)  # what is later than that comes for somebody else
        self._go_on()

    def _arrived(self, wanted: _Wanted, slot: int, offset: int, nbytes: int, outcome: ReadOutcome) -> None:
        link = self._link
        packed = link.control.is_packed(nbytes)
        expected = link.encodings.codec_number(packed), link.encodings.payload_nbytes(packed)
        if outcome.reason is None and (outcome.codec, outcome.payload_bytes) == expected:
            link.control.finish_fetch(slot, offset, nbytes, outcome.digest)
            self.fetched_blocks += 1
            if self._takes_away and not link.closing:
                link.spawn(link.delete(join_keys([wanted.key])))
        else:
            link.control.abandon_fetch(slot, offset, outcome.reason or MissReason.TRANSFER_FAILED)
        self._reading.remove(wanted.key)
        self._ended([wanted])
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        """There are places again; once for all that settle together."""
        if self._queue and not self._pump_is_due and not self._link.closing:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._go_on_now)

    def _go_on_now(self) -> None:
        self._pump_is_due = False
        self._go_on()

    # -- asking the store --------------------------------------------------------------------------

    async def _ask(self) -> None:
        link = self._link
        while self._unknown:
            keys = list(self._unknown)[:ASK_BATCH]
            if not link.guard.reads.admit(1):
                self._ended(list(self._unknown.values()))
                return
            found = await link.ask_encodings(keys)
            self._sort_in(list(zip(keys, found, strict=True)))
            self._go_on()

    def _asked(self, _: object) -> None:
        self._asking = False
        self._go_on()

    def _sort_in(self, found: Iterable[tuple[bytes, int]]) -> None:
        for key, encoding in found:
            wanted = self._unknown.pop(key, None)
            if wanted is not None and encoding == NOT_KNOWN:
                self._ended([wanted])
            elif wanted is not None:
                wanted.encoding = encoding
                self._queue[key] = wanted
                for call in wanted.calls:
                    call.in_tier.add(call.left[key])

    def _ended(self, blocks: Iterable[_Wanted]) -> None:
        """Whoever waits for these need not wait any longer: they are in the pool, or they will not be.

        A block that was evicted meanwhile may be wanted anew by somebody else: that is another entry.
        """
        for wanted in blocks:
            if self._wanted.get(wanted.key) is wanted:
                del self._wanted[wanted.key]
                self._queue.pop(wanted.key, None)
                self._unknown.pop(wanted.key, None)
                for call in wanted.calls:
                    call.ended(wanted.key)
