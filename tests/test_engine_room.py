"""How full an engine's pool is, and what a save may say of blocks that had to go."""

import asyncio

import pytest

from kvortex import KVortexEngine, SaveOutcome
from kvortex.testing import Fault
from tests.engine_support import (
    BLOCK_NBYTES,
    BLOCK_SIZE,
    chain,
    contents,
    make_cache,
    running_engine,
    small_config,
)


@pytest.mark.parametrize("num_blocks", [4, 16, 1])
@pytest.mark.parametrize("lines", [(0.95, 0.05), (0.8, 0.2)])
async def test_a_steady_stream_fills_the_pool_to_between_the_two_lines(
    lines: tuple[float, float], num_blocks: int
) -> None:
    watermark, ratio = lines
    pool_blocks = 400
    config = small_config(
        pool={"bytes": pool_blocks * BLOCK_NBYTES, "pin_piece_bytes": 4 * BLOCK_NBYTES},
        eviction={"watermark": watermark, "ratio": ratio},
    )
    shares = []
    async with running_engine(make_cache(), config) as (engine, _):
        for salt in range(5 * pool_blocks // num_blocks):
            assert (await engine.save_blocks(chain(num_blocks, salt), range(num_blocks))).ok
            shares.append(engine.get_stats().pools[0].allocated_bytes / (pool_blocks * BLOCK_NBYTES))
    later = shares[2 * pool_blocks // num_blocks :]
    low, step = watermark * (1 - ratio), num_blocks / pool_blocks
    assert min(later) >= low - step
    assert max(later) <= watermark + step
    assert max(later) >= watermark - step, "what was paid for is used"
    assert sum(later) / len(later) > low + (watermark - low) / 3


def test_the_default_leaves_no_more_than_a_tenth_of_the_pool_unused() -> None:
    config = small_config()
    assert config.eviction.watermark * (1 - config.eviction.ratio) >= 0.9


async def test_a_save_does_not_evict_what_it_says_is_stored() -> None:
    config = small_config(pool={"bytes": 10 * BLOCK_NBYTES, "pin_piece_bytes": 10 * BLOCK_NBYTES})
    cache = make_cache()
    async with running_engine(cache, config) as (engine, _):
        await engine.save_blocks(chain(6), range(6))
        result = await engine.save_blocks(chain(16), range(16))
        assert [outcome.is_stored for outcome in result.outcomes] == engine.check_blocks(chain(16)).tolist()
        assert engine.match_prefix(chain(16)) == 10, "the head, without a hole"
        assert not result.ok
        assert (await engine.load_blocks(chain(10), range(20, 30))).ok
        assert contents(cache, range(20, 30)) == contents(cache, range(10))


@pytest.mark.usefixtures("short_parts")
async def test_a_save_in_parts_keeps_its_head_and_says_what_had_no_room() -> None:
    config = small_config(pool={"bytes": 100 * BLOCK_NBYTES, "pin_piece_bytes": 4 * BLOCK_NBYTES})
    async with running_engine(make_cache(256), config) as (engine, _):
        await engine.save_blocks(chain(90, salt=1), range(90))
        result = await engine.save_blocks(chain(200), range(200))
        assert [outcome.is_stored for outcome in result.outcomes] == engine.check_blocks(chain(200)).tolist()
        assert engine.match_prefix(chain(200)) == 100
        assert result.outcomes[100:] == (SaveOutcome.NO_SPACE,) * 100


async def test_blocks_kept_unpacked_do_not_drive_out_the_packed_ones_in_front_of_them() -> None:
    config = small_config(pool={"bytes": 8 * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES}, codec="bf16")
    async with running_engine(make_cache(), config, lambda number, batch: Fault.LOSSY) as (engine, _):
        result = await engine.save_blocks(chain(24), range(24))
        assert [outcome.is_stored for outcome in result.outcomes] == engine.check_blocks(chain(24)).tolist()


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("how", ["cleared", "evicted by others"])
async def test_a_save_does_not_say_stored_of_blocks_that_went_before_it_was_over(how: str) -> None:
    held = {"on": False}
    config = small_config(pool={"bytes": 80 * BLOCK_NBYTES, "pin_piece_bytes": 4 * BLOCK_NBYTES})

    def fault_of(number: int, batch: object) -> Fault | None:
        return Fault.HOLD if held["on"] and number >= 16 else None

    async with running_engine(make_cache(256), config, fault_of) as (engine, executor):
        held["on"] = True
        save = asyncio.ensure_future(engine.save_blocks(chain(66), range(66)))  # two parts: 16 batches, and one
        async with asyncio.timeout(30):
            while executor.num_held < 1:
                await asyncio.sleep(0.001)
        assert engine.match_prefix(chain(66)) == 64
        held["on"] = False
        if how == "cleared":
            engine.clear()
        else:
            for salt in range(1, 12):
                await engine.save_blocks(chain(8, salt), range(100, 108))
        executor.release()
        result = await save
        gone = [outcome is SaveOutcome.GONE for outcome in result.outcomes]
        assert any(gone)
        assert [outcome.is_stored for outcome in result.outcomes] == engine.check_blocks(chain(66)).tolist()
        assert not result.ok


async def test_a_save_that_nothing_happened_to_is_all_stored() -> None:
    async with KVortexEngine.create(small_config()) as engine:
        engine.register_kv_caches(make_cache(256), BLOCK_SIZE)
        result = await engine.save_blocks(chain(200), range(200))
        assert result.counts() == {SaveOutcome.STORED: 200}
        assert result.ok
