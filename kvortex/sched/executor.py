"""The interface of executors, which carry out batches: on a GPU, on the host and in tests."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.sched.batcher import Batch
from kvortex.types import Direction


class Completion(Protocol):
    """Called on the loop when a batch is over.

    Args:
        outcome: digests `uint64 [num_blocks]`, or the error.
        too_lossy: for a save that packs, `bool [num_blocks]`: blocks that lose more than allowed, not to be used.
    """

    def __call__(
        self, outcome: NDArray[np.uint64] | Exception, too_lossy: NDArray[np.bool_] | None = None, /
    ) -> None: ...


SourceRead: TypeAlias = Callable[[], None]
"""Called on the loop when a save has read the cache's blocks, if a request of the batch asks for it."""


class TransferExecutor(ABC):
    """Carries out batches. All methods are called on one thread.

    After `issue` the completion is called exactly once, even if callers were cancelled. Until then the batch may
    touch the cache's blocks and the pool's extents.

    Callbacks run in `poll`. An event loop, or a thread, calls it when the file descriptor `fd` is readable. `fd` is
    open until `close`.
    """

    fd: int

    @abstractmethod
    def free_slots(self, direction: Direction) -> int:
        """Number of batches that `issue` can take now in this direction."""

    @abstractmethod
    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        """Start a batch without blocking.

        Raises:
            DeviceError: the batch could not be started; nothing of it is in flight and no callback follows.
        """

    @abstractmethod
    def poll(self) -> None:
        """Run the callbacks that are due, in order, without blocking. All run, even if one raises."""

    @abstractmethod
    def close(self) -> None:
        """Block until batches in flight have ended, then release everything; idempotent. From any thread.

        Callbacks that `poll` has not run yet are lost.
        """


def call_all(calls: Iterator[Callable[[], object]]) -> None:
    """Make all calls in order, even if one raises; the error is raised at the end."""
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
