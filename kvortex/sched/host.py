"""Moves batches between a cache in host memory and the pool, with the CPU kernels, on one worker thread."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import too_lossy
from kvortex.kernels import HostKernels, HostPackKernels
from kvortex.runtime.blocking import submit_or_run
from kvortex.sched.batcher import Batch
from kvortex.sched.doorbell import Doorbell
from kvortex.sched.executor import Completion, SourceRead, TransferExecutor, batch_arrays, call_all
from kvortex.types import Direction

_Moved: TypeAlias = tuple[NDArray[np.uint64], NDArray[np.bool_] | None]


class HostExecutor(TransferExecutor):
    """Moves one batch at a time: the kernels use all cores and release the GIL.

    Args:
        kernels: for each form the kernels that move its blocks between the registered tensors and the pool.
        max_pack_error: relative error above which a packed block is reported as too lossy.
    """

    _DEPTH = 2  # one batch runs and one is ready, so that the worker does not wait for the loop

    def __init__(
        self,
        kernels: Sequence[HostKernels | HostPackKernels],
        *,
        max_pack_error: float = 0.0,
    ) -> None:
        self._kernels = list(kernels)
        self._max_pack_error = max_pack_error
        self._doorbell = Doorbell()
        self.fd = self._doorbell.fd
        self._ended: deque[Callable[[], None]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvortex-host")
        self._in_flight = 0
        self._closed = False

    def use(self, kernels: Sequence[HostKernels | HostPackKernels]) -> None:
        """Move blocks with other kernels from now on, as many as before, or none. No batch may be in flight."""
        self._kernels[:] = kernels

    def free_slots(self, direction: Direction) -> int:
        return self._DEPTH - self._in_flight

    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        self._in_flight += 1
        future = submit_or_run(self._worker, partial(self._move, batch))
        future.add_done_callback(partial(self._report, on_done, on_source_read))

    def _report(self, on_done: Completion, on_source_read: SourceRead, done: Future[_Moved]) -> None:
        self._ended.append(partial(self._finish, done, on_done, on_source_read))
        self._doorbell.ring()

    def poll(self) -> None:
        call_all(self._ended.popleft() for _ in range(self._doorbell.take()))

    def _move(self, batch: Batch) -> _Moved:
        arrays, kernels = batch_arrays(batch), self._kernels[batch.form]
        if batch.direction is Direction.LOAD:
            return kernels.scatter(*arrays), None
        if isinstance(kernels, HostKernels):
            return kernels.gather(*arrays), None
        digests, errors = kernels.gather(*arrays)
        return digests, too_lossy(errors, self._max_pack_error)

    def _finish(self, done: Future[_Moved], on_done: Completion, on_source_read: SourceRead) -> None:
        self._in_flight -= 1
        on_source_read()
        error = done.exception()
        if isinstance(error, BaseException) and not isinstance(error, Exception):
            raise error
        if error is not None:
            on_done(error)
        else:
            on_done(*done.result())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._worker.shutdown()
        self._doorbell.close()
        self._kernels.clear()  # they hold a view of the pool
