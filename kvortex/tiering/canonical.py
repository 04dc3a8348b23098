"""A lower tier with canonical blocks: they are re-laid on the way down and on the way up, in scratch memory.

    write   payload in the pool ──re-laid──> scratch ──> tier
    read    tier ──> scratch ──re-laid──> payload in the pool

On each way a block is checked twice, as the pool has it and as the tier has it. So what was damaged in either never
gets a digest that fits.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import EngineStateError, KVortexError
from kvortex.kernels.relayout import warm_up
from kvortex.tiering.canonical_blocks import CanonicalBlock
from kvortex.tiering.chain_parts import unread
from kvortex.tiering.scratch import MIN_BUFFERS, Scratch
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, StoredBlock, Tier, TierStats, WriteOutcome, WriteRequest
from kvortex.tiers.base import as_bytes, check_keys, check_reads, check_writes
from kvortex.tiers.counters import TierCounters
from kvortex.types import MissReason, SaveOutcome

logger = logging.getLogger(__name__)

BATCH: Final = 8
"""Blocks of a call that are re-laid and moved together; others of the call move at the same time."""
THREADS: Final = 4
SETTLE_S: Final = 0.2
"""Seconds that blocks get to settle when the deadline of their call has passed, before they count as late."""
CLOSE_TIMEOUT_S: Final = 5.0

assert BATCH <= MIN_BUFFERS

Result = TypeVar("Result")


class _Call:
    """The blocks of one call that have no outcome yet."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.over = asyncio.Event()
        if not count:
            self.over.set()


class _Move:
    """One block of a call."""

    def __init__(self, request: Any, block: CanonicalBlock, call: _Call) -> None:
        self.request = request
        self.block = block
        self.scratch: NDArray[np.uint8] | None = None
        self.is_inside = False  # the other tier owns the scratch memory
        self.ended_by: Cause | None = None  # why the call does not wait for it any more
        self.outcome: Any = None
        self._call = call

    @property
    def canonical(self) -> NDArray[np.uint8]:
        """The scratch memory of its canonical payload."""
        assert self.scratch is not None
        return self.scratch[: self.block.nbytes]

    def unfinished(self, cause: Cause, detail: str = "") -> Any:
        if isinstance(self.request, WriteRequest):
            return WriteOutcome(SaveOutcome.FAILED, cause=cause, detail=detail)
        return replace(unread(cause), detail=detail)

    def end(self, outcome: Any) -> None:
        if outcome.cause is Cause.CANCELLED and self.ended_by is not None:
            outcome = self.unfinished(self.ended_by)
        self.outcome = outcome
        self.request.settle(outcome)
        self._call.left -= 1
        if not self._call.left:
            self._call.over.set()


