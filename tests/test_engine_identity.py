"""What the engine wants to know of a model before its blocks meet those of others, and what keeps them apart."""

import os
from pathlib import Path

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, ModelIdentity
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.tiers import MemoryTier, Tier
from tests.engine_support import BLOCK_SIZE, Parts, chain, contents, make_cache, small_config

MODEL = ModelIdentity(model="a", weights_revision="1")


class SharedTier(MemoryTier):
    """As a remote store would be."""

    name = "shared"
    outlives_process = True


def shared_tier(namespace: Namespace) -> Tier:
    return SharedTier(1 << 20, namespace=namespace.digest)


def private_tier(namespace: Namespace) -> Tier:
    return MemoryTier(1 << 20, namespace=namespace.digest)


@pytest.mark.parametrize("identity", [{}, {"weights_revision": "1"}, {"fingerprint": "x"}])
async def test_a_disk_without_a_named_model_is_refused_with_the_way_out(
    tmp_path: Path, identity: dict[str, str]
) -> None:
    config = small_config(disk=str(tmp_path), identity=identity)
    async with KVortexEngine.create(config) as engine:
        with pytest.raises(ConfigError, match=r'identity=ModelIdentity\(model="'):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    assert os.listdir(tmp_path) == []


async def test_any_tier_that_others_may_share_wants_a_named_model() -> None:
    make = iter([shared_tier, private_tier]).__next__
    one_by_one = Parts(make_tier=lambda namespace: make()(namespace))
    async with KVortexEngine.create(small_config(), one_by_one) as engine:
        with pytest.raises(ConfigError, match="the shared tier keeps blocks for other processes"):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)  # and is as before
    async with KVortexEngine.create(small_config(identity=MODEL), Parts(make_tier=shared_tier)) as engine:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)


def test_the_blocking_face_refuses_it_too(tmp_path: Path) -> None:
    with (
        KVortexEngine.create_sync(small_config(disk=str(tmp_path))) as engine,
        pytest.raises(ConfigError, match="name this one"),
    ):
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)


def namespace_with(cache: dict[str, torch.Tensor], config: KVortexConfig) -> bytes:
    with KVortexEngine.create_sync(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        return engine._engine.namespace.digest


def test_the_bound_of_packing_is_part_of_the_namespace_and_of_no_other() -> None:
    cache = {name: layer.to(torch.bfloat16) for name, layer in make_cache().items()}
    bounds = (0.01, 0.02, 0.05)
    packed = {namespace_with(cache, small_config(codec={"name": "fp8", "max_error": bound})) for bound in bounds}
    assert len(packed) == len(bounds)
    raw = {namespace_with(cache, small_config(codec={"max_error": bound})) for bound in bounds}
    assert len(raw) == 1


async def test_an_engine_with_a_tighter_bound_does_not_load_what_a_looser_one_packed(tmp_path: Path) -> None:
    cache = {name: layer.to(torch.bfloat16) for name, layer in make_cache().items()}
    hashes, ids = chain(4), list(range(4))
    bits = {name: layer.view(torch.int16) for name, layer in cache.items()}
    want = contents(bits, ids)
    for bound, found in ((0.2, 0), (0.001, 0), (0.001, 4)):
        config = small_config(disk=str(tmp_path), codec={"name": "fp8", "max_error": bound}, identity=MODEL)
        async with KVortexEngine.create(config) as engine:
            engine.register_kv_caches(cache, BLOCK_SIZE)
            assert await engine.wait_tier()
            assert engine.match_prefix(hashes) == found
            if not found:
                await engine.save_blocks(hashes, ids)
                await engine.flush()
            else:
                assert (await engine.load_blocks(hashes, ids)).ok
                assert contents(bits, ids) == want  # kept as they are
