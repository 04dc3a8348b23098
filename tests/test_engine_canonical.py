"""Engines with all KV heads and the ranks of another one over the same store: each finds what the other has saved."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvortex import KVortexEngine, MissReason, ModelIdentity
from kvortex.config import MIB
from kvortex.errors import ConfigError, LayoutError, OwnerError
from kvortex.groups import KVGroup
from kvortex.tiering import tier_of
from kvortex.types import SaveOutcome
from tests.engine_support import BLOCK_SIZE, Parts, chain, contents, small_config, wipe
from tests.owner.owner_support import local_owner, read_line, spawn
from tests.owner.ranks_of_one_engine import RanksOfOneEngine, shards, together
from tests.tiers.redis_support import RedisServer

MODEL = ModelIdentity(model="a", weights_revision="1")
NUM_HEADS, HEADS_DIM = 4, 3
COUNT = 6
SAVED, LOADED = range(COUNT), range(20, 20 + COUNT)
CANONICAL = {"canonical_layout": True}
ABSENT = [MissReason.NEVER_STORED] * COUNT


def make_cache(
    seed: int = 0, num_heads: int = NUM_HEADS, dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, torch.Tensor]:
    """`[K and V, blocks, tokens, heads, head size]`; with `heads_first` in another order in memory."""
    generator = torch.Generator().manual_seed(seed)
    cache = {
        f"layers.{i}": torch.randn(2, 64, BLOCK_SIZE, num_heads, 16, generator=generator).to(dtype) for i in range(2)
    }
    if changes.get("heads_first"):
        return {name: tensor.transpose(2, 3).contiguous().transpose(2, 3) for name, tensor in cache.items()}
    return cache


class Store:
    """What engines share, and how their settings name it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    @property
    def tier(self) -> dict[str, Any]:
        return {"tier": {**self.settings.get("tier", {}), **CANONICAL}, **self.disk}

    @property
    def disk(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if name != "tier"}


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return Store(disk={"path": str(tmp_path / "disk"), "rescan_interval_s": None})


