"""The disk tier: one file a block, shared by any number of processes. `docs/disk-tier.md` has format and rules."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple, Unpack

from aiofiles.os import wrap  # type: ignore[import-untyped]

from kvortex.config import DiskTierConfig
from kvortex.errors import ConfigError, EngineStateError
from kvortex.runtime.blocking import interpreter_ends
from kvortex.tiers.base import (
    Cause,
    ReadOutcome,
    ReadRequest,
    ScanProgress,
    StoredBlock,
    WriteOutcome,
    WriteRequest,
    check_reads,
    check_writes,
)
from kvortex.tiers.disk.direct import BUFFERED, DirectIO, probe
from kvortex.tiers.disk.directories import check_owned, make_directories
from kvortex.tiers.disk.files import DiskFiles
from kvortex.tiers.disk.layout import DiskLayout
from kvortex.tiers.disk.os_calls import OsCalls
from kvortex.tiers.disk.reader import DiskReader
from kvortex.tiers.disk.scan import list_parts, read_part
from kvortex.tiers.disk.temp_space import TempSpace
from kvortex.tiers.disk.writer import DiskWriter
from kvortex.tiers.frame import frame_bytes
from kvortex.tiers.indexed import IndexedTier
from kvortex.tiers.payload import warm_up
from kvortex.tiers.runner import BatchRunner
from kvortex.tiers.sealing import framing_of
from kvortex.types import MissReason, SaveOutcome

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

_METADATA_THREADS = 3  # the scan takes one


class DiskTier(IndexedTier):
    """Blocks of one namespace under `config.path`.

    It opens at once, and scans the directory in the background. Until the scan is complete `lookup` knows only blocks
    that this process wrote or read, and those that the scan has reached; `find` and `read` ask the file system.

    Args:
        config: directory, capacity and other settings.
        namespace: digest of the namespace, 32 bytes.
        calls: the system calls; tests replace them by failing ones.

    Raises:
        InvalidHashError: `namespace` is not 32 bytes.
    """

    name = "disk"

    def __init__(self, config: DiskTierConfig, *, namespace: bytes, calls: OsCalls | None = None) -> None:
        if not config.path:
            raise ConfigError("disk.path must name a directory")
        store = f"the disk tier in {config.path}"
        super().__init__(
            config.capacity_bytes, framing_of(namespace, os.fspath(config.seal_keys), store, in_files=True)
        )
        self._config = config
        self._calls = calls or OsCalls()
        self._layout = DiskLayout(config.path, namespace)
        self._temp = TempSpace(self._layout.temp, self._calls)
        self._direct = BUFFERED
        self._progress = ScanProgress(0, 0, 0, False)
        self._scan_task: asyncio.Task[None] | None = None
        self._metadata = ThreadPoolExecutor(_METADATA_THREADS, thread_name_prefix="kvortex-disk-meta")

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise EngineStateError("the disk tier was closed; make a new one")
            if not self._is_open:
                await self._open()

    async def _open(self) -> None:
        try:
            self._direct = await self._on_thread(self._prepare)
        except ConfigError:
            self._temp.close()
            raise
        except OSError as error:
            self._temp.close()
            raise ConfigError(f"cannot keep blocks in {self._layout.root}: {error}") from error
        files = DiskFiles(
            self._layout, self._config, self._framing, self._direct, self._index, self._counters, self._calls
        )
        self._files = files
        self._reads = BatchRunner(
            "kvortex-disk-read", self._config.read_threads, DiskReader(files).read, _unread, ReadRequest.settle
        )
        self._writes = BatchRunner(
            "kvortex-disk-write",
            self._config.write_threads,
            DiskWriter(files, self._temp).write,
            _unwritten,
            WriteRequest.settle,
        )
        self._is_open = True
        self._scan_task = asyncio.create_task(self._keep_scanning(), name="kvortex-disk-scan")

    def _prepare(self) -> DirectIO:
        make_directories(self._calls, self._layout.namespace_directory)
        make_directories(self._calls, self._layout.temp)
        for path in self._layout.directories:
            check_owned(self._calls, path)
        self._temp.open()
        warm_up()
        return BUFFERED if self._config.direct is False else self._probe()

    def _probe(self) -> DirectIO:
        found = probe(self._temp.new_path(), self._calls)
        if self._config.direct and not found.is_direct:
            raise OSError(f"direct=True, but O_DIRECT does not work in {self._layout.root}")
        return found

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._scan_task is not None:
                self._scan_task.cancel()
                await asyncio.wait([self._scan_task])
                timeout_s = self._config.close_timeout_s
                await asyncio.gather(self._reads.aclose(timeout_s), self._writes.aclose(timeout_s))
        finally:
            self._scanned.set()
            self._temp.close()
            self._metadata.shutdown(wait=False, cancel_futures=True)

    # -- asking ----------------------------------------------------------------------------------------

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        try:
            async with asyncio.timeout(deadline_s):
                return self._rooms_for(await self._on_thread(_each, self._files.look_for, keys))
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
            return [0] * len(keys)

    def _stored_bytes(self, payload_bytes: int) -> int:
        return frame_bytes(payload_bytes)

    async def scan(self) -> AsyncIterator[StoredBlock]:
        self._check(())
        name = self._layout.namespace_name
        for part in await self._on_thread(list_parts, self._layout, self._calls, self._unreadable, name):
            try:
                found = await self._on_thread(read_part, part, self._calls, self._files.count)
            except OSError as error:
                self._files.count(error)
                continue
            for key, block in found:
                yield StoredBlock(key, block.stored_bytes, block.last_use_s)

    # -- moving ----------------------------------------------------------------------------------------

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self._check(())
        check_reads(requests)
        outcomes = await self._reads.run(requests, deadline_s)
        self._counters.record_reads(outcomes)
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self._check(())
        sizes = check_writes(requests)
        outcomes = await self._writes.run(requests, deadline_s)
        self._counters.record_writes(outcomes, sizes)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        try:
            async with asyncio.timeout(deadline_s):
                return await self._on_thread(_each, self._files.delete, keys)
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
            return [False] * len(keys)

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        try:
            async with asyncio.timeout(deadline_s):
                await self._on_thread(self._files.touch_many, keys, used_s)
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def direct_io(self) -> DirectIO:
        """How files are opened, as the probe at start has found."""
        return self._direct

    @property
    def scan_progress(self) -> ScanProgress:
        """Progress of the start-up scan; after that the result of the last complete scan."""
        return self._progress

    @property
    def _num_unsettled(self) -> int:
        return self._reads.num_unsettled + self._writes.num_unsettled if self._is_open else 0

    # -- the scan --------------------------------------------------------------------------------------

    async def _keep_scanning(self) -> None:
        while True:
            try:
                await self._scan_once()
            except OSError as error:
                self._files.count(error)
                logger.warning("cannot scan %s: %s", self._layout.root, error)
            except RuntimeError:
                if interpreter_ends():
                    return  # no thread can be started at the end
                raise
            self._scanned.set()
            if self._config.rescan_interval_s is None:
                return
            await asyncio.sleep(self._config.rescan_interval_s)

    async def _scan_once(self) -> None:
        self._index.begin_scan()
        await self._on_thread(self._temp.sweep, self._files.count)
        unread: set[str] = set()

        def unreadable(namespace: str, error: OSError) -> None:
            unread.add(namespace)
            self._files.count(error)

        parts = await self._on_thread(list_parts, self._layout, self._calls, unreadable, None)
        blocks = 0
        for number, part in enumerate(parts):
            self._report(number, len(parts), blocks, complete=False)
            try:
                blocks += await self._on_thread(self._files.merge, part)
            except OSError as error:
                unreadable(part.namespace, error)
        await self._on_thread(self._index.end_scan, unread)
        self._report(len(parts), len(parts), blocks, complete=True)
        await self._on_thread(self._files.evict_excess)

    def _unreadable(self, _: str, error: OSError) -> None:
        self._files.count(error)

    def _report(self, done: int, total: int, blocks: int, *, complete: bool) -> None:
        if not self._scanned.is_set() or complete:
            self._progress = ScanProgress(done, total, blocks, complete)

    # -- inside ----------------------------------------------------------------------------------------

    async def _on_thread(self, function: Callable[[Unpack[Arguments]], Result], *args: *Arguments) -> Result:
        result: Result = await wrap(function)(*args, executor=self._metadata)
        return result


def _each(function: Callable[[bytes], Result], keys: Sequence[bytes]) -> list[Result]:
    return [function(key) for key in keys]


def _unread(cause: Cause, settled: bool) -> ReadOutcome:
    reason = MissReason.DEADLINE if cause is Cause.DEADLINE else MissReason.TRANSFER_FAILED
    return ReadOutcome(reason, cause=cause, settled=settled)


def _unwritten(cause: Cause, settled: bool) -> WriteOutcome:
    return WriteOutcome(SaveOutcome.FAILED, cause=cause, settled=settled)
