"""Batches on a GPU: gather -> staging -> copy for saves, copy -> staging -> scatter for loads."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Packing
from kvortex.driver import Device, Event, Stream
from kvortex.errors import DeviceError
from kvortex.kernels import DeviceKernels
from kvortex.kernels.device import BatchSlot, device_table, staging_block_nbytes
from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.kernels.tiles import scratch_words
from kvortex.layout import KVLayout
from kvortex.memory import DeviceStagingPool, PinnedPool
from kvortex.sched.batcher import Batch
from kvortex.sched.executor import Completion, Post, SourceRead, TransferExecutor, batch_arrays
from kvortex.sched.request import merge_runs
from kvortex.types import Direction

logger = logging.getLogger(__name__)

STAGING_BUFFERS = 2  # a direction: one is filled while the other is emptied
SLOTS_PER_BUFFER = 8  # batches queued on the GPU for one buffer, so that the link never waits for the host


Fired: TypeAlias = Callable[[DeviceError | None], object]
_Watched: TypeAlias = tuple[Event, Fired]


@dataclass(slots=True)
class _StagingBuffer:
    address: int
    filled: Event
    emptied: Event | None = None  # the end of the last batch that used it


@dataclass(slots=True)
class _InFlight:
    """A batch on the GPU; its slot and events are used again when it is over."""

    slot: BatchSlot
    done: Event


class _Lane:
    """One direction: a kernel stream, copy streams, two staging buffers, slots for batches in flight."""

    def __init__(self, kernel_stream: Stream, copy_streams: Sequence[Stream]) -> None:
        self.kernel_stream = kernel_stream
        self.copy_streams = copy_streams
        self.buffers: list[_StagingBuffer] = []
        self.idle: list[_InFlight] = []
        self.sequence = 0

    def next_buffer(self) -> tuple[_StagingBuffer, Stream]:
        number = self.sequence
        self.sequence += 1
        return self.buffers[number % len(self.buffers)], self.copy_streams[number % len(self.copy_streams)]


class EventWaiter:
    """A thread that sleeps on CUDA events in turn and reports what has fired.

    Beside other Python threads every turn of this one may cost a switch of the GIL, some milliseconds: so it looks
    for everything that has fired when it wakes up, and reports it all at once.

    Args:
        device: of the events.
        name: of the thread.
        post: runs a callback on the thread that issues batches.
    """

    def __init__(self, device: Device, name: str, post: Post) -> None:
        self._device = device
        self._post = post
        self._queue: queue.SimpleQueue[_Watched | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, event: Event, callback: Fired) -> None:
        """Post `callback` once `event` has fired, with the error if the device failed."""
        self._queue.put((event, callback))

    def _run(self) -> None:
        self._device.make_current()
        while (item := self._queue.get()) is not None:
            later: _Watched | None = item
            while later is not None:
                fired = [self._report(later, self._device.synchronize_event)]
                later = self._take_fired(fired)
                self._post(partial(_call_all, fired))

    def _take_fired(self, fired: list[Callable[[], object]]) -> "_Watched | None":
        """Add the reports of what has fired already; returns what comes next and has not, if anything."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return None
            if item is None:
                self._queue.put(None)  # for the outer loop
                return None
            try:
                if not self._device.has_fired(item[0]):
                    return item
            except DeviceError as error:
                fired.append(partial(item[1], error))
            else:
                fired.append(partial(item[1], None))

    @staticmethod
    def _report(item: "_Watched", wait: Callable[[Event], object]) -> Callable[[], object]:
        try:
            wait(item[0])
        except DeviceError as error:
            return partial(item[1], error)
        return partial(item[1], None)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


def _call_all(callbacks: Sequence[Callable[[], object]]) -> None:
    """In order, and each even if one before it raises."""
    with contextlib.ExitStack() as calls:
        for callback in reversed(callbacks):
            calls.callback(callback)


