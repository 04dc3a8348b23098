"""Leases: what was found stays in the pool until it is loaded, and nothing of them is left behind."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from kvortex import KVortexConfig, KVortexEngine, MissReason
from kvortex.config import KIB
from kvortex.errors import ConfigError, EngineStateError
from kvortex.types import BlockHash
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, chain, contents, make_cache, running_engine, small_config
from tests.groups_support import apart, grouped_engine, groups_config, request, tables

POOL_BLOCKS = 32
CONFIG = small_config(pool={"bytes": POOL_BLOCKS * BLOCK_NBYTES, "pin_piece_bytes": 128 * KIB, "lease_share": 0.5})
MOST = POOL_BLOCKS // 2  # blocks that leases may keep


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[KVortexEngine]:
    async with running_engine(make_cache(), CONFIG) as (made, _):
        yield made
        for lease in list(made._leases.open):  # type: ignore[union-attr]
            lease.release()
        assert made.get_stats().pools[0].leased_bytes == 0
        made.clear()
        assert made.get_stats().pools[0].allocated_bytes == 0


async def fill(engine: KVortexEngine, salts: Sequence[int], num_blocks: int = 16) -> None:
    """Save other chains, which evict whatever can be evicted."""
    for salt in salts:
        await engine.save_blocks(chain(num_blocks, salt), range(num_blocks))


async def saved(engine: KVortexEngine, num_blocks: int, salt: int = 0) -> list[BlockHash]:
    hashes = chain(num_blocks, salt)
    assert (await engine.save_blocks(hashes, range(num_blocks))).ok
    return hashes


async def test_leased_blocks_outlive_what_would_evict_them(engine: KVortexEngine) -> None:
    hashes = await saved(engine, 8)
    with engine.pin(hashes, ttl_s=60) as lease:
        assert (lease.num_blocks, lease.nbytes) == (8, 8 * BLOCK_NBYTES)
        assert engine.get_stats().pools[0].leased_bytes == 8 * BLOCK_NBYTES
        await fill(engine, range(1, 9))
        assert engine.match_prefix(hashes) == 8
        assert (await engine.load_blocks(hashes, range(40, 48))).ok
        assert "8 blocks" in repr(lease)
    assert lease.is_over
    assert "over" in repr(lease)
    await fill(engine, range(1, 9))
    assert engine.match_prefix(hashes) == 0
    assert engine.miss_reason(hashes[0]) is MissReason.EVICTED


async def test_a_lease_ends_by_itself(engine: KVortexEngine) -> None:
    hashes = await saved(engine, 4)
    lease = engine.pin(hashes, ttl_s=0.05)
    assert not lease.is_over
    await asyncio.sleep(0.2)
    assert lease.is_over
    lease.release()
    await fill(engine, range(1, 9))
    assert engine.match_prefix(hashes) == 0


async def test_a_block_is_kept_until_its_last_lease_ends_and_counts_once(engine: KVortexEngine) -> None:
    hashes = await saved(engine, MOST)
    leases = [engine.pin(hashes[:n], ttl_s=60) for n in (MOST, MOST, 3)]
    assert [lease.num_blocks for lease in leases] == [MOST, MOST, 3]
    assert engine.get_stats().pools[0].leased_bytes == MOST * BLOCK_NBYTES
    leases[0].release()
    leases[0].release()
    leases[1].release()
    assert engine.get_stats().pools[0].leased_bytes == 3 * BLOCK_NBYTES
    await fill(engine, range(1, 9))
    assert engine.match_prefix(hashes) == 3


async def test_leases_leave_room_for_others(engine: KVortexEngine) -> None:
    hashes = await saved(engine, 24)
    first = engine.pin(hashes[:6], ttl_s=60)
    second = engine.pin(hashes, ttl_s=60)
    assert (first.num_blocks, second.num_blocks) == (6, MOST)
    other = await saved(engine, 12, salt=1)
    assert engine.match_prefix(other) == 12
    assert engine.pin(other, ttl_s=60).num_blocks == 0
    second.release()
    assert engine.pin(other, ttl_s=60).num_blocks == MOST - 6


async def test_what_is_not_in_the_pool_is_not_leased(engine: KVortexEngine) -> None:
    hashes = await saved(engine, 4)
    assert engine.pin([*hashes, *chain(2, salt=9)], ttl_s=60).num_blocks == 4
    assert engine.pin([*chain(2, salt=9), *hashes], ttl_s=60).num_blocks == 0
    assert engine.pin([], ttl_s=60).nbytes == 0


@pytest.mark.parametrize("ttl_s", [0, -1, float("inf"), float("nan")])
async def test_a_time_that_is_none_is_refused(engine: KVortexEngine, ttl_s: float) -> None:
    with pytest.raises(ConfigError, match="ttl_s"):
        engine.pin(chain(1), ttl_s=ttl_s)


async def test_what_is_forgotten_is_not_found_and_its_memory_comes_back_with_the_lease(engine: KVortexEngine) -> None:
    hashes = await saved(engine, 8)
    lease = engine.pin(hashes, ttl_s=60)
    assert await engine.invalidate(hashes[:2])
    engine.clear()
    assert not engine.check_blocks(hashes).any()
    assert engine.get_stats().pools[0].allocated_bytes == 8 * BLOCK_NBYTES
    lease.release()
    assert engine.get_stats().pools[0].allocated_bytes == 0


async def test_a_shutdown_ends_leases() -> None:
    async with running_engine(make_cache(), CONFIG) as (engine, _):
        lease = engine.pin(await saved(engine, 4), ttl_s=60)
    assert lease.is_over
    lease.release()
    with pytest.raises(EngineStateError):
        engine.pin(chain(1), ttl_s=1)


async def test_a_lease_has_what_every_group_needs() -> None:
    cache, hashes = apart(), request(12)
    async with grouped_engine(cache, groups_config(pool={"bytes": 1 << 20, "pin_piece_bytes": 256 * KIB})) as engine:
        table = tables(12, {"full": 0, "window": 0, "state": 0})
        assert (await engine.save_blocks(hashes, table)).num_stored == 27
        lease = engine.pin(hashes, ttl_s=60)
        needed = 12 + 3 + 1  # full attention, the window, the last state
        assert lease.num_blocks == 12
        assert len(lease._slots) == needed
        for salt in range(1, 12):
            await engine.save_blocks(request(12, salt), table)
        assert engine.match_prefix(hashes) == 12
        lease.release()
        for salt in range(1, 12):
            await engine.save_blocks(request(12, salt), table)
        assert engine.match_prefix(hashes) == 0


def test_leases_from_other_threads() -> None:
    cache = make_cache()
    with KVortexEngine.create_sync(CONFIG) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        hashes = chain(8)
        engine.save_blocks(hashes, range(8))
        lease = engine.pin(hashes, ttl_s=60)
        thread = threading.Thread(target=lease.release)
        thread.start()
        thread.join()
        engine.drain()  # the loop has taken the release in
        assert lease.is_over
        with engine.pin(hashes, ttl_s=60) as lease:
            assert engine.load_blocks(hashes[: lease.num_blocks], range(8, 16)).ok
        assert contents(cache, range(8)) == contents(cache, range(8, 16))
        kept = engine.pin(hashes, ttl_s=60)
    kept.release()  # nothing is left to release


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pool\.lease_share"):
        KVortexConfig(pool={"lease_share": 1.0})
