"""Look-up and load: how many blocks of a request are cached, and the jobs that bring them to the device."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvortex.index import pack_keys
from kvortex.stats import EngineStats
from kvortex.types import BlockHash, MissReason
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, LoadJob
from kvortex.vllm.scheduler.admission import Admission
from kvortex.vllm.scheduler.context import PlannerContext
from kvortex.vllm.scheduler.jobs import LoadInFlight
from kvortex.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class LoadPlanner:
    """Looks requests up and plans their loads.

    Args:
        context: the pool and its lower tier.
        options: the connector's options.
        admission: says whether a request may load now.
        tracked: the requests by id, those that wait with blocks among them.
        stats: counts hits and misses.
    """

    def __init__(
        self,
        context: PlannerContext,
        options: ConnectorOptions,
        admission: Admission,
        tracked: Mapping[str, TrackedRequest],
        stats: EngineStats,
    ) -> None:
        self._context = context
        self._control = context.control
        self._keys = context.keys
        self._options = options
        self._admission = admission
        self._tracked = tracked
        self._stats = stats
        self._waiting_since_s: dict[str, float] = {}  # request -> since when it waits for a pending save

    # -- look-up -----------------------------------------------------------------------------------

    def look_up(self, tracked: TrackedRequest, num_computed_tokens: int, plan: ConnectorPlan) -> int | None:
        """Number of blocks that a request can load now.

        Args:
            tracked: the request, with `first` behind what vLLM's own cache has.
            num_computed_tokens: tokens that vLLM's own cache has.
            plan: the plan of the next step; a job that fetches more blocks from the lower tier is added to it.

        Returns:
            None while the request should wait, because more blocks are in flight to the pool.
        """
        request = tracked.request
        if tracked.computes or request.skip_reading_prefix_cache:
            return 0
        keys = self._keys.of(request, slice(tracked.first, None))
        # Behind a hit of vLLM's own cache, a single block is computed sooner than it is loaded.
        least = max(self._options.min_hit_blocks, 2 if num_computed_tokens else 1)
        if len(keys) < least:
            return 0
        found = self._control.index.prefix_length(keys)
        if found < len(keys) and (
            self._wait_for_block(request.request_id, keys[found])
            or self._begin_fetch(request, tracked.first + found, keys[found:], plan)
        ):
            return None
        if found < least or not self._admission.may_load(request, self._tracked.values()):
            return 0
        return found

    def _wait_for_block(self, request_id: str, key: BlockHash) -> bool:
        """Begin, or continue, to wait for a block that is in flight to the pool; False if waiting is not worthwhile."""
        tier = self._context.tier
        if tier is not None and tier.is_arriving(key):
            return True
        # A save in flight takes some milliseconds, less than to compute the block. It may fail: the wait is bounded.
        if self._control.index.miss_reason(key) is not MissReason.PENDING:
            self._waiting_since_s.pop(request_id, None)
            return False
        now_s = time.monotonic()
        since_s = self._waiting_since_s.setdefault(request_id, now_s)
        return now_s - since_s < self._options.pending_wait_s

    def _begin_fetch(self, request: "Request", number: int, keys: Sequence[BlockHash], plan: ConnectorPlan) -> bool:
        """Plan to fetch a request's blocks, from `number` on, from the lower tier; False if it has none of them."""
        tier = self._context.tier
        job = tier.plan_fetch(request, number, keys) if tier is not None else None
        if job is not None:
            plan.fetches.append(job)
        return job is not None

    def end_wait(self, request_id: str) -> None:
        """A request waits for no pending save any more."""
        self._waiting_since_s.pop(request_id, None)

    # -- load --------------------------------------------------------------------------------------

    def plan_load(self, tracked: TrackedRequest, count: int, plan: ConnectorPlan) -> None:
        """Pin `count` blocks that were promised to a request, and plan their load into its device blocks."""
        # Selected by position in the request: behind them there may be more blocks, for drafts.
        wanted = slice(tracked.first, tracked.first + count)
        block_ids = np.array(tracked.block_ids[wanted], dtype=np.int32)
        load = self._control.plan_load(pack_keys(self._keys.of(tracked.request, wanted)), block_ids)
        missing = np.delete(block_ids, load.positions)
        request_id = tracked.request.request_id
        job_id = next(self._context.job_ids)
        plan.loads.append(LoadJob(job_id, request_id, load.transfer, tuple(missing.tolist())))
        plan.fresh_block_ids.update(block_ids.tolist())
        self._context.jobs.add(
            LoadInFlight(job_id=job_id, plan=load, request_id=request_id, started_s=time.perf_counter())
        )
        tracked.loading = job_id
        tracked.has_kv_from(plan.number)

    def count_misses(self, request: "Request") -> None:
        """Count the blocks that a request has to compute, because it loads nothing."""
        first = request.num_computed_tokens // self._context.block_size
        keys = self._keys.of(request, slice(first, None))
        found = self._control.index.prefix_length(keys)
        if found < len(keys):
            self._context.stats.count_misses(self._control.index.miss_reason(keys[found]), len(keys) - found)

    def finish(self, job: LoadInFlight) -> None:
        """Every worker has reported a load: unpin its blocks, and drop those that are corrupt."""
        count = job.plan.transfer.num_blocks
        succeeded, intact = np.ones(count, dtype=np.bool_), np.ones(count, dtype=np.bool_)
        succeeded[list(job.failed)] = False
        intact[list(job.corrupt)] = False
        outcomes = self._control.finish_load(job.plan, intact, succeeded)
        tracked = self._tracked.get(job.request_id)
        if tracked is not None:
            tracked.loading = None
            tracked.computes = any(outcome is not None for outcome in outcomes)
        self._stats.record_outcomes(outcomes)
        seconds = time.perf_counter() - job.started_s
        self._context.stats.count_load(outcomes, self._context.sizes.raw, seconds)
