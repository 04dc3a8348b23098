"""What callers pass to the engine: copied at once, in any form that has a meaning, and refused in plain words."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason
from kvortex.errors import EngineStateError, InvalidBlockIdError, InvalidHashError
from kvortex.hashing import hash_blocks
from kvortex.sched.batcher import Batch
from kvortex.testing import Fault
from kvortex.types import Direction
from tests.engine_support import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    chain,
    contents,
    make_cache,
    running_engine,
    small_config,
    wipe,
)

COUNT = 8

REUSED_IDS: dict[str, Callable[[range], Any]] = {
    "int32 array": lambda ids: np.array(ids, dtype=np.int32),
    "int64 array": lambda ids: np.array(ids, dtype=np.int64),
    "list": list,
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "view of an array": lambda ids: np.array(ids, dtype=np.int32).repeat(2)[::2],
}


def as_rows(hashes: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32).copy()


REUSED_HASHES: dict[str, Callable[[list[bytes]], Any]] = {
    "uint8 array": as_rows,
    "uint64 array": lambda hashes: as_rows(hashes).view(np.uint64),
    "object array": lambda hashes: np.array([*hashes, None], dtype=object)[:-1],
    "list": list,
    "list of bytearrays": lambda hashes: [bytearray(h) for h in hashes],
}


def overwrite(values: Any, other: Any) -> None:
    """What a caller does that keeps one buffer for all its calls."""
    if isinstance(values, list) and isinstance(values[0], bytearray):
        for value in values:
            value[:] = bytes(32)
    elif isinstance(values, list):
        values[:] = other
    else:
        values[:] = values[0] * 0 if values[0] is not None and not isinstance(values[0], bytes) else other[0]


@pytest.mark.parametrize("awaited", [True, False])
@pytest.mark.parametrize("form", REUSED_IDS)
async def test_block_ids_may_be_reused_once_a_call_is_made(form: str, awaited: bool) -> None:
    cache = make_cache()
    want = contents(cache, range(COUNT))
    async with running_engine(cache) as (engine, _):
        ids = REUSED_IDS[form](range(COUNT))
        save = asyncio.ensure_future(engine.save_blocks(chain(COUNT), ids))
        await asyncio.sleep(0) if awaited else None
        overwrite(ids, [40] * COUNT)
        assert (await save).ok
        ids = REUSED_IDS[form](range(20, 20 + COUNT))
        load = asyncio.ensure_future(engine.load_blocks(chain(COUNT), ids))
        await asyncio.sleep(0) if awaited else None
        overwrite(ids, [40] * COUNT)
        assert (await load).ok
        assert contents(cache, range(20, 20 + COUNT)) == want
        assert (await engine.load_blocks(chain(COUNT), range(20, 20 + COUNT))).ok, "the blocks were given back"


@pytest.mark.parametrize("form", REUSED_HASHES)
async def test_hashes_may_be_reused_once_a_call_is_made(form: str) -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        hashes = REUSED_HASHES[form](chain(COUNT))
        save = asyncio.ensure_future(engine.save_blocks(hashes, range(COUNT)))
        overwrite(hashes, chain(COUNT, salt=1))
        assert (await save).ok
        assert engine.match_prefix(chain(COUNT)) == COUNT


WORKING_HASHES: dict[str, Callable[[list[bytes]], Any]] = {
    **REUSED_HASHES,
    "generator": lambda hashes: (h for h in hashes),
    "tuple": tuple,
    "bytes array": lambda hashes: np.array(hashes, dtype="S32"),
    "void array": lambda hashes: as_rows(hashes).view("V32").ravel(),
    "strided array": lambda hashes: as_rows(hashes).repeat(2, axis=0)[::2],
    "memoryviews": lambda hashes: [memoryview(h) for h in hashes],
    "tensor of bytes": lambda hashes: torch.from_numpy(as_rows(hashes)),
}

WORKING_IDS: dict[str, Callable[[range], Any]] = {
    **REUSED_IDS,
    "range": lambda ids: ids,
    "generator": lambda ids: (i for i in ids),
    "iterator over an array": lambda ids: iter(np.array(ids)),
    "uint8 array": lambda ids: np.array(ids, dtype=np.uint8),
    "uint64 array": lambda ids: np.array(ids, dtype=np.uint64),
    "read-only array": lambda ids: np.frombuffer(np.array(ids, dtype=np.int32).tobytes(), np.int32),
    "list of numpy integers": lambda ids: [np.int64(i) for i in ids],
    "list of tensors": lambda ids: [torch.tensor(i) for i in ids],
}


@pytest.mark.parametrize("form", WORKING_HASHES)
async def test_hashes_in_any_form(form: str) -> None:
    make = WORKING_HASHES[form]
    hashes = [*chain(COUNT - 1), b"\x01" + bytes(31)]  # one that ends in zeros
    async with running_engine(make_cache()) as (engine, _):
        assert (await engine.save_blocks(make(hashes), range(COUNT))).ok
        assert engine.check_blocks(make(hashes)).tolist() == [True] * COUNT
        assert engine.match_prefix(make(hashes)) == COUNT
        assert await engine.prefetch(make(hashes)) == COUNT
        assert (await engine.load_blocks(make(hashes), range(20, 20 + COUNT))).ok
        assert engine.match_prefix(hashes) == COUNT


@pytest.mark.parametrize("form", WORKING_IDS)
async def test_block_ids_in_any_form(form: str) -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        assert (await engine.save_blocks(chain(COUNT), WORKING_IDS[form](range(COUNT)))).ok
        assert (await engine.load_blocks(chain(COUNT), WORKING_IDS[form](range(20, 20 + COUNT)))).ok
        assert contents(cache, range(20, 20 + COUNT)) == contents(cache, range(COUNT))


NO_HASHES: dict[str, Any] = {
    "None": None,
    "a number": 7,
    "one hash alone": bytes(32),
    "text": "x" * 32,
    "a set": {bytes(32)},
    "a mapping": {bytes(32): 0},
    "list of None": [None],
    "short": [b"short"],
    "texts": ["x" * 32],
    "long beside short": [bytes(33), bytes(31)],
    "wide memoryview": [memoryview(bytes(64)).cast("H")],
    "numbers": [1],
    "tensor of bool": torch.zeros(1, dtype=torch.bool),
    "tensor of words": torch.zeros(1, 8, dtype=torch.int32),
    "tensor with gradients": torch.zeros(1, 32, requires_grad=True),
    "array of floats": np.zeros((1, 4)),
    "array of short strings": np.array([b"abc"]),
    "array without rows": np.array(7),
    "array of short rows": np.zeros((1, 31), np.uint8),
}

NO_IDS: dict[str, Any] = {
    "None": None,
    "a number": 7,
    "text": "abc",
    "a set": {1},
    "a mapping": {1: 2},
    "list of None": [None],
    "list of bool": [True],
    "list of floats": [1.0],
    "list of texts": ["1"],
    "ragged": [[1], [2, 3]],
    "nested": [[1]],
    "tensor of bool": torch.ones(1, dtype=torch.bool),
    "tensor of bfloat16": torch.ones(1, dtype=torch.bfloat16),
    "tensor with gradients": torch.ones(1, requires_grad=True),
    "array of bool": np.ones(1, dtype=bool),
    "array of objects": np.array([None]),
    "array of dates": np.array(["2024-01-01"], dtype="datetime64[D]"),
    "beyond any": [2**70],
    "beyond int64": [2**64 - 1],
    "negative": [-1],
    "beyond the cache": [NUM_BLOCKS],
    "twice": [3, 3],
}


@pytest.mark.parametrize("form", NO_HASHES)
async def test_what_are_no_hashes_is_refused_in_plain_words(form: str) -> None:
    wrong = NO_HASHES[form]
    async with running_engine(make_cache()) as (engine, executor):
        for call in (engine.check_blocks, engine.match_prefix, engine.prefetch):
            with pytest.raises(InvalidHashError, match="hash"):
                call(wrong)
        for both in (engine.save_blocks, engine.load_blocks):
            with pytest.raises(InvalidHashError, match="hash"):
                both(wrong, [0])
        assert not executor.batches


@pytest.mark.parametrize("form", NO_IDS)
async def test_what_are_no_block_ids_is_refused_in_plain_words(form: str) -> None:
    wrong = NO_IDS[form]
    async with running_engine(make_cache()) as (engine, executor):
        for call in (engine.save_blocks, engine.load_blocks):
            with pytest.raises(InvalidBlockIdError, match="block id"):
                call(chain(len(wrong) if isinstance(wrong, list) else 1), wrong)
        assert not executor.batches
        assert engine.get_stats().pools[0].allocated_bytes == 0


@pytest.mark.parametrize("form", ["generator", "array"])
async def test_hashes_and_ids_that_do_not_pair_up_are_counted_for_the_caller(form: str) -> None:
    hashes = chain(3)
    async with running_engine(make_cache()) as (engine, _):
        with pytest.raises(InvalidHashError, match="3 hashes and 2 block ids do not pair up"):
            engine.save_blocks((h for h in hashes) if form == "generator" else as_rows(hashes), [0, 1])


async def test_sizes_may_be_numpy_integers() -> None:
    cache = make_cache()
    hashes = hash_blocks(np.arange(4 * BLOCK_SIZE), np.int64(BLOCK_SIZE))
    async with KVortexEngine.create(small_config()) as engine:
        layout = engine.register_kv_caches(
            cache, np.int64(BLOCK_SIZE), num_blocks=np.int32(NUM_BLOCKS), block_dim=np.int64(1)
        )
        assert (type(layout.block_size), type(layout.num_blocks)) == (int, int)
        assert engine.namespace.digest
        assert (await engine.save_blocks(hashes, range(4))).ok
    async with KVortexEngine.create(small_config()) as plain:
        assert plain.register_kv_caches(cache, BLOCK_SIZE) == layout


# -- blocks in somebody's hands ----------------------------------------------------------------------


def holding(direction: Direction) -> Callable[[int, Batch], Fault | None]:
    return lambda number, batch: Fault.HOLD if batch.direction is direction else None


async def until_held(executor: Any) -> None:
    async with asyncio.timeout(30):
        while executor.num_held < 1:
            await asyncio.sleep(0.001)


async def finish(executor: Any, task: "asyncio.Task[Any]") -> Any:
    async with asyncio.timeout(30):
        while not task.done():
            executor.release()
            await asyncio.sleep(0.001)
    return task.result()


async def test_a_save_from_a_block_that_a_load_writes_is_refused() -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=holding(Direction.LOAD)) as (engine, executor):
        await engine.save_blocks(chain(4), range(4))
        load = asyncio.ensure_future(engine.load_blocks(chain(4), range(8, 12)))
        await until_held(executor)
        with pytest.raises(InvalidBlockIdError, match="block id 9 is being written by a load: wait"):
            await engine.save_blocks(chain(2, salt=1), (9, 20))
        assert engine.miss_reason(chain(1, salt=1)[0]) is MissReason.NEVER_STORED
        assert (await engine.save_blocks(chain(1, salt=1), (20,))).ok, "others can be saved meanwhile"
        assert (await finish(executor, load)).ok
        assert (await engine.save_blocks(chain(2, salt=1), (9, 20))).ok


async def test_a_load_into_a_block_that_a_save_reads_is_refused() -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=holding(Direction.SAVE)) as (engine, executor):
        first = asyncio.ensure_future(engine.save_blocks(chain(4, salt=1), range(20, 24)))
        await until_held(executor)
        assert (await finish(executor, first)).ok
        save = asyncio.ensure_future(engine.save_blocks(chain(4), range(4)))
        await until_held(executor)
        with pytest.raises(InvalidBlockIdError, match="block id 3 is being read by a save: wait"):
            await engine.load_blocks(chain(2, salt=1), (3, 8))
        again = asyncio.ensure_future(engine.save_blocks(chain(4, salt=2), range(4)))  # two may read
        assert (await finish(executor, save)).ok
        assert (await finish(executor, again)).ok
        assert (await engine.load_blocks(chain(2, salt=1), (3, 8))).ok


@pytest.mark.usefixtures("short_parts")
async def test_a_long_save_has_all_its_blocks_from_its_first_part_on() -> None:
    """Blocks of a later part would otherwise be overwritten before they are read, and kept under a valid digest."""
    cache = make_cache(256)
    async with running_engine(cache, fault_of=holding(Direction.SAVE)) as (engine, executor):
        other = asyncio.ensure_future(engine.save_blocks(chain(1, salt=1), [200]))
        await until_held(executor)
        await finish(executor, other)
        save = asyncio.ensure_future(engine.save_blocks(chain(100), range(100)))
        await asyncio.sleep(0)  # the first part of 64 is planned, the second is not
        with pytest.raises(InvalidBlockIdError, match="block id 99 is being read by a save"):
            await engine.load_blocks(chain(1, salt=1), [99])
        assert (await finish(executor, save)).ok


@pytest.mark.parametrize("direction", list(Direction))
async def test_a_cancelled_or_failed_call_gives_its_blocks_back(direction: Direction) -> None:
    cache = make_cache()
    faults: dict[str, Fault | None] = {"now": None}
    async with running_engine(cache, fault_of=lambda number, batch: faults["now"]) as (engine, executor):
        await engine.save_blocks(chain(4), range(4))
        call = engine.save_blocks if direction is Direction.SAVE else engine.load_blocks
        faults["now"] = Fault.HOLD
        task = asyncio.ensure_future(call(chain(4, salt=int(direction is Direction.SAVE)), range(8, 12)))
        await until_held(executor)
        task.cancel()
        await asyncio.sleep(0)
        with pytest.raises(InvalidBlockIdError, match="being"):
            await engine.load_blocks(chain(1), [8])
        with pytest.raises(asyncio.CancelledError):
            await finish(executor, task)
        faults["now"] = Fault.FAIL
        await call(chain(4, salt=2 * int(direction is Direction.SAVE)), range(8, 12))
        faults["now"] = None
        wipe(cache, range(8, 12))
        assert (await engine.load_blocks(chain(4), range(8, 12))).ok
        assert contents(cache, range(8, 12)) == contents(cache, range(4))


async def test_a_call_that_is_made_before_a_shutdown_and_awaited_after_it_is_refused() -> None:
    engine = await KVortexEngine.create(small_config())
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    late = engine.save_blocks(chain(1), [0])
    await engine.shutdown()
    with pytest.raises(EngineStateError, match="shut down"):
        await late


async def test_looking_up_and_then_loading_what_was_found_has_the_hit_rate_of_the_look_up() -> None:
    kv_caches = {"layer": torch.randn(2, 64, 16, 2, 16)}
    async with KVortexEngine.create(KVortexConfig(pool=16 << 20)) as engine:
        engine.register_kv_caches(kv_caches, block_size=16)
        hashes = hash_blocks(range(100 * 16), block_size=16)
        await engine.save_blocks(hashes[:9], range(9))
        known = engine.match_prefix(hashes)
        await engine.load_blocks(hashes[:known], range(known))
        stats = engine.get_stats()
    assert (known, stats.looked_up_blocks, stats.found_tokens) == (9, 100, 9 * 16)
    assert stats.hit_rate == 0.09
    assert stats.load_hit_rate == 1.0
    assert engine.get_stats().hit_rate == 0.09  # what was counted outlives the engine


async def test_a_cancelled_save_has_not_failed() -> None:
    async with running_engine(make_cache(), fault_of=holding(Direction.SAVE)) as (engine, executor):
        task = asyncio.ensure_future(engine.save_blocks(chain(40), range(40)))
        await until_held(executor)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finish(executor, task)
        stored = engine.check_blocks(chain(40))
        assert 0 < stored.sum() < 40, "what was under way arrived, the rest was given up"
        reasons = {engine.miss_reason(h) for h, there in zip(chain(40), stored.tolist(), strict=True) if not there}
        assert reasons == {MissReason.NEVER_STORED}
        assert [t.failures for t in engine.get_stats().transfers] == [0]