class CanonicalTier(Tier):
    """Another tier, with canonical blocks. Its keys, order of eviction and capacity are those of the other.

    The other tier gets scratch memory only, and a buffer of that serves another block once the other tier has settled
    it. Where every buffer is in use, blocks wait, each as long as its call does.

    Args:
        inner: the other tier, not opened. Its namespace is that of the canonical blocks.
        blocks: re-lay the blocks of each form; None for forms that there are not.
    """

    def __init__(self, inner: Tier, blocks: Sequence[CanonicalBlock | None]) -> None:
        self.inner = inner
        self.name = inner.name
        self.outlives_process = inner.outlives_process
        self.finds_more = inner.finds_more
        self.write_bytes = inner.write_bytes
        self._blocks = tuple(blocks)
        there = [block for block in blocks if block is not None]
        self._room = max(block.payload_nbytes for block in there)
        self._canonical_of = {block.payload_nbytes: block.nbytes for block in there}
        self._scratch = Scratch(max(block.nbytes for block in there))
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvortex-relayout")
        self._counters = TierCounters()
        self._moves: set[_Move] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._is_open = self._is_closed = self._has_warned = False

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise EngineStateError(f"the {self.name} tier was closed; make a new one")
            if not self._is_open:
                await asyncio.gather(self.inner.open(), asyncio.to_thread(warm_up))
                self._is_open = True

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for move in [move for move in self._moves if move.scratch is None]:
            self._end(move, move.unfinished(Cause.CLOSED))
        try:
            await self.inner.aclose()
        finally:
            if self._background:
                await asyncio.wait(self._background, timeout=CLOSE_TIMEOUT_S)
            self._threads.shutdown(wait=False)

    async def scanned(self) -> None:
        await self.inner.scanned()

    def _check(self, keys: Sequence[bytes]) -> None:
        if not self._is_open or self._is_closed:
            raise EngineStateError(f"the {self.name} tier is not open; use it between open() and aclose()")
        check_keys(keys)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        try:
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:  # the interpreter ends, or this tier was closed while the other still moved a block
            return work()
        return await done

    # -- asking ----------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        return self._rooms(self.inner.lookup(keys))

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        return self._rooms(await self.inner.find(keys, deadline_s=deadline_s))

    def _rooms(self, found: Sequence[int]) -> list[int]:
        return [self._room if nbytes else 0 for nbytes in found]

    def scan(self) -> AsyncIterator[StoredBlock]:
        return self.inner.scan()

    def coldest(self, payloads: Sequence[int]) -> list[StoredBlock]:
        return self.inner.coldest([self._canonical_of.get(nbytes, nbytes) for nbytes in payloads])

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        return await self.inner.delete(keys, deadline_s=deadline_s)

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        await self.inner.touch(keys, used_s, deadline_s=deadline_s)

    # -- moving ----------------------------------------------------------------------------------------

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self._check(())
        check_reads(requests)
        blocks = [self._block_of(request) for request in requests]
        outcomes: list[ReadOutcome] = await self._run(requests, blocks, self._read, deadline_s)
        self._counters.record_reads(outcomes)
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self._check(())
        sizes = check_writes(requests)
        blocks = [self._block_of(request) for request in requests]
        for block, nbytes in zip(blocks, sizes, strict=True):
            if nbytes != block.payload_nbytes:
                raise ValueError(f"a block of {nbytes} bytes instead of {block.payload_nbytes}")
        outcomes: list[WriteOutcome] = await self._run(requests, blocks, self._write, deadline_s)
        self._counters.record_writes(outcomes, (block.nbytes for block in blocks))
        return outcomes

    def _block_of(self, request: ReadRequest | WriteRequest) -> CanonicalBlock:
        block = self._blocks[request.form] if 0 <= request.form < len(self._blocks) else None
        if block is None:
            raise ValueError(f"there are no canonical blocks of form {request.form}")
        return block

    async def _run(
        self,
        requests: Sequence[Any],
        blocks: Sequence[CanonicalBlock],
        work: Callable[[list[_Move], float | None], Coroutine[Any, Any, None]],
        deadline_s: float | None,
    ) -> list[Any]:
        call = _Call(len(requests))
        moves = [_Move(request, block, call) for request, block in zip(requests, blocks, strict=True)]
        self._moves.update(moves)
        due_s = None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s
        parts = [moves[start : start + BATCH] for start in range(0, len(moves), BATCH)]
        tasks = [asyncio.create_task(work(part, due_s)) for part in parts]
        cause, over = Cause.CANCELLED, asyncio.create_task(call.over.wait())
        try:
            await asyncio.wait([*tasks, over], timeout=deadline_s)
            cause = Cause.CLOSED if self._is_closed else Cause.DEADLINE
        finally:
            over.cancel()
            for move in moves:
                move.ended_by = cause
                if move.scratch is None and move.outcome is None:
                    self._end(move, move.unfinished(cause))
            for task in tasks:
                task.cancel()
        if call.left:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await call.over.wait()
        return [move.outcome or replace(move.unfinished(cause), settled=False) for move in moves]

    async def _begin(self, moves: Sequence[_Move]) -> list[_Move]:
        """Wait for scratch memory; returns the blocks that are still wanted then, each with a buffer."""
        buffers = await self._scratch.take(len(moves))
        wanted = [move for move in moves if move.outcome is None]
        for move in wanted:
            move.scratch = buffers.pop()
        self._scratch.give(buffers)
        return wanted

    def _end(self, move: _Move, outcome: Any) -> None:
        """Nothing touches the memory of a block any more."""
        scratch, move.scratch = move.scratch, None
        move.is_inside = False
        self._moves.discard(move)
        move.end(outcome)
        if scratch is not None:
            self._scratch.give([scratch])

    async def _pass_on(self, moves: Sequence[_Move], call: Awaitable[object]) -> None:
        """A call of the other tier, which settles each of these blocks."""
        for move in moves:
            move.is_inside = True
        try:
            await call
        except (KVortexError, ValueError) as error:  # misuse, or closed in the meantime: nothing has been started
            logger.warning("the %s tier refuses a call: %s", self.name, error)
            for move in [move for move in moves if move.is_inside]:
                self._end(move, move.unfinished(Cause.CLOSED if self._is_closed else Cause.IO_ERROR, str(error)))
        except Exception as error:  # tiers can be third-party code
            logger.exception("the %s tier failed unexpectedly", self.name)
            for move in [move for move in moves if move.is_inside]:
                move.scratch = None  # it may still be written to
                self._end(move, move.unfinished(Cause.IO_ERROR, f"{type(error).__name__}: {error}"))
                self._scratch.abandon()

    @staticmethod
    def _comes_back(move: _Move) -> bool:
        """The other tier settles a block; False if the call that it belongs to has raised before."""
        was_inside, move.is_inside = move.is_inside, False
        return was_inside

    def _left_s(self, due_s: float | None) -> float | None:
        return None if due_s is None else max(due_s - asyncio.get_running_loop().time(), 0.0)

    # -- reading ---------------------------------------------------------------------------------------

    async def _read(self, moves: list[_Move], due_s: float | None) -> None:
        if not (wanted := await self._begin(moves)):
            return
        requests = [
            ReadRequest(move.request.key, move.canonical, partial(self._arrived, move), move.request.used_s)
            for move in wanted
        ]
        await self._pass_on(wanted, self.inner.read(requests, deadline_s=self._left_s(due_s)))

    def _arrived(self, move: _Move, outcome: ReadOutcome) -> None:
        if not self._comes_back(move):
            return
        if outcome.reason is None:
            self._spawn(self._lift(move, outcome))
            return
        if outcome.cause is Cause.CORRUPT:
            self._counters.record_removed_corrupt()
        self._end(move, outcome)

    async def _lift(self, move: _Move, outcome: ReadOutcome) -> None:
        block, target = move.block, as_bytes(move.request.buffer)
        if outcome.payload_bytes != block.nbytes:
            self._end(move, move.unfinished(Cause.CORRUPT, f"{outcome.payload_bytes} bytes instead of {block.nbytes}"))
            return
        if target.size < block.payload_nbytes:
            self._end(move, move.unfinished(Cause.BUFFER_TOO_SMALL))
            return
        payload = target[: block.payload_nbytes]
        digest = await self._on_thread(partial(block.up, move.canonical, payload, outcome.digest))
        if digest is not None:
            self._end(move, replace(outcome, payload_bytes=block.payload_nbytes, digest=digest))
            return
        await self._remove(move.request.key)
        self._end(move, ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT))

    async def _remove(self, key: bytes) -> None:
        """Remove a damaged block that the other tier has taken for a good one."""
        try:
            await self.inner.delete([key], deadline_s=CLOSE_TIMEOUT_S)
            self._counters.record_removed_corrupt()
        except Exception:  # tiers can be third-party code, and this one may be closed by now
            logger.exception("a damaged block cannot be removed from the %s tier", self.name)

    # -- writing ---------------------------------------------------------------------------------------

    async def _write(self, moves: list[_Move], due_s: float | None) -> None:
        if not (wanted := await self._begin(moves)):
            return
        requests: list[WriteRequest] = []
        lowering = self._spawn(self._lower(wanted, requests))
        try:
            await asyncio.shield(lowering)
        except asyncio.CancelledError:  # its threads go on
            lowering.add_done_callback(partial(self._lowered_in_vain, wanted))
            raise
        begun = [move for move in wanted if move.scratch is not None]
        if begun:
            await self._pass_on(begun, self.inner.write(requests, deadline_s=self._left_s(due_s)))

    async def _lower(self, moves: Sequence[_Move], requests: list[WriteRequest]) -> None:
        digests = await asyncio.gather(*(self._on_thread(partial(self._down, move)) for move in moves))
        for move, digest in zip(moves, digests, strict=True):
            if isinstance(digest, str):
                self._warn(digest)
                self._end(move, move.unfinished(Cause.CORRUPT, digest))
            else:
                requests.append(self._write_request(move, digest))

    @staticmethod
    def _down(move: _Move) -> int | str:
        return move.block.down(as_bytes(move.request.payload), move.canonical, move.request.digest)

    def _write_request(self, move: _Move, digest: int) -> WriteRequest:
        request = move.request
        settled = partial(self._written, move)
        return WriteRequest(
            request.key, move.canonical, digest, move.block.raw_nbytes, request.codec, settled, request.used_s
        )

    def _written(self, move: _Move, outcome: WriteOutcome) -> None:
        if self._comes_back(move):
            self._end(move, outcome)

    def _lowered_in_vain(self, moves: Sequence[_Move], _: object) -> None:
        for move in moves:
            if move.scratch is not None:
                self._end(move, move.unfinished(Cause.CANCELLED))

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("a block is not written to the %s tier: %s; further ones are counted only", self.name, why)

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def may_have_unknown(self) -> bool:
        return self.inner.may_have_unknown

    @property
    def capacity_bytes(self) -> int:
        return self.inner.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self.inner.used_bytes

    def stats(self) -> TierStats:
        inner = self.inner.stats()
        return self._counters.snapshot(
            self.name,
            evicted_blocks=inner.evicted_blocks,
            num_blocks=inner.num_blocks,
            used_bytes=inner.used_bytes,
            capacity_bytes=inner.capacity_bytes,
            unsettled=len(self._moves),
            scan=inner.scan,
        )
