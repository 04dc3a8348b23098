"""Passes requests from callers to the executor, on the event loop, without a task of its own and without blocking."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import DeviceError, EngineStateError, KVortexError
from kvortex.runtime.blocking import run_blocking
from kvortex.sched.batcher import Batch, Batcher
from kvortex.sched.executor import TransferExecutor
from kvortex.sched.request import TransferRequest
from kvortex.types import Direction

logger = logging.getLogger(__name__)

KEEPS_LINK_BUSY = 2
"""Batches in flight per direction that keep the link busy: one moves while the next is prepared."""


class TransferScheduler:
    """Takes requests, lets the batcher cut batches, and issues them to the executor when it has free slots.

    A request is issued at once if few batches are in flight in its direction. Otherwise it waits for further
    requests, up to the batcher's linger time. Cancelling `wait` drops the blocks that no batch has taken, then waits
    for the blocks in flight. When `wait` returns, the caller may reuse the cache's blocks and free the extents.

    Args:
        batcher: decides which blocks form the next batch.
        executor: carries out batches; `aclose` closes it.
    """

    def __init__(self, batcher: Batcher, executor: TransferExecutor) -> None:
        self._batcher = batcher
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._in_flight = dict.fromkeys(Direction, 0)
        self._unsettled: set[TransferRequest] = set()
        self._linger_handle: asyncio.TimerHandle | None = None
        self._closing = False
        self._fd: int | None = executor.fd
        self._loop.add_reader(executor.fd, executor.poll)

    @property
    def num_requests(self) -> int:
        """Number of requests that are queued or in flight."""
        return len(self._unsettled)

    def submit(self, request: TransferRequest) -> None:
        """Queue a request; its `settled` event is set when it has ended.

        Raises:
            EngineStateError: the scheduler is closing.
        """
        if self._closing:
            raise EngineStateError("the engine is shutting down and takes no more transfers")
        if not request.num_blocks:
            request.settle_if_done()
            return
        self._unsettled.add(request)
        self._batcher.add(request, self._loop.time())
        self._pump()  # at once: until the loop's next iteration the link could be idle

    async def wait(self, requests: Sequence[TransferRequest]) -> None:
        """Wait until submitted requests have settled; for cancellation see the class."""
        try:
            for request in requests:
                await request.settled.wait()
        except asyncio.CancelledError:
            await self.cancel_and_wait(requests)
            raise

    async def cancel_and_wait(self, requests: Sequence[TransferRequest]) -> None:
        """Cancel requests and return when all have settled, even if this call is cancelled too."""
        for request in requests:
            self.cancel(request)
        # A second cancellation must not free memory that a transfer still uses; transfers end within milliseconds.
        while unsettled := [request for request in requests if not request.settled.is_set()]:
            with contextlib.suppress(asyncio.CancelledError):
                await unsettled[0].settled.wait()

    def cancel(self, request: TransferRequest) -> None:
        """Drop the blocks of a request that no batch has taken; blocks in flight end as usual."""
        self._batcher.remove(request)
        request.cancel()
        self._forget_settled(request)

    async def drain(self) -> None:
        """Wait until every request submitted so far has settled."""
        for request in list(self._unsettled):
            await request.settled.wait()

    async def aclose(self) -> None:
        """Refuse new requests, finish the present ones, close the executor; idempotent.

        If its own loop is closed, call it on another loop: requests left on the closed loop never settle.
        """
        self._closing = True
        if not self._loop.is_closed():
            await self.drain()
        self._leave_loop()
        await run_blocking(self._executor.close)

    def close(self) -> None:
        """`aclose` for a scheduler without requests; blocks until the executor is closed."""
        self._closing = True
        self._leave_loop()
        self._executor.close()

    def _leave_loop(self) -> None:
        self._stop_lingering()
        if self._fd is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._fd = None

    # -- the pump ----------------------------------------------------------------------------------

    def _pump(self) -> None:
        self._stop_lingering()
        while free := {d for d in self._batcher.waiting if self._executor.free_slots(d) > 0}:
            busy = {d for d in free if self._in_flight[d] >= KEEPS_LINK_BUSY}
            batch = self._batcher.next_batch(self._loop.time(), free, busy)
            if batch is None:
                # A timer is needed only for a batch that could go now but waits for more requests.
                due_s = self._batcher.next_due_s(free)
                if due_s is not None:
                    self._linger_handle = self._loop.call_at(due_s, self._pump)
                break
            self._issue(batch)

    def _stop_lingering(self) -> None:
        if self._linger_handle is not None:
            self._linger_handle.cancel()
            self._linger_handle = None

    def _issue(self, batch: Batch) -> None:
        self._in_flight[batch.direction] += 1
        try:
            self._executor.issue(batch, partial(self._finish, batch), partial(self._source_read, batch))
        except KVortexError as error:
            self._end(batch, error, None)

    def _source_read(self, batch: Batch) -> None:
        for part in batch.slices:
            part.request.source_read(part.num_blocks)

    def _finish(
        self, batch: Batch, outcome: NDArray[np.uint64] | Exception, too_lossy: NDArray[np.bool_] | None = None, /
    ) -> None:
        self._end(batch, outcome, too_lossy)
        self._pump()  # in this iteration of the loop: the next one would first poll its file descriptors

    def _end(self, batch: Batch, outcome: NDArray[np.uint64] | Exception, too_lossy: NDArray[np.bool_] | None) -> None:
        self._in_flight[batch.direction] -= 1
        if not self._in_flight[batch.direction]:
            self._batcher.restart_ramp(batch.direction)
        if isinstance(outcome, Exception):
            level = logging.WARNING if isinstance(outcome, DeviceError) else logging.ERROR
            logger.log(level, "a %s batch of %d blocks failed: %s", batch.direction.value, batch.num_blocks, outcome)
        position = 0
        for request, start, stop in batch.slices:
            after = position + stop - start
            if isinstance(outcome, Exception):
                request.errors.append(outcome)
            else:
                request.arrived(
                    start, outcome[position:after], None if too_lossy is None else too_lossy[position:after]
                )
            position = after
            request.blocks_in_flight -= stop - start
            request.settle_if_done()
            self._forget_settled(request)

    def _forget_settled(self, request: TransferRequest) -> None:
        if request.settled.is_set():
            self._unsettled.discard(request)
