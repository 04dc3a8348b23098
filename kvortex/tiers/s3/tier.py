"""The tier over S3. `docs/s3-tier.md` has its settings, and what happens when something fails."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from kvortex.errors import ConfigError, EngineStateError
from kvortex.runtime.blocking import run_blocking
from kvortex.tiers.base import (
    Cause,
    ReadOutcome,
    ReadRequest,
    StoredBlock,
    TierStats,
    WriteOutcome,
    WriteRequest,
    check_reads,
    check_writes,
)
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.indexed import IndexedTier
from kvortex.tiers.s3.block_map import Segment
from kvortex.tiers.s3.calls import Calls, Move
from kvortex.tiers.s3.catalogue import Catalogue
from kvortex.tiers.s3.failures import StoreFailure
from kvortex.tiers.s3.payloads import Payloads, warm_up
from kvortex.tiers.s3.reader import FRESH_S, Reader
from kvortex.tiers.s3.segment import BLOCK_BYTES, FIXED_BYTES, aligned
from kvortex.tiers.s3.settings import S3Settings
from kvortex.tiers.s3.writer import UPLOAD_BYTES, Writer
from kvortex.tiers.sealing import framing_of

Result = TypeVar("Result")

FIRST_LISTING_S: Final = 1.0
"""Seconds from its begin that look-ups wait for the first listing. Then they answer what is known already."""
CLOSE_GRACE_S: Final = 2.0
"""Seconds that closing gives to uploads in progress."""


class S3Tier(IndexedTier):
    """Blocks of one namespace in a bucket that many hosts share, many blocks to an object.

    It opens even if the store does not answer yet. `lookup` knows what this process has stored or seen in the bucket;
    `find` lists the names of new objects before, if it is asked for blocks that are not known.

    Args:
        settings: of the bucket.
        namespace: digest of the namespace, 32 bytes.

    Raises:
        ConfigError: obstore is not installed, or the settings do not go together.
        InvalidHashError: `namespace` is not 32 bytes.
    """

    name = "s3"
    finds_more = True

    def __init__(self, settings: S3Settings, *, namespace: bytes) -> None:
        name = f"the s3 tier in {settings.address}"
        framing = framing_of(namespace, settings.seal_keys, name)
        super().__init__(settings.capacity_bytes, framing, one_length=False)  # its index has segments, not blocks
        try:
            from kvortex.tiers.s3.store import ObjectStore
        except ImportError as error:
            raise ConfigError(
                f"tiers over S3 need obstore, which is not installed: pip install 'kvortex[s3]' ({error})"
            ) from error
        self._settings = settings
        self.write_bytes = max(UPLOAD_BYTES, settings.segment_bytes)
        self._payloads = payloads = Payloads(framing)
        folder = f"{settings.prefix}/{namespace.hex()}" + ("-sealed" if framing.is_sealed else "")
        self._store = ObjectStore(settings, folder, FailureLog(name))
        self._catalogue = Catalogue(settings, namespace, self._store, payloads.overhead, self._index, self._counters)
        self._reader = Reader(self._store, self._catalogue, payloads, settings.connections)
        self._writer = Writer(settings, self._store, self._catalogue, payloads, self._index)
        self._reads, self._writes = Calls(), Calls()
        self._scan_task: asyncio.Task[None] | None = None

    # -- life ------------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise EngineStateError("the s3 tier was closed; make a new one")
            if self._is_open:
                return
            await run_blocking(warm_up)
            try:
                await self._catalogue.check()
            except StoreFailure as failure:
                if failure.is_lasting:
                    self._store.close()
                    raise ConfigError(f"{self._settings.address} cannot be used: {failure}") from failure
            self._is_open = True
            self._scan_task = asyncio.create_task(self._keep_scanning(), name="kvortex-s3-scan")

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if not self._is_open:
            self._store.close()
            return
        if self._scan_task is not None:
            self._scan_task.cancel()
            await asyncio.wait([self._scan_task])
        await asyncio.gather(self._reads.aclose(), self._writes.aclose())
        await self._writer.aclose(CLOSE_GRACE_S)
        await self._catalogue.close()
        self._scanned.set()
        self._store.close()

    async def _keep_scanning(self) -> None:
        await self._counted(self._catalogue.refresh(0.0))
        self._scanned.set()
        while True:
            await asyncio.sleep(self._settings.rescan_s * random.uniform(0.9, 1.1))
            await self._counted(self._catalogue.rescan())

    # -- asking ----------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        return self._catalogue.blocks.payload_bytes(keys)

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        if not all(self.lookup(keys)):
            await self._within(deadline_s, self._counted(self._learn()))
        return self.lookup(keys)

    async def _learn(self) -> None:
        is_first = not self._catalogue.progress.complete
        try:
            async with asyncio.timeout(max(FIRST_LISTING_S - self._catalogue.listing_for_s, 0.0) if is_first else None):
                await self._catalogue.refresh(FRESH_S)
        except TimeoutError:
            return  # the listing goes on

    async def scan(self) -> AsyncIterator[StoredBlock]:
        self._check(())
        async for segments in self._catalogue.scan():
            for segment in segments:
                for block in self._blocks_of(segment):
                    yield block

    def _blocks_of(self, segment: Segment) -> list[StoredBlock]:
        """The blocks of a segment; the first is charged with what belongs to none."""
        known = self._index.get(segment.id.key)
        last_use_s = segment.id.written_ms / 1000 if known is None else known.last_use_s
        live = self._catalogue.blocks.live(segment)
        rest = segment.nbytes - sum(_charged(entry.stored_bytes) for entry in live)
        return [
            StoredBlock(entry.key, _charged(entry.stored_bytes) + (0 if number else rest), last_use_s)
            for number, entry in enumerate(live)
        ]

    def coldest(self, payloads: Sequence[int]) -> list[StoredBlock]:
        chosen = self._index.coldest(sum(map(self._stored_bytes, payloads)) + FIXED_BYTES)
        segments = (self._catalogue.segment_of(segment.key) for segment in chosen)
        return [block for segment in segments if segment is not None for block in self._blocks_of(segment)]

    def _stored_bytes(self, payload_bytes: int) -> int:
        return _charged(payload_bytes + self._payloads.overhead)

    # -- moving ----------------------------------------------------------------------------------------

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self._check(())
        check_reads(requests)
        moves = [Move(request) for request in requests]
        outcomes: list[ReadOutcome] = await self._reads.run(moves, self._reader.read(moves), deadline_s)
        self._counters.record_reads(outcomes)
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self._check(())
        sizes = check_writes(requests)
        moves = [Move(request) for request in requests]
        outcomes: list[WriteOutcome] = await self._writes.run(moves, self._writer.write(moves), deadline_s)
        self._counters.record_writes(outcomes, sizes)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        gone = await self._within(deadline_s, self._counted(self._delete(keys)))
        return [False] * len(keys) if gone is None else gone

    async def _delete(self, keys: Sequence[bytes]) -> list[bool]:
        await self._catalogue.refresh(FRESH_S)  # others may have stored them, too
        places = self._catalogue.blocks.places(keys)
        await self._catalogue.remove(list(dict.fromkeys(place for of_key in places for place in of_key)))
        return [bool(of_key) for of_key in places]

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        for key, time_s in zip(keys, used_s, strict=True):
            if (place := self._catalogue.blocks.get(key)) is not None:
                self._catalogue.used(place.segment, time_s)

    # -- figures ---------------------------------------------------------------------------------------

    def stats(self) -> TierStats:
        catalogue = self._catalogue
        return replace(
            super().stats(),
            num_blocks=len(catalogue.blocks),
            evicted_blocks=catalogue.evicted_blocks,
            scan=catalogue.progress,
        )

    @property
    def _num_unsettled(self) -> int:
        return self._reads.num_unsettled + self._writes.num_unsettled

    # -- inside ----------------------------------------------------------------------------------------

    async def _counted(self, work: Awaitable[Result]) -> Result | None:
        """The result; None if the store fails, which is counted."""
        try:
            return await work
        except StoreFailure as failure:
            self._counters.record_cause(failure.cause)
        return None

    async def _within(self, deadline_s: float | None, work: Awaitable[Result]) -> Result | None:
        """The result; None if it takes too long."""
        try:
            async with asyncio.timeout(deadline_s):
                return await work
        except TimeoutError:
            self._counters.record_cause(Cause.DEADLINE)
        return None


def _charged(stored_bytes: int) -> int:
    """Bytes that a block takes of a segment, with its part of the footer."""
    return aligned(stored_bytes) + BLOCK_BYTES
