"""The engine on host memory: bytes, outcomes, reasons, figures."""

import asyncio
import json

import numpy as np
import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, SaveOutcome
from kvortex.config import MIB
from kvortex.errors import EngineStateError, InvalidBlockIdError, InvalidHashError
from kvortex.index import pack_keys
from kvortex.testing import Fault
from kvortex.types import Direction
from tests.engine_support import (
    BLOCK_NBYTES,
    BLOCK_SIZE,
    NUM_BLOCKS,
    chain,
    contents,
    make_cache,
    running_engine,
    small_config,
    wipe,
)

LAYOUTS = {
    "K and V apart": lambda: torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, 2, 16),
    "K and V together": lambda: torch.randn(NUM_BLOCKS, 2, BLOCK_SIZE, 2, 16),
    "heads before tokens": lambda: torch.randn(2, NUM_BLOCKS, 2, BLOCK_SIZE, 16).transpose(2, 3),
    "latent": lambda: torch.randn(NUM_BLOCKS, BLOCK_SIZE, 576).to(torch.bfloat16),
    "fp8": lambda: torch.randn(NUM_BLOCKS, BLOCK_SIZE, 2, 64).to(torch.float8_e4m3fn),
    "half": lambda: torch.randn(NUM_BLOCKS, 2, BLOCK_SIZE, 2, 16).half(),
}


@pytest.mark.parametrize("name", LAYOUTS)
async def test_what_was_saved_comes_back_elsewhere(name: str) -> None:
    cache = {f"layers.{i}": LAYOUTS[name]() for i in range(3)}
    async with KVortexEngine.create(KVortexConfig(pool=16 * MIB)) as engine:
        layout = engine.register_kv_caches(cache, BLOCK_SIZE)
        dims = dict(zip(cache, layout.block_dims, strict=True))
        before = {k: v.clone() for k, v in cache.items()}
        saved_ids, loaded_ids = np.arange(20)[::-1], np.arange(40, 60)
        assert (await engine.save_blocks(chain(20), saved_ids)).ok
        result = await engine.load_blocks(chain(20), loaded_ids)
        assert result.ok
        for layer, tensor in cache.items():
            for source, target in zip(saved_ids, loaded_ids, strict=True):
                want = before[layer].select(dims[layer], int(source)).contiguous().view(torch.uint8)
                assert torch.equal(tensor.select(dims[layer], int(target)).contiguous().view(torch.uint8), want)
            untouched = [b for b in range(NUM_BLOCKS) if b not in loaded_ids]
            for b in untouched:
                want = before[layer].select(dims[layer], b).contiguous().view(torch.uint8)
                assert torch.equal(tensor.select(dims[layer], b).contiguous().view(torch.uint8), want)


async def test_outcomes_of_a_save() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        hashes = chain(8)
        assert (await engine.save_blocks(hashes[:4], range(4))).outcomes == (SaveOutcome.STORED,) * 4
        second = await engine.save_blocks(hashes, range(8))
        assert second.outcomes == (SaveOutcome.ALREADY_STORED,) * 4 + (SaveOutcome.STORED,) * 4
        assert second.ok
        assert second.num_stored == 4
        assert engine.check_blocks(hashes).all()
        assert engine.match_prefix(hashes) == 8


async def test_what_is_printed_is_one_line() -> None:
    engine = await KVortexEngine.create(KVortexConfig(pool=16 * MIB))
    assert repr(engine) == "<KVortexEngine: no caches registered yet; a pool of 16.0 MiB>"
    layout = engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    assert repr(layout) == f"<KVLayout: {layout.describe()}>"
    assert layout.describe() in repr(engine)
    assert repr(await engine.save_blocks(chain(3), range(3))) == "<SaveResult of 3 blocks: 3 stored>"
    assert repr(await engine.load_blocks(chain(4), range(4))) == "<LoadResult of 4 blocks: 3 loaded, 1 never_stored>"
    assert repr(await engine.load_blocks([], [])) == "<LoadResult of 0 blocks: 0 loaded>"
    await engine.shutdown()
    assert "shut down" in repr(engine)
    assert all("\n" not in repr(thing) for thing in (engine, layout))


