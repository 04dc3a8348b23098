"""The engine over a lower tier: blocks outlive pool and process, and nothing that the tier does hurts."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, ModelIdentity
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.owner.tiers import MakeTier
from kvortex.sched.executor import TransferExecutor
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.testing.tier_conformance import until
from kvortex.tiers import DiskTier, MemoryTier, ReadOutcome, ReadRequest, Tier, WriteOutcome, WriteRequest
from kvortex.types import Direction
from tests.engine_support import (
    BLOCK_NBYTES,
    BLOCK_SIZE,
    NUM_BLOCKS,
    Parts,
    chain,
    contents,
    make_cache,
    small_config,
    wipe,
)
from tests.owner.owner_support import local_owner, wait_until

TIER_BYTES = 64 << 20
MODEL = ModelIdentity(model="a", weights_revision="1")
WrapExecutor = Callable[[TransferExecutor], TransferExecutor]
FaultOf = Callable[[Direction, int, bytes], TierFault | None]


class LastingTier(MemoryTier):
    """What it kept outlives it, as on a disk."""

    async def aclose(self) -> None:
        kept, used_bytes = self._kept.copy(), self._used_bytes
        await super().aclose()
        self._kept, self._used_bytes = kept, used_bytes


class Bench:
    """Tiers follow each other, an engine each.

    Args:
        socket: of an owner that has pool and tier; None where the engine has them.
    """

    def __init__(self, socket: Path | None = None) -> None:
        self.socket = socket
        self.inner: LastingTier | None = None
        self.tier: FaultInjectingTier | None = None

    def make(self, fault_of: FaultOf | None) -> MakeTier:
        def make_tier(config: KVortexConfig, namespace: bytes) -> Tier:
            kept = self.inner
            self.inner = LastingTier(TIER_BYTES, namespace=namespace)
            if kept is not None:
                self.inner._kept, self.inner._used_bytes = kept._kept, kept._used_bytes
            self.tier = FaultInjectingTier(self.inner, fault_of or (lambda *_: None), delay_s=0.1)
            return self.tier

        return make_tier

    def parts(self, fault_of: FaultOf | None, wrap_executor: WrapExecutor | None = None) -> Parts:
        """An engine's own tier."""
        make_tier = self.make(fault_of)
        return Parts(
            make_tier=lambda namespace: make_tier(KVortexConfig(), namespace.digest), wrap_executor=wrap_executor
        )

    @asynccontextmanager
    async def engine(
        self, cache: dict[str, torch.Tensor], fault_of: FaultOf | None = None, **changes: object
    ) -> AsyncIterator[KVortexEngine]:
        if self.socket is None:
            async with KVortexEngine.create(small_config(**changes), self.parts(fault_of)) as engine:
                engine.register_kv_caches(cache, BLOCK_SIZE)
                yield engine
            return
        of_owner = {name: changes.pop(name) for name in ("pool", "eviction", "tier") if name in changes}
        with local_owner(self.socket, make_tier=self.make(fault_of), **of_owner) as owner:
            config = small_config(owner=self.socket, identity=MODEL, **changes)
            async with KVortexEngine.create(config) as engine:
                engine.register_kv_caches(cache, BLOCK_SIZE)
                yield engine
            wait_until(lambda: owner.clear() or owner.allocated_bytes == 0)  # writes and reads in flight settle


