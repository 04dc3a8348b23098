"""What the planner of loads and the planner of saves both work on."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvortex.planes.control import ControlPlane
from kvortex.types import BlockSizes
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.scheduler.events import EventLog
from kvortex.vllm.scheduler.jobs import JobsInFlight, LoadInFlight, SaveInFlight
from kvortex.vllm.scheduler.tier_planner import TierPlanner


@dataclass(frozen=True)
class PlannerContext:
    """One pool with its lower tier, as the workers registered them.

    Args:
        block_size: tokens of a block.
        sizes: bytes that a block takes in the pool.
        control: the pool's index and allocator.
        tier: plans writes and fetches; None without a lower tier.
        keys: gives the keys of a request's blocks.
        jobs: loads and saves in flight.
        job_ids: numbers for jobs.
        stats: counts for vLLM's metrics.
        events: takes note of what enters the pool; None where vLLM publishes no events.
    """

    block_size: int
    sizes: BlockSizes
    control: ControlPlane
    tier: TierPlanner | None
    keys: BlockKeys
    jobs: JobsInFlight[LoadInFlight | SaveInFlight]
    job_ids: Iterator[int]
    stats: ConnectorStats
    events: EventLog | None
