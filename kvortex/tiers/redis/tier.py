"""The tier over Redis or Valkey. `docs/redis-tier.md` has its settings, and what happens when something fails."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from kvortex.errors import ConfigError, EngineStateError
from kvortex.runtime.blocking import interpreter_ends, run_blocking, submit_or_run
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
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.indexed import IndexedTier
from kvortex.tiers.payload import warm_up
from kvortex.tiers.redis.blocks import LONG_AGO_S, RedisBlocks
from kvortex.tiers.redis.connections import Connections
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.lookup import BlockWrite
from kvortex.tiers.redis.servers import Cluster, OneServer, Servers
from kvortex.tiers.redis.settings import RedisSettings
from kvortex.tiers.runner import BatchRunner
from kvortex.tiers.sealing import framing_of
from kvortex.types import BLOCK_HASH_BYTES, MissReason, SaveOutcome

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ASKING_THREADS: Final = 2
RESCAN_S: Final = 300.0
CLOSE_GRACE_S: Final = 1.0
"""Seconds that closing gives to blocks in flight. Then it ends their connections, and so them."""
FIRST_CURSOR: Final = b"0"


class RedisTier(IndexedTier):
    """Blocks of one namespace in a server that many hosts share.

    It opens even if there is no server yet, and uses it from the time that there is one. `lookup` knows what this
    process has stored, read or asked for; `find` asks the server, which others write to all the time. With
    `capacity_bytes` it lists the blocks in the server, too, and evicts the least recently used ones.

    Args:
        settings: of the server.
        namespace: digest of the namespace, 32 bytes.

    Raises:
        ConfigError: redis-py is not installed, or the keys that seal blocks cannot be used.
        InvalidHashError: `namespace` is not 32 bytes.
    """

    name = "redis"
    finds_more = True

    def __init__(self, settings: RedisSettings, *, namespace: bytes) -> None:
        store = f"the redis tier at {settings.address}"
        super().__init__(settings.capacity_bytes, framing_of(namespace, settings.seal_keys, store))
        self._settings = settings
        log = FailureLog(store)
        self._servers = _servers_of(settings, log)
        self._blocks = RedisBlocks(settings, self._framing, self._servers, self._index, self._counters, log)
        self._scan_task: asyncio.Task[None] | None = None

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise EngineStateError("the redis tier was closed; make a new one")
            if not self._is_open:
                await self._open()

    async def _open(self) -> None:
        await run_blocking(warm_up)
        await run_blocking(self._check_server)
        threads = self._settings.connections
        self._asking = ThreadPoolExecutor(ASKING_THREADS, thread_name_prefix="kvortex-redis-ask")
        self._reads = BatchRunner("kvortex-redis-read", threads, self._blocks.read, _unread, ReadRequest.settle)
        self._writes = BatchRunner("kvortex-redis-write", threads, self._blocks.write, _unwritten, _settle_write)
        self._is_open = True
        if self._settings.capacity_bytes is not None:
            self._scan_task = asyncio.create_task(self._keep_scanning(), name="kvortex-redis-scan")
        else:
            self._progress = ScanProgress(1, 1, 0, complete=True)  # nothing is listed
            self._scanned.set()

    def _check_server(self) -> None:
        """Try one look-up, and warn of a server that does not evict.

        Raises:
            ConfigError: the server refuses this client.
        """
        try:
            self._blocks.find([bytes(BLOCK_HASH_BYTES)])
        except StoreFailure as failure:
            if failure.is_lasting:
                self._servers.abort()
                raise ConfigError(f"the redis server at {self._settings.address} refuses: {failure}") from failure
            return  # it may come later
        try:
            said = self._blocks.info()
        except StoreFailure:
            return
        if why := _never_evicts(said, has_ttl=self._settings.ttl_s is not None):
            logger.warning(
                "the redis server at %s %s; set maxmemory, and maxmemory-policy allkeys-lru",
                self._settings.address,
                why,
            )

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if not self._is_open:
            self._servers.abort()
            return
        ending = asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self._servers.abort)
        try:
            if self._scan_task is not None:
                self._scan_task.cancel()
                await asyncio.wait([self._scan_task])
            timeout_s = 2 * CLOSE_GRACE_S + self._settings.connect_timeout_s
            await asyncio.gather(self._reads.aclose(timeout_s), self._writes.aclose(timeout_s))
        finally:
            ending.cancel()
            self._scanned.set()
            self._servers.abort()
            self._asking.shutdown(wait=False)  # what waits there fails, as there are no connections

    # -- asking ----------------------------------------------------------------------------------------

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        found = await self._within(deadline_s, partial(self._blocks.find, list(keys)))
        return [0] * len(keys) if found is None else self._rooms_for(found)

    async def scan(self) -> AsyncIterator[StoredBlock]:
        self._check(())
        told: set[bytes] = set()
        for server in await self._ask(self._blocks.servers):
            cursor = b""
            while cursor != FIRST_CURSOR:
                cursor, keys = await self._ask(partial(self._blocks.scan, server, cursor or FIRST_CURSOR))
                new = [key for key in dict.fromkeys(keys) if key not in told]
                told.update(new)  # a server may name a key again
                for key, nbytes in zip(new, await self._ask(partial(self._blocks.find, new)), strict=True):
                    if nbytes:
                        known = self._index.get(key)
                        yield StoredBlock(key, nbytes, LONG_AGO_S if known is None else known.last_use_s)

    async def _keep_scanning(self) -> None:
        while True:
            await self._scan_once()
            self._scanned.set()
            await asyncio.sleep(RESCAN_S)

    async def _scan_once(self) -> None:
        count = 0
        self._index.begin_scan()
        try:
            async for _ in self.scan():
                count += 1
                if not self._progress.complete:
                    self._progress = ScanProgress(0, 1, count, complete=False)
        except StoreFailure as failure:
            self._counters.record_cause(failure.cause)
        except RuntimeError:
            if not interpreter_ends():  # no thread can be started at the end
                raise
        else:
            self._index.end_scan()
            self._progress = ScanProgress(1, 1, count, complete=True)

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
        outcomes = await self._writes.run(self._blocks.writes(requests), deadline_s)
        self._counters.record_writes(outcomes, sizes)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        gone = await self._within(deadline_s, partial(self._blocks.delete, list(keys)))
        return [False] * len(keys) if gone is None else gone

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        await self._within(deadline_s, partial(self._blocks.touch, list(keys), list(used_s)))

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def num_connections(self) -> int:
        """Connections to the server that there are now."""
        return self._servers.num_open

    @property
    def _num_unsettled(self) -> int:
        return self._reads.num_unsettled + self._writes.num_unsettled if self._is_open else 0

    # -- inside ----------------------------------------------------------------------------------------

    async def _within(self, deadline_s: float | None, work: Callable[[], Result]) -> Result | None:
        """The result; None if it takes too long or fails."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self._ask(work)
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
        except StoreFailure as failure:
            self._counters.record_cause(failure.cause)
        return None

    async def _ask(self, work: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(submit_or_run(self._asking, work))


def _servers_of(settings: RedisSettings, log: FailureLog) -> Servers:
    """The module that needs redis-py is imported where a tier is made."""
    try:
        from kvortex.tiers.redis.dialling import SlotTable, dial
    except ImportError as error:
        raise ConfigError(
            f"tiers over Redis need redis-py, which is not installed: pip install 'kvortex[redis]' ({error})"
        ) from error
    if settings.seeds and not settings.service:
        return Cluster(partial(SlotTable, settings), partial(dial, settings), log)
    return OneServer(Connections(partial(dial, settings), log))


def _never_evicts(info: dict[str, str], *, has_ttl: bool) -> str:
    """Why a server never evicts a block, in words that go on after its name; empty if it does, or does not tell."""
    policy = info.get("maxmemory_policy", "")
    if info.get("maxmemory") == "0":
        return "has no maxmemory, and grows until its machine has no memory left"
    if policy == "noeviction" or (policy.startswith("volatile") and not has_ttl):
        return f"evicts no blocks (maxmemory-policy {policy}), so that writes fail once it is full"
    return ""


def _unread(cause: Cause, settled: bool) -> ReadOutcome:
    reason = MissReason.DEADLINE if cause is Cause.DEADLINE else MissReason.TRANSFER_FAILED
    return ReadOutcome(reason, cause=cause, settled=settled)


def _settle_write(write: BlockWrite, outcome: WriteOutcome) -> None:
    write.request.settle(outcome)


def _unwritten(cause: Cause, settled: bool) -> WriteOutcome:
    return WriteOutcome(SaveOutcome.FAILED, cause=cause, settled=settled)