async def test_two_saves_of_one_block_at_once_store_it_once() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, executor):
        first, second = await asyncio.gather(
            engine.save_blocks(chain(4), range(4)), engine.save_blocks(chain(4), range(4))
        )
        assert first.counts() == {SaveOutcome.STORED: 4}
        assert second.counts() == {SaveOutcome.PENDING: 4}
        assert sum(batch.num_blocks for batch in executor.batches) == 4


async def test_a_block_under_way_is_a_miss_that_says_so() -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=lambda number, batch: Fault.HOLD) as (engine, executor):
        save = asyncio.create_task(engine.save_blocks(chain(2), range(2)))
        while executor.num_held < 1:
            await asyncio.sleep(0.001)
        assert not engine.check_blocks(chain(2)).any()
        loaded = await engine.load_blocks(chain(2), (10, 11))
        assert loaded.outcomes == (MissReason.PENDING,) * 2
        executor.release()
        assert (await save).ok
        assert engine.check_blocks(chain(2)).all()


async def test_a_miss_has_its_reason() -> None:
    cache = make_cache(512)
    pool_blocks = 32
    config = small_config(pool={"bytes": pool_blocks * BLOCK_NBYTES, "pin_piece_bytes": 4 * BLOCK_NBYTES})
    async with running_engine(cache, config) as (engine, _):
        assert engine.miss_reason(chain(1)[0]) is MissReason.NEVER_STORED
        first = chain(8, salt=1)
        await engine.save_blocks(first, range(8))
        assert engine.miss_reason(first[0]) is None
        for salt in range(2, 8):
            await engine.save_blocks(chain(8, salt), range(8))
        result = await engine.load_blocks(first, range(100, 108))
        assert set(result.outcomes) == {MissReason.EVICTED}
        assert result.missed_block_ids == tuple(range(100, 108))
        stats = engine.get_stats()
        assert stats.misses[MissReason.EVICTED] == 8
        assert stats.evicted_blocks >= 8


async def test_eviction_takes_the_tail_before_the_head() -> None:
    cache = make_cache(512)
    config = small_config(pool={"bytes": 40 * BLOCK_NBYTES, "pin_piece_bytes": 4 * BLOCK_NBYTES})
    async with running_engine(cache, config) as (engine, _):
        old = chain(16, salt=1)
        await engine.save_blocks(old, range(16))
        await engine.save_blocks(chain(30, salt=2), range(30))
        kept = engine.match_prefix(old)
        assert 0 < kept < 16
        assert not engine.check_blocks(old)[kept:].any()


async def test_eviction_is_gradual() -> None:
    cache = make_cache(512)
    config = small_config(pool={"bytes": 100 * BLOCK_NBYTES, "pin_piece_bytes": 4 * BLOCK_NBYTES})
    async with running_engine(cache, config) as (engine, _):
        evicted = [0]
        for salt in range(60):
            await engine.save_blocks(chain(4, salt), range(4))
            evicted.append(engine.get_stats().evicted_blocks)
        steps = np.diff(evicted)
        assert steps.sum() > 100
        assert steps.max() <= 8  # twice what came in


async def test_a_pool_full_of_blocks_in_use_gives_no_space() -> None:
    cache = make_cache()
    config = small_config(
        pool={"bytes": 8 * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES}, eviction={"watermark": 1.0}
    )
    held = {"on": False}
    async with running_engine(cache, config, lambda number, batch: Fault.HOLD if held["on"] else None) as (
        engine,
        executor,
    ):
        await engine.save_blocks(chain(8, 1), range(8))
        held["on"] = True
        load = asyncio.create_task(engine.load_blocks(chain(8, 1), range(16, 24)))
        while executor.num_held < 2:
            await asyncio.sleep(0.001)
        saved = await engine.save_blocks(chain(4, 2), range(4))
        assert saved.outcomes == (SaveOutcome.NO_SPACE,) * 4
        assert engine.match_prefix(chain(8, 1)) == 8
        held["on"] = False
        executor.release()
        while not load.done():
            executor.release()
            await asyncio.sleep(0.001)
        assert load.result().ok
        assert (await engine.save_blocks(chain(4, 2), range(4))).ok


