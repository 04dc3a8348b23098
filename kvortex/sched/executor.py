"""The contract of the executors, which move batches: the CUDA executor, the host executor and those of tests."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.sched.batcher import Batch
from kvortex.types import Direction


class Completion(Protocol):
    """Called on the loop when a batch has ended.

    Args:
        outcome: digests of the blocks, `uint64 [num_blocks]`, or the error that ended the batch.
        too_lossy: for a save that packs, which blocks lose more than is allowed and must not be used,
            `bool [num_blocks]`; None otherwise.
    """

    def __call__(
        self, outcome: NDArray[np.uint64] | Exception, too_lossy: NDArray[np.bool_] | None = None, /
    ) -> None: ...


SourceRead: TypeAlias = Callable[[], None]
"""Called on the loop, if a request of the batch asked for it, when a save has read the cache's blocks."""


class TransferExecutor(ABC):
    """Moves batches. All methods but `close` are called on one thread.

    After `issue`, the completion of a batch is called exactly once, even if its callers have been cancelled. Until then
    the executor may touch the batch's blocks of the cache and its extents in the pool.

    Callbacks run in `poll`. An event loop or a thread calls it when the descriptor `fd` is readable. `fd` is open until
    `close`.
    """

    fd: int

    @abstractmethod
    def free_slots(self, direction: Direction) -> int:
        """Batches that `issue` can take now in this direction."""

    @abstractmethod
    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        """Start a batch; does not block.

        Raises:
            DeviceError: the batch could not be started. Nothing of it is in flight, and no callback follows.
        """

    @abstractmethod
    def poll(self) -> None:
        """Run the callbacks that are due, in order; does not block. All run, even if one of them raises."""

    @abstractmethod
    def close(self) -> None:
        """Block until all batches in flight have ended, and release all resources. Idempotent; from any thread.

        Callbacks that `poll` has not run yet are lost.
        """


def call_all(calls: Iterator[Callable[[], object]]) -> None:
    """Call all of them in order, even if one raises; then the last error is raised."""
    for call in calls:
        try:
            call()
        except BaseException:
            call_all(calls)
            raise


def batch_arrays(batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Block ids `int32 [n]` and pool offsets `int64 [n]` of a batch, in the order of its slices."""
    parts = batch.slices
    if len(parts) == 1:
        part = parts[0]
        return part.request.block_ids[part.start : part.stop], part.request.offsets[part.start : part.stop]
    ids = np.concatenate([part.request.block_ids[part.start : part.stop] for part in parts])
    offsets = np.concatenate([part.request.offsets[part.start : part.stop] for part in parts])
    return ids, offsets
