"""Look-up and load: how many blocks of a request are cached, and the jobs that bring them to the device."""

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.planes.plans import LoadPlan, Planned
from kvortex.stats import EngineStats
from kvortex.tiering.keys import split_keys
from kvortex.types import BlockHash, MissReason
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, LoadJob
from kvortex.vllm.scheduler.admission import Admission
from kvortex.vllm.scheduler.blocks import Reach, Wanted
from kvortex.vllm.scheduler.context import PlannerContext
from kvortex.vllm.scheduler.handover import Waits, promised_tokens
from kvortex.vllm.scheduler.jobs import LoadInFlight
from kvortex.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class _BegunLoad(NamedTuple):
    """A load that is planned for the next step, and in which memory."""

    job_id: int
    request_id: str
    planned: Planned[LoadPlan]
    block_ids: NDArray[np.int32]
    pool: str


class LoadPlanner:
    """Looks requests up and plans their loads.

    Args:
        context: the pool and its lower tier.
        options: the connector's options.
        admission: says whether a request may load now.
        tracked: the requests by id, those that wait with blocks among them.
        stats: counts hits and misses.
        takes_over: requests wait for blocks that other servers have promised.
    """

    def __init__(
        self,
        context: PlannerContext,
        options: ConnectorOptions,
        admission: Admission,
        tracked: Mapping[str, TrackedRequest],
        stats: EngineStats,
        *,
        takes_over: bool,
    ) -> None:
        self._context = context
        self._control = context.control
        self._options = options
        self._admission = admission
        self._tracked = tracked
        self._stats = stats
        self._begun: list[_BegunLoad] = []
        self._waiting_since_s: dict[str, float] = {}  # request -> since when it waits for a pending save
        self._takes_over = takes_over
        self._handovers = Waits(options.handover_wait_s)

    # -- look-up -----------------------------------------------------------------------------------

    def look_up(self, tracked: TrackedRequest) -> int | None:
        """Number of tokens that a request can load now.

        Args:
            tracked: the request, with `local_tokens` that vLLM's own cache has.

        Returns:
            None while the request should wait, because more blocks are in flight to the pool, or the lower tier is
            being asked for them.
        """
        request, rules = tracked.request, self._context.rules
        tracked.looked_up = None
        if tracked.computes or request.skip_reading_prefix_cache:
            return 0
        # Behind a hit of vLLM's own cache, a single block is computed sooner than it is loaded.
        least = max(self._options.min_hit_blocks, 2 if tracked.local_tokens else 1)
        if rules.num_ahead(tracked) < least:
            return 0
        tier = self._context.tier
        if tier is not None and (
            tier.is_fetching(request.request_id)
            or tier.waits_for_answer(request.request_id, lambda: self._not_in_pool(tracked))
        ):
            return None
        found, wanted = rules.reach(tracked, tier.known if tier is not None else None)
        if tier is None:
            tracked.looked_up = tracked.local_tokens, Reach(found, wanted)
        if wanted.keys and (self._wait_for_blocks(request.request_id, wanted) or self._begin_fetch(request, wanted)):
            return None
        if self._waits_for_promise(tracked, found):
            return None
        if found < least * rules.alignment or not self._admission.may_load(request, self._tracked.values()):
            return 0
        return found

    def _not_in_pool(self, tracked: TrackedRequest) -> list[BlockHash]:
        keys = self._context.rules.keys_ahead(tracked)
        mask = self._control.index.contains_mask(keys)
        return [BlockHash(key) for key in split_keys(keys[~mask])]

    def _wait_for_blocks(self, request_id: str, wanted: Wanted) -> bool:
        """Begin, or continue, to wait for blocks that are in flight to the pool; False if that is not worthwhile."""
        # A save in flight takes some milliseconds, less than to compute the block. It may fail: the wait is bounded.
        if wanted.reason is not MissReason.PENDING:
            self._waiting_since_s.pop(request_id, None)
            return False
        now_s = time.monotonic()
        since_s = self._waiting_since_s.setdefault(request_id, now_s)
        return now_s - since_s < self._options.pending_wait_s

    def _begin_fetch(self, request: "Request", wanted: Wanted) -> bool:
        """Have blocks that a request needs fetched from the lower tier; False if it has none of them."""
        tier = self._context.tier
        return tier is not None and tier.fetch(request, wanted)

    def _waits_for_promise(self, tracked: TrackedRequest, found: int) -> bool:
        """True while blocks that another server has promised are not in the pool, unless that takes too long."""
        request, rules = tracked.request, self._context.rules
        promised = promised_tokens(request) if self._takes_over else 0
        ahead = min((promised - tracked.local_tokens) // rules.alignment, rules.num_ahead(tracked))
        if found // rules.alignment >= ahead or not self._handovers.goes_on(request.request_id, found):
            return False
        if self._context.tier is not None:
            self._context.tier.ask_again(request.request_id)
        return True

    def end_wait(self, request_id: str) -> None:
        """A request waits for blocks of others no more."""
        self._waiting_since_s.pop(request_id, None)
        self._handovers.end(request_id)

    # -- load --------------------------------------------------------------------------------------

    def plan_load(self, tracked: TrackedRequest, num_tokens: int, blocks: "KVCacheBlocks", plan: ConnectorPlan) -> None:
        """Pin the blocks of `num_tokens` tokens that were promised to a request, and plan their load.

        Args:
            tracked: the request.
            num_tokens: tokens that were promised.
            blocks: the device blocks that were allocated.
            plan: the plan of the next step; the job is added to it.
        """
        keys, block_ids = self._context.rules.to_load(tracked, num_tokens, blocks)
        job_id = next(self._context.job_ids)
        begun = self._control.begin_load(keys, block_ids)
        self._begun.append(_BegunLoad(job_id, tracked.request.request_id, begun, block_ids, self._context.pool))
        plan.fresh_block_ids.update(block_ids.tolist())
        tracked.loading = job_id
        tracked.loaded = range(tracked.local_tokens, tracked.local_tokens + num_tokens)
        tracked.disk_tokens = self._disk_tokens(tracked, num_tokens)
        tracked.has_kv_from(plan.number)

    def add_jobs(self, plan: ConnectorPlan) -> None:
        """Add the loads that were planned for a step to its plan. An owner has worked them out meanwhile."""
        begun, self._begun = self._begun, []
        for one in begun:
            load = one.planned.result()
            missing = np.delete(one.block_ids, load.positions)
            digests = load.pins.digests.copy() if self._context.keeps_digests else None
            plan.loads.append(
                LoadJob(
                    one.job_id,
                    one.request_id,
                    load.transfer,
                    tuple(missing.tolist()),
                    digests,
                    self._context.num_weights(),
                    one.pool,
                )
            )
            self._context.jobs.add(
                LoadInFlight(job_id=one.job_id, plan=load, request_id=one.request_id, started_s=time.perf_counter())
            )

    def _disk_tokens(self, tracked: TrackedRequest, num_tokens: int) -> int:
        """How many of the tokens that a request loads came from the lower tier, by the blocks of the anchor group."""
        tier, groups = self._context.tier, self._control.groups
        if tier is None or groups is None:
            return 0
        block_size, start = groups.groups[groups.anchor].block_size, tracked.local_tokens
        blocks = range(start // block_size, (start + num_tokens) // block_size)
        return tier.num_fetched(tracked.request.request_id, groups.anchor, blocks) * block_size

    def count_misses(self, tracked: TrackedRequest) -> None:
        """Count the blocks that a request has to compute, because it loads nothing."""
        rules = self._context.rules
        tracked.local_tokens = tracked.request.num_computed_tokens
        ahead = rules.num_ahead(tracked)
        if ahead <= 0:
            return
        known, tracked.looked_up = tracked.looked_up, None
        if known is not None and known[0] == tracked.local_tokens:
            found, wanted = known[1]
        else:
            found, wanted = rules.reach(tracked, None)
        if (missed := ahead - found // rules.alignment) > 0:
            reason = wanted.reason or (
                self._control.index.miss_reason(wanted.keys[0]) if wanted.keys else MissReason.NEVER_STORED
            )
            self._context.stats.count_misses(reason, missed)

    def finish(self, job: LoadInFlight) -> bool:
        """Every worker has reported a load: unpin its blocks, and drop those that are corrupt.

        Returns:
            True if some of its blocks have not arrived, and the request is still there: it has to compute them.
        """
        count = job.plan.transfer.num_blocks
        succeeded, intact = np.ones(count, dtype=np.bool_), np.ones(count, dtype=np.bool_)
        succeeded[list(job.failed)] = False
        intact[list(job.corrupt)] = False
        outcomes = self._control.finish_load(job.plan, intact, succeeded)
        tracked = self._tracked.get(job.request_id)
        if tracked is not None:
            tracked.loading = None
            tracked.computes = outcomes.count(None) < len(outcomes)
            if tracked.computes:
                tracked.loaded = range(0)
        self._stats.record_outcomes(outcomes)
        seconds = time.perf_counter() - job.started_s
        nbytes = self._context.bytes_moved(job.plan.transfer.forms, succeeded & intact)
        self._context.stats.count_load(outcomes, nbytes, seconds)
        return tracked is not None and tracked.computes
