"""Several lower tiers, one behind the other, as one tier: small and fast ones in front, large and slow ones behind."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from kvortex.errors import ConfigError, EngineStateError
from kvortex.tiering.chain_parts import ABSENT, REFUSED, ChainRead, ChainWrite, Link, Takes, unread
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, StoredBlock, Tier, TierStats, WriteOutcome, WriteRequest
from kvortex.tiers.base import ScanProgress, as_bytes, check_keys, check_reads, check_writes
from kvortex.tiers.counters import TierCounters
from kvortex.types import MissReason, SaveOutcome

COPY_BYTES: Final = 256 << 20
"""Bytes of blocks that may be on their way from one tier to another; further ones are not copied."""
OPEN_WAIT_S: Final = 0.5
"""Seconds that the other tiers get to open when one has. Those that take longer come later."""
SETTLE_S: Final = 0.2
"""Seconds that tiers get to settle what a deadline has ended, before it counts as late."""


class ChainTier(Tier):
    """A block is written to all tiers, and read from the first that has it; then the tiers in front get a copy.

    A tier behind the first may take only blocks that are used again, or only those that the tier in front of it is
    about to evict: then the two have no block twice, and their capacities add up.

    A tier that cannot be opened, hangs or fails is passed over, and the others go on.

    Args:
        tiers: the tiers, not opened, each with what it takes. The first that can be used takes every block.
        timeout_s: seconds that a call may take. Each tier gets its part of them.
        copies_forward: the tiers in front of the one that had a block get a copy.
    """

    def __init__(self, tiers: Sequence[tuple[Tier, Takes]], timeout_s: float, *, copies_forward: bool = True) -> None:
        self.links = [Link(tier, Takes(takes), timeout_s / len(tiers)) for tier, takes in tiers]
        self._below = {
            ahead: link for ahead, link in itertools.pairwise(self.links) if link.takes is Takes.EVICTED
        }  # what a tier evicts goes there
        self._exclusive: dict[Link, list[Link]] = {}  # tiers that have no block twice, for each of them
        for ahead, link in self._below.items():
            together = self._exclusive.setdefault(ahead, [ahead])
            together.append(link)
            self._exclusive[link] = together
        self.name = "+".join(tier.name for tier, _ in tiers)
        self.outlives_process = any(tier.outlives_process for tier, _ in tiers)
        self.finds_more = any(tier.finds_more for tier, _ in tiers)
        self.write_bytes = max(tier.write_bytes for tier, _ in tiers)
        self._copies_forward = copies_forward
        self._counters = TierCounters()
        self._opening = asyncio.Lock()
        self._is_open = self._is_closed = False
        self._background: set[asyncio.Task[None]] = set()  # openings and copies
        self._copies: dict[bytes, asyncio.Task[None]] = {}
        self._copied_bytes = 0

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise EngineStateError(f"the {self.name} tiers were closed; make new ones")
            if self._is_open:
                return
            pending = {self._spawn(link.open()) for link in self.links}
            try:
                while pending and not any(link.is_open for link in self.links):
                    _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if pending:
                    await asyncio.wait(pending, timeout=OPEN_WAIT_S)
            except BaseException:
                for task in pending:
                    task.cancel()
                raise
            if not any(link.is_open for link in self.links):
                raise ConfigError("; ".join(f"{link.tier.name}: {link.error}" for link in self.links))
            self._is_open = True

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        closed = await asyncio.gather(*(link.guard.aclose() for link in self.links), return_exceptions=True)
        if tasks:
            await asyncio.wait(tasks, timeout=SETTLE_S)
        for link in self.links:
            link.is_open = False
        for error in closed:
            if error is not None:
                raise error

    async def scanned(self) -> None:
        await asyncio.gather(*(link.tier.scanned() for link in self.links if link.is_open))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _check(self, keys: Sequence[bytes]) -> None:
        if not self._is_open or self._is_closed:
            raise EngineStateError(f"the {self.name} tiers are not open; use them between open() and aclose()")
        check_keys(keys)

    # -- asking ----------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        return _first_of([link.tier.lookup(keys) for link in self.links if link.reads], len(keys))

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        try:
            async with asyncio.timeout(deadline_s):
                answers = await asyncio.gather(*(link.guard.find(keys) for link in self.links if link.reads))
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
            return [0] * len(keys)
        return _first_of(answers, len(keys))

    async def scan(self) -> AsyncIterator[StoredBlock]:
        self._check(())
        for number, link in enumerate(self.links):
            if not link.is_open:
                continue
            async for block in link.tier.scan():
                if not any(earlier.tier.lookup([block.key])[0] for earlier in self.links[:number] if earlier.is_open):
                    yield block

    # -- reading ---------------------------------------------------------------------------------------

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self._check(())
        check_reads(requests)
        reads = self._reads_of(requests)
        tasks = self._try_next(reads)

        def give_up(cause: Cause) -> None:
            for read in reads:
                read.give_up(cause)

        cause = await self._run(tasks, deadline_s, give_up)
        late = ReadOutcome(MissReason.DEADLINE, cause=cause, settled=False)
        outcomes = [read.outcome or late for read in reads]
        self._counters.record_reads(outcomes)
        return outcomes

    def _reads_of(self, requests: Sequence[ReadRequest]) -> list[ChainRead]:
        links = [link for link in self.links if link.reads]
        known = [link.tier.lookup([request.key for request in requests]) for link in links]
        asks = [link.tier.may_have_unknown for link in links]
        reads = []
        for position, request in enumerate(requests):
            have = [link for link, sizes in zip(links, known, strict=True) if sizes[position]]
            may_have = [link for link, asks_store in zip(links, asks, strict=True) if asks_store and link not in have]
            # Between exclusive tiers a block may move before it is read.
            moving = [link for one in have for link in self._exclusive.get(one, ()) if link.reads]
            reads.append(ChainRead(request, list(dict.fromkeys(have + may_have + moving))))
        return reads

    def _try_next(self, reads: Iterable[ChainRead]) -> list[asyncio.Task[None]]:
        """Have the next tier of each block read it; blocks without one are misses."""
        batches: dict[Link, list[ChainRead]] = {}
        for read in reads:
            if read.links and not self._is_closed:
                batches.setdefault(read.links.pop(0), []).append(read)
            else:
                self._end_miss(read)
        return [asyncio.create_task(self._read_from(link, batch)) for link, batch in batches.items()]

    def _end_miss(self, read: ChainRead) -> None:
        if read.outcome is None and read.miss.cause is Cause.CORRUPT:
            self._counters.record_removed_corrupt()
        read.end(read.miss)

    async def _read_from(self, link: Link, batch: list[ChainRead]) -> None:
        admitted = link.guard.reads.admit(len(batch))
        tried = [read for read in batch[:admitted] if read.outcome is None]
        if tried:
            for read in tried:
                read.in_flight = True
            await link.guard.read([replace(r.request, on_settled=partial(self._arrived, link, r)) for r in tried])
        elif admitted:
            link.guard.reads.give_up()
        further = self._try_next(read for read in batch if not read.in_flight and read.outcome is None)
        try:
            if further:
                await asyncio.wait(further)
        finally:
            for task in further:
                task.cancel()

    def _arrived(self, link: Link, read: ChainRead, outcome: ReadOutcome) -> None:
        read.in_flight = False
        if outcome.reason is None:
            if self._copies_forward:
                self._copy_forward(link, read.request, outcome)
            read.end(outcome)
        elif read.over is not None:
            read.end(unread(read.over) if outcome.cause is Cause.CANCELLED else outcome)
        elif outcome.cause is not Cause.ABSENT and read.miss is ABSENT:
            read.miss = outcome

    # -- writing ---------------------------------------------------------------------------------------

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self._check(())
        sizes = check_writes(requests)
        usable = [link for link in self.links if link.writes]
        links = [link for link in usable if link.takes is Takes.ALWAYS or link is usable[0]]
        writes = [ChainWrite(request, len(links)) for request in requests]
        if not links:
            for write in writes:
                write.end(REFUSED)
        not_begun = set(range(len(links)))

        def give_up(cause: Cause) -> None:
            for write in writes:
                write.over = cause
                for number in not_begun:
                    write.settled(number, WriteOutcome(SaveOutcome.FAILED, cause=cause))
            not_begun.clear()

        work = [self._write_to(link, number, writes, not_begun) for number, link in enumerate(links)]
        cause = await self._run([asyncio.create_task(part) for part in work], deadline_s, give_up)
        late = WriteOutcome(SaveOutcome.FAILED, cause=cause, settled=False)
        outcomes = [write.outcome or late for write in writes]
        self._counters.record_writes(outcomes, sizes)
        return outcomes

    async def _write_to(self, link: Link, number: int, writes: Sequence[ChainWrite], not_begun: set[int]) -> None:
        async with self._room(link, [write.request for write in writes]):
            if number not in not_begun:
                return
            not_begun.remove(number)
            admitted = link.guard.writes.admit(len(writes))
            for write in writes[admitted:]:
                write.settled(number, REFUSED)
            if admitted:
                await link.guard.write(
                    [replace(w.request, on_settled=partial(w.settled, number)) for w in writes[:admitted]]
                )

    @contextlib.asynccontextmanager
    async def _room(self, link: Link, requests: Sequence[WriteRequest]) -> AsyncIterator[None]:
        """Before blocks are written to a tier, what it evicts for them goes to the tier below it."""
        sizes = Counter(as_bytes(request.payload).size for request in requests)
        link.coming += sizes
        try:
            if (below := self._below.get(link)) is not None and below.writes and link.reads and link.writes:
                await self._move_back(link, below)
            yield
        finally:
            link.coming -= sizes

    async def _move_back(self, link: Link, below: Link) -> None:
        """Move what the writes under way would evict to the tier below, or wait for who has begun with that."""
        moves = set()
        for block in link.tier.coldest(list(link.coming.elements())):
            key, nbytes = block.key, link.tier.lookup([block.key])[0]
            if nbytes and not below.tier.lookup([key])[0] and self._may_copy(key, nbytes):
                self._start_copy(key, nbytes, self._copy(link, nbytes, below, key, block.last_use_s, moves=True))
            if key in self._copies:
                moves.add(self._copies[key])
        if moves:
            await asyncio.wait(moves, timeout=below.guard.longest_call_s)

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        try:
            async with asyncio.timeout(deadline_s):
                if copies := {self._copies[key] for key in keys if key in self._copies}:
                    await asyncio.wait(copies)
                deleted = await asyncio.gather(*(link.guard.delete(keys) for link in self.links if link.is_open))
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
            return [False] * len(keys)
        told = [of_link for of_link in deleted if of_link is not None]
        if len(told) < len(deleted) or not told:
            return [False] * len(keys)
        return [any(of_key) for of_key in zip(*told, strict=True)]

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.gather(*(link.guard.touch(keys, used_s) for link in self.links if link.writes))
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
        for number, link in enumerate(self.links[1:], 1):
            if link.takes is Takes.SECOND_TOUCH and link.writes:
                for key, nbytes, time_s in zip(keys, link.tier.lookup(keys), used_s, strict=True):
                    if not nbytes:
                        self._copy_back(self.links[:number], link, key, time_s)

    # -- copies between tiers --------------------------------------------------------------------------

    def _copy_forward(self, link: Link, request: ReadRequest, outcome: ReadOutcome) -> None:
        """A block was read from one tier: the tiers in front of it get a copy."""
        ahead = list(itertools.takewhile(lambda other: other is not link, self.links))
        taking = [other for other in ahead if other.writes and other.takes is not Takes.EVICTED]
        lacking = [other for other in taking if not other.tier.lookup([request.key])[0]]
        if lacking and self._may_copy(request.key, outcome.payload_bytes):
            payload = as_bytes(request.buffer)[: outcome.payload_bytes].copy()  # the caller's memory is given back now
            self._start_copy(
                request.key,
                payload.size,
                self._move_forward(link, lacking, request.key, payload, outcome, request.used_s),
            )

    async def _move_forward(
        self,
        link: Link,
        ahead: Sequence[Link],
        key: bytes,
        payload: Any,
        outcome: ReadOutcome,
        used_s: float | None,
    ) -> None:
        is_ahead = await self._put(ahead, key, payload, outcome, used_s)
        if is_ahead and link.takes is Takes.EVICTED:
            await link.guard.delete([key])

    def _copy_back(self, ahead: Sequence[Link], link: Link, key: bytes, used_s: float) -> None:
        """A block was used again: a tier that gets only such blocks gets it from one in front of it."""
        sources = [(other, nbytes) for other in ahead if other.reads and (nbytes := other.tier.lookup([key])[0])]
        if sources and self._may_copy(key, sources[0][1]):
            source, nbytes = sources[0]
            self._start_copy(key, nbytes, self._copy(source, nbytes, link, key, used_s))

    async def _copy(
        self, source: Link, nbytes: int, link: Link, key: bytes, used_s: float, *, moves: bool = False
    ) -> None:
        if not source.guard.reads.admit(1):
            return
        buffer = np.empty(nbytes, dtype=np.uint8)
        for outcome in await source.guard.read([ReadRequest(key, buffer, used_s=used_s)]):
            if outcome.reason is None:
                is_there = await self._put([link], key, buffer[: outcome.payload_bytes], outcome, used_s)
                if is_there and moves:  # now, and not by an eviction, which may take another block by then
                    await source.guard.delete([key])

    async def _put(
        self, links: Sequence[Link], key: bytes, payload: Any, outcome: ReadOutcome, used_s: float | None
    ) -> bool:
        """Returns True if one of the tiers has the block now."""
        is_there = False
        for link in links:
            request = WriteRequest(key, payload, outcome.digest, outcome.raw_bytes, outcome.codec, used_s=used_s)
            async with self._room(link, [request]):
                if link.guard.writes.admit(1):
                    is_there |= any(one.outcome.is_stored for one in await link.guard.write([request]))
        return is_there

    def _may_copy(self, key: bytes, nbytes: int) -> bool:
        return not self._is_closed and key not in self._copies and self._copied_bytes + nbytes <= COPY_BYTES

    def _start_copy(self, key: bytes, nbytes: int, copy: Coroutine[Any, Any, None]) -> None:
        self._copied_bytes += nbytes
        task = self._copies[key] = self._spawn(copy)
        task.add_done_callback(partial(self._end_copy, key, nbytes))

    def _end_copy(self, key: bytes, nbytes: int, _: object) -> None:
        self._copied_bytes -= nbytes
        del self._copies[key]

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        return sum(link.tier.capacity_bytes for link in self.links)

    @property
    def used_bytes(self) -> int:
        return sum(link.tier.used_bytes for link in self.links)

    def stats(self) -> TierStats:
        of_links = [link.tier.stats() for link in self.links]
        stats_of = dict(zip(self.links, of_links, strict=True))
        together = [self._exclusive.get(link, [link]) for link in self.links]
        scans = [stats.scan for link, stats in zip(self.links, of_links, strict=True) if link.is_open]
        return self._counters.snapshot(
            self.name,
            evicted_blocks=max(stats_of[last].evicted_blocks for *_, last in together),
            num_blocks=max(sum(stats_of[link].num_blocks for link in several) for several in together),
            used_bytes=self.used_bytes,
            capacity_bytes=self.capacity_bytes,
            unsettled=sum(stats.unsettled for stats in of_links),
            scan=ScanProgress(
                sum(scan.parts_done for scan in scans),
                sum(scan.parts_total for scan in scans),
                sum(scan.blocks for scan in scans),
                complete=bool(scans) and all(scan.complete for scan in scans),
            ),
        )

    # -- calls -----------------------------------------------------------------------------------------

    async def _run(
        self, tasks: Sequence[asyncio.Task[None]], deadline_s: float | None, give_up: Callable[[Cause], None]
    ) -> Cause:
        """Wait for the parts of a call. When the deadline has passed or the call is cancelled, end what has not begun.

        Returns:
            Why blocks are late, if some are: that one tier hangs is no deadline that the others have missed.
        """
        cause, running = Cause.CANCELLED, set[asyncio.Task[None]]()
        try:
            if tasks:
                _, running = await asyncio.wait(tasks, timeout=deadline_s)
            cause = Cause.CLOSED if self._is_closed else Cause.DEADLINE if running else Cause.IO_ERROR
        finally:
            give_up(cause)
            for task in tasks:
                task.cancel()
        if running:
            await asyncio.wait(running, timeout=SETTLE_S)
        return cause


def _first_of(answers: Sequence[Sequence[int]], count: int) -> list[int]:
    """For each key the first answer that is not 0."""
    if not answers:
        return [0] * count
    found = list(answers[0])
    for further in answers[1:]:
        if all(found):
            break
        found = [one or other for one, other in zip(found, further, strict=True)]
    return found
