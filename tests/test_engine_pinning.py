"""A pool of which less can be pinned than was asked for: the engine goes on with what there is."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvortex import KVortexConfig, KVortexEngine, MissReason, SaveOutcome
from kvortex.errors import DeviceError
from kvortex.memory import PinnedPool
from tests.engine_support import (
    BLOCK_NBYTES,
    BLOCK_SIZE,
    chain,
    contents,
    make_cache,
    running_engine,
    small_config,
    wipe,
)

POOL_BLOCKS, PINNED_BLOCKS, PIECE_BLOCKS = 1000, 16, 4


class MeanDevice:
    """Registers so many pieces, each when the gate lets it, and then no more."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.registered: list[int] = []
        self.gate = threading.Semaphore(0)

    def numa_node(self) -> None:
        return None

    def make_current(self) -> None:
        pass

    enter_thread = make_current

    def register_host(self, address: int, nbytes: int) -> None:
        assert self.gate.acquire(timeout=30)
        if len(self.registered) == self.pieces:
            raise DeviceError("injected: no more memory can be pinned")
        self.registered.append(address)

    def unregister_host(self, address: int) -> None:
        self.registered.remove(address)

    def go_on(self) -> None:
        self.gate.release(POOL_BLOCKS)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[MeanDevice]:
    """Behind every pool that an engine makes."""
    mean = MeanDevice(PINNED_BLOCKS // PIECE_BLOCKS)

    def make(capacity_bytes: int, **how: Any) -> PinnedPool:
        return PinnedPool(capacity_bytes, **{**how, "device": mean})

    monkeypatch.setattr("kvortex.planes.data.PinnedPool", make)
    yield mean
    assert not mean.registered, "everything is unregistered at the end"


def config(**changes: object) -> KVortexConfig:
    return small_config(
        pool={"bytes": POOL_BLOCKS * BLOCK_NBYTES, "pin_piece_bytes": PIECE_BLOCKS * BLOCK_NBYTES}, **changes
    )


async def told(engine: KVortexEngine) -> None:
    """Wait until the engine knows."""
    with pytest.raises(DeviceError, match="no more memory can be pinned"):
        await engine.wait_pinned()


async def test_an_engine_goes_on_with_as_much_as_can_be_pinned(
    device: MeanDevice, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="kvortex")
    cache = make_cache()
    device.go_on()
    async with running_engine(cache, config()) as (engine, _):
        await told(engine)
        for salt in range(20):
            assert (await engine.save_blocks(chain(6, salt), range(6))).ok, "there is always room for what is new"
            wipe(cache, range(20, 26))
            assert (await engine.load_blocks(chain(6, salt), range(20, 26))).ok
            assert contents(cache, range(20, 26)) == contents(cache, range(6))
        stats = engine.get_stats()
        pool = stats.pools[0]
        assert pool.capacity_bytes == pool.pinned_bytes == PINNED_BLOCKS * BLOCK_NBYTES
        assert pool.capacity_bytes // 2 < pool.allocated_bytes <= pool.capacity_bytes
        assert stats.evicted_blocks >= 20 * 6 - PINNED_BLOCKS
        assert sum(t.failures for t in stats.transfers) == 0
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert (
        f"no more than {PINNED_BLOCKS * BLOCK_NBYTES} of the pool's {POOL_BLOCKS * BLOCK_NBYTES} bytes" in warnings[0]
    )


async def test_a_save_that_waits_for_memory_that_is_never_pinned_fails_and_the_next_does_not(
    device: MeanDevice,
) -> None:
    async with running_engine(make_cache(), config()) as (engine, _):
        save = asyncio.ensure_future(engine.save_blocks(chain(PINNED_BLOCKS + 8), range(PINNED_BLOCKS + 8)))
        await asyncio.sleep(0.01)
        assert not save.done()
        device.go_on()
        outcomes = (await save).outcomes
        assert set(outcomes) == {SaveOutcome.FAILED}
        assert engine.miss_reason(chain(1)[0]) is MissReason.TRANSFER_FAILED
        assert (await engine.save_blocks(chain(PINNED_BLOCKS), range(PINNED_BLOCKS))).ok


async def test_blocks_that_came_from_a_lower_tier_to_where_nothing_is_pinned_are_not_served(
    device: MeanDevice, tmp_path: Path
) -> None:
    """A lower tier needs no pinned memory: its blocks may be there first."""
    cache, hashes = make_cache(), chain(PINNED_BLOCKS + 8)
    want = contents(cache, range(len(hashes)))
    device.go_on()
    device.pieces = POOL_BLOCKS
    on_disk = config(disk=str(tmp_path), identity={"model": "a"})
    async with running_engine(cache, on_disk) as (engine, _):
        await engine.save_blocks(hashes, range(len(hashes)))
        await engine.flush()
    device.pieces, device.gate = PINNED_BLOCKS // PIECE_BLOCKS, threading.Semaphore(0)
    async with running_engine(cache, on_disk) as (engine, _):
        await engine.wait_tier()
        assert await engine.prefetch(hashes) == len(hashes)
        load = asyncio.ensure_future(engine.load_blocks(hashes, range(len(hashes))))
        await asyncio.sleep(0.01)
        device.go_on()
        assert set((await load).outcomes) == {MissReason.TRANSFER_FAILED}
        await told(engine)
        assert engine.get_stats().pools[0].allocated_bytes == PINNED_BLOCKS * BLOCK_NBYTES
        wipe(cache, range(8))
        assert (await engine.load_blocks(hashes[:8], range(8))).ok
        assert contents(cache, range(8)) == want[:8]
        assert (await engine.load_blocks(hashes[-8:], range(8))).ok, "they come back to where they can be used"
        assert contents(cache, range(8)) == want[-8:]


async def test_without_any_pinned_memory_the_self_test_says_so_and_nothing_is_kept(device: MeanDevice) -> None:
    device.pieces = 0
    device.go_on()
    async with KVortexEngine.create(config(transfer={"self_test": True})) as engine:
        with pytest.raises(DeviceError, match="no more memory can be pinned"):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        device.pieces = POOL_BLOCKS
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        await engine.wait_pinned()
        assert (await engine.save_blocks(chain(6), range(6))).ok
