"""Hosts that share a Redis: what one engine has saved the others load, also behind a disk and behind an owner."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvortex import KVortexConfig, KVortexEngine, MissReason, ModelIdentity
from kvortex.errors import ConfigError
from tests.engine_support import BLOCK_SIZE, chain, contents, make_cache, small_config, wipe
from tests.fleet_support import LOADED, SAVED, check_loads, host, save
from tests.owner.owner_support import read_line, spawn
from tests.tiers.redis_support import RedisServer
from tests.tiers.seal_support import write_keys


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer("--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru") as running:
        yield running


async def test_what_one_host_saves_another_loads(server: RedisServer) -> None:
    cache, theirs = make_cache(), make_cache(seed=1)
    async with host(theirs, tier=server.url()) as second, host(cache, tier=server.url()) as first:
        await save(first)
        assert second.match_prefix(chain(12)) == 0  # nobody has told it
        await check_loads(second, theirs, cache)
        figures = second.get_stats().tiering
        assert (figures.tier, figures.fetched_blocks) == ("redis", 12)
    async with host(theirs, tier=server.url()) as third:
        await check_loads(third, theirs, cache)


async def test_other_models_and_weights_find_nothing(server: RedisServer) -> None:
    cache = make_cache()
    async with host(cache, tier=server.url()) as engine:
        await save(engine)
    for model in (ModelIdentity(model="b", weights_revision="1"), ModelIdentity(model="a", weights_revision="2")):
        async with host(cache, model, tier=server.url()) as other:
            loaded = await other.load_blocks(chain(12), LOADED)
            assert set(loaded.outcomes) == {MissReason.NEVER_STORED}


async def test_a_model_without_a_name_is_refused(server: RedisServer) -> None:
    with pytest.raises(ConfigError, match="model"):
        async with KVortexEngine.create(small_config(tier=server.url())) as engine:
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)


async def test_behind_the_disks_of_two_hosts(server: RedisServer, tmp_path: Path) -> None:
    cache, theirs = make_cache(), make_cache(seed=1)
    tiers = [[f"disk://{tmp_path / name}?capacity_bytes=1GiB", server.url()] for name in ("first", "second")]
    async with host(cache, tier=tiers[0]) as first:
        await save(first)
        assert [link.num_blocks for link in first.get_stats().tiering.links] == [12, 12]
    async with host(theirs, tier=tiers[1]) as second:
        await check_loads(second, theirs, cache)
        await second.flush()
        async with asyncio.timeout(30):
            while [link.num_blocks for link in second.get_stats().tiering.links] != [12, 12]:
                await asyncio.sleep(0.01)
    server.kill()
    async with host(theirs, tier=tiers[1]) as again:
        await check_loads(again, theirs, cache)


async def test_a_host_without_its_server_serves_from_the_pool(server: RedisServer) -> None:
    cache = make_cache()
    server.kill()
    async with host(cache, tier=server.url()) as engine:
        await save(engine)
        await check_loads(engine, cache, cache)
        assert engine.get_stats().tiering.failed_writes > 0
        assert (await engine.load_blocks(chain(4, 1), range(4))).num_loaded == 0


async def test_blocks_are_forgotten_everywhere(server: RedisServer) -> None:
    cache = make_cache()
    async with host(cache, tier=server.url()) as engine:
        await save(engine)
        assert await engine.invalidate(chain(12)[6:])
        assert server.ask("DBSIZE") == 6
        assert await engine.clear(tiers=True)
        assert server.ask("DBSIZE") == 0


@pytest.mark.slow
async def test_behind_the_owner_of_a_machine(server: RedisServer, tmp_path: Path) -> None:
    cache, theirs, path = make_cache(), make_cache(seed=1), tmp_path / "kv.sock"
    async with host(cache, tier=server.url()) as elsewhere:
        await save(elsewhere)
    url = server.url("&connections=2", user=":s3cret@")
    server.ask("CONFIG", "SET", "requirepass", "s3cret")
    owner = spawn(["-m", "kvortex", "serve", "--pool", "64MiB", "--socket", str(path), "--json", "--tier", url])
    try:
        said = await asyncio.to_thread(read_line, owner)
        assert "s3cret" not in said
        assert json.loads(said)["lower_tier"].startswith("unix://:***@")
        async with host(theirs, owner={"socket": path, "deadline_s": 60.0}) as engine:
            await check_loads(engine, theirs, cache)
    finally:
        os.kill(owner.pid, signal.SIGTERM)
        owner.communicate(timeout=60)


def test_the_environment_and_files_name_it(tmp_path: Path) -> None:
    url = "redis://cache:6379/1?ttl_s=86400"
    assert KVortexConfig.from_env({"KVORTEX_TIER": f"disk:///a {url}"}).tier.urls == ("disk:///a", url)
    file = tmp_path / "kvortex.toml"
    file.write_text(f'tier = "{url}"\n')
    assert KVortexConfig.from_file(file).tier.urls == (url,)


async def test_a_forged_block_is_a_miss_that_says_so_and_is_saved_anew(server: RedisServer, tmp_path: Path) -> None:
    """Two engines, the second of which changes its keys first; then somebody without a key writes to the server."""
    files = [write_keys(tmp_path / f"{number}.keys", "old") for number in range(2)]
    cache = make_cache()
    hashes, expected = chain(12), contents(cache, SAVED)
    async with (
        host(cache, tier=server.url(f"&seal_keys={files[0]}")) as first,
        host(make_cache(seed=1), tier=server.url(f"&seal_keys={files[1]}")) as second,
    ):
        write_keys(files[1], "new", "old")
        await first.save_blocks(hashes, SAVED)
        await first.flush()
        assert (await second.load_blocks(hashes, LOADED)).ok
        names = sorted(server.ask("KEYS", "*"))
        assert len(names) == 12
    for name in names:
        server.ask("SETRANGE", name, 1000, b"forged")
    async with host(cache, tier=server.url(f"&seal_keys={files[0]}")) as third:
        wipe(cache, LOADED)
        missed = await third.load_blocks(hashes, LOADED)
        assert set(missed.outcomes) == {MissReason.AUTH}
        stats = third.get_stats()
        assert stats.misses[MissReason.AUTH] == 12
        assert stats.tiering is not None
        assert stats.tiering.causes["auth"] == 12
        assert (await third.save_blocks(hashes, SAVED)).ok
        await third.flush()
    async with host(cache, tier=server.url(f"&seal_keys={files[0]}")) as fourth:
        wipe(cache, LOADED)
        assert (await fourth.load_blocks(hashes, LOADED)).ok
        assert contents(cache, LOADED) == expected
