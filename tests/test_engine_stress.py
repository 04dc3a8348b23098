"""Seeded storms of saves, loads, evictions, failures and cancellations, against an oracle of what each hash means."""

import asyncio
import contextlib
import random

import numpy as np
import pytest
import torch

from kvortex import BlockHash, hash_blocks
from kvortex.sched.batcher import Batch
from kvortex.testing import Fault
from kvortex.types import Direction
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, make_cache, running_engine, small_config

CLIENTS = 8
BLOCKS_EACH = 24
CHAINS = 12
pytestmark = pytest.mark.slow


def payload(block_hash: BlockHash) -> torch.Tensor:
    """The oracle: a block's content is a function of its hash."""
    seed = int.from_bytes(block_hash[:8], "little")
    data = np.random.default_rng(seed).integers(0, 2**32, BLOCK_NBYTES // 4, dtype=np.uint32)
    return torch.from_numpy(data.view(np.float32))


def write(cache: dict[str, torch.Tensor], block_id: int, data: torch.Tensor) -> None:
    for layer, part in zip(cache.values(), data.split(data.numel() // len(cache)), strict=True):
        layer[:, block_id] = part.view(layer[:, block_id].shape)


def holds(cache: dict[str, torch.Tensor], block_id: int, data: torch.Tensor) -> bool:
    parts = data.split(data.numel() // len(cache))
    return all(
        torch.equal(layer[:, block_id].reshape(-1).view(torch.int32), part.view(torch.int32))
        for layer, part in zip(cache.values(), parts, strict=True)
    )


class Storm:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.cache = make_cache(CLIENTS * BLOCKS_EACH)
        self.chains = [
            hash_blocks(np.arange(BLOCKS_EACH // 2 * BLOCK_SIZE), BLOCK_SIZE, extra_keys=(c,)) for c in range(CHAINS)
        ]
        self.loaded = self.missed = self.cancelled = 0

    def fault_of(self, number: int, batch: Batch) -> Fault | None:
        roll = self.random.random()
        if roll < 0.03:
            return Fault.REFUSE
        if roll < 0.06:
            return Fault.FAIL
        if roll < 0.09 and batch.direction is Direction.LOAD:
            return Fault.CORRUPT
        return None

    async def client(self, engine: object, number: int, rounds: int) -> None:
        mine = list(range(number * BLOCKS_EACH, (number + 1) * BLOCKS_EACH))
        for _ in range(rounds):
            hashes = self.random.choice(self.chains)[: self.random.randint(1, BLOCKS_EACH // 2)]
            ids = self.random.sample(mine, len(hashes))
            call = self.save if self.random.random() < 0.5 else self.load
            task = asyncio.create_task(call(engine, hashes, ids))
            if self.random.random() < 0.3:
                for _ in range(self.random.randint(0, 30)):
                    await asyncio.sleep(0)
                self.cancelled += task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            # Back in control: these blocks are ours again, whatever happened.
            for b in ids:
                write(self.cache, b, torch.full((BLOCK_NBYTES // 4,), float("nan")))

    async def save(self, engine: object, hashes: list[BlockHash], ids: list[int]) -> None:
        for block_hash, b in zip(hashes, ids, strict=True):
            write(self.cache, b, payload(block_hash))
        await engine.save_blocks(hashes, ids)

    async def load(self, engine: object, hashes: list[BlockHash], ids: list[int]) -> None:
        result = await engine.load_blocks(hashes, ids)
        for block_hash, b, reason in zip(hashes, ids, result.outcomes, strict=True):
            if reason is None:
                assert holds(self.cache, b, payload(block_hash)), f"wrong bytes for {block_hash.hex()[:8]}"
                self.loaded += 1
            else:
                self.missed += 1


@pytest.mark.parametrize("seed", range(6))
async def test_storm(seed: int) -> None:
    storm = Storm(seed)
    pool_blocks = 64
    config = small_config(pool={"bytes": pool_blocks * BLOCK_NBYTES, "pin_piece_bytes": 16 * BLOCK_NBYTES})
    async with running_engine(storm.cache, config, storm.fault_of) as (engine, _):
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(storm.client(engine, number, rounds=60))
        stats = engine.get_stats()
        assert stats.evicted_blocks > 0
        engine.clear()
        assert engine.get_stats().pools[0].allocated_bytes == 0
    assert storm.loaded > 20
    assert storm.missed > 0
    assert storm.cancelled > 5
