"""Seeded storms over three groups of layers in shared pages, against an oracle of what each block holds."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kvortex import BlockHash, KVortexEngine
from kvortex.sched import TransferExecutor
from kvortex.sched.batcher import Batch
from kvortex.testing import Fault, FaultInjectingExecutor, TierFault
from kvortex.types import Direction
from tests.engine_support import Parts
from tests.groups_support import GroupedCache, Tables, groups_config, in_shared_pages, request
from tests.test_engine_tiering import Bench

CLIENTS = 6
BLOCKS = 8  # of full attention in the longest request
PAGES_EACH = 2 * BLOCKS + 2
CHAINS = 10
pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "raw": {},
    "fp8": {"codec": {"name": "fp8"}},
    "raw over an inclusive tier": {"tier": {"inclusion": "inclusive"}},
    "fp8 over an exclusive tier": {"codec": {"name": "fp8"}, "tier": {"inclusion": "exclusive"}},
}


class Storm:
    def __init__(self, seed: int, kind: str) -> None:
        self.random = random.Random(seed)
        self.kind = kind
        self.cache = in_shared_pages(num_pages=CLIENTS * PAGES_EACH)
        self.scratch = in_shared_pages(num_pages=2)
        self.chains = [request(BLOCKS, salt) for salt in range(CHAINS)]
        self.content: dict[tuple[BlockHash, str], bytes] = {}
        self.loaded = dict.fromkeys(self.cache.groups, 0)
        self.missed = self.cancelled = 0

    # -- the oracle ----------------------------------------------------------------------------------

    def payload(self, block_hash: BlockHash, group: str) -> bytes:
        """A block's content is a function of its hash and its group."""
        key = block_hash, group
        if key not in self.content:
            self.content[key] = self.make_payload(block_hash, group, self.scratch)
        return self.content[key]

    def make_payload(self, block_hash: BlockHash, group: str, scratch: GroupedCache) -> bytes:
        """Any bytes for a state; numbers that packing does not change for the others, or some that it cannot take."""
        generator = np.random.default_rng([block_hash[0], block_hash[1], *group.encode()])
        if group == "state":
            return generator.bytes(len(scratch.block(group, 0)))
        parts = scratch.parts(group, 0)
        for part in parts:
            part.copy_(torch.from_numpy(generator.integers(-8, 9, tuple(part.shape)).astype(np.float32)))
        if block_hash[2] < 40:
            parts[0].view(torch.int16)[0, 0, 0, 0] = 0x7FFF  # no number
        return scratch.block(group, 0)

    # -- faults --------------------------------------------------------------------------------------

    def fault_of(self, number: int, batch: Batch) -> Fault | None:
        roll = self.random.random()
        if roll < 0.02:
            return Fault.REFUSE
        if roll < 0.04:
            return Fault.FAIL
        if roll < 0.06 and batch.direction is Direction.LOAD:
            return Fault.CORRUPT
        if roll < 0.08 and batch.direction is Direction.SAVE:
            return Fault.LOSSY
        return None

    def tier_fault_of(self, direction: Direction, number: int, key: bytes) -> TierFault | None:
        return self.random.choice([TierFault.FAIL, TierFault.SHORT, TierFault.LIE]) if number % 40 == 39 else None

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[KVortexEngine]:
        def wrap(inner: TransferExecutor) -> TransferExecutor:
            return FaultInjectingExecutor(inner, self.fault_of)

        changes = KINDS[self.kind]
        nbytes = sum(len(self.scratch.block(group, 0)) for group in ("full", "window")) * BLOCKS
        pool_bytes = nbytes * (3 if "fp8" in self.kind else 6)
        config = groups_config(pool={"bytes": pool_bytes}, eviction={"watermark": 0.8}, **changes)
        parts = Bench().parts(self.tier_fault_of, wrap) if "tier" in changes else Parts(wrap_executor=wrap)
        async with KVortexEngine.create(config, parts) as engine:
            self.cache.register(engine)
            yield engine

    # -- clients -------------------------------------------------------------------------------------

    def some_blocks(self, number: int) -> tuple[list[BlockHash], Tables]:
        """A request, some of its blocks, and pages of this client for them."""
        hashes = self.random.choice(self.chains)[: self.random.randint(1, BLOCKS)]
        counts = {"full": len(hashes), "window": len(hashes), "state": len(hashes) // 4}
        free = self.random.sample(range(number * PAGES_EACH, (number + 1) * PAGES_EACH), PAGES_EACH)
        absent = self.random.choice([0.0, 0.3])
        tables = {
            group: [-1 if self.random.random() < absent else free.pop() for _ in range(count)]
            for group, count in counts.items()
        }
        names = self.random.sample(list(tables), len(tables))
        return hashes, {name: tables[name] for name in names}

    def named(self, hashes: list[BlockHash], tables: Tables) -> list[tuple[str, BlockHash, int]]:
        step = {"full": 1, "window": 1, "state": 4}
        return [
            (group, hashes[(block + 1) * step[group] - 1], page)
            for group, pages in tables.items()
            for block, page in enumerate(pages)
            if page >= 0
        ]

    async def client(self, engine: KVortexEngine, number: int, rounds: int) -> None:
        for round_number in range(rounds):
            hashes, tables = self.some_blocks(number)
            call = self.save if self.random.random() < 0.5 else self.load
            task = asyncio.create_task(call(engine, hashes, tables))
            if self.random.random() < 0.3:
                for _ in range(self.random.randint(0, 30)):
                    await asyncio.sleep(0)
                self.cancelled += task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if number == 0 and round_number % 40 == 39:
                engine.clear()
            for group, _, page in self.named(hashes, tables):  # back in control: these pages are ours again
                self.cache.write(group, page, bytes([255]) * len(self.cache.block(group, page)))

    async def save(self, engine: KVortexEngine, hashes: list[BlockHash], tables: Tables) -> None:
        for group, block_hash, page in self.named(hashes, tables):
            self.cache.write(group, page, self.payload(block_hash, group))
        await engine.save_blocks(hashes, tables)

    async def load(self, engine: KVortexEngine, hashes: list[BlockHash], tables: Tables) -> None:
        if self.random.random() < 0.2:
            await engine.prefetch(hashes)
        result = await engine.load_blocks(hashes, tables)
        for (group, block_hash, page), reason in zip(self.named(hashes, tables), result.outcomes, strict=True):
            if reason is not None:
                self.missed += 1
                continue
            assert self.cache.block(group, page) == self.payload(block_hash, group), f"wrong bytes in {group}"
            self.loaded[group] += 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
async def test_storm(seed: int, kind: str) -> None:
    storm = Storm(seed, kind)
    async with storm.engine() as engine:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(storm.client(engine, number, rounds=100))
        await engine.flush()
        stats = engine.get_stats()
        assert stats.evicted_blocks > 0
        assert (stats.kept_as_is_blocks > 0) == ("fp8" in kind)
        assert (stats.tiering is not None and stats.tiering.fetched_blocks > 0) == ("tier" in kind)
        engine.clear()
        assert engine.get_stats().pools[0].allocated_bytes == 0
    assert sum(storm.loaded.values()) > 100
    assert min(storm.loaded.values()) > 0
    assert storm.missed > 0
    assert storm.cancelled > 5
