"""One rank's jobs: carried out on the loop of its data plane, from their start to their outcome."""

import asyncio
import functools
import logging
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.cuda.driver import Event
from kvortex.errors import KVortexError
from kvortex.planes.data import DataPlane
from kvortex.sched import TransferRequest
from kvortex.types import TransferPlan
from kvortex.vllm.plans import JobOutcome, LoadJob, SaveDigests, SaveJob
from kvortex.vllm.worker.digests import Digests
from kvortex.vllm.worker.places import RankPlaces
from kvortex.vllm.worker.reports import ReportBox

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class RankJob:
    """One rank's part of a load or a save.

    Args:
        job: the job as planned, for all ranks.
        transfer: the part of its transfer that this rank moves, with this rank's offsets.
        positions: the positions of these blocks in the job's transfer, `intp [n]`.
        read: an event that is set once the job does not read the paged cache any more; only saves use it.
        overwritten: True for a save whose device blocks were given away before it had read them: it has failed.
    """

    job: SaveJob | LoadJob
    transfer: TransferPlan
    positions: NDArray[np.intp]
    read: threading.Event = field(default_factory=threading.Event)
    overwritten: bool = False

    @functools.cached_property
    def device_blocks(self) -> frozenset[int]:
        """The blocks of the paged cache that it reads or writes."""
        return frozenset(self.transfer.block_ids.tolist())


class JobRunner:
    """Carries out the jobs of one rank. Its public methods are called from the thread of vLLM's steps.

    Args:
        data: moves blocks between paged cache and pool.
        loop: the loop of the data plane, on a thread of its own.
        digests: of the blocks in the pool.
        places: this rank's groups and offsets, and what it saves.
        part: number of this rank's part of blocks in an owner's pool.
        reports: takes the outcomes.
        pool: name of the owner's memory; jobs that were planned for another one are refused.
    """

    def __init__(
        self,
        data: DataPlane,
        loop: asyncio.AbstractEventLoop,
        digests: Digests,
        places: RankPlaces,
        part: int,
        reports: ReportBox,
        *,
        pool: str = "",
    ) -> None:
        self.pool = pool
        self._data = data
        self._loop = loop
        self._digests = digests
        self._places = places
        self._part = part
        self._reports = reports
        self.num_weights = 0
        """Changes of the weights so far. Loads that were planned before the last of them bring nothing."""
        self._transfers: set[asyncio.Task[None]] = set()  # they touch the paged cache

    @property
    def num_transfers(self) -> int:
        """Jobs in flight that touch the paged cache."""
        return len(self._transfers)

    # -- start -------------------------------------------------------------------------------------

    def whole(self, job: LoadJob) -> RankJob:
        """A load: every rank loads all blocks of its layers."""
        return RankJob(job, *self._places.whole(job.transfer))

    def part_of(self, job: SaveJob) -> RankJob:
        """This rank's part of a save; it may be empty."""
        return RankJob(job, *self._places.part_of(job.transfer))

    def start(self, part: RankJob) -> None:
        """Start a load or a save, behind what the stream of the forward has queued so far."""
        after = self._data.record_event()
        self._loop.call_soon_threadsafe(self._spawn_transfer, part, after)

    def refuse(self, part: RankJob) -> None:
        """Let a load or a save fail without a start."""
        self._end(part, JobOutcome(part.job.job_id, _ids(part.positions)))

    def skip(self, job: SaveJob) -> None:
        """Report a save in which this rank has no part."""
        self._reports.end(JobOutcome(job.job_id))

    # -- end ---------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of the pool's memory, so that it can be unmapped. No job may start any more."""
        self._digests.release()

    async def settle(self) -> None:
        """Wait until no job touches the paged cache; on the loop."""
        while self._transfers:
            await asyncio.wait(self._transfers)

    # -- on the loop's thread ----------------------------------------------------------------------

    def _spawn_transfer(self, part: RankJob, after: Event | None) -> None:
        _spawn(self._transfer(part, after), self._transfers)

    async def _transfer(self, part: RankJob, after: Event | None) -> None:
        data, is_save = self._data, isinstance(part.job, SaveJob)
        ended: list[TransferRequest] = []
        try:
            request = await data.start(part.transfer, after, ended.append, wants_source_released=is_save)
            if is_save:
                await request.source_released.wait()
                part.read.set()
            await data.wait([request])
        except KVortexError as error:
            logger.warning("a job could not be started: %s", error)
        finally:
            part.read.set()
            data.release_event(after)
            outcome = self._outcome_of(part, ended[0])
            if part.overwritten or self._is_outdated(part.job):
                outcome = JobOutcome(part.job.job_id, _ids(part.positions))
            self._end(part, outcome)

    def _is_outdated(self, job: SaveJob | LoadJob) -> bool:
        """True for a load from an owner's pool that was planned for other weights than those of now."""
        return isinstance(job, LoadJob) and job.digests is not None and job.num_weights < self.num_weights

    def _end(self, part: RankJob, outcome: JobOutcome) -> None:
        part.read.set()
        if isinstance(part.job, LoadJob):
            self._reports.end_load(part.job, outcome)
        else:
            self._reports.end(outcome)

    def _outcome_of(self, part: RankJob, request: TransferRequest) -> JobOutcome:
        corrupt = np.zeros(request.num_blocks, dtype=np.bool_)
        reported: SaveDigests | None = None
        planned = part.job.transfer.part(part.positions)
        if isinstance(part.job, LoadJob):
            expected = None if part.job.digests is None else part.job.digests[part.positions]
            intact = self._digests.are_intact(planned, part.transfer, expected, request.digests)
            corrupt = request.succeeded & ~intact
        else:
            done = np.flatnonzero(request.succeeded)
            digests = self._digests.saved(planned.part(done), part.transfer.part(done), request.digests[done])
            if digests is not None:
                reported = SaveDigests(self._part, part.positions[done], digests)
        masks = (~request.succeeded, corrupt, request.too_lossy)
        failed, damaged, too_lossy = (_ids(part.positions[mask]) for mask in masks)
        return JobOutcome(part.job.job_id, failed, damaged, too_lossy, reported)


def _ids(positions: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(positions.tolist())


def _spawn(call: Coroutine[Any, Any, None], tasks: "set[asyncio.Task[None]]") -> None:
    task = asyncio.get_running_loop().create_task(call)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    task.add_done_callback(_log_error)


def _log_error(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a transfer job ended in an unexpected error", exc_info=error)