@pytest.fixture(params=["in process", "owner"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path / "kv.sock" if request.param == "owner" else None)


def pool_of(blocks: int) -> dict[str, object]:
    return {
        "pool": {"bytes": blocks * BLOCK_NBYTES, "pin_piece_bytes": 8 * 4096},
        "eviction": {"watermark": 1.0},
    }


async def test_blocks_outlive_the_engine(bench: Bench) -> None:
    cache, hashes, ids = make_cache(), chain(20), list(range(20))
    want = contents(cache, ids)
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
        assert engine.get_stats().tiering.written_blocks == 20
    wipe(cache, range(NUM_BLOCKS))
    async with bench.engine(cache) as engine:
        assert await engine.wait_tier()
        assert engine.match_prefix(hashes) == 20
        assert engine.check_blocks([*hashes, b"x" * 32]).tolist() == [True] * 20 + [False]
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.ok
        assert contents(cache, ids) == want
        stats = engine.get_stats()
        assert stats.tiering.fetched_blocks == 20
        seen = {"cpu"} if bench.socket else {"cpu", "memory"}
        assert {(t.direction, t.tier) for t in stats.transfers} == {(Direction.LOAD, tier) for tier in seen}


async def test_what_the_pool_evicted_comes_back(bench: Bench) -> None:
    cache = make_cache()
    async with bench.engine(cache, **pool_of(16)) as engine:
        want = {}
        for salt in range(6):
            ids = np.random.default_rng(salt).permutation(NUM_BLOCKS)[:8].tolist()
            want[salt] = contents(cache, ids)
            assert (await engine.save_blocks(chain(8, salt), ids)).ok
            await engine.flush()
        for salt, blocks in want.items():
            before = {name: layer.clone() for name, layer in cache.items()}
            loaded = await engine.load_blocks(chain(8, salt), range(8))
            assert loaded.ok, loaded.miss_counts()
            assert contents(cache, range(8)) == blocks
            for name, layer in cache.items():
                layer.copy_(before[name])


async def test_a_deadline_is_a_miss_with_its_reason_and_the_blocks_are_there_next_time(bench: Bench) -> None:
    cache, hashes, ids = make_cache(), chain(6), list(range(6))
    want = contents(cache, ids)
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()

    def slow_from_the_fourth(direction: Direction, number: int, key: bytes) -> TierFault | None:
        return TierFault.HANG if direction is Direction.LOAD and number >= 3 else None

    async with bench.engine(cache, slow_from_the_fourth) as engine:
        loaded = await engine.load_blocks(hashes, ids, deadline_s=0.2)
        assert loaded.outcomes == (None,) * 3 + (MissReason.DEADLINE,) * 3
        bench.tier.release()
        assert await engine.prefetch(hashes) == 6
        wipe(cache, ids)
        assert (await engine.load_blocks(hashes, ids, deadline_s=0.0)).ok
        assert contents(cache, ids) == want


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (TierFault.FAIL, MissReason.TRANSFER_FAILED),
        (TierFault.SHORT, MissReason.TRANSFER_FAILED),
        (TierFault.LIE, MissReason.CORRUPT),
    ],
)
async def test_a_bad_read_is_a_miss_with_its_reason(bench: Bench, fault: TierFault, reason: MissReason) -> None:
    cache, hashes, ids = make_cache(), chain(5), list(range(5))
    want = contents(cache, ids)
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
    broken = lambda direction, number, key: fault if direction is Direction.LOAD and number == 2 else None  # noqa: E731
    async with bench.engine(cache, broken) as engine:
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.outcomes == (None, None, reason, None, None)
        await asyncio.sleep(0)
        again = await engine.load_blocks(hashes, ids)
        # A wrong block is taken away from the tier too; one that could not be read is still there.
        assert again.ok is (reason is not MissReason.CORRUPT)
        assert [c for i, c in enumerate(contents(cache, ids)) if i != 2] == [w for i, w in enumerate(want) if i != 2]


async def test_a_hung_tier_ends_with_its_timeout_and_the_engine_goes_on(bench: Bench) -> None:
    cache, hashes, ids = make_cache(), chain(4), list(range(4))
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
    hangs = lambda direction, number, key: TierFault.HANG  # noqa: E731
    async with bench.engine(cache, hangs, tier={"timeout_s": 0.1}) as engine:
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.num_loaded == 0
        other = chain(4, salt=7)
        assert (await engine.save_blocks(other, ids)).ok
        assert (await engine.load_blocks(other, ids)).ok
        await asyncio.wait_for(engine.flush(), 5)
        assert engine.get_stats().tiering.written_blocks == 0
        bench.tier.release()  # late reads and writes settle; pools at zero is checked after every test


async def test_a_full_tier_is_counted_and_hurts_nobody(bench: Bench) -> None:
    cache, hashes, ids = make_cache(), chain(4), list(range(4))
    async with bench.engine(cache, lambda *_: TierFault.FULL) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
        figures = engine.get_stats().tiering
        assert (figures.written_blocks, figures.failed_writes) == (0, 4)
        text = engine.get_stats().to_prometheus()
        assert 'kvortex_tier_failed_writes_total{tier="memory"} 4' in text
        assert 'kvortex_tier_causes_total{tier="memory",cause="no_space"}' in text
        assert f"of {TIER_BYTES >> 20}.0 MiB" in str(engine.get_stats())
        assert (await engine.load_blocks(hashes, ids)).ok


