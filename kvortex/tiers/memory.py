"""A tier in ordinary memory: for tests, and the smallest example of the contract."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError, EngineStateError, InvalidHashError
from kvortex.tiers.base import (
    Cause,
    ReadOutcome,
    ReadRequest,
    ScanProgress,
    StoredBlock,
    Tier,
    TierStats,
    WriteOutcome,
    WriteRequest,
    as_bytes,
    check_keys,
    check_reads,
    check_writes,
)
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.payload import copy_payload
from kvortex.tiers.uses import UseClock
from kvortex.types import BLOCK_HASH_BYTES, MissReason, SaveOutcome


@dataclass(slots=True)
class _Kept:
    payload: NDArray[np.uint8]
    digest: int
    raw_bytes: int
    codec: int
    last_use_s: float


class MemoryTier(Tier):
    """Stores copies of payloads and evicts the least recently used. No call suspends, so every deadline is kept.

    Args:
        capacity_bytes: bytes of payload that it may store.
        namespace: digest of the namespace, 32 bytes.

    Raises:
        ConfigError: `capacity_bytes` is below 1.
        InvalidHashError: `namespace` is not 32 bytes.
    """

    name = "memory"
    outlives_process = False

    def __init__(self, capacity_bytes: int, *, namespace: bytes) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, not {capacity_bytes}")
        if len(namespace) != BLOCK_HASH_BYTES:
            raise InvalidHashError(f"a namespace digest is {BLOCK_HASH_BYTES} bytes, not {namespace!r}")
        self.namespace = namespace
        self._capacity_bytes = capacity_bytes
        self._kept: dict[bytes, _Kept] = {}
        self._uses = UseClock()
        self._used_bytes = 0
        self._evicted_blocks = 0
        self._counters = TierCounters()
        self._is_open = self._is_closed = False

    async def open(self) -> None:
        if self._is_closed:
            raise EngineStateError("the memory tier was closed; make a new one")
        self._is_open = True

    async def aclose(self) -> None:
        self._is_open, self._is_closed = False, True
        self._kept.clear()
        self._used_bytes = 0

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        get = self._kept.get
        return [kept.payload.size if (kept := get(key)) is not None else 0 for key in keys]

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._check(keys)
        return self.lookup(keys)

    def coldest(self, payloads: Sequence[int]) -> list[StoredBlock]:
        excess, found = self._used_bytes + sum(payloads) - self._capacity_bytes, []
        for key, kept in sorted(self._kept.items(), key=lambda item: item[1].last_use_s):
            if excess <= 0:
                break
            excess -= kept.payload.size
            found.append(StoredBlock(key, kept.payload.size, kept.last_use_s))
        return found

    async def scan(self) -> AsyncIterator[StoredBlock]:
        self._check(())
        for key, kept in list(self._kept.items()):
            yield StoredBlock(key, kept.payload.size, kept.last_use_s)

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self._check(())
        check_reads(requests)
        outcomes = [self._read(request) for request in requests]
        self._counters.record_reads(outcomes)
        for request, outcome in zip(requests, outcomes, strict=True):
            request.settle(outcome)
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self._check(())
        sizes = check_writes(requests)
        outcomes = [self._write(request) for request in requests]
        self._counters.record_writes(outcomes, sizes)
        for request, outcome in zip(requests, outcomes, strict=True):
            request.settle(outcome)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        self._check(keys)
        return [self._drop(key) is not None for key in keys]

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        self._check(keys)
        for key, time_s in zip(keys, used_s, strict=True):
            if (kept := self._kept.get(key)) is not None:
                kept.last_use_s = max(kept.last_use_s, self._uses.at(time_s))

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def stats(self) -> TierStats:
        return self._counters.snapshot(
            self.name,
            evicted_blocks=self._evicted_blocks,
            num_blocks=len(self._kept),
            used_bytes=self._used_bytes,
            capacity_bytes=self._capacity_bytes,
            unsettled=0,
            scan=ScanProgress(0, 0, len(self._kept), complete=True),
        )

    def _check(self, keys: Sequence[bytes]) -> None:
        if not self._is_open:
            raise EngineStateError("the memory tier is not open; use it between open() and aclose()")
        check_keys(keys)

    def _read(self, request: ReadRequest) -> ReadOutcome:
        kept = self._kept.get(request.key)
        if kept is None:
            return ReadOutcome(MissReason.NEVER_STORED, cause=Cause.ABSENT)
        target = as_bytes(request.buffer)
        if target.size < kept.payload.size:
            return ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.BUFFER_TOO_SMALL)
        if copy_payload(kept.payload, target[: kept.payload.size]) != kept.digest:
            self._drop(request.key)
            self._counters.record_removed_corrupt()
            return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT)
        kept.last_use_s = max(kept.last_use_s, self._uses.at(request.used_s))
        return ReadOutcome(None, kept.payload.size, kept.raw_bytes, kept.codec, kept.digest)

    def _write(self, request: WriteRequest) -> WriteOutcome:
        used_s = self._uses.at(request.used_s)
        if (kept := self._kept.get(request.key)) is not None:
            kept.last_use_s = max(kept.last_use_s, used_s)
            return WriteOutcome(SaveOutcome.ALREADY_STORED)
        payload = as_bytes(request.payload)
        if payload.size > self._capacity_bytes or not self._make_room(payload.size, used_s):
            return WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE)
        self._kept[request.key] = _Kept(payload.copy(), request.digest, request.raw_bytes, int(request.codec), used_s)
        self._used_bytes += payload.size
        return WriteOutcome(SaveOutcome.STORED)

    def _make_room(self, nbytes: int, used_s: float) -> bool:
        """Evict the least recently used blocks. If one of them was used after `used_s`, evict none and return False."""
        excess = self._used_bytes + nbytes - self._capacity_bytes
        victims: list[bytes] = []
        if excess > 0:
            for key, kept in sorted(self._kept.items(), key=lambda item: item[1].last_use_s):
                if kept.last_use_s > used_s:
                    return False
                victims.append(key)
                excess -= kept.payload.size
                if excess <= 0:
                    break
        for key in victims:
            self._drop(key)
        self._evicted_blocks += len(victims)
        return True

    def _drop(self, key: bytes) -> _Kept | None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._used_bytes -= kept.payload.size
        return kept
