"""The pump, with an executor that is worked by hand."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import DeviceError, EngineStateError
from kvortex.kernels import HostKernels
from kvortex.layout import KVLayout
from kvortex.sched import Batch, Batcher, HostExecutor, TransferExecutor, TransferRequest, TransferScheduler
from kvortex.sched.executor import batch_arrays
from kvortex.types import Direction

SIZE = 1 << 20


class ManualExecutor(TransferExecutor):
    """Batches end when the test says so."""

    def __init__(self, slots: int = 2) -> None:
        self.fd = os.eventfd(0)  # never readable: callbacks run when the test says so
        self.slots = slots
        self.open: list[tuple[Batch, Callable, Callable]] = []
        self.issued = 0
        self.asked = 0
        self.refuse = False
        self.closed = False

    def free_slots(self, direction: Direction) -> int:
        self.asked += 1
        return self.slots - sum(batch.direction is direction for batch, _, _ in self.open)

    def issue(self, batch: Batch, on_done: Callable, on_source_read: Callable) -> None:
        if self.refuse:
            raise DeviceError("refused")
        self.issued += 1
        self.open.append((batch, on_done, on_source_read))

    def end(self, position: int = 0, error: Exception | None = None) -> None:
        batch, on_done, _ = self.open.pop(position)
        on_done(error or np.arange(batch.num_blocks, dtype=np.uint64) + 1)

    def poll(self) -> None:
        raise AssertionError

    def close(self) -> None:
        assert not self.open
        if not self.closed:
            os.close(self.fd)
        self.closed = True


def request(blocks: int, direction: Direction = Direction.SAVE) -> TransferRequest:
    ids = np.arange(blocks, dtype=np.int32)
    return TransferRequest(direction, ids, ids.astype(np.int64) * SIZE, [SIZE])


def make(slots: int = 2, **options: object) -> tuple[TransferScheduler, ManualExecutor]:
    executor = ManualExecutor(slots)
    settings = {"max_bytes": 16 * SIZE, "linger_s": 0.0, **options}
    return TransferScheduler(Batcher(**settings), executor), executor


async def test_a_long_request_goes_through_the_slots_there_are() -> None:
    scheduler, executor = make()
    r = request(64)
    scheduler.submit(r)
    assert len(executor.open) == 2
    while executor.open:
        executor.end()
        await asyncio.sleep(0)
    assert r.settled.is_set()
    assert r.succeeded.all()
    assert r.digests.tolist() == list(range(1, 17)) * 4
    await scheduler.aclose()
    assert executor.closed


async def test_requests_share_a_batch_while_the_link_is_busy() -> None:
    scheduler, executor = make(slots=3, linger_s=10.0)
    requests = [request(1) for _ in range(6)]
    for r in requests:
        scheduler.submit(r)
    assert [batch.num_blocks for batch, _, _ in executor.open] == [1, 1]
    executor.end()
    await asyncio.sleep(0)
    assert [batch.num_blocks for batch, _, _ in executor.open] == [1, 4]
    executor.end()
    executor.end()
    assert all(r.succeeded.all() for r in requests)
    await scheduler.aclose()


async def test_lingering_ends_by_the_clock() -> None:
    scheduler, executor = make(slots=5, linger_s=0.02)
    for _ in range(4):
        scheduler.submit(request(1))
    assert executor.issued == 2
    await asyncio.sleep(0.05)
    assert executor.issued == 3
    while executor.open:
        executor.end()
    await scheduler.aclose()


async def test_a_failed_batch_fails_its_blocks_alone() -> None:
    scheduler, executor = make()
    r = request(48)
    scheduler.submit(r)
    executor.end(error=DeviceError("gone"))
    await asyncio.sleep(0)
    while executor.open:
        executor.end()
        await asyncio.sleep(0)
    assert r.settled.is_set()
    assert r.succeeded.tolist() == [False] * 16 + [True] * 32
    assert [str(error) for error in r.errors] == ["gone"]
    await scheduler.aclose()


async def test_a_refused_batch_ends_at_once() -> None:
    scheduler, executor = make()
    executor.refuse = True
    r = request(8)
    scheduler.submit(r)
    assert r.settled.is_set()
    assert not r.succeeded.any()
    executor.refuse = False
    again = request(8)
    scheduler.submit(again)
    executor.end()
    assert again.succeeded.all()
    await scheduler.aclose()


async def test_cancelling_drops_what_waits_and_waits_for_what_runs() -> None:
    scheduler, executor = make()
    r = request(64)
    scheduler.submit(r)
    task = asyncio.create_task(scheduler.wait([r]))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
        assert not task.done()
    executor.end()
    await asyncio.sleep(0)
    assert executor.issued == 2, "nothing of a cancelled request starts any more"
    assert not task.done()
    executor.end()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert r.succeeded.tolist() == [True] * 32 + [False] * 32
    await scheduler.aclose()


async def test_nobody_polls_while_a_batch_runs() -> None:
    scheduler, executor = make(slots=1)
    scheduler.submit(request(64))
    await asyncio.sleep(0.005)
    asked = executor.asked
    await asyncio.sleep(0.05)
    assert executor.asked == asked
    while executor.open:
        executor.end()
        await asyncio.sleep(0)
    await scheduler.aclose()


async def test_closing_refuses_new_work_and_finishes_the_old() -> None:
    scheduler, executor = make()
    r = request(4)
    scheduler.submit(r)
    closing = asyncio.create_task(scheduler.aclose())
    await asyncio.sleep(0.005)
    assert not closing.done()
    with pytest.raises(EngineStateError, match="shutting down"):
        scheduler.submit(request(1))
    executor.end()
    await closing
    assert r.succeeded.all()
    assert scheduler.num_requests == 0


async def test_an_empty_request_settles_at_once() -> None:
    scheduler, executor = make()
    r = request(0)
    scheduler.submit(r)
    assert r.settled.is_set()
    assert executor.issued == 0
    await scheduler.drain()
    await scheduler.aclose()


async def test_source_is_released_before_the_end() -> None:
    scheduler, executor = make()
    r = request(20)
    scheduler.submit(r)
    for _, _, on_source_read in executor.open:
        on_source_read()
    assert r.source_released.is_set()
    assert not r.settled.is_set()
    executor.end()
    executor.end()
    await scheduler.aclose()


async def test_the_host_executor_moves_and_reports() -> None:
    tensors = {"layers.0": np.random.default_rng(0).integers(0, 256, (8, 16, 64), dtype=np.uint8)}
    layout = KVLayout.from_tensors(tensors, 16)
    pool = np.zeros(8 * layout.block_nbytes, dtype=np.uint8)
    kernels = HostKernels(layout, pool)
    executor = HostExecutor([kernels])
    scheduler = TransferScheduler(Batcher(linger_s=0.0), executor)
    ids = np.array([3, 1], dtype=np.int32)
    offsets = np.array([0, layout.block_nbytes], dtype=np.int64)
    save = TransferRequest(Direction.SAVE, ids, offsets, [layout.block_nbytes])
    scheduler.submit(save)
    await scheduler.wait([save])
    assert save.succeeded.all()
    assert (pool[: layout.block_nbytes] == tensors["layers.0"][3].reshape(-1)).all()
    bad = TransferRequest(Direction.SAVE, ids, offsets + 4, [layout.block_nbytes])
    scheduler.submit(bad)
    await scheduler.wait([bad])
    assert not bad.succeeded.any()
    assert isinstance(bad.errors[0], ValueError)
    await scheduler.aclose()
    executor.close()


class Play:
    """A scheduler under a random script, and what must hold after every step of it."""

    def __init__(self, slots: int, linger_s: float) -> None:
        self.executor = ManualExecutor(slots)
        self.batcher = Batcher(max_requests=3, max_bytes=8 * SIZE, max_blocks=8, linger_s=linger_s)
        self.scheduler = TransferScheduler(self.batcher, self.executor)
        self.requests: list[TransferRequest] = []
        self.waits: list[asyncio.Task[None]] = []
        self.begun: set[TransferRequest] = set()
        self.settled: list[TransferRequest] = []
        self.good: dict[TransferRequest, list[bool]] = {}

    def submit(self, direction: Direction, blocks: int) -> None:
        ids = np.arange(blocks, dtype=np.int32) + 1000 * len(self.requests)
        r = TransferRequest(direction, ids, ids.astype(np.int64) * SIZE, [SIZE], on_settled=self.settled.append)
        self.requests.append(r)
        self.good[r] = [False] * blocks
        self.scheduler.submit(r)
        self.waits.append(asyncio.create_task(self._wait(r)))

    async def _wait(self, r: TransferRequest) -> None:
        self.begun.add(r)
        await self.scheduler.wait([r])

    def end(self, position: int, ok: bool) -> None:
        if not self.executor.open:
            return
        position %= len(self.executor.open)
        batch, on_done, on_source_read = self.executor.open.pop(position)
        on_source_read()
        if ok:
            for part in batch.slices:
                self.good[part.request][part.start : part.stop] = [True] * part.num_blocks
        on_done(batch_arrays(batch)[0].astype(np.uint64) if ok else DeviceError("injected"))

    def cancel(self, number: int) -> None:
        number %= max(len(self.waits), 1)
        if self.waits and self.requests[number] in self.begun:  # before that there is no caller to cancel
            self.waits[number].cancel()

    def check(self) -> None:
        under_way = [part.request for batch, _, _ in self.executor.open for part in batch.slices]
        for r, wait in zip(self.requests, self.waits, strict=True):
            assert r.settled.is_set() == (r.blocks_waiting == 0 and r not in under_way)
            assert r.settled.is_set() or not wait.done(), "control came back under a transfer"
        for direction in Direction:
            waiting = sum(r.blocks_waiting for r in self.requests if r.direction is direction)
            assert self.batcher.queued_bytes(direction) == waiting * SIZE
        assert self.scheduler.num_requests == sum(not r.settled.is_set() for r in self.requests)

    async def finish(self) -> None:
        while any(not r.settled.is_set() for r in self.requests):
            self.end(0, True)
            await asyncio.sleep(0)
            self.check()
        await asyncio.gather(*self.waits, return_exceptions=True)
        await self.scheduler.aclose()
        assert self.executor.closed
        assert sorted(map(id, self.settled)) == sorted(map(id, self.requests)), "each settles exactly once"
        for number, r in enumerate(self.requests):
            assert r.succeeded.tolist() == self.good[r]
            assert r.source_released.is_set()
            digests = [1000 * number + i if good else 0 for i, good in enumerate(self.good[r])]
            assert r.digests.tolist() == digests
            assert r.cancelled or all(self.good[r]) or r.errors


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(list(Direction)), st.integers(1, 30)),
    st.tuples(st.just("end"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("refuse"), st.booleans()),
    st.tuples(st.just("turn")),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), slots=st.integers(1, 4), linger_s=st.sampled_from([0.0, 0.001]))
def test_any_order_of_arrivals_ends_faults_and_cancellations(
    steps: list[tuple[Any, ...]], slots: int, linger_s: float
) -> None:
    async def play() -> None:
        scene = Play(slots, linger_s)
        for name, *arguments in steps:
            if name == "turn":
                await asyncio.sleep(0)
            elif name == "refuse":
                scene.executor.refuse = arguments[0]
            else:
                getattr(scene, name)(*arguments)
            scene.check()
        scene.executor.refuse = False
        await scene.finish()

    asyncio.run(play())


async def test_cancelling_one_of_two_in_a_batch_leaves_the_other() -> None:
    scheduler, executor = make(slots=3, linger_s=10.0)
    for _ in range(2):
        scheduler.submit(request(1))
    first, second = request(2), request(2)
    scheduler.submit(first)
    scheduler.submit(second)
    executor.end()
    await asyncio.sleep(0)
    assert [part.request for part in executor.open[-1][0].slices] == [first, second]
    task = asyncio.create_task(scheduler.wait([first]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    executor.end(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert second.succeeded.all()
    assert not second.cancelled
    executor.end()
    await scheduler.aclose()


async def test_cancelling_what_no_batch_has_taken_returns_at_once() -> None:
    scheduler, executor = make(slots=1)
    scheduler.submit(request(1))
    queued = request(5)
    scheduler.submit(queued)
    task = asyncio.create_task(scheduler.wait([queued]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)
    assert queued.settled.is_set()
    assert queued.source_released.is_set()
    executor.end()
    await scheduler.drain()
    assert executor.issued == 1
    await scheduler.aclose()


async def test_cancelling_after_the_end_changes_nothing() -> None:
    scheduler, executor = make()
    r = request(3)
    scheduler.submit(r)
    executor.end()
    scheduler.cancel(r)
    await scheduler.cancel_and_wait([r])
    assert r.succeeded.all()
    await scheduler.aclose()


async def test_the_loop_sleeps_while_a_batch_is_held() -> None:
    """No timer, no callback: a loop that runs nothing but this test wakes for its two sleeps alone."""
    scheduler, executor = make(slots=2, linger_s=0.001)
    for _ in range(4):
        scheduler.submit(request(8))
    await asyncio.sleep(0.01)  # lingering has ended, all slots are taken
    loop = asyncio.get_running_loop()
    turns = 0
    run_once = loop._run_once

    def counted() -> None:
        nonlocal turns
        turns += 1
        run_once()

    loop._run_once = counted
    await asyncio.sleep(0.05)
    assert turns <= 4
    while executor.open:
        executor.end()
        await asyncio.sleep(0.002)
    await scheduler.aclose()


async def test_closing_leaves_no_timer() -> None:
    scheduler, executor = make(slots=3, linger_s=30.0)
    requests = [request(1) for _ in range(3)]
    for r in requests:
        scheduler.submit(r)
    assert scheduler._linger_handle is not None
    scheduler.cancel(requests[2])
    executor.end()
    executor.end()
    await scheduler.aclose()
    await scheduler.aclose()
    assert scheduler._linger_handle is None or scheduler._linger_handle.cancelled()


async def test_a_ramp_starts_again_when_its_direction_has_come_to_rest() -> None:
    scheduler, executor = make(slots=2, max_bytes=64 * SIZE)
    sizes: list[int] = []

    async def end_one() -> None:
        sizes.append(executor.open[0][0].num_blocks)
        executor.end()
        await asyncio.sleep(0)

    scheduler.submit(request(16 + 32 + 64))
    await end_one()
    scheduler.submit(request(64))  # before the rest: the ramp goes on
    while executor.open:
        await end_one()
    scheduler.submit(request(48))  # after it: from the start
    while executor.open:
        await end_one()
    assert sizes == [16, 32, 64, 64, 16, 32]
    await scheduler.aclose()


async def test_one_timer_at_a_time() -> None:
    scheduler, executor = make(slots=3, linger_s=30.0)
    loop = asyncio.get_running_loop()
    made: list[asyncio.TimerHandle] = []
    call_at = loop.call_at
    loop.call_at = lambda *args, **kwargs: made.append(call_at(*args, **kwargs)) or made[-1]
    for _ in range(6):
        scheduler.submit(request(1))
    assert len(made) == 4
    assert [timer.cancelled() for timer in made] == [True, True, True, False]
    while executor.open:
        executor.end()
        await asyncio.sleep(0)
    assert all(timer.cancelled() for timer in made)
    await scheduler.aclose()


@pytest.mark.parametrize(
    ("error", "level"), [(DeviceError("gone"), "WARNING"), (ValueError("a bug"), "ERROR"), (None, "")]
)
async def test_a_failure_is_logged_with_its_cause(
    error: Exception | None, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, executor = make()
    scheduler.submit(request(4))
    executor.end(error=error)
    expected = [(level, f"a save batch of 4 blocks failed: {error}")] if error else []
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == expected
    await scheduler.aclose()