@pytest.mark.parametrize("shed", ["newest", "oldest"])
async def test_too_much_to_write_is_shed_and_counted(bench: Bench, shed: str) -> None:
    cache, hashes, ids = make_cache(), chain(30), list(range(30))
    async with bench.engine(cache, tier={"queue_blocks": 10, "shed": shed}) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
        figures = engine.get_stats().tiering
        assert figures.shed_blocks == 20
        assert figures.written_blocks == 10
        kept = [engine._tiering.known(engine_keys(hashes))[i] for i in range(30)]
        assert kept == ([True] * 10 + [False] * 20 if shed == "newest" else [False] * 20 + [True] * 10)


def engine_keys(hashes: list[bytes]) -> np.ndarray:
    from kvortex.index import pack_keys

    return pack_keys(hashes)


async def test_second_touch_spares_what_is_never_asked_for(bench: Bench) -> None:
    cache, hashes, ids = make_cache(), chain(8), list(range(8))
    async with bench.engine(cache, tier={"admission": "second_touch"}) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
        assert engine.get_stats().tiering.written_blocks == 0
        await engine.load_blocks(hashes[:3], ids[:3])
        await engine.save_blocks(hashes[3:5], ids[3:5])  # saved again: asked for again
        await engine.flush()
        assert engine.get_stats().tiering.written_blocks == 5


class GatheringTier(MemoryTier):
    """Notes how many blocks each write brings; the first write waits."""

    def __init__(self, namespace: bytes, write_bytes: int) -> None:
        super().__init__(TIER_BYTES, namespace=namespace)
        self.write_bytes = write_bytes
        self.counts: list[int] = []
        self.may_go_on = asyncio.Event()

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self.counts.append(len(requests))
        await self.may_go_on.wait()
        return await super().write(requests, deadline_s=deadline_s)


@pytest.mark.parametrize(("write_bytes", "most"), [(0, 16), (BLOCK_NBYTES, 16), (24 * BLOCK_NBYTES, 24), (1 << 40, 40)])
async def test_a_tier_gets_as_many_bytes_at_a_time_as_it_asks_for(write_bytes: int, most: int) -> None:
    """But never more than a tenth of the pool."""
    tiers: list[GatheringTier] = []

    def make_tier(namespace: Namespace) -> Tier:
        tiers.append(GatheringTier(namespace.digest, write_bytes))
        return tiers[0]

    config = small_config(pool={"bytes": 400 * BLOCK_NBYTES, "pin_piece_bytes": 8 * 4096})
    async with KVortexEngine.create(config, Parts(make_tier=make_tier)) as engine:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        assert await engine.wait_tier()
        for start in range(0, 96, 48):
            assert (await engine.save_blocks(chain(96)[start : start + 48], range(48))).ok
        await until(lambda: bool(tiers[0].counts), 60)
        tiers[0].may_go_on.set()
        await engine.flush()
        assert sum(tiers[0].counts) == 96
        assert max(tiers[0].counts) == most


async def test_exclusive_blocks_are_in_one_place(bench: Bench) -> None:
    cache = make_cache()
    want = {}
    settings = pool_of(40) | {"eviction": {"watermark": 0.5, "ratio": 0.5}, "tier": {"inclusion": "exclusive"}}
    async with bench.engine(cache, **settings) as engine:
        for salt in range(6):
            ids = list(range(salt * 8, salt * 8 + 8))
            want[salt] = contents(cache, ids)
            assert (await engine.save_blocks(chain(8, salt), ids)).ok
            await engine.flush()
        figures = engine.get_stats().tiering
        assert figures.demoted_blocks > 0
        assert figures.written_blocks == figures.demoted_blocks
        for salt, blocks in want.items():
            keys = engine_keys(chain(8, salt))
            both = engine._control.index.contains_mask(keys) & engine._tiering.known(keys)
            assert not both.any()
            loaded = await engine.load_blocks(chain(8, salt), range(8))
            good = [i for i, outcome in enumerate(loaded.outcomes) if outcome is None]
            assert [contents(cache, range(8))[i] for i in good] == [blocks[i] for i in good]
            await engine.flush()
            await asyncio.sleep(0.01)
        assert engine.get_stats().tiering.fetched_blocks > 0