async def test_a_save_longer_than_the_pool_keeps_the_head() -> None:
    cache = make_cache()
    config = small_config(
        pool={"bytes": 16 * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES}, eviction={"watermark": 1.0}
    )
    async with running_engine(cache, config) as (engine, _):
        result = await engine.save_blocks(chain(40), range(40))
        stored = engine.match_prefix(chain(40))
        assert result.counts()[SaveOutcome.STORED] >= 16
        assert stored <= 16
        assert engine.check_blocks(chain(40)).sum() == 16


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.FAIL])
async def test_a_failed_save_is_given_back(fault: Fault) -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=lambda number, batch: fault if number == 1 else None) as (engine, _):
        result = await engine.save_blocks(chain(12), range(12))
        counts = result.counts()
        assert counts[SaveOutcome.FAILED] == 4
        assert counts[SaveOutcome.STORED] == 8
        for block_hash, outcome in zip(chain(12), result.outcomes, strict=True):
            want = None if outcome is SaveOutcome.STORED else MissReason.TRANSFER_FAILED
            assert engine.miss_reason(block_hash) is want
        assert engine.get_stats().pools[0].num_extents == 8
        assert (await engine.save_blocks(chain(12), range(12))).ok


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.REFUSE, MissReason.TRANSFER_FAILED),
        (Fault.FAIL, MissReason.TRANSFER_FAILED),
        (Fault.CORRUPT, MissReason.CORRUPT),
    ],
)
async def test_a_failed_load_is_a_miss(fault: Fault, reason: MissReason) -> None:
    cache = make_cache()
    broken = {"number": -1}

    def fault_of(number: int, batch: object) -> Fault | None:
        return fault if number == broken["number"] else None

    async with running_engine(cache, fault_of=fault_of) as (engine, executor):
        hashes = chain(8)
        await engine.save_blocks(hashes, range(8))
        want = contents(cache, range(8))
        broken["number"] = len(executor.batches)
        result = await engine.load_blocks(hashes, range(16, 24))
        missed = [i for i, outcome in enumerate(result.outcomes) if outcome is not None]
        assert {result.outcomes[i] for i in missed} == {reason}
        assert 0 < len(missed) < 8
        assert result.num_prefix_loaded == missed[0]
        good = [i for i in range(8) if i not in missed]
        assert contents(cache, [16 + i for i in good]) == [want[i] for i in good]
        still = engine.check_blocks(hashes)
        # A transfer that failed says nothing of the stored bytes; corrupt ones are gone.
        assert still.tolist() == [reason is not MissReason.CORRUPT or i in good for i in range(8)]
        assert engine.get_stats().misses[reason] == len(missed)


async def test_a_flipped_bit_in_the_pool_is_found() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        hashes = chain(8)
        await engine.save_blocks(hashes, range(8))
        control, data = engine._planes()
        rng = np.random.default_rng(5)
        for bit in rng.integers(0, BLOCK_NBYTES * 8, 20).tolist():
            pins = control.index.pin(pack_keys(hashes[2:3]))
            offset = int(pins.offsets[0])
            control.allocator.free_many(control.index.unpin(pins.slots))
            data.pool.bytes[offset + bit // 8] ^= 1 << (bit % 8)
            result = await engine.load_blocks(hashes, range(16, 24))
            assert result.outcomes[2] is MissReason.CORRUPT
            assert result.num_loaded == 7
            assert engine.miss_reason(hashes[2]) is MissReason.CORRUPT
            assert (await engine.save_blocks(hashes, range(8))).num_stored == 1


async def test_clear_forgets_everything_and_frees_it() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        await engine.save_blocks(chain(8), range(8))
        engine.clear()
        assert not engine.check_blocks(chain(8)).any()
        assert engine.get_stats().pools[0].allocated_bytes == 0


async def test_clear_during_a_save_leaves_nothing_visible() -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=lambda number, batch: Fault.HOLD) as (engine, executor):
        save = asyncio.create_task(engine.save_blocks(chain(2), range(2)))
        while executor.num_held < 1:
            await asyncio.sleep(0.001)
        engine.clear()
        executor.release()
        await save
        assert not engine.check_blocks(chain(2)).any()
        assert engine.get_stats().pools[0].allocated_bytes == 0


async def test_bad_calls_are_refused_before_anything_starts() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, executor):
        with pytest.raises(InvalidHashError, match="do not pair up"):
            await engine.save_blocks(chain(2), [1])
        with pytest.raises(InvalidHashError, match="32 bytes"):
            await engine.save_blocks([b"short"], [1])
        with pytest.raises(InvalidHashError, match="32 bytes"):
            await engine.load_blocks(["x" * 32], [1])
        with pytest.raises(InvalidBlockIdError, match="64 is not in"):
            await engine.save_blocks(chain(1), [NUM_BLOCKS])
        with pytest.raises(InvalidBlockIdError, match="-1 is not in"):
            await engine.load_blocks(chain(1), [-1])
        with pytest.raises(InvalidBlockIdError, match="twice"):
            await engine.load_blocks(chain(2), [3, 3])
        assert not executor.batches
        assert not engine.check_blocks(chain(2)).any()
        assert engine.get_stats().pools[0].allocated_bytes == 0


