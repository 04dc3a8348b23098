"""Two processes with a device each over one pool: both pin the same pages, each loads what the other saved."""

import asyncio
import multiprocessing
import os
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from kvortex.config import KVortexConfig
from kvortex.layout import KVLayout, PagedCache
from kvortex.memory import SharedMemory, SharedTicket
from kvortex.planes.data import DataPlane
from kvortex.sched import TransferRequest
from kvortex.types import Direction, TransferPlan

pytestmark = pytest.mark.gpu

BLOCK_SIZE, NUM_BLOCKS, POOL_BYTES = 16, 64, 64 << 20
HALF = NUM_BLOCKS // 2


def _device(rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}"


def _pattern(block: int) -> float:
    return float(block + 1) / 4


async def _move(plane: DataPlane, direction: Direction, block_ids: list[int], places: list[int]) -> TransferRequest:
    ended: list[TransferRequest] = []
    offsets = np.array(places, dtype=np.int64) * plane.sizes[0].raw
    plan = TransferPlan(direction, np.array(block_ids, dtype=np.int32), offsets)
    after = plane.record_event()
    await plane.wait([await plane.start(plan, after, ended.append)])
    plane.release_event(after)
    (request,) = ended
    assert request.succeeded.all()
    return request


async def _work(rank: int, memory: SharedMemory, connection: Connection) -> None:
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 1024, device=_device(rank))
    layout = KVLayout.from_tensors({"layer": cache}, BLOCK_SIZE)
    config = KVortexConfig(
        pool={"bytes": POOL_BYTES, "pin_piece_bytes": 16 << 20}, transfer={"max_batch_bytes": 8 << 20}
    )
    plane = DataPlane(config, {"layer": cache}, PagedCache.of_layout(layout, ["layer"]), memory=memory)
    connection.send("ready")  # the self-test has used the pool's first places
    assert await asyncio.to_thread(connection.recv) == "ready"
    mine = list(range(rank, HALF, 2))
    for block in mine:
        cache[block] = _pattern(block)
    saved = await _move(plane, Direction.SAVE, mine, mine)
    connection.send(saved.digests.tolist())
    theirs = await asyncio.to_thread(connection.recv)
    loaded = await _move(plane, Direction.LOAD, list(range(HALF, NUM_BLOCKS)), list(range(HALF)))
    assert loaded.digests[rank::2].tolist() == saved.digests.tolist()
    assert loaded.digests[1 - rank :: 2].tolist() == theirs
    wanted = torch.tensor([_pattern(block) for block in range(HALF)], device=cache.device)
    assert torch.equal(cache[HALF:], wanted[:, None, None].expand_as(cache[HALF:]))
    await plane.aclose()


def _second(connection: Connection, ticket: SharedTicket) -> None:
    memory = SharedMemory.attach(ticket)
    assert memory is not None
    asyncio.run(_work(1, memory, connection))


def test_two_processes_pin_one_pool_and_load_each_others_blocks() -> None:
    names = set(os.listdir("/dev/shm"))
    memory = SharedMemory.create(POOL_BYTES)
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    other = spawn.Process(target=_second, args=(there, memory.ticket))
    other.start()
    try:
        asyncio.run(_work(0, memory, here))
        other.join(60)
        assert other.exitcode == 0
    finally:
        other.kill()
        memory.close()
    assert set(os.listdir("/dev/shm")) <= names
