"""What carries out batches: the contract that the CUDA, the host and the test executors share."""

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
        outcome: digests `uint64 [num_blocks]`, or what went wrong.
        too_lossy: `bool [num_blocks]` of a save that packs: blocks that lose more than allowed, and are not to be used.
    """

    def __call__(
        self, outcome: NDArray[np.uint64] | Exception, too_lossy: NDArray[np.bool_] | None = None, /
    ) -> None: ...


SourceRead: TypeAlias = Callable[[], None]
"""Called on the loop, if a request of the batch asked for it, when a save has read the cache's blocks."""


class TransferExecutor(ABC):
    """Carries out batches. All methods are called on one thread.

    After `issue` a batch always ends in exactly one call of its completion, cancelled callers or not; until
    then it may touch the cache's blocks and the pool's extents.

    Callbacks run in `poll`, which is called when the descriptor `fd` is readable: by an event loop that watches
    it, or by a thread that waits for it. `fd` is open until `close`.
    """

    fd: int

    @abstractmethod
    def free_slots(self, direction: Direction) -> int:
        """Batches that `issue` can take now in this direction."""

    @abstractmethod
    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        """Start a batch without blocking.

        Raises:
            DeviceError: it could not be started; then nothing of it is under way and no callback follows.
        """

    @abstractmethod
    def poll(self) -> None:
        """Run the callbacks that are due, in order and without blocking. What one raises keeps no other back."""

    @abstractmethod
    def close(self) -> None:
        """Block until what is under way has ended and release everything; idempotent. From any thread.

        Callbacks that `poll` has not run are lost.
        """


def call_all(calls: Iterator[Callable[[], object]]) -> None:
    """In order, and each even if one before it raises."""
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
