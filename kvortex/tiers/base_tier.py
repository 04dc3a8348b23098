"""A base for tiers over stores of whole objects: subclass it with five short methods."""

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, ClassVar, Final, TypeVar

import numpy as np

from kvortex.errors import ConfigError, EngineStateError
from kvortex.tiers.base import (
    Cause,
    ReadOutcome,
    ReadRequest,
    ScanProgress,
    StoredBlock,
    WriteOutcome,
    WriteRequest,
    as_bytes,
    check_reads,
    check_writes,
)
from kvortex.tiers.causes import cause_of
from kvortex.tiers.indexed import IndexedTier
from kvortex.tiers.payload import warm_up
from kvortex.tiers.sealing import framing_of
from kvortex.tiers.store_index import Admission, IndexedBlock
from kvortex.types import BLOCK_HASH_BYTES, MissReason, SaveOutcome

logger = logging.getLogger(__name__)

FIND_BATCH: Final = 256
CLOSE_TIMEOUT_S: Final = 5.0
"""Seconds that calls of the store may take to notice that they are cancelled."""

Result = TypeVar("Result")


class _Move:
    """One block of a call. Its memory is touched only while it has no outcome."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.outcome: Any = None

    def end(self, outcome: ReadOutcome | WriteOutcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.request.settle(outcome)


class BaseTier(IndexedTier):
    """Brings batches, deadlines, settling, digests, figures and eviction to a store that knows objects by name.

    A subclass has `get_object`, `put_object`, `find_objects`, `delete_objects` and, if the store can tell what it has,
    `list_objects`; `connect` and `disconnect` if there is something to open. All run on the event loop, and use
    `asyncio.to_thread` for what blocks. They may raise anything: a failure is counted, and costs a miss. Each may be
    cancelled at any time, when a deadline passes: what it was given or returns is not used then. (A thread goes on
    after that; what it stores may be found later.)

    The name of an object is the namespace and the key of its block. An object is a frame (`kvortex.tiers.frame`): what
    is damaged, cut or another block's is noticed when it is read.

    Args:
        namespace: digest of the namespace, 32 bytes.
        capacity_bytes: bytes of the objects of this namespace that the tier may use; it evicts the least recently used.
            None leaves that to the store.
        seal_keys: path of a file with secrets that seal the objects, see docs/sealing.md; empty for plain objects.

    Raises:
        ConfigError: `capacity_bytes` is below 1, or the file cannot be used.
        InvalidHashError: `namespace` is not 32 bytes.
    """

    finds_more = True
    concurrency: ClassVar[int] = 16
    """Objects that are read or written at a time."""
    lists_objects: ClassVar[bool] = True
    """False if the store cannot tell what it has: `list_objects` is not called then."""
    rescan_s: ClassVar[float | None] = 300.0
    """Seconds between two listings: so this process learns what others have stored and deleted. None lists once."""

    def __init__(self, *, namespace: bytes, capacity_bytes: int | None = None, seal_keys: str = "") -> None:
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, not {capacity_bytes}")
        super().__init__(capacity_bytes, framing_of(namespace, seal_keys, f"the {self.name} tier"))
        self.namespace = namespace
        self._places = asyncio.Semaphore(self.concurrency)
        self._moves: dict[_Move, asyncio.Task[None]] = {}
        self._scan_task: asyncio.Task[None] | None = None

    # -- for subclasses --------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open the store.

        Raises:
            ConfigError: it cannot be used; the message says why and what to do.
        """
        return

    async def disconnect(self) -> None:
        """Close the store; called once, even if `connect` has raised."""
        return

    @abstractmethod
    async def get_object(self, name: str) -> bytes | bytearray | memoryview | None:
        """The whole object; None if there is none."""

    @abstractmethod
    async def put_object(self, name: str, data: bytes) -> None:
        """Store an object, which others see only when it is complete. `OSError` with ENOSPC if there is no room."""

    @abstractmethod
    async def find_objects(self, names: Sequence[str]) -> Sequence[int]:
        """Bytes of each of these objects, up to 256 of them; 0 where there is none."""

    @abstractmethod
    async def delete_objects(self, names: Sequence[str]) -> None:
        """Delete these objects; those that are not there are no error."""

    def list_objects(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Name, bytes and time of the last known use, in seconds since the epoch, of the objects of a prefix."""
        raise NotImplementedError(f"{type(self).__name__} has no list_objects; set lists_objects to False")

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise EngineStateError(f"the {self.name} tier was closed; make a new one")
            if self._is_open:
                return
            await asyncio.to_thread(warm_up)
            try:
                await self.connect()
            except BaseException:
                await self.disconnect()
                raise
            self._is_open = True
            if self.lists_objects:
                self._scan_task = asyncio.create_task(self._keep_scanning(), name=f"kvortex-{self.name}-scan")
            else:
                self._scanned.set()

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if not self._is_open:
            return
        tasks = list(self._moves.values())
        for move in list(self._moves):
            move.end(_unfinished(move.request, Cause.CLOSED))
        if self._scan_task is not None:
            tasks.append(self._scan_task)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        self._scanned.set()
        await self.disconnect()

    # -- asking ----------------------------------------------------------------------------------------

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        found = await self._within(deadline_s, self._find(keys))
        return [0] * len(keys) if found is None else self._rooms_for(found)

    async def _find(self, keys: Sequence[bytes]) -> list[int]:
        sizes: list[int] = []
        for start in range(0, len(keys), FIND_BATCH):
            batch = keys[start : start + FIND_BATCH]
            known = [self._index.get(key) for key in batch]
            with self._index.watching() as changed:
                found = list(await self.find_objects([self._name(key) for key in batch]))
                seen = [(key, _seen(nbytes)) for key, nbytes in zip(batch, found, strict=True) if nbytes]
                self._index.merge(seen, changed)
            for key, before, nbytes in zip(batch, known, found, strict=True):
                if not nbytes:
                    self._index.discard(key, before)
            sizes += found
        return sizes

    async def scan(self) -> AsyncIterator[StoredBlock]:
        self._check(())
        if not self.lists_objects:
            for known, block in self._index.blocks():
                yield StoredBlock(known, block.stored_bytes, block.last_use_s)
            return
        prefix = self._name(b"")
        async for name, nbytes, last_use_s in self.list_objects(prefix):
            if (key := _key_in(name, prefix)) is not None:
                yield StoredBlock(key, nbytes, last_use_s)

    async def _keep_scanning(self) -> None:
        while True:
            await self._scan_once()
            self._scanned.set()
            if self.rescan_s is None:
                return
            await asyncio.sleep(self.rescan_s)

    async def _scan_once(self) -> None:
        count = 0
        self._index.begin_scan()
        try:
            with self._index.watching() as changed:
                async for block in self.scan():
                    count += 1
                    self._index.merge([(block.key, _seen(block.stored_bytes, block.last_use_s))], changed)
                    if not self._progress.complete:
                        self._progress = ScanProgress(0, 1, count, complete=False)
            self._index.end_scan()
        except Exception as error:  # whatever the store raises
            self._failed(error)
            logger.debug("the %s tier cannot tell what it has", self.name, exc_info=error)
        else:
            self._progress = ScanProgress(1, 1, count, complete=True)

    # -- moving ----------------------------------------------------------------------------------------

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self._check(())
        check_reads(requests)
        outcomes: list[ReadOutcome] = await self._move_all(requests, self._read, deadline_s)
        self._counters.record_reads(outcomes)
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self._check(())
        sizes = check_writes(requests)
        outcomes: list[WriteOutcome] = await self._move_all(requests, self._write, deadline_s)
        self._counters.record_writes(outcomes, sizes)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        gone = await self._within(deadline_s, self._delete(keys))
        return [False] * len(keys) if gone is None else gone

    async def _delete(self, keys: Sequence[bytes]) -> list[bool]:
        there = await self._find(keys)
        claimed = [bool(nbytes) and self._index.claim(key) for key, nbytes in zip(keys, there, strict=True)]
        mine = [key for key, is_mine in zip(keys, claimed, strict=True) if is_mine]
        try:
            if mine:
                await self.delete_objects([self._name(key) for key in mine])
        finally:
            for key in mine:  # if it has failed, they cannot be relied on
                self._index.removed(key)
        return claimed

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        self._index.touch(keys, used_s, float("inf"))

    # -- inside ----------------------------------------------------------------------------------------

    @property
    def _num_unsettled(self) -> int:
        return len(self._moves)

    def _name(self, key: bytes) -> str:
        return f"{self.namespace.hex()}/{key.hex()}"

    async def _within(self, deadline_s: float | None, work: Awaitable[Result]) -> Result | None:
        """The result; None if it takes too long or fails."""
        try:
            async with asyncio.timeout(deadline_s):
                return await work
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
        except Exception as error:  # whatever the store raises
            self._failed(error)
            logger.debug("the %s tier failed", self.name, exc_info=error)
        return None

    def _failed(self, error: Exception) -> None:
        self._counters.record_cause(_cause(error))
        logger.warning("the %s tier failed: %s", self.name, _text(error))

    async def _move_all(
        self, requests: Sequence[Any], work: Callable[[_Move], Awaitable[Any]], deadline_s: float | None
    ) -> list[Any]:
        moves: list[_Move] = [_Move(request) for request in requests]
        tasks = [asyncio.create_task(self._move(move, work)) for move in moves]
        self._moves.update(zip(moves, tasks, strict=True))
        cause = Cause.CANCELLED
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=deadline_s)
            cause = Cause.CLOSED if self._is_closed else Cause.DEADLINE
        finally:
            for move, task in zip(moves, tasks, strict=True):
                self._moves.pop(move, None)
                move.end(_unfinished(move.request, cause))
                task.cancel()
        return [move.outcome for move in moves]

    async def _move(self, move: _Move, work: Callable[[_Move], Awaitable[Any]]) -> None:
        try:
            async with self._places:
                outcome = await work(move)
        except Exception as error:  # whatever the store raises
            logger.debug("the %s tier failed", self.name, exc_info=error)
            outcome = _unfinished(move.request, _cause(error), _text(error))
        move.end(outcome)

    async def _read(self, move: _Move) -> ReadOutcome:
        request = move.request
        known = self._index.get(request.key)
        with self._index.watching() as changed:
            data = await self.get_object(self._name(request.key))
            if move.outcome is not None:
                raise asyncio.CancelledError
            if data is None:
                self._index.discard(request.key, known)
                reason = MissReason.NEVER_STORED if known is None else MissReason.EVICTED
                return ReadOutcome(reason, cause=Cause.ABSENT)
            outcome = self._decode(request, memoryview(data).cast("B"))
            seen = _seen(memoryview(data).nbytes)
            if outcome.reason is None:
                self._index.use(request.key, seen, changed, float("inf"), request.used_s)
            elif outcome.reason is MissReason.AUTH:
                self._index.condemn(request.key, seen, changed)
        if outcome.cause is Cause.CORRUPT:
            await self._remove_corrupt(request.key)
        elif outcome.cause is Cause.UNKNOWN_VERSION:
            self._index.ignore(request.key)
        return outcome

    def _decode(self, request: ReadRequest, frame: memoryview) -> ReadOutcome:
        framing = self._framing
        header = framing.decode(frame[: framing.header_bytes], request.key)
        if isinstance(header, ReadOutcome):
            return header
        payload = frame[framing.header_bytes :]
        if payload.nbytes != header.payload_bytes:
            return framing.flawed("the object's length is not what its header says")
        target = as_bytes(request.buffer)
        if target.size < payload.nbytes:
            return ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.BUFFER_TOO_SMALL)
        return framing.open(header, np.frombuffer(payload, dtype=np.uint8), target[: payload.nbytes])

    async def _remove_corrupt(self, key: bytes) -> None:
        if self._index.claim(key):
            try:
                await self.delete_objects([self._name(key)])
            finally:
                self._index.removed(key)
            self._counters.record_removed_corrupt()

    async def _write(self, move: _Move) -> WriteOutcome:
        request = move.request
        nbytes = self._framing.header_bytes + as_bytes(request.payload).size
        if self._index.get(request.key) is None:
            await self._find([request.key])  # another process may have stored it
        if self._index.ignores(request.key):
            return WriteOutcome(SaveOutcome.FAILED, cause=Cause.UNKNOWN_VERSION)
        admission, victims = self._index.reserve(request.key, nbytes, request.used_s)
        if admission is Admission.NO_SPACE:
            return WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE)
        if admission is not Admission.RESERVED:
            is_stored = admission is Admission.STORED
            return WriteOutcome(SaveOutcome.ALREADY_STORED if is_stored else SaveOutcome.PENDING)
        try:
            try:
                if victims:
                    await self.delete_objects([self._name(key) for key, _ in victims])
            finally:
                for key, _ in victims:
                    self._index.removed(key)
            if move.outcome is not None:
                raise asyncio.CancelledError
            header, payload = self._framing.encode(request)
            data = header + payload.tobytes()
            await self.put_object(self._name(request.key), data)
        except BaseException:
            self._index.abort(request.key)
            raise
        self._index.commit(request.key, "")
        return WriteOutcome(SaveOutcome.STORED)


def _seen(nbytes: int, last_use_s: float | None = None) -> IndexedBlock:
    return IndexedBlock("", nbytes, time.time() if last_use_s is None else last_use_s)


def _key_in(name: str, prefix: str) -> bytes | None:
    """The key in an object's name; None if it is the name of something else."""
    try:
        key = bytes.fromhex(name.removeprefix(prefix))
    except ValueError:
        return None
    return key if name.startswith(prefix) and len(key) == BLOCK_HASH_BYTES else None


def _cause(error: Exception) -> Cause:
    return cause_of(error) if isinstance(error, OSError) else Cause.IO_ERROR


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _unfinished(request: ReadRequest | WriteRequest, cause: Cause, detail: str = "") -> Any:
    if isinstance(request, WriteRequest):
        outcome = SaveOutcome.NO_SPACE if cause is Cause.NO_SPACE else SaveOutcome.FAILED
        return WriteOutcome(outcome, cause=cause, detail=detail)
    reason = MissReason.DEADLINE if cause is Cause.DEADLINE else MissReason.TRANSFER_FAILED
    return ReadOutcome(reason, cause=cause, detail=detail)
