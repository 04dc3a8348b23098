"""The scheduler half in the real Scheduler, with workers that are played by hand."""

from typing import Any

import numpy as np
from played_owner import PlayedOwner
from scheduler_harness import SchedulerHarness, Step, WorkerReport

from kvortex.types import TransferPlan
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.plans import ConnectorPlan, JobOutcome
from kvortex.vllm.scheduler.half import SchedulerHalf
from kvortex.vllm.versions import IS_NEWER, WorkerReports

BLOCK_SIZE = 32
BLOCK_NBYTES = BLOCK_SIZE * 4096


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 1000, count).tolist()


class Played:
    """A harness and a worker that does what it is told."""

    def __init__(self, harness: SchedulerHarness) -> None:
        self.harness = harness
        self.open_loads: dict[str, int] = {}
        self.open_saves: dict[int, TransferPlan] = {}
        self.owner: PlayedOwner | None = None

    @property
    def half(self) -> SchedulerHalf:
        return self.harness.connector._scheduler

    def schedule(self) -> Step:
        step = self.harness.schedule()
        plan: ConnectorPlan = step.metadata
        self.open_saves |= {job.job_id: job.transfer for job in [*plan.early_saves, *plan.saves]}
        self.open_loads |= {job.request_id: job.job_id for job in plan.loads}
        return step

    def report(self, *, saves: bool = True, loads: bool = True, **faults: Any) -> WorkerReport:
        """Everything open has ended; `failed`, `corrupt`, `lossy` are positions, `invalid_block_ids` as vLLM has it."""
        outcomes: list[JobOutcome] = []
        received: set[str] = set()
        if saves:
            lossy = faults.get("lossy", ())
            for job, transfer in self.open_saves.items():
                digests = None if self.owner is None else self.owner.digests_of(transfer)
                outcomes.append(JobOutcome(job, lossy, (), lossy, digests))
            self.open_saves = {}
        if loads:
            failed, corrupt = faults.get("failed", ()), faults.get("corrupt", ())
            outcomes += [JobOutcome(job, failed, corrupt) for job in self.open_loads.values()]
            received = set(self.open_loads)
            self.open_loads = {}
        message = WorkerReports(outcomes) if outcomes else None
        channel = {"worker_meta": message} if IS_NEWER else {"kv_cache_events": message}
        return WorkerReport(
            finished_recving=received,
            invalid_block_ids=faults.get("invalid_block_ids", frozenset()),
            kv_connector_stats=ConnectorStats(),  # there are always some, if empty ones
            **channel,
        )

    def step(self, **options: Any) -> Step:
        step = self.schedule()
        self.harness.finish(step, self.report(**options))
        return step

    def run(self, request_id: str) -> None:
        for _ in range(400):
            if self.harness.requests[request_id].is_finished():
                self.step()  # delivers the last outcomes
                return
            self.step()
        raise TimeoutError(request_id)
