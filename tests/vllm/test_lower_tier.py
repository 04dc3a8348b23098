"""Both halves' sides of the lower tier, without vLLM: encodings, breakers, tiers that do not open."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvortex.vllm.scheduler.tier_index import TierIndex
from kvortex.vllm.worker.tier_mover import TierMover
from numpy.typing import NDArray

from kvortex import KVortexConfig
from kvortex.codecs import PageEncodings, Pages, packing_for
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.layout import KVLayout
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.tiering import guard
from kvortex.tiers import MemoryTier, ScanProgress, Tier, TierStats, breaker
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction, TransferPlan
from kvortex.vllm.scheduler import tier_index
from kvortex.vllm.worker import tier_mover

RAW_BYTES = 8192
LAYOUT = KVLayout.from_tensors({"layer": torch.zeros(2, 16, 256, dtype=torch.bfloat16)}, 16)
ENCODINGS = PageEncodings([Pages(LAYOUT, packing_for(LAYOUT, "fp8"))])
NUM_BLOCKS = 40
KEYS = [bytes([n]) * 32 for n in range(NUM_BLOCKS)]
TIMEOUT_S = 0.2
HANGS_S = 60.0


def namespace(codec: str = "fp8 within 0.05") -> Namespace:
    return Namespace(model="m", weights_revision="1", kv_dtype="bfloat16", layout=b"x" * 32, block_size=16, codec=codec)


def config(**settings: Any) -> KVortexConfig:
    return KVortexConfig(disk="/nowhere", tier={"timeout_s": TIMEOUT_S}).replace(**settings)


def plan_of(packed: Sequence[bool]) -> TransferPlan:
    offsets = np.arange(len(packed), dtype=np.int64) * RAW_BYTES
    return TransferPlan(Direction.LOAD, np.zeros(len(packed), np.int32), offsets, np.array(packed, dtype=np.uint8))


class Bench:
    """A worker's mover over a tier in memory that misbehaves on command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: TierFault | None = None
        self.asked = 0
        self.inner = MemoryTier(1 << 30, namespace=namespace().digest)
        self.tier = FaultInjectingTier(self.inner, self._fault_of)
        for module in (tier_index, tier_mover):
            monkeypatch.setattr(module, "tier_of", lambda *_: self.tier)
        monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 3600.0)
        self.pool: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, NUM_BLOCKS * RAW_BYTES, np.uint8)
        self.mover = TierMover(config(), namespace(), self.pool, ENCODINGS)

    def _fault_of(self, direction: Direction, number: int, key: bytes) -> TierFault | None:
        self.asked += 1
        return self.fault

    def digests(self, packed: Sequence[bool]) -> NDArray[np.uint64]:
        sizes = [ENCODINGS.payloads[p] for p in packed]
        return np.array(
            [payload_digest(self.pool[i * RAW_BYTES :][:nbytes]) for i, nbytes in enumerate(sizes)], dtype=np.uint64
        )


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


async def test_a_block_comes_back_in_the_form_in_which_it_was_written(bench: Bench) -> None:
    packed = [n % 3 > 0 for n in range(NUM_BLOCKS)]
    await bench.mover.open()
    digests = bench.digests(packed)
    assert (await bench.mover.write(KEYS, plan_of(packed), digests)).all()
    before = bench.pool.copy()
    bench.pool[:] = 0
    arrived = np.zeros(NUM_BLOCKS, dtype=np.uint64)
    assert (await bench.mover.fetch(KEYS, plan_of(packed), arrived)).all()
    assert (arrived == digests).all()
    for n, is_packed in enumerate(packed):
        nbytes = ENCODINGS.payloads[is_packed]
        assert (bench.pool[n * RAW_BYTES :][:nbytes] == before[n * RAW_BYTES :][:nbytes]).all()
    await bench.mover.aclose()


async def test_the_scheduler_half_knows_the_form_of_what_is_on_disk_and_of_what_was_just_written(
    bench: Bench,
) -> None:
    packed = [n % 3 > 0 for n in range(NUM_BLOCKS)]
    await bench.mover.open()
    await bench.mover.write(KEYS[:20], plan_of(packed[:20]), bench.digests(packed[:20]))

    def known() -> list[bool]:
        index = TierIndex(config(), namespace())
        try:
            assert index.known_prefix(KEYS) == packed[:20]
            for encoding in (True, False):
                index.add_written(
                    [key for key, p in zip(KEYS[20:], packed[20:], strict=True) if p is encoding], encoding
                )
            everything = index.known_prefix(KEYS)
            index.add_lost(KEYS[5:6])
            assert index.known_prefix(KEYS) == packed[:5]
            return everything
        finally:
            index._tier = MemoryTier(1, namespace=namespace().digest)  # this one's is the mover's too
            index.close()

    assert await asyncio.to_thread(known) == packed
    await bench.mover.aclose()


class Unscanned(MemoryTier):
    """Knows only what it was asked for, until its scan is over."""

    is_scanned = False

    def __init__(self, capacity_bytes: int, *, namespace: bytes) -> None:
        super().__init__(capacity_bytes, namespace=namespace)
        self._seen: set[bytes] = set()

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        return [nbytes if key in self._seen else 0 for key, nbytes in zip(keys, super().lookup(keys), strict=True)]

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self._seen.update(keys)
        return self.lookup(keys)

    def stats(self) -> TierStats:
        return replace(super().stats(), scan=ScanProgress(0, 1, 0, complete=self.is_scanned))


