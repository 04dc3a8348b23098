"""Jobs in flight: the scheduler half's record of each job until every worker has reported it.

The scheduler half sends a job as plain data, in the `ConnectorPlan` of a step, and keeps its record here. Each worker
carries out its part (`RankJob`) and reports a `JobOutcome`.

    scheduler half          sent as           every worker                       ended: every worker has reported
    ----------------------  ----------------  ---------------------------------  --------------------------------------
    LoadInFlight            LoadJob           pool -> paged cache, then checks   the request computes what is missing
    SaveInFlight            SaveJob           paged cache -> pool                its blocks are visible, or dropped

    states of a job:  planned -> sent with a step's plan -> in flight -> reported by all workers -> ended

A job that fails, or that is cancelled at shutdown, is reported too: with the positions of the blocks that failed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvortex.kernels.digest import digests_of_rows
from kvortex.planes.plans import LoadPlan, Planned, SavePlan
from kvortex.vllm.plans import JobOutcome, SaveDigests
from kvortex.vllm.scheduler.blocks import BlockRun
from kvortex.vllm.scheduler.events import PlannedBlocks
from kvortex.vllm.scheduler.handover import is_wanted
from kvortex.vllm.scheduler.requests import TrackedRequest


@dataclass(kw_only=True)
class JobInFlight:
    """A job that the workers carry out, with the outcomes that have come so far.

    `failed`, `corrupt` and `too_lossy` are positions in the job's transfer, of all workers together.
    """

    job_id: int
    num_reports: int = 0
    failed: set[int] = field(default_factory=set)
    corrupt: set[int] = field(default_factory=set)
    too_lossy: set[int] = field(default_factory=set)
    digests: list[SaveDigests] = field(default_factory=list)  # of a save, where the owner of the pool keeps them

    def add(self, outcome: JobOutcome) -> None:
        """Take in one worker's outcome."""
        self.num_reports += 1
        self.failed.update(outcome.failed)
        self.corrupt.update(outcome.corrupt)
        self.too_lossy.update(outcome.too_lossy)
        if outcome.digests is not None:
            self.digests.append(outcome.digests)


@dataclass(kw_only=True)
class LoadInFlight(JobInFlight):
    """A load: blocks of one request in flight from the pool. `started_s` is from `time.perf_counter`."""

    plan: LoadPlan
    request_id: str
    started_s: float


@dataclass(slots=True)
class SavePart:
    """Consecutive blocks of one group of one request in a save."""

    tracked: TrackedRequest
    run: BlockRun
    event: PlannedBlocks | None  # None where vLLM publishes no events


@dataclass(kw_only=True, slots=True)
class BegunSave:
    """A save that the owner of the pool works out, and that becomes a job in this step or the next."""

    planned: Planned[SavePlan]
    parts: list[SavePart]
    order: NDArray[np.intp] | None  # see `SaveInFlight`
    as_is: bool
    block_ids: list[int]  # of the device, each once
    pool: str

    @property
    def is_handed_over(self) -> bool:
        """True if another server is to go on with one of the requests."""
        return any(is_wanted(part.tracked.request) for part in self.parts)


@dataclass(kw_only=True)
class SaveInFlight(JobInFlight):
    """A save: blocks of one request or more in flight to the pool."""

    plan: SavePlan
    parts: list[SavePart]
    order: (
        NDArray[np.intp] | None
    )  # for each of the save's keys its position among those of all parts; None if in order
    as_is: bool = False  # stored raw, because packing would lose too much
    is_stale: bool = False  # weights have changed since it was planned: its blocks have been dropped
    holds_blocks: bool = True  # vLLM gives its device blocks to nobody; where saves hold none, this has no meaning

    def block_digests(self, num_parts: int) -> NDArray[np.uint64]:
        """The digests of the blocks that move, `uint64 [n]`, from those of their parts; zeros where workers have them.

        Args:
            num_parts: how many parts a block has, see `kvortex.vllm.worker.parts`.
        """
        parts = np.zeros((self.plan.transfer.num_blocks, num_parts), dtype=np.uint64)
        for of_part in self.digests:
            parts[of_part.positions, of_part.part] = of_part.digests
        return parts[:, 0] if num_parts == 1 else digests_of_rows(parts)


AnyJob = TypeVar("AnyJob", bound=JobInFlight)


class JobsInFlight(Generic[AnyJob]):
    """The jobs that are not over yet, by number.

    Args:
        num_workers: workers that report each job.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._jobs: dict[int, AnyJob] = {}

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[AnyJob]:
        return iter(self._jobs.values())

    def __getitem__(self, job_id: int) -> AnyJob:
        return self._jobs[job_id]

    def add(self, job: AnyJob) -> None:
        """A job is planned."""
        self._jobs[job.job_id] = job

    def report(self, outcome: JobOutcome) -> AnyJob:
        """Take in one worker's outcome, and return the job that it belongs to."""
        job = self._jobs[outcome.job_id]
        job.add(outcome)
        return job

    def is_reported(self, job: AnyJob) -> bool:
        """True once every worker has reported the job."""
        return job.num_reports == self._num_workers

    def end(self, job: AnyJob) -> None:
        """A job is over."""
        del self._jobs[job.job_id]
