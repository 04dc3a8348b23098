"""Blocks that a caller has the engine forget are found nowhere: not in the pool, not in the tier, not by a restart."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvortex import KVortexEngine, MissReason, SaveOutcome
from kvortex.testing import Fault, TierFault
from kvortex.tiering import guard
from kvortex.tiers import breaker
from kvortex.types import Direction
from tests.engine_support import BLOCK_SIZE, chain, contents, make_cache, running_engine, small_config
from tests.groups_support import apart, request, tables
from tests.test_engine_groups_tiering import Below
from tests.test_engine_tiering import MODEL, Bench

TIMEOUT_S = 0.3  # of the tier
HASHES = chain(8)
CODECS = ("raw", "bf16")


class Store:
    """Engines one after another over one memory, or one directory."""

    def __init__(self, tier: str, folder: Path) -> None:
        self.bench = Bench()
        self._changes: dict[str, Any] = {} if tier == "memory" else {"disk": str(folder)}
        self.cache = make_cache()

    @asynccontextmanager
    async def engine(self, fault_of: Any = None, **changes: Any) -> Any:
        settings = {"tier": {"timeout_s": TIMEOUT_S}, "identity": MODEL, **self._changes, **changes}
        parts = None if self._changes else self.bench.parts(fault_of)
        async with KVortexEngine.create(small_config(**settings), parts) as engine:
            engine.register_kv_caches(self.cache, BLOCK_SIZE)
            assert await engine.wait_tier()
            yield engine

    async def is_found(self, **changes: Any) -> list[bool]:
        """Which of the blocks another engine finds, and can load."""
        async with self.engine(**changes) as engine:
            found = engine.check_blocks(HASHES).tolist()
            loaded = await engine.load_blocks(HASHES, range(32, 40))
            assert [outcome is None for outcome in loaded.outcomes] == found
        return found


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(request.param, tmp_path)


@pytest.fixture
def memory(tmp_path: Path) -> Store:
    return Store("memory", tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.1)
    monkeypatch.setattr(guard, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 3600.0)


@pytest.mark.parametrize("codec", CODECS)
async def test_forgotten_blocks_are_found_nowhere_and_the_others_stay(store: Store, codec: str) -> None:
    async with store.engine(codec=codec) as engine:
        assert (await engine.save_blocks(HASHES, range(8))).ok
        await engine.flush()
        assert await engine.invalidate(HASHES[2:4])
        assert engine.check_blocks(HASHES).tolist() == [True] * 2 + [False] * 2 + [True] * 4
        assert engine.miss_reason(HASHES[2]) is MissReason.INVALIDATED
        loaded = await engine.load_blocks(HASHES, range(32, 40))
        assert loaded.miss_counts() == {MissReason.INVALIDATED: 2}
    assert await store.is_found(codec=codec) == [True] * 2 + [False] * 2 + [True] * 4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("inclusion", ["inclusive", "exclusive"])
async def test_everything_is_forgotten(store: Store, codec: str, inclusion: str) -> None:
    settings = {"codec": codec, "tier": {"timeout_s": TIMEOUT_S, "inclusion": inclusion}, "pool": {"bytes": 1 << 17}}
    settings["pool"]["pin_piece_bytes"] = 1 << 16
    async with store.engine(**settings) as engine:
        for salt in range(6):
            await engine.save_blocks(chain(8, salt), range(8))
        await engine.flush()
        assert engine.get_stats().tiering.used_bytes > 0
        assert await engine.clear(tiers=True)
        for salt in range(6):
            assert not engine.check_blocks(chain(8, salt)).any()
        stats = engine.get_stats()
        assert stats.tiering.used_bytes == stats.pools[0].allocated_bytes == 0
        assert (await engine.save_blocks(HASHES, range(8))).ok
        assert engine.match_prefix(HASHES) == 8


async def test_a_plain_clear_keeps_the_tier(store: Store) -> None:
    async with store.engine() as engine:
        await engine.save_blocks(HASHES, range(8))
        await engine.flush()
        engine.clear()
        assert engine.match_prefix(HASHES) == 8
    assert await store.is_found() == [True] * 8


@pytest.mark.parametrize("everything", [False, True])
async def test_what_waits_to_be_written_and_what_is_being_written(memory: Store, everything: bool) -> None:
    """The first writes are slow, so that the others still wait."""
    slow = lambda direction, number, key: TierFault.SLOW if direction is Direction.SAVE else None  # noqa: E731
    async with memory.engine(slow, tier={"timeout_s": 5.0}) as engine:
        assert (await engine.save_blocks(HASHES, range(8))).ok
        await asyncio.sleep(0.02)
        assert engine.get_stats().tiering.written_blocks == 0
        assert await (engine.clear(tiers=True) if everything else engine.invalidate(HASHES))
        await engine.flush()
        assert not engine.check_blocks(HASHES).any()
    assert not any(await memory.is_found())


async def test_a_fetch_on_its_way_does_not_bring_a_forgotten_block_back(memory: Store) -> None:
    async with memory.engine() as engine:
        await engine.save_blocks(HASHES, range(8))
        await engine.flush()
    slow = lambda direction, number, key: TierFault.SLOW if direction is Direction.LOAD else None  # noqa: E731
    async with memory.engine(slow, tier={"timeout_s": 5.0}) as engine:
        fetch = asyncio.create_task(engine.prefetch(HASHES))
        await asyncio.sleep(0.02)
        assert await engine.invalidate(HASHES)
        assert await fetch == 0
        assert not engine.check_blocks(HASHES).any()
        engine.clear()
        assert engine.get_stats().pools[0].allocated_bytes == 0


async def test_a_save_on_its_way_says_that_its_blocks_are_gone() -> None:
    is_held = True
    async with running_engine(make_cache(), fault_of=lambda *_: Fault.HOLD if is_held else None) as (engine, faulty):
        save = asyncio.create_task(engine.save_blocks(HASHES, range(8)))
        while not engine.get_stats().pools[0].allocated_bytes:
            await asyncio.sleep(0)
        assert await engine.invalidate(HASHES[:3])
        while not save.done():
            faulty.release()
            await asyncio.sleep(0.01)
        outcomes = (await save).outcomes
        assert set(outcomes[:3]) == {SaveOutcome.GONE}
        assert set(outcomes[3:]) == {SaveOutcome.STORED}
        is_held = False
        assert (await engine.save_blocks(HASHES, range(8))).ok
        assert (await engine.load_blocks(HASHES, range(8, 16))).ok


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("everything", [False, True])
async def test_a_tier_that_hangs_is_not_waited_for_and_says_so(memory: Store, everything: bool) -> None:
    hangs = lambda direction, number, key: TierFault.HANG if direction is Direction.SAVE else None  # noqa: E731
    async with memory.engine(hangs) as engine:
        await engine.save_blocks(HASHES, range(8))
        await asyncio.sleep(0.02)
        async with asyncio.timeout(3):
            assert not await (engine.clear(tiers=True) if everything else engine.invalidate(HASHES))
        assert not engine.check_blocks(HASHES).any()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["raises", "hangs", "does nothing"])
async def test_a_tier_that_does_not_delete(memory: Store, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async with memory.engine() as engine:
        await engine.save_blocks(HASHES, range(8))
        await engine.flush()

        async def delete(keys: Any, **named: Any) -> list[bool]:
            if how == "raises":
                raise OSError("no")
            if how == "hangs":
                await asyncio.sleep(60)
            return [False] * len(keys)

        assert memory.bench.tier is not None
        monkeypatch.setattr(memory.bench.tier, "delete", delete)
        assert not await engine.invalidate(HASHES)
        assert not await engine.clear(tiers=True)


async def test_without_a_tier_and_of_blocks_that_are_nowhere() -> None:
    async with running_engine(make_cache()) as (engine, _):
        assert await engine.invalidate(HASHES)
        assert await engine.invalidate([])
        assert await engine.clear(tiers=True)
        assert engine.miss_reason(HASHES[0]) is MissReason.NEVER_STORED


@pytest.mark.parametrize("tier", ["memory", "disk"])
async def test_the_blocks_of_all_groups_are_forgotten(tmp_path: Path, tier: str) -> None:
    below, cache, hashes = Below(tier, tmp_path), apart(), request(12)
    table = tables(12, {"full": 0, "window": 0, "state": 0})
    async with below.engine(cache) as engine:
        await engine.save_blocks(hashes, table)
        await engine.flush()
        assert await engine.invalidate(hashes)
        for group in table:
            assert not engine.check_blocks(hashes, group).any()
    async with below.engine(cache) as engine:
        assert engine.match_prefix(hashes) == 0
        assert engine.get_stats().tiering.used_bytes == 0


def test_without_a_loop(tmp_path: Path) -> None:
    cache = make_cache()
    with KVortexEngine.create_sync(small_config(disk=str(tmp_path), identity=MODEL)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        engine.save_blocks(HASHES, range(8))
        engine.flush()
        assert engine.invalidate(HASHES[4:], timeout_s=10)
        assert engine.match_prefix(HASHES) == 4
        assert engine.clear()
        assert engine.match_prefix(HASHES) == 4
        assert engine.load_blocks(HASHES[:4], range(8, 12)).ok
        assert contents(cache, range(4)) == contents(cache, range(8, 12))
        assert engine.clear(tiers=True, timeout_s=10)
        assert engine.match_prefix(HASHES) == 0
