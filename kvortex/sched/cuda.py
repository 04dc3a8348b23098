"""Batches on a GPU: gather -> staging -> copy for saves, copy -> staging -> scatter for loads."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Pages, too_lossy
from kvortex.cuda.driver import Device, Event, Stream
from kvortex.errors import DeviceError
from kvortex.kernels import DeviceKernels
from kvortex.kernels.device import BatchSlot, device_table, staging_block_nbytes
from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.kernels.tiles import scratch_words
from kvortex.memory import DeviceStagingPool, PinnedPool
from kvortex.sched.batcher import Batch
from kvortex.sched.doorbell import Doorbell
from kvortex.sched.executor import Completion, SourceRead, TransferExecutor, batch_arrays, call_all
from kvortex.sched.native import failed_call, queue_load, queue_save
from kvortex.sched.waiter import EventWaiter
from kvortex.types import Direction

STAGING_BUFFERS = 2  # for each direction: one is filled while the other is emptied
SLOTS_PER_BUFFER = 8  # batches queued on the GPU for one buffer, so that the link never waits for the host

_SAVES, _LOADS = 1, 1 << 32
"""What an event of a save, and of a load, adds to the doorbell's count: one number that holds both counts."""

_NO_EVENT: Event = 0


@dataclass(slots=True)
class _StagingBuffer:
    address: int
    emptied: Event = _NO_EVENT  # the end of the last batch that used the buffer; none once the host has seen it


@dataclass(slots=True)
class _InFlight:
    """A batch on the GPU. Its slot and events are used again when it has ended."""

    slot: BatchSlot
    staged: Event  # the staging buffer is filled: a save has read the cache
    done: Event
    offsets: NDArray[np.int64]
    buffer: _StagingBuffer = field(init=False)


class _Lane:
    """The resources of one direction: a kernel stream, copy streams, staging buffers, slots for batches in flight."""

    waiter: EventWaiter

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