async def test_a_cancelled_prefetch_leaves_nothing_behind(bench: Bench) -> None:
    cache, hashes, ids = make_cache(), chain(40), list(range(40))
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
    slow = lambda direction, number, key: TierFault.SLOW if direction is Direction.LOAD else None  # noqa: E731
    async with bench.engine(cache, slow, tier={"fetch_blocks": 4}) as engine:
        task = asyncio.create_task(engine.prefetch(hashes))
        await asyncio.sleep(0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.3)
        figures = engine.get_stats().tiering
        assert figures.arriving_blocks == 0
        assert 0 < figures.fetched_blocks < 40
        assert await engine.prefetch(hashes) == 40


async def test_two_loads_of_one_chain_fetch_it_once(bench: Bench) -> None:
    cache, hashes = make_cache(), chain(12)
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, range(12))
        await engine.flush()
    reads: list[bytes] = []

    def count(direction: Direction, number: int, key: bytes) -> TierFault | None:
        if direction is Direction.LOAD:
            reads.append(key)
        return TierFault.SLOW

    async with bench.engine(cache, count) as engine:
        first, second = await asyncio.gather(
            engine.load_blocks(hashes, range(12)), engine.load_blocks(hashes, range(20, 32))
        )
        assert first.ok
        assert second.ok
        assert len(reads) == len(set(reads)) == 12


async def test_a_pool_smaller_than_the_chain_fetches_what_fits(bench: Bench) -> None:
    cache, hashes = make_cache(), chain(30)
    want = contents(cache, range(30))
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, range(30))
        await engine.flush()
    wipe(cache, range(30))
    async with bench.engine(cache, **pool_of(10)) as engine:
        loaded = await engine.load_blocks(hashes, range(30))  # no hang, no leak
        assert 0 < loaded.num_loaded <= 10
        good = [i for i, outcome in enumerate(loaded.outcomes) if outcome is None]
        assert [contents(cache, range(30))[i] for i in good] == [want[i] for i in good]


async def test_packed_blocks_go_down_and_up_packed(bench: Bench) -> None:
    cache = {name: layer.to(torch.bfloat16) for name, layer in make_cache().items()}
    cache["layers.0"][0, 3] = float("inf")
    bits = {name: layer.view(torch.int16) for name, layer in cache.items()}
    hashes, ids = chain(6), list(range(6))
    async with bench.engine(cache, codec={"name": "fp8", "max_error": 0.2}) as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
        wipe(cache, ids)
        await engine.load_blocks(hashes, ids)
        want = contents(bits, ids)
        assert sorted({kept.codec for kept in bench.inner._kept.values()}) == [0, 2]
    wipe(cache, ids)
    async with bench.engine(cache, codec={"name": "fp8", "max_error": 0.2}) as engine:
        assert (await engine.load_blocks(hashes, ids)).ok
        assert contents(bits, ids) == want


def packed_cache(block_nbytes: int) -> dict[str, torch.Tensor]:
    """One layer of 64 blocks of so many bytes; every third loses too much when it is packed."""
    elements = block_nbytes // 2 // 2 // BLOCK_SIZE
    layer = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, 1, elements).to(torch.bfloat16)
    layer[0, ::3, 0] = float("inf")
    return {"layers.0": layer}


@pytest.mark.parametrize("block_nbytes", [2048, 4096, 8192, 65536])
@pytest.mark.parametrize("scanned", [True, False])
async def test_packed_blocks_and_those_kept_as_they_are_come_back_from_disk(
    tmp_path: Path, block_nbytes: int, scanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, hashes, ids = packed_cache(block_nbytes), chain(12), list(range(12))
    bits = {name: layer.view(torch.int16) for name, layer in cache.items()}
    config = small_config(disk=str(tmp_path), codec="fp8", identity=MODEL, pool={"pin_piece_bytes": 1 << 20})
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert (await engine.save_blocks(hashes, ids)).ok
        assert engine.get_stats().kept_as_is_blocks == 4
        await engine.flush()
        await engine.load_blocks(hashes, ids)
        want = contents(bits, ids)
    if not scanned:
        never = asyncio.Event()
        monkeypatch.setattr(DiskTier, "_scan_once", lambda self: never.wait())
    for layer in bits.values():
        layer.zero_()
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        if scanned:
            assert await engine.wait_tier()
            assert engine.check_blocks(hashes).all()
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.ok, loaded.miss_counts()
        assert contents(bits, ids) == want
        assert engine.get_stats().tiering.fetched_blocks == 12


async def test_a_damaged_block_is_taken_away_in_whichever_form_it_rests(bench: Bench) -> None:
    cache, hashes, ids = packed_cache(8192), chain(6), list(range(6))
    async with bench.engine(cache, codec="fp8") as engine:
        await engine.save_blocks(hashes, ids)
        await engine.flush()
    lies = lambda direction, *_: TierFault.LIE if direction is Direction.LOAD else None  # noqa: E731
    async with bench.engine(cache, lies, codec="fp8") as engine:
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.miss_counts() == {MissReason.CORRUPT: 6}
        await asyncio.sleep(0.01)
        assert bench.inner._kept == {}


@pytest.mark.parametrize("call", ["prefetch", "load", "prefetch beside another"])
async def test_a_prefix_longer_than_the_pool_keeps_its_head(bench: Bench, call: str) -> None:
    cache, hashes = make_cache(), chain(40)
    want = contents(cache, range(40))
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, range(40))
        await engine.save_blocks(chain(6, salt=1), range(6))
        await engine.flush()
    wipe(cache, range(40))
    async with bench.engine(cache, **pool_of(16)) as engine:
        if call == "prefetch beside another":
            assert await engine.prefetch(chain(6, salt=1)) == 6
        if call != "load":
            assert await engine.prefetch(hashes) == 16
        loaded = await engine.load_blocks(hashes, range(40))
        assert loaded.num_prefix_loaded == 16
        assert loaded.miss_counts() == {MissReason.NOT_FETCHED: 24}
        assert contents(cache, range(16)) == want[:16]


