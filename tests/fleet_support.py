"""Hosts that share a store: engines over the same tiers, what one of them saves and another loads."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import torch

from kvortex import KVortexEngine, ModelIdentity
from tests.engine_support import BLOCK_SIZE, chain, contents, small_config, wipe

MODEL = ModelIdentity(model="a", weights_revision="1")
SAVED = range(12)
LOADED = range(20, 32)


@contextlib.asynccontextmanager
async def host(
    cache: dict[str, torch.Tensor], model: ModelIdentity = MODEL, **changes: Any
) -> AsyncIterator[KVortexEngine]:
    """An engine whose tier is open."""
    async with KVortexEngine.create(small_config(identity=model, **changes)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        yield engine


async def save(engine: KVortexEngine) -> None:
    """Save twelve blocks, and have them written."""
    assert (await engine.save_blocks(chain(12), SAVED)).ok
    await engine.flush()


async def check_loads(
    engine: KVortexEngine, cache: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], within_s: float = 0.0
) -> None:
    """The engine loads these blocks, with the bytes that the cache had that they were saved from.

    Args:
        engine: the engine; `cache` is its own.
        saved: the cache of the engine that has saved them.
        within_s: seconds in which they have to be found; 0 for at once.
    """
    due_s = asyncio.get_running_loop().time() + within_s
    while True:
        wipe(cache, LOADED)
        loaded = await engine.load_blocks(chain(12), LOADED)
        if loaded.ok or asyncio.get_running_loop().time() >= due_s:
            break
    assert loaded.ok
    assert contents(cache, LOADED) == contents(saved, SAVED)
