"""Transfers on host memory, through the scheduler: both ways, with faults, with kernels that raise."""

import asyncio
import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvortex.errors import DeviceError
from kvortex.kernels import HostKernels
from kvortex.kernels.reference import gather_reference
from kvortex.layout import KVLayout
from kvortex.sched import Batch, Batcher, HostExecutor, TransferExecutor, TransferRequest, TransferScheduler
from kvortex.testing import Fault, FaultInjectingExecutor
from kvortex.types import Direction

BLOCKS = 24
LAYOUT_SHAPE = (2, BLOCKS, 16, 2, 8)


class Bench:
    """A cache of random bytes, a pool, and the blocks' payloads as they were."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.tensors = {f"layers.{i}": rng.integers(0, 256, LAYOUT_SHAPE, dtype=np.uint8) for i in range(2)}
        self.layout = KVLayout.from_tensors(self.tensors, 16)
        self.size = self.layout.block_nbytes
        self.pool = np.zeros(BLOCKS * self.size, dtype=np.uint8)
        self.kernels = HostKernels(self.layout, self.pool)
        self.payloads, self.digests = gather_reference(self.layout, range(BLOCKS))

    def executor(self) -> HostExecutor:
        return HostExecutor([self.kernels])

    def scheduler(self, executor: TransferExecutor, max_blocks: int = 4) -> TransferScheduler:
        return TransferScheduler(Batcher(max_blocks=max_blocks, linger_s=0.0), executor)

    def request(self, direction: Direction, ids: list[int], extents: list[int] | None = None) -> TransferRequest:
        offsets = np.array(ids if extents is None else extents, dtype=np.int64) * self.size
        return TransferRequest(direction, np.array(ids, dtype=np.int32), offsets, [self.size])

    def now(self) -> NDArray[np.uint8]:
        return gather_reference(self.layout, range(BLOCKS))[0]


async def test_what_was_saved_comes_back_to_other_blocks() -> None:
    bench = Bench()
    scheduler = bench.scheduler(bench.executor())
    ids = [11, 0, 7, 3, 9, 2]
    save = bench.request(Direction.SAVE, ids, [5, 4, 3, 2, 1, 0])
    scheduler.submit(save)
    await scheduler.wait([save])
    assert save.succeeded.all()
    assert save.source_released.is_set()
    assert (save.digests == bench.digests[ids]).all()
    assert (bench.pool.reshape(BLOCKS, -1)[:6] == bench.payloads[ids[::-1]]).all()
    assert not bench.pool.reshape(BLOCKS, -1)[6:].any()
    load = bench.request(Direction.LOAD, [12, 13, 14, 15, 16, 17], [5, 4, 3, 2, 1, 0])
    scheduler.submit(load)
    await scheduler.wait([load])
    assert (load.digests == save.digests).all()
    expected = bench.payloads.copy()
    expected[12:18] = bench.payloads[ids]
    assert (bench.now() == expected).all()
    await scheduler.aclose()


async def test_an_exception_in_the_kernel_fails_its_batch_and_no_other() -> None:
    bench = Bench()
    calls: list[list[int]] = []
    gather = bench.kernels.gather

    def breaking(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
        calls.append(ids.tolist())
        if 5 in ids:
            raise ZeroDivisionError("injected")
        return gather(ids, offsets)

    bench.kernels.gather = breaking
    executor = bench.executor()
    scheduler = bench.scheduler(executor)
    save = bench.request(Direction.SAVE, list(range(12)))
    scheduler.submit(save)
    await scheduler.wait([save])
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert save.succeeded.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert [type(error) for error in save.errors] == [ZeroDivisionError]
    assert executor.free_slots(Direction.SAVE) == 2
    await scheduler.aclose()


async def test_it_takes_no_more_than_it_has_slots_for() -> None:
    bench = Bench()
    go = threading.Event()
    gather = bench.kernels.gather

    def waiting(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
        assert go.wait(10)
        return gather(ids, offsets)

    bench.kernels.gather = waiting
    executor = bench.executor()
    scheduler = bench.scheduler(executor)
    save = bench.request(Direction.SAVE, list(range(BLOCKS)))
    scheduler.submit(save)
    assert executor.free_slots(Direction.SAVE) == executor.free_slots(Direction.LOAD) == 0
    assert save.blocks_in_flight == 8
    go.set()
    await scheduler.wait([save])
    assert save.succeeded.all()
    await scheduler.aclose()


async def test_closing_waits_for_what_runs_and_gives_up_the_pool() -> None:
    bench = Bench()
    executor = bench.executor()
    ended: list[object] = []
    request = bench.request(Direction.SAVE, [1, 2])
    batcher = Batcher(linger_s=0.0)
    batcher.add(request, 0.0)
    batch = batcher.next_batch(0.0, {Direction.SAVE}, set())
    assert batch is not None
    executor.issue(batch, lambda outcome, *_: ended.append(outcome), lambda: ended.append("read"))
    executor.close()
    assert (bench.pool.reshape(BLOCKS, -1)[1:3] == bench.payloads[1:3]).all()
    assert ended == [], "completions come through `poll`"
    executor.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(executor.fd)
    assert not executor._kernels


def only(number: int, fault: Fault) -> Callable[[int, Batch], Fault | None]:
    return lambda n, batch: fault if n == number else None


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.FAIL])
@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_fault_takes_the_blocks_of_its_batch_and_the_rest_goes_on(fault: Fault, number: int) -> None:
    bench = Bench()
    executor = FaultInjectingExecutor(bench.executor(), only(number, fault))
    scheduler = bench.scheduler(executor)
    save = bench.request(Direction.SAVE, list(range(12)))
    scheduler.submit(save)
    await scheduler.wait([save])
    lost = range(4 * number, 4 * number + 4)
    assert save.succeeded.tolist() == [i not in lost for i in range(12)]
    assert (save.digests[save.succeeded] == bench.digests[:12][save.succeeded]).all()
    assert not save.digests[~save.succeeded].any()
    assert [type(error) for error in save.errors] == [DeviceError]
    assert len(executor.batches) == 3
    again = bench.request(Direction.SAVE, list(lost))
    scheduler.submit(again)
    await scheduler.wait([again])
    assert again.succeeded.all()
    await scheduler.aclose()


async def test_requests_that_share_a_failing_batch_all_learn_of_it() -> None:
    bench = Bench()
    executor = FaultInjectingExecutor(bench.executor(), only(2, Fault.FAIL))
    scheduler = bench.scheduler(executor, max_blocks=6)
    running = bench.request(Direction.SAVE, list(range(12)))  # fills both slots
    sharing = [bench.request(Direction.SAVE, [12 + 2 * i, 13 + 2 * i]) for i in range(4)]
    for request in (running, *sharing):
        scheduler.submit(request)
    await scheduler.wait([running, *sharing])
    assert [batch.num_blocks for batch in executor.batches] == [6, 6, 6, 2]
    assert len(executor.batches[2].slices) == 3
    assert running.succeeded.all()
    assert [request.succeeded.any() for request in sharing] == [False, False, False, True]
    assert [len(request.errors) for request in sharing] == [1, 1, 1, 0]
    await scheduler.aclose()


async def test_a_corrupt_digest_is_reported_as_it_was_read() -> None:
    bench = Bench()
    scheduler = bench.scheduler(FaultInjectingExecutor(bench.executor(), only(0, Fault.CORRUPT)))
    save = bench.request(Direction.SAVE, [1, 2])
    scheduler.submit(save)
    await scheduler.wait([save])
    assert save.succeeded.all()
    assert (save.digests == bench.digests[1:3] ^ np.array([1, 0], dtype=np.uint64)).all()
    await scheduler.aclose()


async def test_a_held_batch_keeps_a_cancelled_caller_waiting() -> None:
    bench = Bench()
    executor = FaultInjectingExecutor(bench.executor(), only(0, Fault.HOLD))
    scheduler = bench.scheduler(executor)
    save = bench.request(Direction.SAVE, [1, 2])
    scheduler.submit(save)
    task = asyncio.create_task(scheduler.wait([save]))
    while not executor.num_held:
        await asyncio.sleep(0.001)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.002)
        assert not task.done()
    draining = asyncio.create_task(scheduler.drain())
    await asyncio.sleep(0.002)
    assert not draining.done()
    executor.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    await draining
    assert scheduler.num_requests == 0
    await scheduler.aclose()
