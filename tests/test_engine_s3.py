"""Hosts that share a bucket: what one engine has saved the others load, also behind a disk and behind an owner."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, ModelIdentity
from kvortex.index import pack_keys
from kvortex.testing.tier_conformance import until
from tests.engine_support import BLOCK_NBYTES, chain, contents, make_cache
from tests.fleet_support import LOADED, SAVED, check_loads, host, save
from tests.owner.owner_support import read_line, spawn
from tests.tiers.s3_support import Rclone, keys_in_environment

PATIENCE_S = 30.0
"""A first listing may still be on its way, and older than what is to be found."""


@pytest.fixture
def server() -> Iterator[Rclone]:
    with keys_in_environment(), Rclone() as running:
        yield running


async def test_what_one_host_saves_another_loads(server: Rclone) -> None:
    cache, theirs = make_cache(), make_cache(seed=1)
    async with host(theirs, tier=server.url()) as second, host(cache, tier=server.url()) as first:
        await save(first)
        assert second.match_prefix(chain(12)) == 0  # nobody has told it
        await check_loads(second, theirs, cache, PATIENCE_S)
        figures = second.get_stats().tiering
        assert (figures.tier, figures.fetched_blocks) == ("s3", 12)
    async with host(theirs, tier=server.url()) as third:
        await check_loads(third, theirs, cache, PATIENCE_S)
    assert len(server.names()) == 1


async def test_other_models_and_weights_find_nothing(server: Rclone) -> None:
    cache = make_cache()
    async with host(cache, tier=server.url()) as engine:
        await save(engine)
    for model in (ModelIdentity(model="b", weights_revision="1"), ModelIdentity(model="a", weights_revision="2")):
        async with host(cache, model, tier=server.url()) as other:
            loaded = await other.load_blocks(chain(12), LOADED)
            assert set(loaded.outcomes) == {MissReason.NEVER_STORED}


async def test_packed_blocks_come_back(server: Rclone) -> None:
    cache = {name: layer.to(torch.bfloat16) for name, layer in make_cache().items()}
    async with host(cache, tier=server.url(), codec="fp8") as engine:
        await save(engine)
        assert (await engine.load_blocks(chain(12), SAVED)).ok
        rounded = {name: layer.clone() for name, layer in cache.items()}
    async with host(cache, tier=server.url(), codec="fp8") as other:
        for layer in cache.values():
            layer.zero_()
        assert (await other.load_blocks(chain(12), SAVED)).ok
        assert all(torch.equal(layer[:, :12], rounded[name][:, :12]) for name, layer in cache.items())


async def test_behind_the_disks_of_two_hosts(server: Rclone, tmp_path: Path) -> None:
    cache, theirs = make_cache(), make_cache(seed=1)
    tiers = [[f"disk://{tmp_path / name}?capacity_bytes=1GiB", server.url()] for name in ("first", "second")]
    async with host(cache, tier=tiers[0]) as first:
        await save(first)
        assert [link.num_blocks for link in first.get_stats().tiering.links] == [12, 12]
    async with host(theirs, tier=tiers[1]) as second:
        await check_loads(second, theirs, cache, PATIENCE_S)
        await second.flush()
        async with asyncio.timeout(30):
            while [link.num_blocks for link in second.get_stats().tiering.links] != [12, 12]:
                await asyncio.sleep(0.01)
    server.kill()
    async with host(theirs, tier=tiers[1]) as again:
        await check_loads(again, theirs, cache, PATIENCE_S)


async def test_blocks_that_are_given_back_one_by_one_leave_their_neighbours(server: Rclone) -> None:
    """An exclusive tier loses each block that is fetched, here out of objects with many."""
    cache = make_cache()
    pool = {"bytes": 40 * BLOCK_NBYTES, "pin_piece_bytes": 8 * 4096}
    eviction = {"watermark": 0.5, "ratio": 0.5}
    tier = {"urls": [server.url("&segment_bytes=64KiB")], "inclusion": "exclusive"}
    async with host(cache, tier=tier, pool=pool, eviction=eviction) as engine:
        for salt in range(6):
            ids = range(8 * salt, 8 * salt + 8)
            assert (await engine.save_blocks(chain(8, salt), ids)).ok
            await engine.flush()
        keys = [(salt, position) for salt in range(6) for position in range(8)]
        demoted = [key for key, is_known in zip(keys, known(engine, keys), strict=True) if is_known]
        assert len(demoted) > 2 * len(server.names()) > 0
        for salt, position in demoted[::2]:
            assert (await engine.load_blocks([chain(8, salt)[position]], [50])).ok
            assert contents(cache, [50]) == contents(cache, [8 * salt + position])
            await engine.flush()
        assert engine.get_stats().tiering.fetched_blocks == len(demoted[::2])
        await until(lambda: not any(known(engine, demoted[:1])), 30)


def known(engine: KVortexEngine, keys: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether the tier is known to have these blocks: number of a chain, position in it."""
    return engine._tiering.known(pack_keys([chain(8, salt)[position] for salt, position in keys])).tolist()


async def test_a_host_without_its_store_serves_from_the_pool(server: Rclone) -> None:
    cache = make_cache()
    server.kill()
    async with host(cache, tier=server.url()) as engine:
        await save(engine)
        await check_loads(engine, cache, cache, PATIENCE_S)
        assert engine.get_stats().tiering.failed_writes > 0
        assert (await engine.load_blocks(chain(4, 1), range(4))).num_loaded == 0


async def test_blocks_are_forgotten_everywhere(server: Rclone) -> None:
    cache = make_cache()
    async with host(cache, tier=server.url()) as engine:
        await save(engine)
        assert await engine.invalidate(chain(12)[6:])
        async with host(make_cache(seed=1), tier=server.url()) as other:
            assert (await other.load_blocks(chain(12), LOADED)).num_loaded == 6
        assert await engine.clear(tiers=True)
    async with host(cache, tier=server.url()) as engine:
        assert (await engine.load_blocks(chain(12), LOADED)).num_loaded == 0


@pytest.mark.slow
async def test_behind_the_owner_of_a_machine(server: Rclone, tmp_path: Path) -> None:
    cache, theirs, path = make_cache(), make_cache(seed=1), tmp_path / "kv.sock"
    async with host(cache, tier=server.url()) as elsewhere:
        await save(elsewhere)
    url = server.url("&connections=2")
    owner = spawn(["-m", "kvortex", "serve", "--pool", "64MiB", "--socket", str(path), "--json", "--tier", url])
    try:
        said = await asyncio.to_thread(read_line, owner)
        assert json.loads(said)["lower_tier"] == url
        async with host(theirs, owner={"socket": path, "deadline_s": 60.0}) as engine:
            await check_loads(engine, theirs, cache, PATIENCE_S)
    finally:
        os.kill(owner.pid, signal.SIGTERM)
        owner.communicate(timeout=60)


def test_the_environment_and_files_name_it(tmp_path: Path) -> None:
    url = "s3://bucket/prefix?region=eu-west-1"
    assert KVortexConfig.from_env({"KVORTEX_TIER": f"disk:///a {url}"}).tier.urls == ("disk:///a", url)
    file = tmp_path / "kvortex.toml"
    file.write_text(f'tier = "{url}"\n')
    assert KVortexConfig.from_file(file).tier.urls == (url,)
