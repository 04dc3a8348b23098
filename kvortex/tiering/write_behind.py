"""Write-behind: blocks move down, to the lower tier, after their save or when they are evicted."""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.index import Evicted
from kvortex.tiering.backing import NOT_KNOWN, BackingTier
from kvortex.tiering.keys import join_keys, split_keys
from kvortex.tiers import Cause, WriteOutcome, WriteRequest
from kvortex.types import Direction, SaveOutcome

WRITE_BATCH: Final = 16
"""Blocks of a write, unless the tier asks for more bytes at a time."""
DEMOTED_SHARE: Final = 0.1
"""Share of the pool that demoted blocks may hold: blocks that were evicted and wait for their write."""


@dataclass(frozen=True, slots=True)
class _Demoted:
    """A block that was evicted, and holds its extent until it is written."""

    key: bytes
    offset: int
    nbytes: int
    form: int
    digest: int
    used_s: float


class _Moving:
    """Writes of one block that the tier has not settled."""

    def __init__(self) -> None:
        self.count = 0
        self.settled = asyncio.get_running_loop().create_future()
        self.is_withdrawn = False


@dataclass(frozen=True, slots=True, eq=False)
class _Bar:
    """Blocks that are not taken just now; None for all."""

    keys: Collection[bytes] | None