@pytest.fixture(params=["disk", "redis", "disk and redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        yield Store(disk=str(tmp_path / "disk"))
        return
    with RedisServer("--maxmemory", "256mb") as server:
        urls = [server.url()] if request.param == "redis" else [f"disk://{tmp_path / 'disk'}", server.url()]
        yield Store(tier={"urls": urls})


@contextlib.asynccontextmanager
async def engine_over(
    store: Store, cache: Mapping[str, torch.Tensor], heads_dim: Any = HEADS_DIM, **changes: Any
) -> AsyncIterator[KVortexEngine]:
    config = small_config(**{"identity": MODEL, **store.tier}).replace(**changes)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(dict(cache), BLOCK_SIZE, heads_dim=heads_dim)
        assert await engine.wait_tier()
        yield engine


@contextlib.asynccontextmanager
async def ranks_over(
    store: Store, folder: Path, cache: Mapping[str, torch.Tensor], size: int, codec: str = "raw"
) -> AsyncIterator[tuple[RanksOfOneEngine, list[dict[str, torch.Tensor]]]]:
    tensors = shards(cache, size, HEADS_DIM)
    with local_owner(folder / f"{size}.sock", {"bytes": 8 * MIB, "pin_piece_bytes": MIB}, **store.tier) as owner:
        async with RanksOfOneEngine(owner.path, tensors, HEADS_DIM, codec) as ranks:
            yield ranks, tensors


async def save(engine: KVortexEngine) -> None:
    assert (await engine.save_blocks(chain(COUNT), SAVED)).ok
    await engine.flush()


async def load(engine: KVortexEngine) -> list[MissReason | None]:
    return list((await engine.load_blocks(chain(COUNT), LOADED)).outcomes)


@pytest.mark.parametrize("size", [2, 4])
async def test_one_engine_finds_what_several_ranks_have_saved(store: Store, tmp_path: Path, size: int) -> None:
    saved, cache = make_cache(), make_cache(seed=1)
    async with ranks_over(store, tmp_path, saved, size) as (ranks, _):
        assert set(await ranks.save(chain(COUNT), SAVED)) == {SaveOutcome.STORED}
    async with engine_over(store, cache) as engine:
        assert await load(engine) == [None] * COUNT
        assert contents(cache, LOADED) == contents(saved, SAVED)
        tiering = engine.get_stats().tiering
        assert (tiering.fetched_blocks, tiering.used_bytes > 0) == (COUNT, True)
        assert len(tiering.links) == (2 if len(store.settings.get("tier", {}).get("urls", [])) > 1 else 0)


@pytest.mark.parametrize("size", [2, 4])
async def test_several_ranks_find_what_one_engine_has_saved(store: Store, tmp_path: Path, size: int) -> None:
    saved, cache = make_cache(heads_first=True), make_cache(seed=1)
    async with engine_over(store, saved) as engine:
        await save(engine)
    async with ranks_over(store, tmp_path, cache, size) as (ranks, tensors):
        assert await ranks.load(chain(COUNT), LOADED) == [None] * COUNT
        assert contents(together(tensors, HEADS_DIM), LOADED) == contents(saved, SAVED)


async def test_two_and_four_ranks_find_what_the_others_have_saved(disk: Store, tmp_path: Path) -> None:
    saved, cache = make_cache(), make_cache(seed=1)
    async with ranks_over(disk, tmp_path, saved, 2) as (ranks, _):
        await ranks.save(chain(COUNT), SAVED)
    async with ranks_over(disk, tmp_path, cache, 4) as (ranks, tensors):
        assert await ranks.load(chain(COUNT), LOADED) == [None] * COUNT
        assert contents(together(tensors, HEADS_DIM), LOADED) == contents(saved, SAVED)
        moved = range(40, 40 + COUNT)
        assert set(await ranks.save(chain(COUNT, 1), LOADED)) == {SaveOutcome.STORED}
    last = make_cache(seed=2)
    async with ranks_over(disk, tmp_path, last, 2) as (ranks, tensors):
        assert await ranks.load(chain(COUNT, 1), moved) == [None] * COUNT
        assert contents(together(tensors, HEADS_DIM), moved) == contents(saved, SAVED)


def rounded(num_heads: int, seed: int = 0, heads_first: bool = False) -> dict[str, torch.Tensor]:
    """Rows of 128 elements that FP8 keeps exactly."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 32, BLOCK_SIZE, num_heads, 128)
    values = torch.randint(-8, 9, (2, *shape), generator=generator) * 2.0 ** torch.randint(
        -6, 7, (2, *shape[:-1], 1), generator=generator
    )
    cache = {f"layers.{i}": values[i].to(torch.bfloat16) for i in range(2)}
    if heads_first:
        return {name: tensor.transpose(2, 3).contiguous().transpose(2, 3) for name, tensor in cache.items()}
    return cache


def bits(cache: Mapping[str, torch.Tensor], block_ids: Sequence[int]) -> list[bytes]:
    return contents({name: tensor.view(torch.int16) for name, tensor in cache.items()}, block_ids)


@pytest.mark.parametrize("size", [2, 4])
async def test_packed_blocks_too(disk: Store, tmp_path: Path, size: int) -> None:
    saved, cache, loaded = rounded(4, heads_first=True), rounded(4, seed=1), range(20, 20 + COUNT)
    async with ranks_over(disk, tmp_path, saved, size, "fp8") as (ranks, _):
        assert set(await ranks.save(chain(COUNT), SAVED)) == {SaveOutcome.STORED}
    sizes = {path.stat().st_size for path in (tmp_path / "disk").rglob("*.kv1")}
    assert max(sizes) < 0.55 * saved["layers.0"][:, 0].nbytes * 2 + 8192
    async with engine_over(disk, cache, codec="fp8", pool={"bytes": 8 * MIB, "pin_piece_bytes": MIB}) as engine:
        assert (await engine.load_blocks(chain(COUNT), loaded)).ok
        assert bits(cache, loaded) == bits(saved, SAVED)
        assert (await engine.save_blocks(chain(COUNT, 1), SAVED)).ok
        await engine.flush()
    last = rounded(4, seed=2)
    async with ranks_over(disk, tmp_path, last, size, "fp8") as (ranks, tensors):
        assert await ranks.load(chain(COUNT, 1), loaded) == [None] * COUNT
        assert bits(together(tensors, HEADS_DIM), loaded) == bits(cache, SAVED)
    async with engine_over(disk, rounded(4, seed=3)) as engine:
        assert list((await engine.load_blocks(chain(COUNT), loaded)).outcomes) == ABSENT, "another codec"


async def test_blocks_that_are_kept_as_they_are(disk: Store) -> None:
    """Packing would lose too much of one block, so it is stored raw."""
    saved, cache, loaded = rounded(4), rounded(4, seed=1, heads_first=True), range(20, 20 + COUNT)
    saved["layers.1"][0, 3, 5, 2, 7] = float("inf")
    changes: dict[str, Any] = {"codec": "fp8", "pool": {"bytes": 8 * MIB, "pin_piece_bytes": MIB}}
    async with engine_over(disk, saved, **changes) as engine:
        await save(engine)
        assert engine.get_stats().kept_as_is_blocks == 1
    async with engine_over(disk, cache, **changes) as engine:
        assert (await engine.load_blocks(chain(COUNT), loaded)).ok
        assert bits(cache, loaded) == bits(saved, SAVED)


async def test_what_is_damaged_in_the_pool_of_ranks_is_not_written(disk: Store, tmp_path: Path) -> None:
    async with ranks_over(disk, tmp_path, make_cache(), 2) as (ranks, _):
        place = ranks._parts[1].offset(0) + 100
        write_digests = ranks._parts[1].write_digests

        def damage(pool: Any, plan: Any, digests: Any) -> None:
            write_digests(pool, plan, digests)
            ranks._bytes[plan.offsets[2] + place] ^= 1

        ranks._parts[1].write_digests = damage  # type: ignore[method-assign]
        await ranks.save(chain(COUNT), SAVED)
        figures = ranks.tiering.figures()
        assert figures is not None
        assert (figures.written_blocks, figures.failed_writes, figures.causes["corrupt"]) == (COUNT - 1, 1, 1)
    async with engine_over(disk, make_cache(seed=1)) as engine:
        assert await load(engine) == [None, None, MissReason.NEVER_STORED, None, None, None]


@pytest.mark.parametrize("verify", [True, False])
async def test_what_is_damaged_on_disk_is_a_miss_and_removed(disk: Store, tmp_path: Path, verify: bool) -> None:
    disk.settings["disk"]["verify"] = verify
    cache = make_cache()
    async with engine_over(disk, cache) as engine:
        await save(engine)
    files = sorted((tmp_path / "disk").rglob("*.kv1"))
    assert len(files) == COUNT
    damaged = bytearray(files[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[0].write_bytes(bytes(damaged))
    async with engine_over(disk, cache) as engine:
        outcomes = await load(engine)
        assert outcomes.count(None) == COUNT - 1
        assert outcomes.count(MissReason.CORRUPT) == 1
        await engine.flush()
        await save(engine)
    assert len(list((tmp_path / "disk").rglob("*.kv1"))) == COUNT
    async with engine_over(disk, cache) as engine:
        assert await load(engine) == [None] * COUNT


OTHERS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "model": (make_cache, {"identity": {"model": "b"}}),
    "weights": (make_cache, {"identity": {"weights_revision": "2"}}),
    "fingerprint": (make_cache, {"identity": {"fingerprint": "rope"}}),
    "heads": (lambda: make_cache(num_heads=8), {}),
    "dtype": (lambda: make_cache(dtype=torch.float64), {}),
    "layer": (lambda: {"layers.0": make_cache()["layers.0"]}, {}),
    "layout": (make_cache, {"tier": {"canonical_layout": False}}),
}


@pytest.mark.parametrize("other", OTHERS)
async def test_what_differs_in_anything_else_finds_nothing(disk: Store, other: str) -> None:
    async with engine_over(disk, make_cache()) as engine:
        await save(engine)
    make, changes = OTHERS[other]
    async with engine_over(disk, make(), **changes) as engine:
        assert await load(engine) == ABSENT
    async with engine_over(disk, make_cache(seed=1)) as engine:
        assert await load(engine) == [None] * COUNT


async def test_latents_and_heads_and_several_groups(disk: Store) -> None:
    """A latent beside layers with heads; windows beside full attention; dimensions by name."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> dict[str, torch.Tensor]:
        return {
            "full": torch.randn(64, 2, BLOCK_SIZE, NUM_HEADS, 16, generator=generator),
            "latent": torch.randn(64, BLOCK_SIZE, 32, generator=generator),
            "window": torch.randn(64, NUM_HEADS, BLOCK_SIZE, 32, generator=generator),
        }

    groups = (
        KVGroup("full", ("full", "latent"), BLOCK_SIZE),
        KVGroup("window", ("window",), BLOCK_SIZE, "window", 2 * BLOCK_SIZE),
    )
    tables = {"full": list(SAVED), "window": list(LOADED)}
    saved, cache = tensors(), tensors()
    for number, of_engine in enumerate((saved, cache)):
        async with KVortexEngine.create(small_config(**{"identity": MODEL, **disk.tier})) as engine:
            engine.register_kv_caches(of_engine, BLOCK_SIZE, groups=groups, heads_dim={"full": 3, "window": 1})
            assert await engine.wait_tier()
            if not number:
                assert (await engine.save_blocks(chain(COUNT), tables)).ok
                await engine.flush()
            else:
                assert (await engine.load_blocks(chain(COUNT), tables)).ok
    for name, ids in (("full", SAVED), ("latent", SAVED), ("window", LOADED)):
        assert torch.equal(cache[name][list(ids)], saved[name][list(ids)])


# -- what is refused -----------------------------------------------------------------------------------


REFUSED = {
    "no dimension": ({}, None, "pass heads_dim= to register_kv_caches"),
    "groups of several heads": ({"codec": "fp8"}, HEADS_DIM, "are not made of groups of 128: set codec to 'raw'"),
    "one of two ranks": ({"identity": {"tp_size": 2}}, HEADS_DIM, "one of 2 tensor-parallel ranks"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("has_owner", [False, True])
async def test_what_has_no_canonical_layout_is_refused_with_the_way_out(
    disk: Store, tmp_path: Path, what: str, has_owner: bool
) -> None:
    changes, heads_dim, why = REFUSED[what]
    with contextlib.ExitStack() as stack:
        config = small_config(identity=MODEL)
        if has_owner:
            owner = stack.enter_context(local_owner(tmp_path / "kv.sock", **disk.tier))
            config = config.replace(owner=str(owner.path))
        else:
            config = config.replace(**disk.tier)
        async with KVortexEngine.create(config.replace(**changes)) as engine:
            for _ in range(3):
                with pytest.raises((ConfigError, OwnerError), match=f"canonical layout.*{why}"):
                    engine.register_kv_caches(make_cache(), BLOCK_SIZE, heads_dim=heads_dim)
        if has_owner:
            assert len(owner.owner.caches) == 0
            async with KVortexEngine.create(small_config(identity=MODEL, owner=str(owner.path))) as engine:
                engine.register_kv_caches(make_cache(), BLOCK_SIZE, heads_dim=HEADS_DIM)
                num_forms = owner.call(lambda: owner.owner.control.extents.size)
                assert num_forms == 2, "refused caches leave nothing behind"


async def test_states_are_refused(disk: Store) -> None:
    groups = (KVGroup("full", ("full",), BLOCK_SIZE), KVGroup("state", ("state",), BLOCK_SIZE, "state"))
    tensors = {"full": torch.zeros(64, 2, BLOCK_SIZE, 2, 16), "state": torch.zeros(64, 64)}
    async with KVortexEngine.create(small_config(**{"identity": MODEL, **disk.tier})) as engine:
        with pytest.raises(ConfigError, match=r"group 'state' has states.*leave tier\.canonical_layout out"):
            engine.register_kv_caches(
                tensors, BLOCK_SIZE, num_blocks=64, block_dim=0, groups=groups, heads_dim={"full": 3}
            )


@pytest.mark.parametrize("heads_dim", [5, -6, 1, {"layers.7": 3}])
async def test_a_dimension_that_is_none_is_refused(heads_dim: Any, disk: Store) -> None:
    async with KVortexEngine.create(small_config(**{"identity": MODEL, **disk.tier})) as engine:
        with pytest.raises((LayoutError, ConfigError), match="heads"):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE, heads_dim=heads_dim)
        engine.register_kv_caches(make_cache(), BLOCK_SIZE, heads_dim=-2)


async def test_a_layout_for_no_tier_is_refused() -> None:
    async with KVortexEngine.create(small_config(identity=MODEL, tier=CANONICAL)) as engine:
        with pytest.raises(ConfigError, match=r"there is none: give tier\.urls or disk\.path"):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE, heads_dim=HEADS_DIM)
    with pytest.raises(ConfigError, match=r"is started: leave tier\.canonical_layout out here"):
        small_config(owner="/tmp/kv.sock", tier=CANONICAL)


async def test_a_tier_of_a_program_gets_the_canonical_namespace(tmp_path: Path) -> None:
    named: list[Any] = []

    def make_tier(namespace: Any) -> Any:
        named.append(namespace)
        return tier_of(small_config(disk=str(tmp_path)), namespace.digest)

    config = small_config(identity=MODEL, tier=CANONICAL)
    async with KVortexEngine.create(config, Parts(make_tier=make_tier)) as engine:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE, heads_dim=HEADS_DIM)
        assert await engine.wait_tier()
        assert replace(engine.namespace, layout=named[0].layout) == named[0]
        assert engine.namespace.layout != named[0].layout


async def test_clients_of_one_owner_may_say_more_and_less_of_a_cache(disk: Store, tmp_path: Path) -> None:
    """The tier is opened for the first; a later one that does not say where its heads are shares the pool."""
    cache = make_cache()
    with local_owner(tmp_path / "kv.sock", **disk.tier) as owner:
        config = small_config(identity=MODEL, owner=str(owner.path))
        async with KVortexEngine.create(config) as first, KVortexEngine.create(config) as second:
            first.register_kv_caches(cache, BLOCK_SIZE, heads_dim=HEADS_DIM)
            second.register_kv_caches(cache, BLOCK_SIZE)
            await save(second)
            wipe(cache, LOADED)
            assert await load(first) == [None] * COUNT
            assert contents(cache, LOADED) == contents(cache, SAVED)
    async with engine_over(disk, make_cache(seed=1)) as engine:
        assert await load(engine) == [None] * COUNT


async def test_the_command_that_holds_a_pool_takes_the_option(disk: Store, tmp_path: Path) -> None:
    options = ["--pool", "16MiB", "--disk", str(tmp_path / "disk"), "--canonical-layout", "--json"]
    cache, path = make_cache(), tmp_path / "kv.sock"
    process = spawn(["-m", "kvortex", "serve", "--socket", str(path), *options])
    try:
        assert json.loads(read_line(process))["socket"] == str(path)
        async with KVortexEngine.create(small_config(identity=MODEL, owner=str(path))) as engine:
            engine.register_kv_caches(cache, BLOCK_SIZE, heads_dim=HEADS_DIM)
            await save(engine)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    async with engine_over(disk, make_cache(seed=1)) as engine:
        assert await load(engine) == [None] * COUNT