class CudaExecutor(TransferExecutor):
    """Keeps the link busy in both directions.

    All steps of a batch are queued on the GPU at once, and events order them there: the next batch of a staging buffer
    waits for the last copy (or scatter) of the one before, not for the host. Gather and scatter first wait for what the
    caller's stream had queued. For each direction a thread sleeps on the events and rings the doorbell behind `fd`.

    Args:
        pages: for each group of layers where its blocks are, and how they are packed.
        pool: the pinned memory that holds the extents.
        device: the device of the tensors.
        num_streams: number of streams that carry copies.
        staging_nbytes: size of one staging buffer in bytes, which is the largest batch.
        max_pack_error: relative error above which a packed block is reported as too lossy.

    Raises:
        OutOfPoolMemoryError: the device has no memory for staging; nothing stays allocated.
    """

    def __init__(
        self,
        pages: Sequence[Pages],
        pool: PinnedPool,
        device: Device,
        *,
        num_streams: int,
        staging_nbytes: int,
        max_pack_error: float = 0.0,
    ) -> None:
        self._device = device
        self._pool = pool
        self._max_pack_error = max_pack_error
        # Two forms a group, raw and packed; without packing both are the same.
        forms = [Pages(layout, packing) for layout, packing in pages for packing in (None, packing)]
        self._block_nbytes = [staging_block_nbytes(*form) for form in forms]
        self._closed = False
        staging_nbytes = max(staging_nbytes, *self._block_nbytes)
        max_blocks = min(MAX_BATCH_BLOCKS, staging_nbytes // min(self._block_nbytes))
        with contextlib.ExitStack() as undo:
            self._doorbell = Doorbell()
            undo.callback(self._doorbell.close)
            self.fd = self._doorbell.fd
            self._lanes = self._make_lanes(num_streams, undo)
            tables = [device_table(*form) for form in forms]
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
                    lane.buffers.append(_StagingBuffer(address))
                for _ in range(STAGING_BUFFERS * SLOTS_PER_BUFFER):
                    scratch = self._allocate(scratch_nbytes, f"{direction.value} scratch", setup, undo)
                    slot = BatchSlot(device, max_blocks, scratch, setup)
                    undo.callback(slot.close)
                    offsets = np.empty(max_blocks, dtype=np.int64)
                    lane.idle.append(_InFlight(slot, self._event(undo), self._event(undo), offsets))
            self._kernels = [
                DeviceKernels(form.layout, device, address, form.packing)
                for address, form in zip(addresses, forms, strict=True)
            ]
            device.synchronize_stream(setup)
            undo.callback(self._synchronize)
            for direction in Direction:
                self._make_waiter(direction, undo)
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

    def _make_waiter(self, direction: Direction, undo: contextlib.ExitStack) -> None:
        lane = self._lanes[direction]
        lane.waiter = EventWaiter(
            self._device,
            f"kvortex-{direction.value}-events",
            self._doorbell,
            count_per_event=_LOADS if direction is Direction.LOAD else _SAVES,
            capacity=2 * len(lane.idle),
        )
        undo.callback(lane.waiter.close)

    # -- batches -----------------------------------------------------------------------------------

    def use(self, pool: PinnedPool) -> None:
        """Move blocks from and to another pool from now on. No batch may be in flight."""
        self._pool = pool

    def free_slots(self, direction: Direction) -> int:
        return len(self._lanes[direction].idle)

    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        lane = self._lanes[batch.direction]
        flight = lane.idle.pop()
        try:
            self._queue(batch, lane, flight)
        except BaseException:
            # Some of its steps may be queued: the slot must not be reused before they have ended.
            with contextlib.suppress(DeviceError):
                self._synchronize(lane)
            lane.idle.append(flight)
            raise
        if batch.direction is Direction.SAVE:
            for part in batch.slices:
                if part.request.wants_source_released:
                    lane.waiter.watch(flight.staged, lambda error: on_source_read())
                    break
        lane.waiter.watch(flight.done, partial(self._finish, batch, lane, flight, on_done))

    def _queue(self, batch: Batch, lane: _Lane, flight: _InFlight) -> None:
        kernels, (buffer, copies) = self._kernels[batch.form], lane.next_buffer()
        loads = batch.direction is Direction.LOAD
        block_ids, offsets = batch_arrays(batch)
        prepare = kernels.prepare_scatter if loads else kernels.prepare_gather
        launch = prepare(block_ids, buffer.address, flight.slot)
        flight.offsets[: len(offsets)] = offsets
        after = [part.request.after for part in batch.slices if part.request.after is not None]
        queue = queue_load if loads else queue_save
        failure = queue(
            self._device.calls,
            lane.kernel_stream,
            copies,
            buffer.emptied,
            flight.staged,
            flight.done,
            buffer.address,
            self._pool.address,
            self._block_nbytes[batch.form],
            self._pool.piece_bytes,
            np.array(after, dtype=np.int64),
            launch.words,
            flight.offsets[: len(offsets)],
        )
        if failure:
            raise self._device.error(*failed_call(failure))
        buffer.emptied = flight.done
        flight.buffer = buffer

    def poll(self) -> None:
        loads, saves = divmod(self._doorbell.take(), _LOADS)
        lanes = self._lanes
        call_all(itertools.chain(lanes[Direction.SAVE].waiter.fired(saves), lanes[Direction.LOAD].waiter.fired(loads)))

    def _finish(
        self, batch: Batch, lane: _Lane, flight: _InFlight, on_done: Completion, error: DeviceError | None
    ) -> None:
        kernels = self._kernels[batch.form]
        digests = kernels.digests(flight.slot, batch.num_blocks)
        errors = kernels.errors(flight.slot, batch.num_blocks) if batch.direction is Direction.SAVE else None
        if flight.buffer.emptied == flight.done:
            flight.buffer.emptied = _NO_EVENT
        lane.idle.append(flight)
        if error is not None:
            on_done(error)
        else:
            on_done(digests, None if errors is None else too_lossy(errors, self._max_pack_error))

    def _synchronize(self, *lanes: _Lane) -> None:
        """Wait for the streams of these lanes, or of all."""
        for lane in lanes or self._lanes.values():
            for stream in (lane.kernel_stream, *lane.copy_streams):
                self._device.synchronize_stream(stream)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._resources:
            self._device.make_current()
