"""The engine over a cache with several groups of layers: bytes, misses, matches, arguments and claims."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvortex import KVortexEngine, MissReason, SaveOutcome
from kvortex.errors import ConfigError, InvalidBlockIdError, InvalidHashError, LayoutError
from kvortex.groups import KVGroup, Match, MissingKV
from kvortex.index import pack_keys
from kvortex.testing import Fault
from tests.engine_support import BLOCK_SIZE
from tests.groups_support import (
    CACHES,
    GROUPS,
    GroupedCache,
    Tables,
    apart,
    grouped_engine,
    groups_config,
    ids_of,
    in_shared_pages,
    places,
    request,
    tables,
)

NUM_TOKENS = 12 * BLOCK_SIZE


def expect(cache: GroupedCache, into: Tables, content: dict[str, list[bytes]]) -> dict[str, bytes]:
    """All bytes of the cache if just these blocks get these contents. The cache itself stays as it is."""
    before = {name: tensor.clone() for name, tensor in cache.tensors.items()}
    for group, ids in into.items():
        for block_id, piece in zip([b for b in ids if b >= 0], content[group], strict=True):
            cache.write(group, block_id, piece)
    expected = cache.snapshot()
    for name, tensor in cache.tensors.items():
        tensor.copy_(before[name])
    return expected


# -- bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3, 0])
@pytest.mark.parametrize("name", CACHES)
async def test_blocks_of_all_groups_come_back_and_nothing_else_changes(name: str, window: int | None) -> None:
    cache, hashes = CACHES[name](), request()
    cache.fill(seed=1)
    shared = name == "in shared pages"
    source, target = tables(12, places(shared, 0), window), tables(12, places(shared, 1), window)
    async with grouped_engine(cache) as engine:
        saved = await engine.save_blocks(hashes, source)
        assert saved.ok
        assert saved.num_stored == ids_of(source)
        expected = expect(cache, target, cache.blocks(source))
        loaded = await engine.load_blocks(hashes, target)
        assert loaded.ok
        assert loaded.block_ids == tuple(b for ids in target.values() for b in ids if b >= 0)
        assert loaded.groups == tuple(group for group, ids in target.items() for b in ids if b >= 0)
        assert cache.snapshot() == expected
