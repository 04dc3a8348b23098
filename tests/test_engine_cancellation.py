"""Cancelling saves and loads at every await: nothing leaks, nothing wrong is ever served, blocks come to rest."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from kvortex import KVortexEngine, MissReason
from kvortex.testing import Fault
from tests.engine_support import chain, contents, make_cache, running_engine, small_config, wipe

MAX_TURNS = 60


async def cancel_after(turns: int, call: Coroutine[Any, Any, Any], *, times: int = 1) -> bool:
    """Run `call`, cancel it after so many turns of the loop; True if it had not ended by itself."""
    task = asyncio.create_task(call)
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_a_save_at_every_turn(times: int) -> None:
    cache = make_cache()
    want = contents(cache, range(24))
    cancelled = 0
    for turns in range(MAX_TURNS):
        async with running_engine(cache) as (engine, _):
            cancelled += await cancel_after(turns, engine.save_blocks(chain(24), range(24)), times=times)
            # Control is back: the blocks may be reused, whatever is visible must be what was there before.
            wipe(cache, range(24))
            await _check_visible(engine, cache, want)
            for b in range(24):
                _write(cache, b, want[b])
    assert cancelled > 3


async def _check_visible(engine: KVortexEngine, cache: Any, want: list[bytes]) -> None:
    await asyncio.sleep(0.002)
    visible = [i for i, there in enumerate(engine.check_blocks(chain(24)).tolist()) if there]
    loaded = await engine.load_blocks([chain(24)[i] for i in visible], [32 + i for i in visible])
    assert loaded.ok
    assert contents(cache, [32 + i for i in visible]) == [want[i] for i in visible]
    for i in set(range(24)) - set(visible):
        assert engine.miss_reason(chain(24)[i]) in (MissReason.NEVER_STORED, MissReason.TRANSFER_FAILED)
    assert engine.get_stats().pools[0].num_extents == len(visible)


def _write(cache: Any, block_id: int, payload: bytes) -> None:
    import torch

    data = torch.frombuffer(bytearray(payload), dtype=torch.float32)
    parts = data.split(data.numel() // len(cache))
    for layer, part in zip(cache.values(), parts, strict=True):
        layer[:, block_id] = part.view(layer[:, block_id].shape)


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_a_load_at_every_turn(times: int) -> None:
    cache = make_cache()
    want = contents(cache, range(24))
    cancelled = 0
    async with running_engine(cache) as (engine, _):
        await engine.save_blocks(chain(24), range(24))
        for turns in range(MAX_TURNS):
            cancelled += await cancel_after(turns, engine.load_blocks(chain(24), range(32, 56)), times=times)
            # Nothing may write the blocks any more.
            wipe(cache, range(32, 56))
            wiped = contents(cache, range(32, 56))
            await asyncio.sleep(0.002)
            assert contents(cache, range(32, 56)) == wiped
            # Pins are gone, blocks can be loaded and evicted.
            assert (await engine.load_blocks(chain(24), range(32, 56))).ok
            assert contents(cache, range(32, 56)) == want
        control, _ = engine._planes()
        freed = control.index.evict(1 << 30).offsets
        assert freed.size == 24
        control.allocator.free_many(freed)
    assert cancelled > 3


async def test_a_cancelled_call_waits_for_what_is_under_way() -> None:
    cache = make_cache()
    async with running_engine(cache, small_config(), lambda number, batch: Fault.HOLD) as (engine, executor):
        task = asyncio.create_task(engine.save_blocks(chain(2), range(2)))
        while executor.num_held < 1:
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.005)
            assert not task.done()
        executor.release()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_cancelling_while_waiting_for_a_turn() -> None:
    cache = make_cache()
    config = small_config(transfer={"max_outstanding_requests": 1})
    async with running_engine(cache, config, lambda number, batch: Fault.HOLD) as (engine, executor):
        first = asyncio.create_task(engine.save_blocks(chain(2, 1), range(2)))
        while executor.num_held < 1:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(engine.save_blocks(chain(2, 2), range(2)))
        await asyncio.sleep(0.005)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        executor.release()
        assert (await first).ok
        assert not engine.check_blocks(chain(2, 2)).any()


async def test_a_timeout_cancels_like_anybody() -> None:
    cache = make_cache()
    async with running_engine(cache, small_config(), lambda number, batch: Fault.HOLD) as (engine, executor):
        loop = asyncio.get_running_loop()
        loop.call_later(0.1, executor.release)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.save_blocks(chain(2), range(2)), 0.02)
        assert executor.num_held == 0
