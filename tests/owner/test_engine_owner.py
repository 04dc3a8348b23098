"""Engines that share the pool of an owner: what one has saved another loads, and only what it may."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, SaveOutcome
from kvortex.config import KIB
from kvortex.errors import ConfigError, KVortexError
from kvortex.owner import OwnerClient
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, Parts, chain, contents, make_cache, wipe
from tests.groups_support import CACHES, places, request, tables
from tests.owner.owner_support import LocalOwner, local_owner, wait_until

Connect = Callable[..., contextlib.AbstractAsyncContextManager[KVortexEngine]]


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[LocalOwner]:
    """An owner, whose pool is empty when all engines are shut down and it is cleared."""
    with local_owner(tmp_path / "kv.sock") as made:
        yield made
        made.clear()
        assert made.allocated_bytes == 0
        assert made.owner.control.index.num_pending == 0


def config_of(owner: LocalOwner, model: str = "m", **changes: object) -> KVortexConfig:
    transfer = {"max_batch_bytes": 4 * BLOCK_NBYTES, "linger_s": 0.0, "self_test": False}
    return KVortexConfig(**{"owner": owner.path, "identity": {"model": model}, "transfer": transfer, **changes})


@contextlib.asynccontextmanager
async def connected(
    owner: LocalOwner, cache: dict[str, torch.Tensor], model: str = "m", **changes: object
) -> AsyncIterator[KVortexEngine]:
    async with KVortexEngine.create(config_of(owner, model, **changes)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        yield engine


async def save(engine: KVortexEngine, num_blocks: int = 12, salt: int = 0) -> list[bytes]:
    hashes = chain(num_blocks, salt)
    assert (await engine.save_blocks(hashes, range(num_blocks))).ok
    return hashes


def test_a_probe_neither_waits_nor_gives_the_owner_up(owner: LocalOwner) -> None:
    client = OwnerClient(owner.path, 60.0)
    try:
        for _ in range(100):
            client.probe()
        assert client.is_connected
        assert client.generation == 0
        owner.call(lambda: [c.abort() for p in owner.owner._processes.values() for c in p.connections])
        wait_until(lambda: client.probe() or not client.is_connected or client.generation)
    finally:
        client.close()


# -- sharing -----------------------------------------------------------------------------------------


async def test_what_one_engine_saved_another_loads_byte_for_byte(owner: LocalOwner) -> None:
    mine, theirs = make_cache(seed=1), make_cache(seed=2)
    before = contents(mine, range(12))
    async with connected(owner, mine) as first, connected(owner, theirs) as second:
        hashes = await save(first)
        assert second.match_prefix(hashes) == 12
        wipe(theirs, range(20, 32))
        result = await second.load_blocks(hashes, range(20, 32))
        assert result.ok
        assert contents(theirs, range(20, 32)) == before
        assert owner.owner.num_clients == 2
        assert owner.allocated_bytes == 12 * BLOCK_NBYTES


async def test_packed_blocks_are_shared_as_they_are_packed(owner: LocalOwner) -> None:
    mine, theirs, own = make_cache(seed=1), make_cache(seed=2), make_cache(seed=1)
    async with connected(owner, mine, codec="fp8") as first, connected(owner, theirs, codec="fp8") as second:
        hashes = await save(first)
        assert (await second.load_blocks(hashes, range(20, 32))).ok
        assert (await first.load_blocks(hashes, range(12))).ok
        assert contents(theirs, range(20, 32)) == contents(mine, range(12)) != contents(own, range(12))
        assert owner.allocated_bytes < 12 * BLOCK_NBYTES / 3
        async with connected(owner, own) as raw:
            assert raw.match_prefix(hashes) == 0, "raw blocks have other bytes"


@pytest.mark.parametrize("codec", ["raw", "fp8"])
@pytest.mark.parametrize("name", list(CACHES))
async def test_groups_of_layers_are_shared(owner: LocalOwner, name: str, codec: str) -> None:
    mine, theirs = CACHES[name](), CACHES[name]()
    mine.fill_with_numbers(1)
    shared = name != "apart"
    here, there = tables(12, places(shared, 0)), tables(12, places(shared, 1))
    async with (
        KVortexEngine.create(config_of(owner, codec=codec)) as first,
        KVortexEngine.create(config_of(owner, codec=codec)) as second,
    ):
        # Another cache comes first, so that the groups have other numbers in the pool.
        async with connected(owner, make_cache(), "another") as another:
            await save(another, 4, salt=9)
        mine.register(first)
        theirs.register(second)
        hashes = request(12)
        before = mine.blocks(here)
        assert (await first.save_blocks(hashes, here)).ok
        assert second.match_prefix(hashes) == 12
        assert (await second.load_blocks(hashes, there)).ok
        if codec == "raw":
            assert theirs.blocks(there) == before
        assert theirs.blocks(there)["state"] == before["state"], "states are never packed"
        assert (await first.load_blocks(hashes, here)).ok
        assert theirs.blocks(there) == mine.blocks(here)
        for group in ("full", "window", "state"):
            assert second.check_blocks(hashes, group).all()
        second.clear()
        assert first.match_request(hashes).missing.reason is MissReason.INVALIDATED  # type: ignore[union-attr]
        assert owner.allocated_bytes == 4 * BLOCK_NBYTES


async def test_models_do_not_see_each_others_blocks(owner: LocalOwner) -> None:
    mine, theirs = make_cache(seed=1), make_cache(seed=2)
    async with connected(owner, mine, "m") as first, connected(owner, theirs, "n") as second:
        hashes = await save(first)
        assert second.match_prefix(hashes) == 0
        assert not second.check_blocks(hashes).any()
        result = await second.load_blocks(hashes, range(12))
        assert set(result.outcomes) == {MissReason.NEVER_STORED}
        assert contents(theirs, range(12)) == contents(make_cache(seed=2), range(12))
        await save(second)
        assert (await first.load_blocks(hashes, range(20, 32))).ok
        assert contents(mine, range(20, 32)) == contents(mine, range(12))


async def test_lookups_say_what_is_there_and_why_not(owner: LocalOwner) -> None:
    async with connected(owner, make_cache()) as first, connected(owner, make_cache()) as second:
        hashes = chain(12)
        await first.save_blocks(hashes[:4] + hashes[6:8], [*range(4), 6, 7])
        assert second.match_prefix(hashes) == 4
        assert second.check_blocks(hashes).tolist() == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 4
        assert second.miss_reason(hashes[0]) is None
        assert second.miss_reason(hashes[4]) is MissReason.NEVER_STORED
        result = await second.load_blocks(hashes, range(12))
        assert [outcome is None for outcome in result.outcomes] == second.check_blocks(hashes).tolist()
        assert second.match_prefix([]) == 0
        assert (await second.load_blocks([], [])).ok


async def test_a_block_is_stored_once(owner: LocalOwner) -> None:
    async with connected(owner, make_cache()) as first, connected(owner, make_cache(seed=7)) as second:
        hashes = await save(first)
        result = await second.save_blocks(hashes, range(12))
        assert set(result.outcomes) == {SaveOutcome.ALREADY_STORED}
        assert owner.allocated_bytes == 12 * BLOCK_NBYTES


# -- forgetting --------------------------------------------------------------------------------------


async def test_invalidated_blocks_are_gone_for_all(owner: LocalOwner) -> None:
    async with connected(owner, make_cache()) as first, connected(owner, make_cache()) as second:
        hashes = await save(first)
        assert await second.invalidate(hashes[8:])
        assert first.match_prefix(hashes) == 8
        assert first.miss_reason(hashes[9]) is MissReason.INVALIDATED
        assert owner.allocated_bytes == 8 * BLOCK_NBYTES


async def test_clear_forgets_only_the_blocks_of_this_model(owner: LocalOwner) -> None:
    async with (
        connected(owner, make_cache()) as first,
        connected(owner, make_cache()) as second,
        connected(owner, make_cache(), "n") as other,
    ):
        hashes = await save(first)
        await save(other)
        second.clear()
        assert first.match_prefix(hashes) == 0
        assert other.match_prefix(hashes) == 12
        assert owner.allocated_bytes == 12 * BLOCK_NBYTES
        await save(first)
        assert second.match_prefix(hashes) == 12


async def test_leased_blocks_outlive_the_saves_of_others(tmp_path: Path) -> None:
    with local_owner(tmp_path / "kv.sock", {"bytes": 32 * BLOCK_NBYTES, "pin_piece_bytes": 128 * KIB}) as owner:
        async with connected(owner, make_cache()) as first, connected(owner, make_cache(), "n") as other:
            hashes = await save(first)
            with first.pin(hashes, ttl_s=60) as lease:
                assert (lease.num_blocks, lease.nbytes) == (12, 12 * BLOCK_NBYTES)
                assert first.get_stats().pools[0].leased_bytes == 12 * BLOCK_NBYTES
                for salt in range(1, 6):
                    await save(other, salt=salt)
                assert first.match_prefix(hashes) == 12
                assert (await first.load_blocks(hashes, range(20, 32))).ok
            for salt in range(6, 10):
                await save(other, salt=salt)
            assert first.match_prefix(hashes) == 0
            first.pin(hashes, ttl_s=60)
            lease = other.pin(chain(12, salt=9), ttl_s=60)
            assert lease.num_blocks == 12
        owner.clear()
        assert owner.allocated_bytes == 0, "a lease ends with its engine"


async def test_models_evict_each_others_cold_blocks(tmp_path: Path) -> None:
    with local_owner(tmp_path / "kv.sock", {"bytes": 32 * BLOCK_NBYTES, "pin_piece_bytes": 128 * KIB}) as owner:
        cache = make_cache(seed=2)
        async with connected(owner, make_cache(seed=1)) as first, connected(owner, cache, "n") as second:
            hashes = await save(first)
            hot = await save(first, salt=1)
            await first.load_blocks(hot, range(12))
            await save(second, 16, salt=2)
            assert first.match_prefix(hashes) < 12
            assert first.miss_reason(hashes[-1]) is MissReason.EVICTED
            assert first.match_prefix(hot) == 12
            assert second.match_prefix(chain(16, 2)) == 16
            assert first.get_stats().evicted_blocks == second.get_stats().evicted_blocks > 0
            assert (await second.load_blocks(chain(16, 2), range(20, 36))).ok
            assert contents(cache, range(20, 36)) == contents(make_cache(seed=2), range(16))


# -- life --------------------------------------------------------------------------------------------


async def test_blocks_stay_when_their_engine_ends_and_a_new_one_needs_no_copy(owner: LocalOwner) -> None:
    cache = make_cache(seed=3)
    async with connected(owner, cache) as engine:
        hashes = await save(engine)
    assert engine.is_shut_down
    assert owner.allocated_bytes == 12 * BLOCK_NBYTES
    async with connected(owner, make_cache(seed=4)) as engine:
        assert engine.match_prefix(hashes) == 12
        saved = await engine.save_blocks(hashes, range(12))
        assert set(saved.outcomes) == {SaveOutcome.ALREADY_STORED}
        assert engine.get_stats().bytes_saved == 0


async def test_the_self_test_uses_memory_that_holds_no_block_and_gives_it_back(owner: LocalOwner) -> None:
    async with connected(owner, make_cache()) as first:
        hashes = await save(first)
        async with connected(owner, make_cache(), transfer={"self_test": True}) as second:
            assert owner.allocated_bytes == 12 * BLOCK_NBYTES
            assert (await second.load_blocks(hashes, range(12))).ok


async def test_stats_are_those_of_the_whole_pool(owner: LocalOwner) -> None:
    async with connected(owner, make_cache()) as first, connected(owner, make_cache(), "n") as second:
        await save(first)
        await save(second, 8)
        pools = [engine.get_stats().pools[0] for engine in (first, second)]
        assert [pool.allocated_bytes for pool in pools] == [20 * BLOCK_NBYTES] * 2
        assert [pool.capacity_bytes for pool in pools] == [owner.owner.control.allocator.capacity_bytes] * 2
        assert [pool.num_extents for pool in pools] == [20, 20]
        assert pools[0].pinned_bytes == pools[0].capacity_bytes


async def test_a_save_in_flight_while_its_model_is_cleared_says_so(owner: LocalOwner) -> None:
    async with connected(owner, make_cache()) as first, connected(owner, make_cache()) as second:
        hashes = chain(12)
        saving = asyncio.create_task(first.save_blocks(hashes, range(12)))
        while not owner.owner.control.index.num_pending:
            await asyncio.sleep(0)
        second.clear()
        result = await saving
        assert set(result.outcomes) == {SaveOutcome.GONE}
        assert first.match_prefix(hashes) == 0


async def test_calls_of_several_threads_and_engines_at_once_are_right(owner: LocalOwner) -> None:
    caches = [make_cache(seed=n) for n in range(3)]
    expected = {n: contents(caches[0], range(8 * n, 8 * n + 8)) for n in range(4)}
    errors: list[BaseException] = []
    async with connected(owner, caches[0]) as first, connected(owner, caches[1]) as second:
        for n in range(4):
            assert (await first.save_blocks(chain(8, n), range(8 * n, 8 * n + 8))).ok

        def ask(engine: KVortexEngine) -> None:
            try:
                for _ in range(100):
                    for n in range(4):
                        assert engine.match_prefix(chain(8, n)) == 8
                        assert engine.check_blocks(chain(12, n)).sum() == 8
                    assert engine.miss_reason(chain(1, 77)[0]) is MissReason.NEVER_STORED
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(engine,)) for engine in (first, first, second)]
        for thread in threads:
            thread.start()
        for round_ in range(20):
            n = round_ % 4
            await asyncio.gather(
                second.load_blocks(chain(8, n), range(8)),
                second.load_blocks(chain(8, (n + 1) % 4), range(8, 16)),
                first.save_blocks(chain(8, 100 + round_), range(40, 48)),
            )
            assert contents(caches[1], range(16)) == expected[n] + expected[(n + 1) % 4]
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.01)
    assert errors == []


# -- refusals ----------------------------------------------------------------------------------------


async def refused(config: KVortexConfig, expected: type[KVortexError], match: str, parts: Parts | None = None) -> None:
    async with KVortexEngine.create(config, parts) as engine:
        for _ in range(2):
            with pytest.raises(expected, match=match):
                engine.register_kv_caches(make_cache(), BLOCK_SIZE)


async def test_a_model_without_a_name_is_refused(owner: LocalOwner) -> None:
    await refused(KVortexConfig(owner=owner.path), ConfigError, "name this one")
    assert owner.owner.num_clients == 0


def test_lower_tiers_are_refused(owner: LocalOwner, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower tiers are set where the owner"):
        config_of(owner, disk=tmp_path / "blocks")
    with pytest.raises(ConfigError, match="lower tiers are set where the owner"):
        config_of(owner, tier=["redis://127.0.0.1"])


async def test_a_tier_of_the_program_is_refused(owner: LocalOwner) -> None:
    parts = Parts(make_tier=lambda namespace: object())  # type: ignore[arg-type, return-value]
    await refused(config_of(owner), ConfigError, "lower tiers are set where the owner", parts)


async def test_no_owner_at_the_path_says_what_to_do(tmp_path: Path) -> None:
    config = KVortexConfig(owner=tmp_path / "none.sock", identity={"model": "m"})
    await refused(config, ConfigError, r"no owner of a pool answers at .*none\.sock.*start one with `kvortex serve`")


async def test_blocks_that_do_not_fit_the_pool_are_refused(tmp_path: Path) -> None:
    with local_owner(tmp_path / "kv.sock", {"bytes": 4 * KIB, "pin_piece_bytes": 4 * KIB}) as owner:
        await refused(config_of(owner), ConfigError, "a block takes 8192 bytes, the pool has 4096")
        wait_until(lambda: owner.owner.num_clients == 0)
        assert len(owner.owner.caches) == 0
