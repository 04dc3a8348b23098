"""A cache with several groups of layers over a lower tier: all groups' blocks go down and come back."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvortex import KVortexEngine, MissReason
from kvortex.groups import KVGroup, Match, MissingKV
from kvortex.index import pack_keys
from kvortex.testing import TierFault
from kvortex.types import Direction
from tests.engine_support import BLOCK_SIZE
from tests.groups_support import (
    CACHES,
    GROUPS,
    STATE_TOKENS,
    GroupedCache,
    Tables,
    apart,
    groups_config,
    places,
    request,
    tables,
)
from tests.owner.owner_support import local_owner
from tests.test_engine_tiering import Bench, FaultOf

NUM_TOKENS = 12 * BLOCK_SIZE
CODECS = {"raw": {}, "fp8": {"codec": {"name": "fp8"}}}
TIERS = ("memory", "disk", "disk of an owner")


class Below:
    """Engines one after another over what one lower tier keeps."""

    def __init__(self, tier: str, folder: Path) -> None:
        self.bench = Bench()
        self._socket = folder / "kv.sock" if "owner" in tier else None
        self._changes: dict[str, Any] = {} if tier == "memory" else {"disk": str(folder / "kv")}

    @asynccontextmanager
    async def engine(
        self, cache: GroupedCache, fault_of: FaultOf | None = None, **changes: Any
    ) -> AsyncIterator[KVortexEngine]:
        with contextlib.ExitStack() as stack:
            parts, config = None, groups_config(**self._changes, **changes)
            if self._socket is not None:
                of_owner = {name: getattr(config, name) for name in ("pool", "eviction", "tier", "disk")}
                stack.enter_context(local_owner(self._socket, **of_owner))
                config = groups_config(owner=self._socket, **{k: v for k, v in changes.items() if k not in of_owner})
            elif not self._changes:
                parts = self.bench.parts(fault_of)
            async with KVortexEngine.create(config, parts) as engine:
                cache.register(engine)
                assert await engine.wait_tier()
                yield engine


@pytest.fixture(params=TIERS)
def below(request: pytest.FixtureRequest, tmp_path: Path) -> Below:
    return Below(request.param, tmp_path)


@pytest.fixture
def memory(tmp_path: Path) -> Below:
    return Below("memory", tmp_path)


def fill(cache: GroupedCache, seed: int, codec: str, source: Tables) -> None:
    """Any bytes, or, for a codec, numbers in the source, with blocks among them that it keeps as they are."""
    cache.fill(seed)
    if codec == "raw":
        return
    generator = torch.Generator().manual_seed(seed)
    for group, ids in source.items():
        for block_id in ids:
            parts = cache.parts(group, block_id)
            for part in parts:
                part.copy_(torch.randn(part.shape, generator=generator))
            if block_id % 4 == 1:
                parts[0].view(torch.int16)[(0,) * parts[0].ndim] = 0x7FFF  # no number


async def loaded_bytes(engine: KVortexEngine, cache: GroupedCache, hashes: Sequence[bytes], into: Tables) -> Any:
    loaded = await engine.load_blocks(hashes, into)
    assert loaded.ok, loaded.miss_counts()
    return cache.blocks(into)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", CACHES)
async def test_all_groups_outlive_the_engine(below: Below, name: str, codec: str) -> None:
    cache, hashes = CACHES[name](), request()
    shared = name == "in shared pages"
    source, target = tables(12, places(shared, 0)), tables(12, places(shared, 1))
    fill(cache, 1, codec, source)
    async with below.engine(cache, **CODECS[codec]) as engine:
        exact = cache.blocks(source)
        assert (await engine.save_blocks(hashes, source)).num_stored == 27
        await engine.flush()
        assert engine.get_stats().tiering.written_blocks == 27
        want = await loaded_bytes(engine, cache, hashes, target)
        kept_as_is = engine.get_stats().kept_as_is_blocks
    assert want["state"] == exact["state"]
    assert (want == exact) == (codec == "raw")
    assert (kept_as_is > 0) == (codec == "fp8")
    cache.fill(seed=2)
    async with below.engine(cache, **CODECS[codec]) as engine:
        assert engine.match_request(hashes) == Match(NUM_TOKENS, None)
        for group, ids in source.items():
            assert engine.check_blocks(hashes, group).tolist() == [True] * len(ids)
        assert await loaded_bytes(engine, cache, hashes, target) == want
        assert engine.get_stats().tiering.fetched_blocks == 27
        engine.clear()
        assert await loaded_bytes(engine, cache, hashes, source) == want


def one_by_one(source: Tables) -> Iterator[Tables]:
    """Tables of 16 tokens each, so that a tier keeps up with what is evicted for them."""
    for block in range(12):
        yield {
            "full": [b if n == block else -1 for n, b in enumerate(source["full"])],
            "window": [b if n == block else -1 for n, b in enumerate(source["window"])],
            "state": [b if 4 * n + 3 == block else -1 for n, b in enumerate(source["state"])],
        }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("inclusion", ["inclusive", "exclusive"])
async def test_what_the_pool_evicted_comes_back(below: Below, inclusion: str, codec: str) -> None:
    """More requests than the pool holds: those that went down come back as they were.

    A tenth of the pool may wait to be written: that is more than a step evicts, also where blocks are saved again raw.
    """
    num_requests = 8 if codec == "raw" else 12
    cache, want = apart(), {}
    source, target = tables(12, places(False, 0)), tables(12, places(False, 1))
    nbytes = sum(len(block) for blocks in cache.blocks(source).values() for block in blocks)
    changes = {
        "pool": {"bytes": nbytes * (3 if codec == "raw" else 4)},
        "eviction": {"watermark": 0.75},
        "tier": {"inclusion": inclusion},
        **CODECS[codec],
    }
    async with below.engine(cache, **changes) as engine:
        for salt in range(num_requests):
            fill(cache, salt, codec, source)
            for step in one_by_one(source):
                assert (await engine.save_blocks(request(salt=salt), step)).ok
                await engine.flush()
            want[salt] = await loaded_bytes(engine, cache, request(salt=salt), target)
        for salt in range(num_requests):
            cache.fill(seed=99)
            assert engine.match_request(request(salt=salt)) == Match(NUM_TOKENS, None)
            for step in one_by_one(target):
                assert (await engine.load_blocks(request(salt=salt), step)).ok
                await engine.flush()
            assert cache.blocks(target) == want[salt]
        stats = engine.get_stats()
        assert stats.evicted_blocks > 40
        assert stats.tiering.fetched_blocks > 40
        assert stats.tiering.shed_blocks == 0
        assert (stats.tiering.demoted_blocks > 40) == (inclusion == "exclusive")


OTHERS: dict[str, tuple[KVGroup, ...]] = {
    "another window": (GROUPS[0], replace(GROUPS[1], reach=24), GROUPS[2]),
    "a window as full attention": (GROUPS[0], KVGroup("window", ("window.0",), BLOCK_SIZE), GROUPS[2]),
    "states twice as far apart": (*GROUPS[:2], replace(GROUPS[2], block_size=2 * STATE_TOKENS)),
    "in another order": (GROUPS[1], GROUPS[0], GROUPS[2]),
    "a group split in two": (
        KVGroup("full", ("full.0",), BLOCK_SIZE),
        KVGroup("more", ("full.1",), BLOCK_SIZE),
        *GROUPS[1:],
    ),
    "layers in another order": (replace(GROUPS[0], layers=("full.1", "full.0")), *GROUPS[1:]),
    "a group that must stay exact": (GROUPS[0], replace(GROUPS[1], exact=True), GROUPS[2]),
}


@pytest.mark.parametrize("what", OTHERS)
async def test_a_cache_with_other_groups_never_hits_what_these_have_stored(tmp_path: Path, what: str) -> None:
    hashes, changes = request(16), {"codec": {"name": "fp8"}, "disk": str(tmp_path)}
    cache = apart()
    cache.fill_with_numbers(seed=3)
    source = tables(16, {"full": 0, "window": 0, "state": 0})
    async with KVortexEngine.create(groups_config(**changes)) as engine:
        cache.register(engine)
        assert (await engine.save_blocks(hashes, source)).ok
        await engine.flush()
    other = apart(OTHERS[what])
    async with KVortexEngine.create(groups_config(**changes)) as engine:
        other.register(engine)
        assert await engine.wait_tier()
        assert engine.match_request(hashes).num_tokens == 0
        before = other.snapshot()
        for group in other.groups:
            count = len(engine.check_blocks(hashes, group))
            assert not engine.check_blocks(hashes, group).any()
            loaded = await engine.load_blocks(hashes, {group: range(count)})
            assert loaded.outcomes == (MissReason.NEVER_STORED,) * count
        assert other.snapshot() == before
        assert engine.get_stats().tiering.fetched_blocks == 0
    async with KVortexEngine.create(groups_config(**changes)) as engine:
        cache.register(engine)
        assert await engine.wait_tier()
        assert (await engine.load_blocks(hashes, source)).ok


async def test_without_a_codec_it_makes_no_difference_which_groups_must_stay_exact(tmp_path: Path) -> None:
    hashes, ids = request(4), tables(4, places(False, 0))
    for cache in (apart(), apart(OTHERS["a group that must stay exact"])):
        async with KVortexEngine.create(groups_config(disk=str(tmp_path))) as engine:
            cache.register(engine)
            assert await engine.wait_tier()
            if engine.match_prefix(hashes) == 0:
                assert (await engine.save_blocks(hashes, ids)).ok
                await engine.flush()
            else:
                assert (await engine.load_blocks(hashes, ids)).ok


# -- misses ------------------------------------------------------------------------------------------


def tier_key(block_hash: bytes, group: str, engine: KVortexEngine) -> bytes:
    groups = engine._planes()[1].cache.groups
    return groups.tagged(pack_keys([block_hash]), groups.number_of(group))[0].tobytes()


async def stored_below(below: Below, cache: GroupedCache, hashes: Sequence[bytes], source: Tables, **how: Any) -> None:
    async with below.engine(cache, **how) as engine:
        assert (await engine.save_blocks(hashes, source)).ok
        await engine.flush()


@pytest.mark.parametrize("group", ["full", "window", "state"])
async def test_a_block_that_the_tier_has_lost_or_damaged_is_a_miss_of_its_group_alone(
    memory: Below, group: str
) -> None:
    cache, hashes = apart(), request()
    cache.fill(seed=4)
    source, target = tables(12, places(False, 0)), tables(12, places(False, 1))
    await stored_below(memory, cache, hashes, source)
    async with memory.engine(cache) as engine:
        key = tier_key(hashes[11], group, engine)
        memory.bench.inner._kept[key].payload[3] ^= 1
        assert engine.match_request(hashes) == Match(NUM_TOKENS, None)
        loaded = await engine.load_blocks(hashes, target)
        missed = [(g, o) for g, o in zip(loaded.groups, loaded.outcomes, strict=True) if o is not None]
        assert missed == [(group, MissReason.CORRUPT)]
        assert key not in memory.bench.inner._kept
        block = len(source[group]) - 1
        assert engine.match_request(hashes) == Match(128, MissingKV(group, 192, block, MissReason.CORRUPT))
        whole = cache.blocks(target)
        for name, blocks in cache.blocks(source).items():
            kept = slice(None) if name != group else slice(-1)
            assert whole[name][kept] == blocks[kept]


async def test_late_blocks_of_one_group(memory: Below) -> None:
    cache, hashes = apart(), request(4)
    cache.fill(seed=5)
    source = tables(4, places(False, 0))
    await stored_below(memory, cache, hashes, source)
    late: set[bytes] = set()

    def fault_of(direction: Direction, _: int, key: bytes) -> TierFault | None:
        return TierFault.HANG if direction is Direction.LOAD and key in late else None

    async with memory.engine(cache, fault_of) as engine:
        late.add(tier_key(hashes[3], "state", engine))
        loaded = await engine.load_blocks(hashes, source, deadline_s=0.05)
        assert loaded.outcomes == (*[None] * 8, MissReason.DEADLINE)
        memory.bench.tier.release()
        assert await engine.prefetch(hashes) == 4
        assert (await engine.load_blocks(hashes, source, deadline_s=0.0)).ok


async def test_a_prefetch_fetches_what_is_needed_to_resume_and_no_more(below: Below) -> None:
    cache, hashes = apart(), request()
    cache.fill(seed=6)
    source, target = tables(12, places(False, 0)), tables(12, places(False, 1), window=3)
    target["state"][:2] = [-1, -1]
    async with below.engine(cache) as engine:
        assert (await engine.save_blocks(hashes, source)).ok
        await engine.flush()
    async with below.engine(cache) as engine:
        assert await engine.prefetch(hashes) == 12
        assert engine.get_stats().tiering.fetched_blocks == 12 + 3 + 1
        wanted = {"full": source["full"], "window": source["window"][-3:], "state": source["state"][-1:]}
        want = cache.blocks(wanted)
        assert (await engine.load_blocks(hashes, target, deadline_s=0.0)).ok
        assert cache.blocks(target) == want


async def test_a_prefetch_stops_where_a_group_lacks_a_block(memory: Below) -> None:
    cache, hashes = apart(), request()
    source = tables(12, places(False, 0))
    source["state"][2] = -1
    await stored_below(memory, cache, hashes, source)
    async with memory.engine(cache) as engine:
        assert engine.match_request(hashes) == Match(128, MissingKV("state", 192, 2))
        assert await engine.prefetch(hashes) == 8
        assert engine.get_stats().tiering.fetched_blocks == 8 + 3 + 1


async def test_a_request_larger_than_the_pool_comes_back_with_its_head(memory: Below) -> None:
    cache, hashes = apart(), request()
    cache.fill(seed=7)
    source, target = tables(12, places(False, 0)), tables(12, places(False, 1))
    await stored_below(memory, cache, hashes, source)
    sizes = {group: len(cache.block(group, 0)) for group in source}
    async with memory.engine(cache, pool={"bytes": 6 * (sizes["full"] + sizes["window"]) + sizes["state"]}) as engine:
        loaded = await engine.load_blocks(hashes, target)
        missed = {group: [] for group in source}
        for group, outcome in zip(loaded.groups, loaded.outcomes, strict=True):
            missed[group].append(outcome)
        for group, kept in {"full": 6, "window": 6, "state": 1}.items():
            assert missed[group][:kept] == [None] * kept
            assert set(missed[group][kept:]) == {MissReason.NOT_FETCHED}
        content, back = cache.blocks(source), cache.blocks(target)
        assert all(back[group][:kept] == content[group][:kept] for group, kept in {"full": 6, "state": 1}.items())
