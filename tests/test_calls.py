"""How long calls are cut, and who has a turn."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex.engine.calls import (
    FIRST_PART_BLOCKS,
    FIRST_PART_BYTES,
    MAX_PART_BLOCKS,
    MAX_PART_BYTES,
    CallQueue,
    TransferCall,
)
from kvortex.stats import EngineStats
from kvortex.types import Direction

MIB = 1 << 20


def parts(num_blocks: int, block_nbytes: int) -> list[slice]:
    data: Any = SimpleNamespace(largest_packed_nbytes=block_nbytes)
    call: TransferCall[None] = TransferCall(
        CallQueue(1), data, EngineStats(), None, Direction.SAVE, np.empty(0, np.int32)
    )
    return list(call.parts(num_blocks))


@pytest.mark.parametrize("block_nbytes", [4096, 2 * MIB, 48 * MIB, 2 << 30])
@pytest.mark.parametrize("num_blocks", [0, 1, 63, 64, 65, 5000, 100_001])
def test_parts_follow_each_other_within_bounds(num_blocks: int, block_nbytes: int) -> None:
    cut = parts(num_blocks, block_nbytes)
    assert [n for part in cut for n in range(num_blocks)[part]] == list(range(num_blocks))
    first = max(FIRST_PART_BYTES // block_nbytes, FIRST_PART_BLOCKS)
    for part in cut:
        assert part.stop - part.start <= max(MAX_PART_BLOCKS, first)
        assert (part.stop - part.start) * block_nbytes <= max(MAX_PART_BYTES, first * block_nbytes)


def test_a_long_call_has_few_parts_and_a_short_one_has_one() -> None:
    assert parts(64, 2 * MIB) == [slice(0, 64)]
    assert [part.start for part in parts(2048, 2 * MIB)] == [0, 64, 576, 1088, 1600]


async def test_so_many_have_a_turn_and_all_are_waited_for() -> None:
    queue = CallQueue(1)
    await queue.wait_empty()
    await queue.acquire()
    second = asyncio.create_task(queue.acquire())
    third = asyncio.create_task(queue.acquire())
    gone = asyncio.create_task(queue.wait_empty())
    await asyncio.sleep(0)
    third.cancel()
    queue.release()
    await second
    await asyncio.sleep(0.001)
    assert third.cancelled()
    assert not gone.done(), "the second has its turn"
    queue.release()
    await gone