async def test_a_prefix_longer_than_the_disk_keeps_its_head_there(tmp_path: Path) -> None:
    cache, hashes, other = make_cache(), chain(40), chain(8, salt=1)
    frame = 4096 + -(-BLOCK_NBYTES // 4096) * 4096
    config = small_config(disk={"path": str(tmp_path), "capacity_bytes": 20 * frame}, identity=MODEL)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        await engine.save_blocks(other, range(8))
        await engine.flush()
        await engine.save_blocks(hashes, range(40))
        await engine.flush()
        engine.clear()
        assert engine.match_prefix(hashes) >= 12  # of blocks that are written side by side any may get the last places
        assert engine.match_prefix(other) == 0


@pytest.mark.parametrize("by", ["load", "save"])
async def test_what_is_hot_in_the_pool_stays_on_disk(tmp_path: Path, by: str) -> None:
    cache, hot, frame = make_cache(), chain(8), 4096 + -(-BLOCK_NBYTES // 4096) * 4096
    config = small_config(disk={"path": str(tmp_path), "capacity_bytes": 24 * frame}, identity=MODEL)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        await engine.save_blocks(hot, range(8))
        for salt in range(1, 8):
            await engine.save_blocks(chain(8, salt), range(8, 16))
            if by == "load":
                assert (await engine.load_blocks(hot, range(20, 28))).ok
            else:
                await engine.save_blocks(hot, range(8))
            await engine.flush()
            while any("touch" in repr(task.get_coro()) for task in engine._tiering.backing.tasks._tasks):
                await asyncio.sleep(0.001)
        engine.clear()
        assert engine.match_prefix(hot) == 8


class CountingTier(LastingTier):
    """Counts what it is asked."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(TIER_BYTES, namespace=namespace.digest)
        self.asked = {"lookup": 0, "find": 0, "read": 0, "write": 0}

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        self.asked["lookup"] += 1
        return super().lookup(keys)

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        self.asked["find"] += 1
        return await super().find(keys, deadline_s=deadline_s)

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self.asked["read"] += len(requests)
        return await super().read(requests, deadline_s=deadline_s)

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self.asked["write"] += len(requests)
        return await super().write(requests, deadline_s=deadline_s)


async def test_what_nobody_has_is_one_question() -> None:
    tiers: list[CountingTier] = []

    def make_tier(namespace: Namespace) -> Tier:
        tiers.append(CountingTier(namespace))
        return tiers[0]

    cache, hashes = make_cache(2048), chain(2048)
    async with KVortexEngine.create(small_config(), Parts(make_tier=make_tier)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        assert (await engine.load_blocks(hashes, range(2048))).num_loaded == 0
        assert tiers[0].asked == {"lookup": 1, "find": 0, "read": 0, "write": 0}
        assert not engine.check_blocks(hashes).any()
        assert await engine.prefetch(hashes) == 0
        assert tiers[0].asked == {"lookup": 3, "find": 0, "read": 0, "write": 0}


async def test_what_the_tier_has_is_not_offered_to_it_again() -> None:
    tiers: list[CountingTier] = []

    def make_tier(namespace: Namespace) -> Tier:
        tiers.append(CountingTier(namespace))
        return tiers[0]

    cache, hashes = make_cache(), chain(40)
    async with KVortexEngine.create(small_config(), Parts(make_tier=make_tier)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        await engine.save_blocks(hashes, range(40))
        await engine.flush()
        assert tiers[0].asked["write"] == 40
        for _ in range(3):
            assert (await engine.load_blocks(hashes, range(40))).ok
            await engine.save_blocks(hashes, range(40))
            assert engine.get_stats().tiering.waiting_blocks == 0
        await engine.flush()
        assert tiers[0].asked["write"] == 40
        tiers[0]._drop(hashes[7])  # lost meanwhile
        await engine.load_blocks(hashes, range(40))
        await engine.flush()
        assert tiers[0].asked["write"] == 41


async def test_another_namespace_sees_nothing(tmp_path: Path) -> None:
    cache, hashes, ids = make_cache(), chain(4), list(range(4))
    for model, found in (("a", 0), ("a", 4), ("b", 0)):
        config = small_config(disk=str(tmp_path), identity=ModelIdentity(model=model))
        async with KVortexEngine.create(config) as engine:
            engine.register_kv_caches(cache, BLOCK_SIZE)
            assert await engine.prefetch(hashes) == found
            await engine.save_blocks(hashes, ids)
            await engine.flush()


async def test_on_disk_blocks_survive_a_restart_and_damage_is_a_miss(tmp_path: Path) -> None:
    cache, hashes, ids = make_cache(), chain(10), list(range(10))
    want = contents(cache, ids)
    config = small_config(disk={"path": str(tmp_path), "capacity_bytes": 1 << 30}, identity=MODEL)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        await engine.save_blocks(hashes, ids)
        await engine.flush()
    files = stored_files(tmp_path)
    assert len(files) == 10
    data = bytearray(files[4].read_bytes())
    data[5000] ^= 1
    files[4].write_bytes(data)
    wipe(cache, ids)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        loaded = await engine.load_blocks(hashes, ids)
        assert sorted(loaded.miss_counts().items()) == [(MissReason.CORRUPT, 1)]
        back = contents(cache, ids)
        assert [b == w for b, w in zip(back, want, strict=True)] == [outcome is None for outcome in loaded.outcomes]
    assert not files[4].exists()


async def test_a_directory_that_cannot_be_used_costs_the_tier_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    cache, hashes = make_cache(), chain(4)
    async with KVortexEngine.create(small_config(disk=str(tmp_path / "file"), identity=MODEL)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        await engine.save_blocks(hashes, range(4))
        assert (await engine.load_blocks(hashes, range(4))).ok
        await engine.flush()
        assert not await engine.wait_tier()
        assert not engine.get_stats().tiering.usable
    assert "cannot be used" in caplog.text


def stored_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*.kv1") if path.is_file())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tier\.inclusion must be one of inclusive, exclusive"):
        KVortexConfig(tier={"inclusion": "both"})
    with pytest.raises(ConfigError, match=r"tier\.timeout_s must be positive"):
        KVortexConfig(tier={"timeout_s": 0})


async def test_shutting_down_in_the_middle_leaves_nothing(bench: Bench) -> None:
    cache, hashes = make_cache(), chain(30)
    slow = lambda direction, number, key: TierFault.SLOW  # noqa: E731
    async with bench.engine(cache) as engine:
        await engine.save_blocks(hashes, range(30))
        await engine.flush()
    async with bench.engine(cache, slow) as engine:
        await engine.save_blocks(chain(10, 3), range(10))
        task = asyncio.create_task(engine.load_blocks(hashes, range(30)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    gc.collect()


def test_the_blocking_face_reaches_the_tier(tmp_path: Path) -> None:
    cache, hashes, ids = make_cache(), chain(6), list(range(6))
    want = contents(cache, ids)
    config = small_config(disk=str(tmp_path), identity=MODEL)
    with KVortexEngine.create_sync(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert engine.wait_tier(timeout_s=10)
        engine.save_blocks(hashes, ids)
        engine.flush(timeout_s=10)
    wipe(cache, ids)
    with KVortexEngine.create_sync(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert engine.prefetch(hashes, timeout_s=10) == 6
        assert engine.load_blocks(hashes, ids, deadline_s=0.0).ok
        assert contents(cache, ids) == want
