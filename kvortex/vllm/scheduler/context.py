"""What the planner of loads and the planner of saves both work on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.owner import Control, RemoteControl
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.scheduler.blocks import BlockRules
from kvortex.vllm.scheduler.events import EventLog
from kvortex.vllm.scheduler.jobs import JobsInFlight, LoadInFlight, SaveInFlight
from kvortex.vllm.scheduler.lower_tier import LowerTier
from kvortex.vllm.scheduler.owner_events import OwnerEvents


@dataclass(frozen=True)
class PlannerContext:
    """One pool with its lower tier, as the workers registered them.

    Args:
        rules: say which blocks of a request are keyed, found, loaded and saved.
        control: the pool's index and allocator.
        tier: the lower tier behind an owner's pool; None without one.
        num_parts: how many parts a block in an owner's pool has, see `kvortex.vllm.worker.parts`.
        jobs: loads and saves in flight.
        job_ids: numbers for jobs.
        stats: counts for vLLM's metrics.
        events: takes note of what enters the pool; None where vLLM publishes no events.
        owner_events: those of an owner's pool; None without an owner.
        num_weights: says how many changes of the weights are known.
    """

    rules: BlockRules
    control: Control
    tier: LowerTier | None
    num_parts: int
    jobs: JobsInFlight[LoadInFlight | SaveInFlight]
    job_ids: Iterator[int]
    stats: ConnectorStats
    events: EventLog | None
    owner_events: OwnerEvents | None
    num_weights: Callable[[], int]

    @property
    def keeps_digests(self) -> bool:
        """True if the pool's index has the digests of its blocks; otherwise the workers have them."""
        return isinstance(self.control, RemoteControl)

    @property
    def pool(self) -> str:
        """Name of the owner's memory that is planned for; empty without an owner."""
        return self.control.client.label if isinstance(self.control, RemoteControl) else ""

    def bytes_moved(self, forms: NDArray[np.uint8] | None, moved: NDArray[np.bool_]) -> int:
        """Bytes of blocks in a worker's paged cache, padding included.

        Args:
            forms: the forms of a transfer's blocks, `uint8 [n]`; None if all have form 0.
            moved: which of them were moved, `bool [n]`.
        """
        extents = self.control.extents
        if forms is None:
            return int(np.count_nonzero(moved)) * int(extents[0])
        return int(extents[forms[moved] // 2 * 2].sum())