async def test_two_loads_into_one_block_are_refused() -> None:
    cache = make_cache()
    held = {"on": False}
    async with running_engine(cache, fault_of=lambda n, b: Fault.HOLD if held["on"] else None) as (engine, executor):
        await engine.save_blocks(chain(2), range(2))
        held["on"] = True
        load = asyncio.create_task(engine.load_blocks(chain(2), (5, 6)))
        while executor.num_held < 1:
            await asyncio.sleep(0.001)
        with pytest.raises(InvalidBlockIdError, match="6 is being written"):
            await engine.load_blocks(chain(2), (6, 7))
        held["on"] = False
        executor.release()
        assert (await load).ok
        assert (await engine.load_blocks(chain(2), (6, 7))).ok


async def test_empty_calls() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        assert (await engine.save_blocks([], [])).outcomes == ()
        assert (await engine.load_blocks([], [])).ok
        assert engine.check_blocks([]).shape == (0,)


async def test_states_in_which_it_refuses() -> None:
    engine = await KVortexEngine.create(small_config())
    with pytest.raises(EngineStateError, match="register_kv_caches first"):
        await engine.save_blocks(chain(1), [0])
    with pytest.raises(EngineStateError, match="register_kv_caches first"):
        engine.check_blocks(chain(1))
    cache = make_cache()
    engine.register_kv_caches(cache, BLOCK_SIZE)
    with pytest.raises(EngineStateError, match="registered already"):
        engine.register_kv_caches(cache, BLOCK_SIZE)
    await engine.shutdown()
    await engine.shutdown()
    with pytest.raises(EngineStateError, match="shut down"):
        await engine.save_blocks(chain(1), [0])


async def test_shutdown_waits_for_callers() -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=lambda number, batch: Fault.HOLD) as (engine, executor):
        save = asyncio.create_task(engine.save_blocks(chain(2), range(2)))
        while executor.num_held < 1:
            await asyncio.sleep(0.001)
        shutdown = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0.02)
        assert not shutdown.done()
        executor.release()
        assert (await save).ok
        await shutdown


async def test_an_engine_left_running_warns() -> None:
    engine = await KVortexEngine.create(small_config())
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    with pytest.warns(ResourceWarning, match="was not shut down"):
        engine.__del__()
    await engine.shutdown()


async def test_figures() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        await engine.save_blocks(chain(8), range(8))
        await engine.load_blocks(chain(10), range(20, 30))
        stats = engine.get_stats()
        assert stats.hits == 8
        assert stats.misses[MissReason.NEVER_STORED] == 2
        assert stats.hit_rate == pytest.approx(0.8)
        assert stats.bytes_saved == stats.bytes_loaded == 8 * BLOCK_NBYTES
        assert {t.direction for t in stats.transfers} == set(Direction)
        assert all(t.num_transfers == 1 for t in stats.transfers)
        assert stats.pools[0].allocated_bytes == 8 * BLOCK_NBYTES
        json.dumps(stats.to_dict())
        assert "hit rate" in str(stats)


async def test_requests_in_progress_are_bounded() -> None:
    cache = make_cache()
    config = small_config(transfer={"max_outstanding_requests": 2})
    async with running_engine(cache, config, lambda number, batch: Fault.HOLD) as (engine, executor):
        saves = [asyncio.create_task(engine.save_blocks(chain(1, salt), [salt])) for salt in range(4)]
        await asyncio.sleep(0.05)
        assert executor.num_held <= 2
        assert engine.get_stats().pools[0].num_extents == 2
        while not all(save.done() for save in saves):
            executor.release()
            await asyncio.sleep(0.001)
        assert all(save.result().ok for save in saves)


async def test_wiped_blocks_are_really_wiped() -> None:
    """The tests above would pass on a load that does nothing if this one did not hold."""
    cache = make_cache()
    before = contents(cache, [3])
    wipe(cache, [3])
    assert contents(cache, [3]) != before