class CudaExecutor(TransferExecutor):
    """Keeps the link busy in both directions.

    Everything of a batch is queued on the GPU at once and ordered there by events: a buffer's next batch waits
    for its last copy (or scatter), not for the host. A gather first waits for what the caller's stream had
    queued, a scatter too. A thread a direction sleeps on the events and wakes the loop.

    Args:
        layout: of the registered tensors.
        pool: pinned memory that extents lie in.
        device: where the tensors lie.
        num_streams: that carry copies.
        staging_nbytes: of one buffer: the largest batch.
        thread_blocks: of a kernel's grid.
        post: delivers callbacks.
        packing: of the layout; None where nothing is packed.
        max_pack_error: a block that loses more is reported as too lossy.

    Raises:
        OutOfPoolMemoryError: the device has no memory for staging; nothing stays allocated.
    """

    def __init__(
        self,
        layout: KVLayout,
        pool: PinnedPool,
        device: Device,
        *,
        num_streams: int,
        staging_nbytes: int,
        thread_blocks: int,
        post: Post,
        packing: Packing | None = None,
        max_pack_error: float = 0.0,
    ) -> None:
        self.post = post
        self._device = device
        self._pool = pool
        self._max_pack_error = max_pack_error
        forms = (None,) if packing is None else (None, packing)
        self._block_nbytes = [staging_block_nbytes(layout, form) for form in forms]
        self._closed = False
        staging_nbytes = max(staging_nbytes, *self._block_nbytes)
        max_blocks = min(MAX_BATCH_BLOCKS, staging_nbytes // min(self._block_nbytes))
        with contextlib.ExitStack() as undo:
            self._lanes = self._make_lanes(num_streams, undo)
            tables = [device_table(layout, form) for form in forms]
            scratch_nbytes = 8 * scratch_words(max_blocks)
            lane_nbytes = STAGING_BUFFERS * (staging_nbytes + SLOTS_PER_BUFFER * scratch_nbytes)
            self.staging = DeviceStagingPool(device, len(self._lanes) * lane_nbytes + sum(t.nbytes for t in tables))
            undo.callback(self.staging.close)
            setup = self._lanes[Direction.SAVE].kernel_stream
            addresses = [self._allocate(table.nbytes, "tile table", setup, undo) for table in tables]
            for address, table in zip(addresses, tables, strict=True):
                device.copy_async(address, table.ctypes.data, table.nbytes, setup)
            for direction, lane in self._lanes.items():
                for _ in range(STAGING_BUFFERS):
                    address = self._allocate(staging_nbytes, f"{direction.value} staging", setup, undo)
                    lane.buffers.append(_StagingBuffer(address, self._event(undo)))
                for _ in range(STAGING_BUFFERS * SLOTS_PER_BUFFER):
                    scratch = self._allocate(scratch_nbytes, f"{direction.value} scratch", setup, undo)
                    slot = BatchSlot(device, max_blocks, scratch, setup)
                    undo.callback(slot.close)
                    lane.idle.append(_InFlight(slot, self._event(undo)))
            self._kernels = [
                DeviceKernels(layout, device, address, thread_blocks, form)
                for address, form in zip(addresses, forms, strict=True)
            ]
            device.synchronize_stream(setup)
            self._waiters = {d: EventWaiter(device, f"kvortex-{d.value}-events", self._post_now) for d in Direction}
            self._resources = undo.pop_all()

    def _make_lanes(self, num_streams: int, undo: contextlib.ExitStack) -> dict[Direction, _Lane]:
        def streams(count: int) -> list[Stream]:
            made = [self._device.create_stream() for _ in range(count)]
            for stream in made:
                undo.callback(self._device.destroy_stream, stream)
            return made

        copies = streams(num_streams)
        saves = max(num_streams // 2, 1)
        kernels = streams(len(Direction))
        return {
            Direction.SAVE: _Lane(kernels[0], copies[:saves]),
            Direction.LOAD: _Lane(kernels[1], copies[saves:] or copies),
        }

    def _allocate(self, nbytes: int, owner: str, stream: Stream, undo: contextlib.ExitStack) -> int:
        address = self.staging.allocate(nbytes, owner, stream=stream)
        undo.callback(self.staging.free, address, stream=stream)
        return address

    def _event(self, undo: contextlib.ExitStack) -> Event:
        event = self._device.create_event()
        undo.callback(self._device.destroy_event, event)
        return event

    # -- batches -----------------------------------------------------------------------------------

    def free_slots(self, direction: Direction) -> int:
        return len(self._lanes[direction].idle)

    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        lane = self._lanes[batch.direction]
        flight = lane.idle.pop()
        issue = self._issue_save if batch.direction is Direction.SAVE else self._issue_load
        try:
            read = issue(batch, lane, flight)
        except BaseException:
            # Part of it may be queued: nothing may reuse the slot before the device has come to rest.
            with contextlib.suppress(DeviceError):
                for stream in (lane.kernel_stream, *lane.copy_streams):
                    self._device.synchronize_stream(stream)
            lane.idle.append(flight)
            raise
        waiter = self._waiters[batch.direction]
        if read is not None and any(part.request.wants_source_released for part in batch.slices):
            waiter.watch(read, lambda error: on_source_read())
        waiter.watch(flight.done, partial(self._finish, batch, lane, flight, on_done))

    def _post_now(self, callback: Callable[[], object]) -> None:
        self.post(callback)  # which may have been exchanged since

    def _issue_save(self, batch: Batch, lane: _Lane, flight: _InFlight) -> Event:
        device, kernels = self._device, lane.kernel_stream
        buffer, copies = lane.next_buffer()
        block_ids, offsets = batch_arrays(batch)
        self._wait_for_callers(batch, kernels)
        if buffer.emptied is not None:
            device.wait_event(kernels, buffer.emptied)
        self._kernels[batch.packed].gather(block_ids, buffer.address, flight.slot, stream=kernels)
        device.record_event(buffer.filled, kernels)
        device.wait_event(copies, buffer.filled)
        for pool_address, staging_address, nbytes in self._runs(offsets, buffer.address, batch):
            device.copy_async(pool_address, staging_address, nbytes, copies)
        device.record_event(flight.done, copies)
        buffer.emptied = flight.done
        return buffer.filled

    def _issue_load(self, batch: Batch, lane: _Lane, flight: _InFlight) -> None:
        device, kernels = self._device, lane.kernel_stream
        buffer, copies = lane.next_buffer()
        block_ids, offsets = batch_arrays(batch)
        if buffer.emptied is not None:
            device.wait_event(copies, buffer.emptied)
        for pool_address, staging_address, nbytes in self._runs(offsets, buffer.address, batch):
            device.copy_async(staging_address, pool_address, nbytes, copies)
        device.record_event(buffer.filled, copies)
        self._wait_for_callers(batch, kernels)
        device.wait_event(kernels, buffer.filled)
        self._kernels[batch.packed].scatter(block_ids, buffer.address, flight.slot, stream=kernels)
        device.record_event(flight.done, kernels)
        buffer.emptied = flight.done

    def _wait_for_callers(self, batch: Batch, stream: Stream) -> None:
        for part in batch.slices:
            if part.request.after is not None:
                self._device.wait_event(stream, part.request.after)

    def _runs(self, offsets: NDArray[np.int64], staging: int, batch: Batch) -> list[tuple[int, int, int]]:
        """Copies of a batch as `(pool address, staging address, bytes)`; none crosses a piece of the pool."""
        size, base = self._block_nbytes[batch.packed], self._pool.address
        return [
            (base + offsets[first], staging + first * size, count * size)
            for first, count in merge_runs(offsets, size, self._pool.piece_bytes)
        ]

    def _finish(
        self, batch: Batch, lane: _Lane, flight: _InFlight, on_done: Completion, error: DeviceError | None
    ) -> None:
        kernels = self._kernels[batch.packed]
        digests = kernels.digests(flight.slot, batch.num_blocks)
        errors = kernels.errors(flight.slot, batch.num_blocks) if batch.direction is Direction.SAVE else None
        lane.idle.append(flight)
        if error is not None:
            on_done(error)
        else:
            on_done(digests, None if errors is None else ~(errors <= self._max_pack_error))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._device.make_current()
        for waiter in self._waiters.values():
            waiter.close()
        for lane in self._lanes.values():
            for stream in (lane.kernel_stream, *lane.copy_streams):
                self._device.synchronize_stream(stream)
        self._resources.close()
