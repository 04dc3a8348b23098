"""Calls of an engine over a cache with several groups of layers: their arguments, and claims on blocks."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvortex import KVortexEngine
from kvortex.errors import ConfigError, InvalidBlockIdError, InvalidHashError, LayoutError
from kvortex.groups import KVGroup, Match, MissingKV
from kvortex.layout import PagedCache
from kvortex.testing import Fault
from tests.engine_support import BLOCK_SIZE
from tests.groups_support import (
    CACHES,
    GROUPS,
    apart,
    grouped_engine,
    groups_config,
    in_shared_pages,
    places,
    request,
    tables,
)

# -- arguments ---------------------------------------------------------------------------------------


def named(**changes: Any) -> dict[str, Any]:
    return {**tables(4, places(False, 0)), **changes}


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([0, 1, 2, 3], InvalidBlockIdError, "several groups of layers: pass block ids as a dict with 'full', "),
    "an array": (np.arange(4), InvalidBlockIdError, "pass block ids as a dict"),
    "an unknown group": (named(windows=[0, 1, 2, 3]), InvalidBlockIdError, "'windows' is no group: .*'full', 'window'"),
    "too few ids": (named(full=[0, 1, 2]), InvalidHashError, "'full'.* 4 blocks, and there are 3 block ids.* -1 for"),
    "too many ids": (named(window=[0, 1, 2, 3, 4]), InvalidHashError, "'window'.* 4 blocks, and there are 5"),
    "an id for each hash": (named(state=[0, 1, 2, 3]), InvalidHashError, "'state'.* 1 blocks, and there are 4"),
    "an id beyond the cache": (named(full=[0, 1, 48, 3]), InvalidBlockIdError, r"'full': block id 48 .* \[0, 48\)"),
    "an id beyond the group": (named(window=[0, 1, 40, 3]), InvalidBlockIdError, r"'window': block id 40 .*\[0, 40\)"),
    "a negative id": (named(full=[0, -2, 1, 2]), InvalidBlockIdError, "'full': block id -2 is not in"),
    "an id twice": (named(window=[5, -1, 5, 6]), InvalidBlockIdError, "'window': block id 5 is named twice"),
    "floats": (named(full=[0.0, 1.0, 2.0, 3.0]), InvalidBlockIdError, "'full': .*integers, not float64"),
    "one id": (named(state=0), InvalidBlockIdError, "'state': .*flat list of integers"),
    "nothing": (named(state=None), InvalidBlockIdError, "'state': .*flat list of integers"),
    "rows": (named(full=[[0, 1], [2, 3], [4, 5], [6, 7]]), InvalidBlockIdError, "'full': .*flat list"),
    "rows of one": (named(full=[[0], [1], [2], [3]]), InvalidBlockIdError, "'full': .*flat list"),
    "uneven rows": (named(full=[[0], [1, 2], [3], [4]]), InvalidBlockIdError, "'full': .*flat list"),
    "a set": (named(full={0, 1, 2, 3}), InvalidBlockIdError, "'full': set has no order"),
    "a dict of a dict": (named(full={"full": [0, 1, 2, 3]}), InvalidBlockIdError, "'full': dict has no order"),
    "words": (named(full=["a", "b", "c", "d"]), InvalidBlockIdError, "'full': .*integers"),
    "a tensor of floats": (named(full=torch.zeros(4)), InvalidBlockIdError, "'full': .*integers"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", ["save_blocks", "load_blocks"])
async def test_wrong_block_ids_are_refused_before_anything_starts(call: str, wrong: str) -> None:
    block_ids, error, says = WRONG[wrong]
    cache, hashes = apart(), request(4)
    cache.fill(seed=10)
    before = cache.snapshot()
    async with grouped_engine(cache) as engine:
        with pytest.raises(error, match=says):
            await getattr(engine, call)(hashes, block_ids)
        assert cache.snapshot() == before
        await nothing_is_held(engine)


async def nothing_is_held(engine: KVortexEngine) -> None:
    """The pool is empty, and all blocks of the cache can be saved and loaded."""
    control, _ = engine._planes()
    assert engine.get_stats().pools[0].allocated_bytes == 0
    assert (len(control.index), control.index.num_pending) == (0, 0)
    assert engine.get_stats().transfers == ()
    hashes = request(8)
    for first in (0, 8):
        ids = {"full": range(first, first + 8), "window": range(first, first + 8), "state": range(first, first + 2)}
        assert (await engine.save_blocks(hashes, ids)).ok
        assert (await engine.load_blocks(hashes, ids)).ok


@pytest.mark.parametrize("call", ["save_blocks", "load_blocks"])
async def test_a_page_that_two_groups_name_is_refused(call: str) -> None:
    """A load would write it twice, and a save keep the same bytes as two different blocks."""
    cache, hashes = in_shared_pages(), request(4)
    cache.fill(seed=11)
    before = cache.snapshot()
    async with grouped_engine(cache) as engine:
        with pytest.raises(
            InvalidBlockIdError, match="block id 3 is named by 'full' and by 'state', which share memory"
        ):
            await getattr(engine, call)(hashes, {"full": [0, 1, 2, 3], "window": [4, 5, 6, 7], "state": [3]})
        assert engine.get_stats().pools[0].allocated_bytes == 0
        assert cache.snapshot() == before
        ids = {"full": [0, 1, 2, 3], "window": [4, 5, 6, 7], "state": [8]}
        assert (await engine.save_blocks(hashes, ids)).ok
        assert (await engine.load_blocks(hashes, ids)).ok


async def test_a_cache_with_one_group_takes_no_dict() -> None:
    tensors = {"layer": torch.zeros(20, BLOCK_SIZE, 64)}
    group = KVGroup("full", ("layer",), BLOCK_SIZE)
    for groups in (None, [group]):
        async with KVortexEngine.create(groups_config()) as engine:
            engine.register_kv_caches(tensors, BLOCK_SIZE, groups=groups)
            for call in (engine.save_blocks, engine.load_blocks):
                with pytest.raises(InvalidBlockIdError, match="one group of layers: pass block ids as a list"):
                    await call(request(2), {"full": [0, 1]})
            saved = await engine.save_blocks(request(2), [0, 1])
            assert (saved.ok, saved.groups) == (True, ())
            assert (await engine.load_blocks(request(2), [2, 3])).groups == ()
            assert engine.match_request(request(3)) == Match(32, MissingKV("full", 48, 2))
            assert engine.check_blocks(request(3), "full").tolist() == [True, True, False]


async def test_a_group_that_is_not_there_cannot_be_looked_up() -> None:
    async with grouped_engine(apart()) as engine:
        with pytest.raises(ConfigError, match="no group of layers is named 'x'; there are full, window, state"):
            engine.check_blocks(request(), "x")
        with pytest.raises(ConfigError, match="no group of layers is named 'x'"):
            engine.miss_reason(request()[0], "x")
        with pytest.raises(ConfigError, match="several groups: name one of full, window, state"):
            engine.miss_reason(request()[0])


def changed(index: int, **changes: Any) -> tuple[KVGroup, ...]:
    groups = list(GROUPS)
    fields = {field: getattr(groups[index], field) for field in ("name", "layers", "block_size", "kind", "reach")}
    groups[index] = KVGroup(**(fields | changes))
    return tuple(groups)


CONTRADICTIONS: dict[str, tuple[Callable[[], tuple[KVGroup, ...]], type[Exception], str]] = {
    "no groups": (lambda: (), ConfigError, "1 to 128 groups of layers, not 0"),
    "a name twice": (lambda: changed(1, name="full"), ConfigError, "group 'full' is named twice"),
    "a layer twice": (lambda: changed(1, layers=("window.0", "full.1")), ConfigError, "layer 'full.1' is named twice"),
    "a layer in no group": (lambda: GROUPS[:2], LayoutError, "tensor 'conv' is in no group of layers: add it"),
    "a layer that is not there": (lambda: changed(0, layers=("full.0", "full.1", "x")), LayoutError, "name 'x'"),
    "a group without layers": (lambda: changed(1, layers=()), LayoutError, "'window.0' is in no group"),
    "blocks of half a hash": (lambda: changed(1, block_size=8), ConfigError, "'window' has blocks of 8 tokens"),
    "layers with other blocks": (
        lambda: (GROUPS[0], KVGroup("rest", ("window.0", "conv", "ssm"), BLOCK_SIZE)),
        LayoutError,
        "'conv'.* has 24 blocks, 'window.0' has 40",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
async def test_groups_that_contradict_each_other_leave_the_engine_as_it_was(what: str) -> None:
    make_groups, error, says = CONTRADICTIONS[what]
    cache = apart()
    async with KVortexEngine.create(groups_config()) as engine:
        with pytest.raises(error, match=says):
            engine.register_kv_caches(cache.tensors, BLOCK_SIZE, block_dim=cache.block_dims, groups=make_groups())
        cache.register(engine)
        assert (await engine.save_blocks(request(), tables(12, places(False, 0)))).ok


async def test_a_pool_without_room_for_one_block_of_each_group_is_refused() -> None:
    cache = apart()
    nbytes = sum(len(cache.block(group, 0)) for group in cache.groups)
    async with KVortexEngine.create(groups_config(pool={"bytes": nbytes - 4096})) as engine:
        with pytest.raises(ConfigError, match=r"one block of each of 3 groups of layers takes .* raise pool\.bytes"):
            cache.register(engine)


# -- claims ------------------------------------------------------------------------------------------


async def until_held(executor: Any) -> None:
    while not executor.num_held:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("shared", [True, False])
async def test_a_load_into_a_block_that_a_save_of_another_group_reads(shared: bool) -> None:
    cache, hashes = CACHES["in shared pages" if shared else "apart"](), request(4)
    cache.fill(seed=12)
    faults: dict[str, Fault | None] = {"now": None}
    async with grouped_engine(cache, fault_of=lambda *_: faults["now"]) as engine:
        executor = engine._planes()[1]._scheduler._executor
        assert (await engine.save_blocks(hashes, {"window": [4, 5, 6, 7], "state": [8]})).ok
        faults["now"] = Fault.HOLD
        save = asyncio.ensure_future(engine.save_blocks(hashes, {"full": [10, 11, 12, 13]}))
        await until_held(executor)
        faults["now"] = None
        into = {"window": [11, 20, 21, 22], "state": [13]}
        if shared:
            with pytest.raises(InvalidBlockIdError, match="block id 11 is being read by a save: wait"):
                await engine.load_blocks(hashes, into)
        else:
            assert (await engine.load_blocks(hashes, into)).ok
        executor.release()
        assert (await save).ok
        assert (await engine.load_blocks(hashes, into)).ok
        assert engine.check_blocks(hashes, "full").all()


@pytest.mark.parametrize("shared", [True, False])
async def test_a_load_has_its_blocks_to_itself_in_all_groups(shared: bool) -> None:
    cache, hashes = CACHES["in shared pages" if shared else "apart"](), request(4)
    cache.fill(seed=13)
    faults: dict[str, Fault | None] = {"now": None}
    async with grouped_engine(cache, fault_of=lambda *_: faults["now"]) as engine:
        executor = engine._planes()[1]._scheduler._executor
        assert (await engine.save_blocks(hashes, {"full": [0, 1, 2, 3], "window": [4, 5, 6, 7]})).ok
        faults["now"] = Fault.HOLD
        load = asyncio.ensure_future(engine.load_blocks(hashes, {"window": [8, 9, 10, 11]}))
        await until_held(executor)
        faults["now"] = None
        if shared:
            with pytest.raises(InvalidBlockIdError, match="block id 10 is being written by another load"):
                await engine.load_blocks(hashes, {"full": [12, 13, 10, 14]})
            with pytest.raises(InvalidBlockIdError, match="block id 8 is being written by a load"):
                await engine.save_blocks(hashes, {"state": [8]})
        else:
            assert (await engine.load_blocks(hashes, {"full": [12, 13, 10, 14]})).ok
            assert (await engine.save_blocks(hashes, {"state": [8]})).ok
        executor.release()
        assert (await load).ok
        assert cache.blocks({"window": [8, 9, 10, 11]}) == cache.blocks({"window": [4, 5, 6, 7]})
        assert (await engine.load_blocks(hashes, {"full": [12, 13, 10, 14]})).ok
        assert cache.blocks({"full": [12, 13, 10, 14]}) == cache.blocks({"full": [0, 1, 2, 3]})


async def test_a_call_that_is_refused_for_one_group_holds_no_block_of_another() -> None:
    cache, hashes = apart(), request(4)
    cache.fill(seed=15)
    faults: dict[str, Fault | None] = {"now": None}
    async with grouped_engine(cache, fault_of=lambda *_: faults["now"]) as engine:
        executor = engine._planes()[1]._scheduler._executor
        assert (await engine.save_blocks(hashes, tables(4, places(False, 0)))).ok
        faults["now"] = Fault.HOLD
        load = asyncio.ensure_future(engine.load_blocks(hashes, {"state": [5]}))
        await until_held(executor)
        faults["now"] = None
        with pytest.raises(InvalidBlockIdError, match="block id 5 is being written by another load"):
            await engine.load_blocks(hashes, {"full": [20, 21, 22, 23], "window": [20, 21, 22, 23], "state": [5]})
        assert (await engine.load_blocks(hashes, {"full": [20, 21, 22, 23], "window": [20, 21, 22, 23]})).ok
        executor.release()
        assert (await load).ok


# -- the blocking face -------------------------------------------------------------------------------


def test_the_blocking_face_takes_groups_too() -> None:
    cache, hashes = apart(), request()
    cache.fill(seed=14)
    source, target = tables(12, places(False, 0)), tables(12, places(False, 1), window=3)
    with KVortexEngine.create_sync(groups_config()) as engine:
        made = engine.register_kv_caches(
            cache.tensors, BLOCK_SIZE, block_dim=cache.block_dims, groups=tuple(cache.groups.values())
        )
        assert isinstance(made, PagedCache)
        assert engine.save_blocks(hashes, source).ok
        assert engine.match_request(hashes) == Match(12 * BLOCK_SIZE, None)
        assert engine.match_prefix(hashes) == engine.prefetch(hashes) == 12
        assert engine.check_blocks(hashes, "state").tolist() == [True] * 3
        assert engine.load_blocks(hashes, target).groups == ("full",) * 12 + ("window",) * 3 + ("state",) * 3
        assert cache.blocks(target)["full"] == cache.blocks(source)["full"]
        with pytest.raises(InvalidBlockIdError, match="pass block ids as a dict"):
            engine.load_blocks(hashes, range(12))