class WriteBehind:
    """A bounded queue of blocks for one tier, and the task that writes them.

    The queue holds keys, not memory: a block is held in the pool only while it is being written. A block that was
    evicted holds its extent until it is written. Blocks beyond the bounds are shed and counted, and so is every block
    while the circuit breaker is open.

    Args:
        backing: the tier behind the pool.
    """

    def __init__(self, backing: BackingTier) -> None:
        self._backing = backing
        self._queue: dict[bytes, float] = {}  # block hash -> time at which it counts as used
        self._demoted: deque[_Demoted] = deque()
        self._demoted_bytes = 0
        self._demoted_limit = int(DEMOTED_SHARE * backing.pool.bytes.size)
        wanted_bytes = min(backing.tier.write_bytes, self._demoted_limit)
        self._batch = max(WRITE_BATCH, wanted_bytes // max(backing.encodings.payloads))
        self._moving: dict[bytes, _Moving] = {}  # by block hash
        self._bars: list[_Bar] = []
        self._has_work = asyncio.Event()
        self._writing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.shed_blocks = self.demoted_blocks = self.written_blocks = self.failed_writes = 0

    @property
    def num_waiting(self) -> int:
        """Blocks that wait to be written, or are being written."""
        return len(self._queue) + len(self._demoted) + self._writing

    async def flush(self) -> None:
        """Wait until no block waits or is being written."""
        await self._idle.wait()

    def stop_waiting(self) -> None:
        """Nothing is written any more: end every `flush`."""
        self._idle.set()

    def offer(self, keys: NDArray[np.uint64], used_s: NDArray[np.float64]) -> None:
        """Queue blocks of the pool that the tier may not have.

        Args:
            keys: block hashes, `uint64 [n, 4]`.
            used_s: times at which they count as used, `float64 [n]`.
        """
        if not self._backing.state.may_work:
            return
        if self._backing.guard.writes.refuses:
            self.shed_blocks += len(keys)
            return
        for key, time_s in zip(split_keys(keys), used_s.tolist(), strict=True):
            if key in self._queue:
                continue
            if self._bars and self._is_barred(key):
                continue
            if len(self._queue) >= self._backing.config.tier.queue_blocks:
                self.shed_blocks += 1
                if self._backing.config.tier.shed == "newest":
                    continue
                del self._queue[next(iter(self._queue))]
            self._queue[key] = time_s
        self._wake_writer()

    def demote(self, evicted: Evicted) -> NDArray[np.bool_]:
        """Keep eviction victims in their extents until they are written, as many as the bound allows.

        Returns:
            Which of them, `bool [n]`; the others are dropped.
        """
        kept = np.zeros(len(evicted.offsets), dtype=np.bool_)
        if self._backing.guard.writes.refuses:
            self.shed_blocks += len(kept)
            return kept
        fitting = int(np.searchsorted(np.cumsum(evicted.nbytes), self._demoted_limit - self._demoted_bytes, "right"))
        keys = split_keys(evicted.keys[:fitting])
        kept[:fitting] = [not self._is_barred(key) for key in keys] if self._bars else True
        columns = (evicted.offsets, evicted.nbytes, evicted.forms, evicted.digests)
        used_s = self._backing.uses.now()
        rows = zip(kept[:fitting].tolist(), keys, *(c[:fitting].tolist() for c in columns), strict=True)
        for is_kept, key, offset, nbytes, form, digest in rows:
            if is_kept:
                self._demoted.append(_Demoted(key, offset, nbytes, form, digest, used_s))
                self._demoted_bytes += nbytes
        num_kept = int(np.count_nonzero(kept))
        self.demoted_blocks += num_kept
        self.shed_blocks += len(kept) - num_kept
        self._wake_writer()
        return kept

    def _wake_writer(self) -> None:
        if (self._queue or self._demoted) and not self._backing.state.closing:
            self._idle.clear()
            self._has_work.set()

    def shed_all(self) -> None:
        """Shed every block that waits to be written."""
        self.shed_blocks += len(self._queue) + len(self._demoted)
        self.demoted_blocks -= len(self._demoted)
        self._queue.clear()
        while self._demoted:
            self._free_demoted(self._demoted.popleft())
        self._note_idle()

    async def withdraw(self, keys: Collection[bytes] | None = None) -> bool:
        """Have no block waiting or in flight to the tier. What comes to be stored nevertheless is deleted then.

        Args:
            keys: block hashes; None for all.

        Returns:
            True once none of these blocks is in flight; False if that takes longer than a call of the tier may take.
        """
        for key in list(self._queue) if keys is None else keys:
            self._queue.pop(key, None)
        for _ in range(len(self._demoted)):
            block = self._demoted.popleft()
            if keys is None or block.key in keys:
                self.demoted_blocks -= 1
                self._free_demoted(block)
            else:
                self._demoted.append(block)
        self._note_idle()
        moving = [move for key, move in self._moving.items() if keys is None or key in keys]
        for move in moving:
            move.is_withdrawn = True
        if not moving:
            return True
        settled = [move.settled for move in moving]
        _, late = await asyncio.wait(settled, timeout=self._backing.guard.longest_call_s)
        return not late

    @contextlib.contextmanager
    def barred(self, keys: Collection[bytes] | None = None) -> Iterator[None]:
        """Take none of these blocks, or none at all, meanwhile: the tier deletes them, and must not get them again."""
        bar = _Bar(keys)
        self._bars.append(bar)
        try:
            yield
        finally:
            self._bars.remove(bar)

    def _is_barred(self, key: bytes) -> bool:
        return any(bar.keys is None or key in bar.keys for bar in self._bars)

    def _note_idle(self) -> None:
        if not self._queue and not self._demoted and not self._writing:
            self._idle.set()

    async def run(self) -> None:
        """Write blocks as they come, until cancelled."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            while self._queue or self._demoted:
                admitted = self._backing.guard.writes.admit(self._batch)
                if not admitted:
                    self.shed_all()
                    break
                await self._write([*self._next_demoted(admitted), *self._next_queued(admitted)])
            self._note_idle()

    async def _write(self, requests: list[WriteRequest]) -> None:
        if not requests:
            self._backing.guard.writes.give_up()
            return
        started = time.perf_counter()
        if self._backing.pool.num_parts > 1:
            requests = await self._with_digests(requests)
        outcomes = await self._backing.guard.write(requests)
        self._writing -= len(requests)
        stored = [request for request, outcome in zip(requests, outcomes, strict=True) if outcome.outcome.is_stored]
        nbytes = sum(len(request.payload) for request in stored)  # arrays and views of bytes
        self._backing.record(Direction.SAVE, len(stored), nbytes, time.perf_counter() - started)

    async def _with_digests(self, requests: list[WriteRequest]) -> list[WriteRequest]:
        try:
            return await asyncio.to_thread(lambda: [*map(self._backing.pool.digest_in_tier, requests)])
        except BaseException:
            self._backing.guard.writes.give_up()
            self._writing -= len(requests)
            for request in requests:
                request.settle(WriteOutcome(SaveOutcome.FAILED, cause=Cause.CANCELLED))
            raise

    def _next_demoted(self, most: int) -> list[WriteRequest]:
        taken = [self._demoted.popleft() for _ in range(min(most, len(self._demoted)))]
        self._writing += len(taken)
        return [
            self._write_request(
                block.key, block.offset, block.form, block.digest, block.used_s, partial(self._demoted_done, block)
            )
            for block in taken
        ]

    def _next_queued(self, most: int) -> list[WriteRequest]:
        used_s = {key: self._queue.pop(key) for key in list(itertools.islice(self._queue, most))}
        hashes = join_keys(list(used_s))
        known = self._backing.encodings_known(hashes)
        if (known != NOT_KNOWN).any():
            self._backing.tasks.spawn(self._backing.touch(hashes, known, np.array(list(used_s.values()))))
        keys = [key for key, encoding in zip(used_s, known.tolist(), strict=True) if encoding == NOT_KNOWN]
        held = self._backing.control.hold(join_keys(keys))
        self._writing += len(held.slots)
        columns = (held.positions, held.slots, held.offsets, held.forms, held.digests)
        return [
            self._write_request(
                key := keys[position], offset, form, digest, used_s[key], partial(self._queued_done, key, slot)
            )
            for position, slot, offset, form, digest in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _write_request(
        self,
        key: bytes,
        offset: int,
        form: int,
        digest: int,
        used_s: float,
        done: Callable[[WriteOutcome], None],
    ) -> WriteRequest:
        backing = self._backing
        self._moving.setdefault(key, _Moving()).count += 1
        raw_nbytes, codec = backing.encodings.raw_nbytes(form), backing.encodings.codecs[form]
        tier_key = backing.key_of(key, form)
        payload = backing.pool.payload(offset, form)
        return WriteRequest(tier_key, payload, digest, raw_nbytes, codec, done, used_s, form)

    def _queued_done(self, key: bytes, slot: int, outcome: WriteOutcome) -> None:
        self._backing.control.release(np.array([slot]))
        self._settled(key, outcome)

    def _demoted_done(self, block: _Demoted, outcome: WriteOutcome) -> None:
        self._free_demoted(block)
        self._settled(block.key, outcome)

    def _free_demoted(self, block: _Demoted) -> None:
        self._demoted_bytes -= block.nbytes
        self._backing.control.free(block.offset)

    def _settled(self, key: bytes, outcome: WriteOutcome) -> None:
        self._count_write(outcome)
        if outcome.outcome.is_stored and self._backing.on_written is not None:
            self._backing.on_written(key)
        move = self._moving[key]
        move.count -= 1
        if not move.count:
            del self._moving[key]
            move.settled.set_result(None)
        if move.is_withdrawn and outcome.outcome.is_stored and not self._backing.state.closing:
            self._backing.tasks.spawn(self._backing.delete(join_keys([key])))

    def _count_write(self, outcome: WriteOutcome) -> None:
        if outcome.outcome.is_stored:
            self.written_blocks += 1
        else:
            self.failed_writes += 1
