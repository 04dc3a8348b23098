"""A batch as the driver sees it: which calls, in which order, with what; and what is left when one goes wrong."""

import contextlib
import os
import select
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvortex.codecs import Pages
from kvortex.errors import DeviceError, InvalidBlockIdError
from kvortex.kernels import device as device_kernels
from kvortex.kernels.tiles import grid_size
from kvortex.layout import KVLayout
from kvortex.sched import Batch, CudaExecutor, TransferRequest
from kvortex.sched.batcher import Slice
from kvortex.types import Direction
from tests.sched.fake_driver import FakeDriver

SAVE, LOAD = Direction
BLOCKS, SIZE, PIECE, POOL = 32, 4096, 16 * 4096, 1 << 40
AFTER = 0xABC


class Bench:
    def __init__(self) -> None:
        self.driver = FakeDriver(num_events=256)
        self._cache = {"layer": torch.zeros(BLOCKS, 16, SIZE // 16, dtype=torch.uint8)}
        self.executor = CudaExecutor(
            [Pages(KVLayout.from_tensors(self._cache, 16))],
            SimpleNamespace(address=POOL, piece_bytes=PIECE),
            self.driver,
            num_streams=3,
            staging_nbytes=16 * SIZE,
        )
        self.ended: list[Any] = []

    def batch(self, direction: Direction, *parts: tuple[list[int], list[int]], wants_read: bool = False) -> Batch:
        slices = []
        for block_ids, places in parts:
            offsets = np.array(places, dtype=np.int64) * SIZE
            request = TransferRequest(
                direction, np.array(block_ids, dtype=np.int32), offsets, [SIZE], AFTER + len(slices)
            )
            request.wants_source_released = wants_read
            slices.append(Slice(request, 0, len(block_ids)))
        count = sum(part.num_blocks for part in slices)
        return Batch(direction, tuple(slices), count * SIZE)

    def issue(self, batch: Batch) -> list[tuple[Any, ...]]:
        """Issue a batch; its calls."""
        self.driver.log.clear()
        self.executor.issue(batch, lambda outcome, *_: self.ended.append(outcome), lambda: self.ended.append("read"))
        return list(self.driver.log)

    def turn(self) -> None:
        assert select.select([self.executor.fd], [], [], 10)[0]
        self.executor.poll()

    def close(self) -> None:
        self.driver.fire_all()
        self.executor.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(device_kernels, "_load_kernels", lambda device, packing: (0x6A, 0x5C))
    with contextlib.closing(Bench()) as bench:
        yield bench


def test_a_save_gathers_and_then_copies_a_run_at_a_time(bench: Bench) -> None:
    calls = bench.issue(bench.batch(SAVE, ([3, 1], [4, 5]), ([7, 8, 9], [6, 15, 16])))
    assert [name for name, *_ in calls] == [
        "wait",
        "wait",
        "launch",
        "record",
        "wait",
        "copy",
        "copy",
        "copy",
        "record",
    ]
    kernels, copies = calls[0][1], calls[4][1]
    assert calls[0] == ("wait", kernels, AFTER, 0)
    assert calls[1] == ("wait", kernels, AFTER + 1, 0)
    assert calls[2][1:9] == (0x6A, grid_size(5, 1, device_kernels.THREADS), 1, 1, device_kernels.THREADS, 1, 1, 0)
    assert calls[2][9] == kernels != copies
    staged = calls[3][1]
    assert calls[3] == ("record", staged, kernels)
    assert calls[4] == ("wait", copies, staged, 0)
    staging = calls[5][2]
    assert calls[5] == ("copy", POOL + 4 * SIZE, staging, 3 * SIZE, copies)
    assert calls[6] == ("copy", POOL + 15 * SIZE, staging + 3 * SIZE, SIZE, copies)
    assert calls[7] == ("copy", POOL + 16 * SIZE, staging + 4 * SIZE, SIZE, copies)  # the next piece
    done = calls[8][1]
    assert calls[8] == ("record", done, copies)
    bench.driver.fire(done)
    bench.turn()
    (digests,) = bench.ended
    assert digests.shape == (5,)


def test_a_load_copies_and_then_scatters(bench: Bench) -> None:
    calls = bench.issue(bench.batch(LOAD, ([3, 1, 2], [4, 5, 9])))
    assert [name for name, *_ in calls] == ["copy", "copy", "record", "wait", "wait", "launch", "record"]
    staging, copies, staged, kernels = calls[0][1], calls[0][4], calls[2][1], calls[3][1]
    assert calls[0] == ("copy", staging, POOL + 4 * SIZE, 2 * SIZE, copies)
    assert calls[1] == ("copy", staging + 2 * SIZE, POOL + 9 * SIZE, SIZE, copies)
    assert calls[2] == ("record", staged, copies)
    assert calls[3] == ("wait", kernels, staged, 0)
    assert calls[4] == ("wait", kernels, AFTER, 0)
    assert calls[5][1] == 0x5C
    assert calls[6][2] == kernels != copies


@pytest.mark.parametrize("direction", Direction)
def test_a_buffer_waits_for_its_last_batch_unless_that_is_over(bench: Bench, direction: Direction) -> None:
    issued = [bench.issue(bench.batch(direction, ([3], [4]))) for _ in range(4)]
    done = [calls[-1][1] for calls in issued]
    assert len(set(done)) == 4
    waits = [[call[2] for call in calls if call[0] == "wait"] for calls in issued]
    assert [len(events) for events in waits] == [2, 2, 3, 3]
    assert done[0] in waits[2]
    assert done[1] in waits[3]
    for number, event in enumerate(done):
        bench.driver.fire(event)
        while len(bench.ended) <= number:
            bench.turn()
    assert [name for name, *_ in bench.issue(bench.batch(direction, ([3], [4])))].count("wait") == 2


def test_a_save_that_wants_to_know_hears_when_the_cache_has_been_read(bench: Bench) -> None:
    calls = bench.issue(bench.batch(SAVE, ([3], [4]), wants_read=True))
    bench.driver.fire(calls[2][1])
    bench.turn()
    assert bench.ended == ["read"]
    bench.driver.fire(calls[-1][1])
    bench.turn()
    assert len(bench.ended) == 2


def test_both_directions_ring_one_bell(bench: Bench) -> None:
    saves = [bench.issue(bench.batch(SAVE, ([b], [b])))[-1][1] for b in range(3)]
    loads = [bench.issue(bench.batch(LOAD, ([b], [b])))[-1][1] for b in range(4)]
    bench.driver.fire(*loads, *saves)
    while len(bench.ended) < 7:
        bench.turn()
    assert [bench.executor.free_slots(d) for d in Direction] == [16, 16]


def test_an_error_on_the_device_fails_its_batch(bench: Bench) -> None:
    first, second = (bench.issue(bench.batch(LOAD, ([b], [b])))[-1][1] for b in range(2))
    bench.driver.fire(first, status=700)
    bench.driver.fire(second)
    while len(bench.ended) < 2:
        bench.turn()
    assert isinstance(bench.ended[0], DeviceError)
    assert isinstance(bench.ended[1], np.ndarray)


@pytest.mark.parametrize("name", ["record", "wait", "copy", "launch"])
@pytest.mark.parametrize("direction", Direction)
def test_a_batch_that_cannot_be_queued_gives_everything_back(bench: Bench, direction: Direction, name: str) -> None:
    bench.driver.fail_at = name
    with pytest.raises(DeviceError, match="700"):
        bench.issue(bench.batch(direction, ([3], [4])))
    assert bench.driver.log[-1][0] == name
    assert bench.executor.free_slots(direction) == 16
    bench.driver.fail_at = ""
    done = bench.issue(bench.batch(direction, ([3], [4])))[-1][1]
    bench.driver.fire(done)
    bench.turn()
    assert len(bench.ended) == 1


@pytest.mark.parametrize(("direction", "ids"), [(SAVE, [BLOCKS]), (SAVE, [-1]), (LOAD, [1, 1])])
def test_ids_that_would_harm_are_not_launched(bench: Bench, direction: Direction, ids: list[int]) -> None:
    with pytest.raises(InvalidBlockIdError):
        bench.issue(bench.batch(direction, (ids, list(range(len(ids))))))
    assert bench.driver.log == []
    assert bench.executor.free_slots(direction) == 16


def test_nothing_is_left_of_it(bench: Bench) -> None:
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    other = Bench()
    for direction in Direction:
        other.issue(other.batch(direction, ([1], [1])))
    other.close()
    other.executor.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
    assert other.driver._host == {}
    assert other.executor.staging.allocated_bytes == 0
