"""A tier that injects faults into another one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any, TypeVar

from kvortex.tiers.base import (
    Cause,
    ReadOutcome,
    ReadRequest,
    StoredBlock,
    Tier,
    TierStats,
    WriteOutcome,
    WriteRequest,
    as_bytes,
    check_reads,
    check_writes,
)
from kvortex.types import Direction, MissReason, SaveOutcome

Outcome = TypeVar("Outcome")


class TierFault(Enum):
    """What goes wrong with one block of a read or write."""

    SLOW = auto()  # the block moves after `delay_s`
    HANG = auto()  # the block moves after `release`; after a deadline the tier keeps the buffer, as the contract says
    FAIL = auto()  # the block does not move; the cause is IO_ERROR
    SHORT = auto()  # a read returns the first half only, and says so; a write stores it under the digest of the whole
    LIE = auto()  # a read is a hit with one wrong bit; a write returns STORED and stores nothing
    FULL = auto()  # a write finds no space; a read is not affected


class FaultInjectingTier(Tier):
    """Passes all calls to another tier and injects faults into reads and writes.

    Args:
        inner: tier that stores the blocks.
        fault_of: returns what goes wrong with a block, or None. It is called with the direction (LOAD for a read), the
            number of the block, counted from 0 in each direction, and its key.
        delay_s: seconds by which SLOW delays a block.
    """

    def __init__(
        self,
        inner: Tier,
        fault_of: Callable[[Direction, int, bytes], TierFault | None],
        *,
        delay_s: float = 0.05,
    ) -> None:
        self.name = inner.name
        self.outlives_process = inner.outlives_process
        self.finds_more = inner.finds_more
        self.write_bytes = inner.write_bytes
        self._inner = inner
        self._fault_of = fault_of
        self._delay_s = delay_s
        self._numbers = dict.fromkeys(Direction, 0)
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_held(self) -> int:
        """Number of blocks whose read or write has not ended."""
        return len(self._tasks)

    def release(self) -> None:
        """Let all blocks that hang go on. Blocks with a later HANG hang again."""
        self._released.set()
        self._released = asyncio.Event()

    async def open(self) -> None:
        await self._inner.open()

    async def aclose(self) -> None:
        self.release()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._inner.aclose()

    async def scanned(self) -> None:
        await self._inner.scanned()

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        return self._inner.lookup(keys)

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        return await self._inner.find(keys, deadline_s=deadline_s)

    def coldest(self, payloads: Sequence[int]) -> list[StoredBlock]:
        return self._inner.coldest(payloads)

    def scan(self) -> AsyncIterator[StoredBlock]:
        return self._inner.scan()

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        if not requests:
            return await self._inner.read(requests)  # raises if the tier is not open
        check_reads(requests)
        tasks = [self._start(self._read(request, self._fault(Direction.LOAD, request.key))) for request in requests]
        late = ReadOutcome(MissReason.DEADLINE, cause=Cause.DEADLINE, settled=False)
        return await _collect(tasks, late, deadline_s)

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        if not requests:
            return await self._inner.write(requests)
        check_writes(requests)
        tasks = [self._start(self._write(request, self._fault(Direction.SAVE, request.key))) for request in requests]
        late = WriteOutcome(SaveOutcome.FAILED, cause=Cause.DEADLINE, settled=False)
        return await _collect(tasks, late, deadline_s)

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        return await self._inner.delete(keys, deadline_s=deadline_s)

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        await self._inner.touch(keys, used_s, deadline_s=deadline_s)

    @property
    def capacity_bytes(self) -> int:
        return self._inner.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._inner.used_bytes

    def stats(self) -> TierStats:
        return replace(self._inner.stats(), unsettled=len(self._tasks))

    # -- inside ----------------------------------------------------------------------------------------

    def _fault(self, direction: Direction, key: bytes) -> TierFault | None:
        number = self._numbers[direction]
        self._numbers[direction] += 1
        return self._fault_of(direction, number, key)

    def _start(self, block: Coroutine[Any, Any, Outcome]) -> asyncio.Task[Outcome]:
        # A task of its own goes on if the caller is cancelled, as the thread of a real tier does.
        task = asyncio.create_task(block)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _pause(self, fault: TierFault | None) -> None:
        if fault is TierFault.SLOW:
            await asyncio.sleep(self._delay_s)
        elif fault is TierFault.HANG:
            await self._released.wait()

    async def _read(self, request: ReadRequest, fault: TierFault | None) -> ReadOutcome:
        await self._pause(fault)
        if fault is TierFault.FAIL:
            outcome = ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.IO_ERROR, detail="injected")
        else:
            (outcome,) = await self._inner.read([replace(request, on_settled=None)])
        if outcome.reason is None and fault is TierFault.LIE:
            as_bytes(request.buffer)[outcome.payload_bytes // 2] ^= 1
        if outcome.reason is None and fault is TierFault.SHORT:
            as_bytes(request.buffer)[outcome.payload_bytes // 2 :] = 0
            outcome = replace(outcome, payload_bytes=outcome.payload_bytes // 2)
        request.settle(outcome)
        return outcome

    async def _write(self, request: WriteRequest, fault: TierFault | None) -> WriteOutcome:
        await self._pause(fault)
        if fault is TierFault.FAIL:
            outcome = WriteOutcome(SaveOutcome.FAILED, cause=Cause.IO_ERROR, detail="injected")
        elif fault is TierFault.FULL:
            outcome = WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE, detail="injected")
        elif fault is TierFault.LIE:
            outcome = WriteOutcome(SaveOutcome.STORED)
        else:
            payload = as_bytes(request.payload)
            half = payload[: max(1, payload.size // 2)]
            kept = replace(request, payload=half if fault is TierFault.SHORT else payload, on_settled=None)
            (outcome,) = await self._inner.write([kept])
        request.settle(outcome)
        return outcome


async def _collect(tasks: Sequence[asyncio.Task[Outcome]], late: Outcome, deadline_s: float | None) -> list[Outcome]:
    if tasks:
        await asyncio.wait(tasks, timeout=deadline_s)
    return [task.result() if task.done() else late for task in tasks]
