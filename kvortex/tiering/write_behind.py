"""Down: blocks are written to the lower tier behind their save, or when they are evicted."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.index import Evicted
from kvortex.tiering.link import TierLink, join_keys, split_keys
from kvortex.tiers import WriteOutcome, WriteRequest
from kvortex.types import Direction

WRITE_BATCH: Final = 16
DEMOTED_SHARE: Final = 0.1
"""Of the pool: what was evicted and waits for the lower tier may hold so much."""


@dataclass(frozen=True, slots=True)
class _Demoted:
    """A block that was evicted and holds its extent until it is written."""

    key: bytes
    offset: int
    nbytes: int
    digest: int


class WriteBehind:
    """A bounded queue of blocks for one tier, and the task that writes them.

    The queue holds keys, not memory: a block is held in the pool only while it is written. What was evicted holds its
    extent until it is written. What is too much is shed and counted.
    """

    def __init__(self, link: TierLink) -> None:
        self._link = link
        self._queue: deque[bytes] = deque()
        self._queued: set[bytes] = set()
        self._demoted: deque[_Demoted] = deque()
        self._demoted_bytes = 0
        self._demoted_limit = int(DEMOTED_SHARE * link.pool.size)
        self._work = asyncio.Event()
        self._writing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.shed_blocks = self.demoted_blocks = self.written_blocks = self.failed_writes = 0

    @property
    def num_waiting(self) -> int:
        """Blocks that wait to be written, or are being written."""
        return len(self._queue) + len(self._demoted) + self._writing

    async def flush(self) -> None:
        """Wait until none is left."""
        await self._idle.wait()

    def end(self) -> None:
        """Nobody needs to wait any longer."""
        self._idle.set()

    def offer(self, keys: NDArray[np.uint64]) -> None:
        """Queue blocks of the pool, `uint64 [n, 4]`, that the tier may not have."""
        if not self._link.may_work:
            return
        for key in split_keys(keys):
            if key in self._queued:
                continue
            if len(self._queue) >= self._link.config.tier_queue_blocks:
                self.shed_blocks += 1
                if self._link.config.tier_shed == "newest":
                    continue
                self._queued.discard(self._queue.popleft())
            self._queue.append(key)
            self._queued.add(key)
        self._look_for_work()

    def take_over(self, evicted: Evicted) -> int:
        """Blocks that are evicted while there is room: the tier's copies are made before their extents are free."""
        fitting = int(np.searchsorted(np.cumsum(evicted.nbytes), self._demoted_limit - self._demoted_bytes, "right"))
        keys = split_keys(evicted.keys[:fitting])
        columns = zip(evicted.offsets.tolist(), evicted.nbytes.tolist(), evicted.digests.tolist(), strict=True)
        for key, (offset, nbytes, digest) in zip(keys, columns, strict=False):
            self._demoted.append(_Demoted(key, offset, nbytes, digest))
            self._demoted_bytes += nbytes
        self.demoted_blocks += fitting
        self.shed_blocks += len(evicted.offsets) - fitting
        self._look_for_work()
        return fitting

    def _look_for_work(self) -> None:
        if (self._queue or self._demoted) and not self._link.closing:
            self._idle.clear()
            self._work.set()

    def give_up(self) -> None:
        """Write nothing of what waits."""
        self.shed_blocks += len(self._queue) + len(self._demoted)
        self._queue.clear()
        self._queued.clear()
        while self._demoted:
            self._free_demoted(self._demoted.popleft())
        self._rest()

    def _rest(self) -> None:
        if not self._queue and not self._demoted and not self._writing:
            self._idle.set()

    async def run(self) -> None:
        """Write what comes, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._queue or self._demoted:
                requests = [*self._next_demoted(), *self._next_queued()]
                started = time.perf_counter()
                outcomes = await self._link.tier.write(requests, deadline_s=self._link.config.tier_timeout_s)
                self._writing -= len(requests)
                stored = sum(outcome.outcome.is_stored for outcome in outcomes)
                self._link.record(Direction.SAVE, stored, time.perf_counter() - started)
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
        known = self._link.lookup(keys)
        keys = [key for key, nbytes in zip(keys, known, strict=True) if not nbytes]
        held = self._link.control.hold(join_keys(keys))
        self._writing += len(held.slots)
        columns = (held.positions, held.slots, held.offsets, held.nbytes, held.digests)
        return [
            self._write_request(keys[position], offset, nbytes, digest, partial(self._queued_done, slot))
            for position, slot, offset, nbytes, digest in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _write_request(
        self, key: bytes, offset: int, nbytes: int, digest: int, done: Callable[[WriteOutcome], None]
    ) -> WriteRequest:
        link = self._link
        packed = link.control.is_packed(nbytes)
        raw_nbytes, codec = link.forms.payloads.raw, link.forms.codec_number(packed)
        return WriteRequest(link.key_of(key), link.payload(offset, nbytes), digest, raw_nbytes, codec, done)

    def _queued_done(self, slot: int, outcome: WriteOutcome) -> None:
        self._link.control.release(np.array([slot]))
        self._count_write(outcome)

    def _demoted_done(self, block: _Demoted, outcome: WriteOutcome) -> None:
        self._free_demoted(block)
        self._count_write(outcome)

    def _free_demoted(self, block: _Demoted) -> None:
        self._demoted_bytes -= block.nbytes
        self._link.control.free(block.offset)

    def _count_write(self, outcome: WriteOutcome) -> None:
        if outcome.outcome.is_stored:
            self.written_blocks += 1
        else:
            self.failed_writes += 1