async def test_a_store_is_asked_until_its_scan_is_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = [n % 3 > 0 for n in range(NUM_BLOCKS)]
    tier = Unscanned(1 << 30, namespace=namespace().digest)
    for module in (tier_index, tier_mover):
        monkeypatch.setattr(module, "tier_of", lambda *_: tier)
    mover = TierMover(config(), namespace(), bench.pool, ENCODINGS)
    await mover.open()
    await mover.write(KEYS, plan_of(packed), bench.digests(packed))

    def ask() -> None:
        index = TierIndex(config(), namespace())
        assert index.asks_store
        assert index.known_prefix(KEYS) == []
        index.ask(KEYS[:30]).result(5)
        assert index.known_prefix(KEYS) == packed[:30]
        index._guard.reads.hung()
        assert not index.asks_store
        index._guard = type(index._guard)(tier, TIMEOUT_S, time.monotonic)
        tier.is_scanned = True
        assert not index.asks_store
        index.close()

    await asyncio.to_thread(ask)


async def test_what_was_lost_is_asked_for_again_after_a_while(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_again() -> None:
        index = TierIndex(config(), namespace())
        index.add_written(KEYS, True)
        index.add_lost(KEYS)
        index.add_written(KEYS[1:], True)
        assert index.known_prefix(KEYS) == []
        assert index.known_prefix(KEYS[1:]) == [True] * (NUM_BLOCKS - 1)
        monkeypatch.setattr(tier_index, "LOST_S", -1.0)
        index.add_lost(KEYS[3:4])
        index._written.add(KEYS, True)
        assert index.known_prefix(KEYS[1:]) == [True] * (NUM_BLOCKS - 1)
        index.close()

    await asyncio.to_thread(asked_again)


async def test_a_tier_that_hangs_costs_a_server_one_timeout(bench: Bench) -> None:
    async with asyncio.timeout(HANGS_S):
        packed = [True] * NUM_BLOCKS
        await bench.mover.open()
        await bench.mover.write(KEYS, plan_of(packed), bench.digests(packed))
        bench.fault, asked = TierFault.HANG, bench.asked
        digests = np.zeros(NUM_BLOCKS, dtype=np.uint64)
        hung = asyncio.ensure_future(bench.mover.fetch(KEYS, plan_of(packed), digests))
        while not bench.mover._guard.reads.refuses:
            await asyncio.sleep(0.001)
        for _ in range(5):
            assert not (await bench.mover.fetch(KEYS, plan_of(packed), digests)).any()
        assert bench.asked == asked + tier_mover.FETCH_BATCH
        assert bench.mover.num_pauses == 1
        bench.tier.release()
        assert (await hung).sum() == tier_mover.FETCH_BATCH, "it may have its memory only when nothing writes to it"
        await bench.mover.aclose()


async def test_writes_to_a_tier_that_hangs_are_refused_at_once(bench: Bench) -> None:
    async with asyncio.timeout(HANGS_S):
        packed = [True] * NUM_BLOCKS
        await bench.mover.open()
        bench.fault = TierFault.HANG
        hung = asyncio.ensure_future(bench.mover.write(KEYS, plan_of(packed), bench.digests(packed)))
        while not bench.mover._guard.writes.refuses:
            await asyncio.sleep(0.001)
        asked = bench.asked
        assert not (await bench.mover.write(KEYS, plan_of(packed), bench.digests(packed))).any()
        assert bench.asked == asked
        bench.tier.release()
        assert (await hung).all()
        await bench.mover.aclose()


class NeverOpens(MemoryTier):
    async def open(self) -> None:
        await asyncio.Event().wait()


class RaisesWhenItOpens(MemoryTier):
    async def open(self) -> None:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("kind", [NeverOpens, RaisesWhenItOpens])
async def test_a_server_starts_without_a_tier_that_does_not_open(
    kind: type[MemoryTier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "CLOSE_TIMEOUT_S", TIMEOUT_S)
    tier: Tier = kind(1 << 20, namespace=namespace().digest)
    monkeypatch.setattr(tier_mover, "tier_of", lambda *_: tier)
    async with asyncio.timeout(HANGS_S):
        mover = TierMover(config(), namespace(), np.zeros(NUM_BLOCKS * RAW_BYTES, np.uint8), ENCODINGS)
        await mover.open()
        assert "cannot be used" in caplog.text
        digests = np.zeros(NUM_BLOCKS, dtype=np.uint64)
        assert not (await mover.fetch(KEYS, plan_of([True] * NUM_BLOCKS), digests)).any()
        assert not (await mover.write(KEYS, plan_of([True] * NUM_BLOCKS), digests)).any()
        await mover.aclose()


async def test_a_scheduler_half_does_not_wait_for_ever_for_its_tier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tier = NeverOpens(1 << 20, namespace=namespace().digest)
    monkeypatch.setattr(tier_index, "tier_of", lambda *_: tier)
    async with asyncio.timeout(HANGS_S):
        with pytest.raises(ConfigError, match="has not opened in"):
            await asyncio.to_thread(TierIndex, config(), namespace())
