"""A tier in memory whose reads and writes have random durations and faults."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError
from kvortex.testing import TierFault
from kvortex.tiers import MemoryTier, ReadOutcome, ReadRequest, Tier, WriteOutcome, WriteRequest
from kvortex.tiers.base import Cause, ScanProgress, StoredBlock, TierStats, as_bytes, check_reads, check_writes
from kvortex.types import Direction, MissReason, SaveOutcome
from tests.simulation.harm import Harm
from tests.simulation.ledger import Ledger, Use

GARBAGE = 0x5A
WIDTH = 4  # blocks that move at a time, as threads would; the others wait
SHORT_S, LONG_S = 0.002, 0.4


@dataclass(frozen=True, slots=True)
class TierFaults:
    """Chances of a block, 0 to 1."""

    slow: float = 0.0
    hang: float = 0.0  # longer than the caller's deadline
    fail: float = 0.0
    short: float = 0.0
    lie: float = 0.0
    full: float = 0.0
    unopened: float = 0.0  # of a tier: it cannot be used at all
    stale: float = 0.0  # of a look-up: it does not know, or believes in what is gone


class Store(MemoryTier):
    """What outlives the tiers that serve it, as a directory outlives processes."""

    async def aclose(self) -> None:
        """Kept."""


@dataclass(eq=False, slots=True)
class _Move:
    request: ReadRequest | WriteRequest
    use: Use
    fault: TierFault | None
    ends: "asyncio.Future[Any]"
    started_s: float | None = None

    @property
    def reads(self) -> bool:
        return isinstance(self.request, ReadRequest)


class SimulatedTier(Tier):
    """Buffers hold garbage while their reads move. What hangs ends by itself, later than its deadline.

    Args:
        store: what it serves.
        pool: to tell where in it a buffer lies.
        ledger, harm: are told what it touches, and what it does to whom.
        dice: seeded.
        faults: what goes wrong, and how often.
        hang_s: how long a move hangs.
        hash_of: the block hash behind a tier's key.
        waits_at_end: `aclose` waits for what hangs; otherwise it settles after that.
    """

    name = "simulated"
    outlives_process = False

    def __init__(
        self,
        store: Store,
        pool: NDArray[np.uint8],
        ledger: Ledger,
        harm: Harm,
        dice: random.Random,
        faults: TierFaults,
        *,
        hang_s: float,
        hash_of: Callable[[bytes], bytes],
        waits_at_end: bool,
    ) -> None:
        self.faults = faults
        self.reads_settled = self.writes_stored = self.writes_refused = 0
        self.good_reads = 0
        self.moving: set[_Move] = set()
        self.read_spans: dict[bytes, list[list[float]]] = {}
        self.said_there: set[bytes] = set()
        self._store = store
        self._pool_address = pool.__array_interface__["data"][0]
        self._ledger = ledger
        self._harm = harm
        self._dice = dice
        self.hang_s = hang_s
        self._hash_of = hash_of
        self._waits_at_end = waits_at_end
        self._waiting: deque[_Move] = deque()
        self._believed_gone: set[bytes] = set()
        self._scanned = False

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        await asyncio.sleep(self._dice.choice((0.0, SHORT_S, LONG_S)))
        if self._dice.random() < self.faults.unopened:
            raise ConfigError("injected: the store cannot be used")
        asyncio.get_running_loop().call_later(self._dice.uniform(0, 2 * LONG_S), self._end_scan)

    def _end_scan(self) -> None:
        self._scanned = True

    async def aclose(self) -> None:
        self._drop(list(self._waiting), Cause.CLOSED)
        if self._waits_at_end and self.moving:
            await asyncio.wait([move.ends for move in self.moving])

    # -- asking ----------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        told = [self._stale(key, nbytes) for key, nbytes in zip(keys, self._store.lookup(keys), strict=True)]
        self.said_there.update(self._hash_of(key) for key, nbytes in zip(keys, told, strict=True) if nbytes)
        return told

    def _stale(self, key: bytes, nbytes: int) -> int:
        if not self.faults.stale or self._dice.random() >= self.faults.stale:
            return nbytes
        return 0 if nbytes else self._dice.choice((0, 1024))

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        await asyncio.sleep(self._dice.uniform(0, SHORT_S))
        there = await self._store.find(keys)
        self.said_there.update(self._hash_of(key) for key, is_there in zip(keys, there, strict=True) if is_there)
        return there

    def scan(self) -> AsyncIterator[StoredBlock]:
        return self._store.scan()

    # -- moving ----------------------------------------------------------------------------------------

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        check_reads(requests)
        moves = [self._take(request, self._draw(Direction.LOAD), as_bytes(request.buffer)) for request in requests]
        outcomes: list[ReadOutcome] = await self._move_all(moves, deadline_s)
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        check_writes(requests)
        moves = [self._take(request, self._draw(Direction.SAVE), as_bytes(request.payload)) for request in requests]
        outcomes: list[WriteOutcome] = await self._move_all(moves, deadline_s)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        await asyncio.sleep(self._dice.uniform(0, SHORT_S))
        return await self._store.delete(keys)

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        await self._store.touch(keys, used_s)

    def _draw(self, direction: Direction) -> TierFault | None:
        roll, faults = self._dice.random(), self.faults
        chances = [
            (TierFault.SLOW, faults.slow),
            (TierFault.HANG, faults.hang),
            (TierFault.FAIL, faults.fail),
            (TierFault.SHORT, faults.short),
            (TierFault.LIE, faults.lie),
        ]
        if direction is Direction.SAVE:
            chances.append((TierFault.FULL, faults.full))
        for fault, chance in chances:
            if roll < chance:
                return fault
            roll -= chance
        return None

    def _take(self, request: Any, fault: TierFault | None, memory: NDArray[np.uint8]) -> _Move:
        offset = memory.__array_interface__["data"][0] - self._pool_address
        reads = isinstance(request, ReadRequest)
        who = "a tier's read" if reads else "a tier's write"
        loop = asyncio.get_running_loop()
        move = _Move(request, self._ledger.begin(who, offset, memory.size, writes=reads), fault, loop.create_future())
        self.moving.add(move)
        self._waiting.append(move)
        if reads:
            memory[:] = GARBAGE
        return move

    async def _move_all(self, moves: list[_Move], deadline_s: float | None) -> list[Any]:
        self._start_some()
        try:
            if moves:
                await asyncio.wait([move.ends for move in moves], timeout=deadline_s)
        except asyncio.CancelledError:
            self._drop(moves, Cause.CANCELLED)
            raise
        self._harm.be_late(self._hash_of(move.request.key) for move in moves if not move.ends.done())
        self._drop(moves, Cause.DEADLINE)
        return [move.ends.result() if move.ends.done() else _outcome(move, Cause.DEADLINE, False) for move in moves]

    def _drop(self, moves: list[_Move], cause: Cause) -> None:
        """What has not been started never will be."""
        for move in moves:
            if move.started_s is None and not move.ends.done():
                self._waiting.remove(move)
                self._harm.fail([self._hash_of(move.request.key)])
                self._settle(move, _outcome(move, cause, True))

    def _start_some(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and sum(move.started_s is not None for move in self.moving) < WIDTH:
            move = self._waiting.popleft()
            move.started_s = loop.time()
            seconds = self._dice.uniform(0, SHORT_S)
            if move.fault is TierFault.SLOW:
                seconds = self._dice.uniform(SHORT_S, LONG_S)
            elif move.fault is TierFault.HANG:
                seconds = self.hang_s
            loop.call_later(seconds, self._end, move)

    def _end(self, move: _Move) -> None:
        request = move.request
        self._settle(
            move, self._read(move, request) if isinstance(request, ReadRequest) else self._write(move, request)
        )
        self._start_some()

    def _settle(self, move: _Move, outcome: Any) -> None:
        self.moving.remove(move)
        self._ledger.end(move.use)
        if move.reads:
            self.reads_settled += 1
            self.read_spans[self._hash_of(move.request.key)][-1][1] = asyncio.get_running_loop().time()
        elif outcome.outcome.is_stored:
            self.writes_stored += 1
        else:
            self.writes_refused += 1
        move.request.settle(outcome)
        move.ends.set_result(outcome)

    def _read(self, move: _Move, request: ReadRequest) -> ReadOutcome:
        block_hash = self._hash_of(request.key)
        if move.fault is TierFault.FAIL:
            self._harm.fail([block_hash])
            return ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.IO_ERROR)
        outcome = self._store._read(request)
        if outcome.reason is MissReason.TRANSFER_FAILED:
            self._harm.fail([block_hash])  # the look-up was wrong about its size
        if outcome.reason is not None:
            return outcome
        if move.fault is TierFault.LIE:
            self._harm.corrupt([block_hash])
            as_bytes(request.buffer)[outcome.payload_bytes // 2] ^= 1
        if move.fault is TierFault.SHORT:
            self._harm.fail([block_hash])
            as_bytes(request.buffer)[outcome.payload_bytes // 2 :] = GARBAGE
            return replace(outcome, payload_bytes=outcome.payload_bytes // 2)
        if outcome.payload_bytes == len(as_bytes(request.buffer)):
            self.good_reads += 1
        else:
            self._harm.fail([block_hash])  # likewise: it rests packed, and was asked for as it is
        return outcome

    def _write(self, move: _Move, request: WriteRequest) -> WriteOutcome:
        if move.fault is TierFault.FAIL:
            return WriteOutcome(SaveOutcome.FAILED, cause=Cause.IO_ERROR)
        if move.fault is TierFault.FULL:
            return WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE)
        if move.fault is TierFault.LIE:
            return WriteOutcome(SaveOutcome.STORED)
        if move.fault is TierFault.SHORT:  # no digest fits what is kept
            self._harm.corrupt([self._hash_of(request.key)])
            request = replace(request, payload=as_bytes(request.payload)[: request.raw_bytes // 4])
        return self._store._write(request)

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        return self._store.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._store.used_bytes

    def stats(self) -> TierStats:
        scan = ScanProgress(0, 1, len(self._store._kept), complete=self._scanned)
        return replace(self._store.stats(), unsettled=len(self.moving), scan=scan)


def _outcome(move: _Move, cause: Cause, settled: bool) -> ReadOutcome | WriteOutcome:
    if move.reads:
        reason = MissReason.DEADLINE if cause is Cause.DEADLINE else MissReason.TRANSFER_FAILED
        return ReadOutcome(reason, cause=cause, settled=settled)
    return WriteOutcome(SaveOutcome.FAILED, cause=cause, settled=settled)
