"""A transfer executor that injects faults into another one."""

from collections.abc import Callable
from enum import Enum, auto
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import DeviceError
from kvortex.sched.batcher import Batch
from kvortex.sched.executor import Completion, SourceRead, TransferExecutor
from kvortex.types import Direction


class Fault(Enum):
    """What goes wrong with one batch."""

    REFUSE = auto()  # the batch cannot be started
    FAIL = auto()  # the batch moves its blocks, then ends with a device error
    LOSSY = auto()  # a save that packs: the error of its first block is above the limit
    CORRUPT = auto()  # one bit of the first block's digest is wrong, as if its bytes were wrong
    HOLD = auto()  # the end of the batch is not reported before `release`


class FaultInjectingExecutor(TransferExecutor):
    """Passes batches to another executor and injects faults.

    Args:
        inner: executor that carries out the batches.
        fault_of: returns what goes wrong with a batch, or None. It is called with the number of the batch, counted from
            0, and the batch.

    Attributes:
        batches: all batches so far, in order.
    """

    def __init__(self, inner: TransferExecutor, fault_of: Callable[[int, Batch], Fault | None]) -> None:
        self._inner = inner
        self._fault_of = fault_of
        self._held: list[Callable[[], None]] = []
        self._num_released = 0  # leading batches that are not held any more
        self.batches: list[Batch] = []
        self.fd = inner.fd

    @property
    def num_held(self) -> int:
        """Number of batches whose end waits for `release`."""
        return len(self._held)

    def release(self) -> None:
        """Report the end of every batch so far that is held, or is still moving and would be."""
        self._num_released = len(self.batches)
        held, self._held = self._held, []
        for report in held:
            report()

    def free_slots(self, direction: Direction) -> int:
        return self._inner.free_slots(direction)

    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        number = len(self.batches)
        fault = self._fault_of(number, batch)
        self.batches.append(batch)
        if fault is Fault.REFUSE:
            raise DeviceError("injected: the batch cannot be started")
        self._inner.issue(batch, partial(self._finish, number, fault, on_done), on_source_read)

    def poll(self) -> None:
        self._inner.poll()

    def _finish(
        self,
        number: int,
        fault: Fault | None,
        on_done: Completion,
        outcome: NDArray[np.uint64] | Exception,
        too_lossy: NDArray[np.bool_] | None = None,
        /,
    ) -> None:
        if fault is Fault.FAIL:
            outcome = DeviceError("injected: the batch failed on the device")
        elif fault is Fault.CORRUPT and not isinstance(outcome, Exception):
            outcome = outcome.copy()
            outcome[0] ^= np.uint64(1)
        elif fault is Fault.LOSSY and too_lossy is not None:
            too_lossy = too_lossy.copy()
            too_lossy[0] = True
        if fault is Fault.HOLD and number >= self._num_released:
            self._held.append(partial(on_done, outcome, too_lossy))
        else:
            on_done(outcome, too_lossy)

    def close(self) -> None:
        self.release()
        self._inner.close()
