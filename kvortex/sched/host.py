"""Batches on plain host memory: the CPU twins, straight between cache and extents, on one worker thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvortex.kernels import HostKernels
from kvortex.sched.batcher import Batch
from kvortex.sched.executor import Completion, Post, SourceRead, TransferExecutor, batch_arrays
from kvortex.types import Direction


class HostExecutor(TransferExecutor):
    """Runs one batch at a time; the twins use all cores themselves and release the GIL.

    Args:
        kernels: of the registered layout and the pool.
        post: delivers callbacks.
    """

    _DEPTH = 2  # one running, one ready behind it: the worker does not wait for the loop

    def __init__(self, kernels: HostKernels, post: Post) -> None:
        self._kernels = kernels
        self.post = post
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvortex-host")
        self._in_flight = 0

    def free_slots(self, direction: Direction) -> int:
        return self._DEPTH - self._in_flight

    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        self._in_flight += 1
        future = self._worker.submit(self._move, batch)
        future.add_done_callback(lambda done: self.post(partial(self._finish, done, on_done, on_source_read)))

    def _move(self, batch: Batch) -> NDArray[np.uint64]:
        move = self._kernels.gather if batch.direction is Direction.SAVE else self._kernels.scatter
        return move(*batch_arrays(batch))

    def _finish(self, done: Future[NDArray[np.uint64]], on_done: Completion, on_source_read: SourceRead) -> None:
        self._in_flight -= 1
        on_source_read()
        error = done.exception()
        if isinstance(error, BaseException) and not isinstance(error, Exception):
            raise error
        on_done(error if error is not None else done.result())

    def close(self) -> None:
        self._worker.shutdown()
        self.__dict__.pop("_kernels", None)  # they hold a view of the pool
