"""Memory between processes: the same bytes, no name left behind, a killed holder of a lock lets go."""

import asyncio
import dataclasses
import fcntl
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_memory import mapped_by

from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.layout import PagedCache
from kvortex.memory import PinnedPool, SharedMemory, SharedTicket
from kvortex.planes.data import DataPlane
from kvortex.sched import TransferRequest
from kvortex.types import Direction, TransferPlan

PAGE = mmap.PAGESIZE
SPAWN = multiprocessing.get_context("spawn")
Spawn = Callable[..., tuple[multiprocessing.process.BaseProcess, Connection]]


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory.create(4 * PAGE)
    yield memory
    memory.close()


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts `target(connection, *arguments)` in a process of its own; killed at the end if it still runs."""
    started: list[multiprocessing.process.BaseProcess] = []

    def start(
        target: Callable[..., None], *arguments: object
    ) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=target, args=(there, *arguments))
        process.start()
        there.close()
        started.append(process)
        return process, here

    yield start
    for process in started:
        process.kill()
        process.join()


def receive(connection: Connection) -> object:
    assert connection.poll(60), "the other process does not answer"
    return connection.recv()


def _write_and_hold(connection: Connection, ticket: SharedTicket) -> None:
    memory = SharedMemory.attach(ticket)
    assert memory is not None
    with memory.map(0, ticket.nbytes) as mapping, memory.exclusive():
        mapping[PAGE : PAGE + 3] = b"new"
        connection.send("written")
        connection.recv()


def test_two_processes_see_the_same_bytes_and_a_killed_one_lets_go(memory: SharedMemory, spawn: Spawn) -> None:
    own_before = mapped_by("self")
    process, connection = spawn(_write_and_hold, memory.ticket)
    assert receive(connection) == "written"
    with memory.map(0, memory.ticket.nbytes) as mapping:
        assert mapping[PAGE : PAGE + 3] == b"new"
    assert process.pid is not None
    assert mapped_by(process.pid) == set()  # nothing with a name that could stay
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with memory.exclusive():  # would wait for ever if the dead process still held it
        assert mapped_by("self") <= own_before


def test_the_lock_keeps_the_other_process_out(memory: SharedMemory, spawn: Spawn) -> None:
    _, connection = spawn(_write_and_hold, memory.ticket)
    assert receive(connection) == "written"
    own = os.open(f"/proc/self/fd/{memory.ticket.descriptor}", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    connection.send("let go")
    with memory.exclusive():
        os.close(own)


def test_a_mapping_outlives_the_descriptor(memory: SharedMemory) -> None:
    mapping = memory.map(PAGE, PAGE)
    memory.close()
    memory.close()
    mapping[:2] = b"ok"
    assert mapping[:2] == b"ok"
    with pytest.raises(ConfigError, match="closed"):
        memory.map(0, PAGE)
    mapping.close()


def test_what_is_not_the_memory_of_the_ticket_is_not_opened(memory: SharedMemory, tmp_path: Path) -> None:
    foreign = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    for change in ({"descriptor": foreign}, {"label": "another"}, {"descriptor": 10_000}, {"process_id": 1 << 30}):
        assert SharedMemory.attach(dataclasses.replace(memory.ticket, **change)) is None
    os.close(foreign)
    same = SharedMemory.attach(memory.ticket)
    assert same is not None
    same.close()


def test_too_much_is_a_setting_out_of_range() -> None:
    with pytest.raises(ConfigError, match="share"):
        SharedMemory.create(1 << 70)


def test_a_pool_takes_its_part_of_the_memory(memory: SharedMemory) -> None:
    with PinnedPool(2 * PAGE, memory=memory) as pool, memory.map(0, 4 * PAGE) as mapping:
        assert pool.bytes.size == 2 * PAGE
        pool.bytes[2 * PAGE - 1] = 7
        assert mapping[2 * PAGE - 1 : 2 * PAGE + 1] == b"\x07\x00"


BLOCK_SIZE, NUM_BLOCKS = 16, 8


def _make_plane(memory: SharedMemory) -> tuple[DataPlane, torch.Tensor]:
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 64)
    paged = PagedCache.from_tensors({"layer": cache}, BLOCK_SIZE)
    return DataPlane(
        KVortexConfig(pool={"bytes": 1 << 20, "pin_piece_bytes": 1 << 18}), {"layer": cache}, paged, memory=memory
    ), cache


async def _move(plane: DataPlane, direction: Direction, block_ids: list[int], places: list[int]) -> TransferRequest:
    ended: list[TransferRequest] = []
    offsets = np.array(places, dtype=np.int64) * plane.sizes[0].raw
    plan = TransferPlan(direction, np.array(block_ids, dtype=np.int32), offsets)
    await plane.wait([await plane.start(plan, None, ended.append)])
    (request,) = ended
    assert request.succeeded.all()
    return request


def _save_odd_blocks(connection: Connection, ticket: SharedTicket) -> None:
    async def work() -> None:
        memory = SharedMemory.attach(ticket)
        assert memory is not None
        plane, cache = _make_plane(memory)
        for block in range(NUM_BLOCKS):
            cache[block] = float(block + 1)
        saved = await _move(plane, Direction.SAVE, [1, 3], [1, 3])
        connection.send(saved.digests.tolist())
        connection.recv()
        await plane.aclose()

    asyncio.run(work())


async def test_what_two_processes_saved_one_loads(spawn: Spawn) -> None:
    memory = SharedMemory.create(1 << 20)
    plane, cache = _make_plane(memory)
    process, connection = spawn(_save_odd_blocks, memory.ticket)
    theirs = receive(connection)
    for block in range(NUM_BLOCKS):
        cache[block] = float(block + 1)
    ours = await _move(plane, Direction.SAVE, [0, 2], [0, 2])
    cache.zero_()
    loaded = await _move(plane, Direction.LOAD, [4, 5, 6, 7], [0, 1, 2, 3])
    assert loaded.digests[1::2].tolist() == theirs
    assert loaded.digests[::2].tolist() == ours.digests.tolist()
    assert cache[4:, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    connection.send("done")
    process.join(30)
    assert process.exitcode == 0
    await plane.aclose()
    memory.close()
