"""The scheduler half: knows what is cached and plans every save and load. Synchronous, microseconds a call."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from vllm.v1.request import RequestStatus

from kvortex.config import format_bytes
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane, SavePlan
from kvortex.stats import EngineStats
from kvortex.types import BlockHash, BlockSizes, MissReason
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.model import expected_sizes, layer_specs, only_group, refuse_unserved
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, PoolShrunk, SaveJob, WeightsChanged, WorkerHandshake
from kvortex.vllm.scheduler.admission import Admission
from kvortex.vllm.scheduler.events import EventLog, PlannedBlocks
from kvortex.vllm.scheduler.jobs import OpenJob, SavePart, TrackedRequest, group_parts
from kvortex.vllm.scheduler.tier_index import TierIndex, check_supported
from kvortex.vllm.scheduler.tier_planner import NO_WRITE, TierPlanner
from kvortex.vllm.versions import (
    HOLD_ABORTED_LOADS,
    drop_stale_hashes,
    hash_root_is_random,
    num_lookahead_tokens,
    report_aborted_loads,
    reports_in,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

MAX_STEPS: Final = 64
"""Steps that are remembered until they are over; vLLM has two or three of them at a time."""


class SchedulerHalf:
    """Plans over vLLM's own block hashes.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes of the paged cache.
        options: the connector's.
        waits_for_hello: what the workers registered comes with their first step: nothing is planned before.

    Raises:
        ConfigError: a model that cannot be served, see `only_group` and `refuse_unserved`.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        options: ConnectorOptions,
        *,
        waits_for_hello: bool = False,
    ) -> None:
        refuse_unserved(vllm_config, kv_cache_config)
        self._options = options
        self._block_size = int(layer_specs(only_group(kv_cache_config))[0].block_size)
        self._admission = Admission(
            int(kv_cache_config.num_blocks) - 1,  # one is vLLM's null block
            self._block_size,
            num_lookahead_tokens(vllm_config),
        )
        transfer = vllm_config.kv_transfer_config
        self._saves = transfer is None or transfer.is_kv_producer
        self._loads = transfer is None or transfer.is_kv_consumer
        self._num_workers = int(vllm_config.parallel_config.world_size)
        self._ready = not waits_for_hello
        self._first_plan: int | None = None  # that computed anything since vLLM's own cache was last emptied
        self._is_mixed = False  # vLLM's own cache may serve what older weights computed
        self._sizes = expected_sizes(kv_cache_config, options.engine.codec.name)
        self._control = ControlPlane.from_config(options.engine, options.engine.pool.bytes, self._sizes)
        check_supported(options.engine)
        self._tier: TierPlanner | None = None
        self._tracked: dict[str, TrackedRequest] = {}
        self._waiting_since_s: dict[str, float] = {}
        self._jobs: dict[int, OpenJob] = {}
        self._aborted: set[str] = set()
        self._job_ids = itertools.count()
        self._keys = BlockKeys(vllm_config.lora_config)
        self._plan_numbers = itertools.count()
        self._plan = self._next_plan()
        self._gives_tokens: deque[bool] = deque(maxlen=MAX_STEPS)  # of each step that is not over
        self._stats = ConnectorStats()
        self.stats = EngineStats()
        events = vllm_config.kv_events_config
        self._events = EventLog(self._block_size) if events is not None and events.enable_kv_cache_events else None
        if self._events is not None:
            self._control.on_removed = self._events.removed
        if hash_root_is_random(vllm_config.cache_config.prefix_caching_hash_algo):
            logger.warning(
                "vLLM's block hashes start from a random root: they serve this process only. "
                "Set PYTHONHASHSEED to share a cache between processes or restarts"
            )

    def _next_plan(self) -> ConnectorPlan:
        return ConnectorPlan(number=next(self._plan_numbers))

    def accept_handshake(self, handshakes: Sequence[WorkerHandshake]) -> None:
        """Learn what the workers registered: how large their blocks are, how much their pools hold.

        Raises:
            ConfigError: workers disagree.
        """
        if not handshakes:
            return
        sizes = {handshake.sizes for handshake in handshakes}
        if len(sizes) > 1:
            found = sorted((s.raw, s.packed) for s in sizes)
            raise ConfigError(f"workers registered blocks of {found} bytes (as they are, packed): they must agree")
        self._plan_with(sizes.pop(), min(handshake.pool_bytes for handshake in handshakes))
        namespaces = [handshake.namespace for handshake in handshakes if handshake.namespace is not None]
        if self._tier is None and len(namespaces) == len(handshakes):
            self._tier = self._plan_tier(min(namespaces, key=lambda n: (n.pp_rank, n.tp_rank)))
        self._ready = True
        disk = f"disk at {self._options.engine.disk.path}" if self._tier is not None else "no disk"
        logger.info("KVortexConnector is ready: a pool of %s; %s", self._describe_pool(), disk)

    def _plan_with(self, sizes: BlockSizes, pool_bytes: int) -> None:
        if (sizes, pool_bytes) == (self._sizes, self._control.allocator.capacity_bytes):
            return
        removed = self._control.on_removed
        self._sizes = sizes
        self._control = ControlPlane.from_config(self._options.engine, pool_bytes, sizes)
        self._control.on_removed = removed

    def _plan_tier(self, namespace: Namespace) -> TierPlanner | None:
        engine = self._options.engine
        try:
            index = TierIndex(engine, namespace)
        except ConfigError as error:
            logger.error("the lower tier cannot be used, blocks stay in the pool alone: %s", error)
            return None
        number = partial(next, self._job_ids)
        return TierPlanner(
            engine, self._control, self._sizes, index, self._num_workers, number, lambda: self._stats, self._events
        )

    # -- look-up and load --------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those computed; None to be asked again; always asynchronous."""
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.request = request
        tracked.first = num_computed_tokens // self._block_size
        if request.status == RequestStatus.PREEMPTED:
            tracked.block_ids = []  # a reset preempts without a word in any step's output
        if self._admission.must_let_pass(request, self._tracked.values()):
            self._admission.pass_over(request)
            return None, False
        found = self._find(tracked, num_computed_tokens)
        if found is None:
            self._admission.pass_over(request)
            return None, False
        self._admission.settle(request.request_id)
        logger.debug("request %s: %d blocks to load behind %d", request.request_id, found, tracked.first)
        return found * self._block_size, found > 0

    def _find(self, tracked: TrackedRequest, num_computed_tokens: int) -> int | None:
        """Blocks to load for a request; None while it is worth waiting for more."""
        request = tracked.request
        if not self._ready or not self._loads or tracked.computes or request.skip_reading_prefix_cache:
            return 0
        keys = self._keys.of(request, slice(tracked.first, None))
        # Behind a hit of vLLM's own, a single block is computed sooner than it is loaded.
        least = max(self._options.min_hit_blocks, 2 if num_computed_tokens else 1)
        if len(keys) < least:
            return 0
        found = self._control.index.prefix_length(keys)
        if found < len(keys) and (
            self._wait_for_block(request.request_id, keys[found])
            or self._begin_fetch(request, tracked.first + found, keys[found:])
        ):
            return None
        if found < least or not self._admission.may_load(request, self._tracked.values()):
            return 0
        return found

    def _begin_fetch(self, request: "Request", number: int, keys: Sequence[BlockHash]) -> bool:
        """Have the workers bring the next blocks of a request from the lower tier; False where there are none."""
        job = self._tier.plan_fetch(request, number, keys) if self._tier is not None else None
        if job is not None:
            self._plan.fetches.append(job)
        return job is not None

    def _wait_for_block(self, request_id: str, key: BlockHash) -> bool:
        """Begin, or go on, to wait for a block that is on its way into the pool; False if it is not worth it."""
        if self._tier is not None and self._tier.is_arriving(key):
            return True
        # Its save is under way: some milliseconds now spare computing it. Bounded, as a save may fail.
        if self._control.index.miss_reason(key) is not MissReason.PENDING:
            self._waiting_since_s.pop(request_id, None)
            return False
        now_s = time.monotonic()
        since_s = self._waiting_since_s.setdefault(request_id, now_s)
        return now_s - since_s < self._options.pending_wait_s

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Pin what was promised and plan its load into the blocks just allocated."""
        block_ids = list(blocks.get_block_ids()[0])
        if not block_ids:
            return  # how an older MultiConnector says that another one loads; see `allocated_for_others`
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.request = request
        self._waiting_since_s.pop(request.request_id, None)
        self._admission.settle(request.request_id)
        tracked.block_ids = block_ids
        drop_stale_hashes(request, self._block_size)
        if num_external_tokens:
            self._plan_load(tracked, num_external_tokens // self._block_size)
        elif tracked.loading is None:
            self._count_misses(request)

    def allocated_for_others(self, request: "Request", blocks: "KVCacheBlocks") -> None:
        """A request got blocks that another connector loads into, or this one: what they held must have been read."""
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.block_ids = list(blocks.get_block_ids()[0])
        self._plan.fresh_block_ids.update(tracked.block_ids[tracked.first :])

    def _plan_load(self, tracked: TrackedRequest, count: int) -> None:
        # By their place in the request: behind them there may be more, for drafts.
        wanted = slice(tracked.first, tracked.first + count)
        block_ids = np.array(tracked.block_ids[wanted], dtype=np.int32)
        keys = self._keys.of(tracked.request, wanted)
        plan = self._control.plan_load(pack_keys(keys), block_ids)
        job_id = next(self._job_ids)
        missing = np.delete(block_ids, plan.positions)
        request_id = tracked.request.request_id
        self._plan.loads.append(LoadJob(job_id, request_id, plan.transfer, tuple(missing.tolist())))
        self._plan.fresh_block_ids.update(block_ids.tolist())
        self._jobs[job_id] = OpenJob(plan, time.perf_counter(), request_id)
        tracked.loading = job_id
        self._begin(tracked)

    def _begin(self, tracked: TrackedRequest) -> None:
        if tracked.first_plan is None:
            tracked.first_plan = self._plan.number

    def _count_misses(self, request: "Request") -> None:
        first = request.num_computed_tokens // self._block_size
        keys = self._keys.of(request, slice(first, None))
        found = self._control.index.prefix_length(keys)
        if found < len(keys):
            self._stats.count_misses(self._control.index.miss_reason(keys[found]), len(keys) - found)

    # -- save --------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> ConnectorPlan:
        """This step's jobs: loads planned since the last one, and saves of the blocks that it completes."""
        self._follow_tables(scheduler_output)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        parts: list[SavePart] = []
        as_is: list[SavePart] = []
        gives_tokens = False
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            request = tracked.request
            gives_tokens |= request.num_computed_tokens + num_tokens >= request.num_tokens
            self._begin(tracked)
            if self._ready and self._saves and not tracked.has_stale_kv:
                full = self._num_full_blocks(tracked, num_tokens - len(drafts.get(request_id, ())))
                if tracked.too_lossy:
                    as_is += self._parts_as_is(tracked, full)
                if full > tracked.num_planned:
                    parts.append(self._part(tracked, slice(tracked.num_planned, full)))
                    tracked.num_planned = full
        for group in group_parts(parts):
            self._plan_save(group)
        for group in group_parts(as_is):
            self._plan_save(group, as_is=True)
        if scheduler_output.num_scheduled_tokens and self._first_plan is None:
            self._first_plan = self._plan.number
        self._gives_tokens.append(gives_tokens)
        plan, self._plan = self._plan, self._next_plan()
        return plan

    def _follow_tables(self, scheduler_output: "SchedulerOutput") -> None:
        fresh = self._plan.fresh_block_ids
        for request_id in scheduler_output.preempted_req_ids or ():
            if (tracked := self._tracked.get(request_id)) is not None:
                tracked.block_ids = []
        for new in scheduler_output.scheduled_new_reqs:
            if (tracked := self._tracked.get(new.req_id)) is not None:
                tracked.block_ids = list(new.block_ids[0])
            fresh.update(new.block_ids[0][new.num_computed_tokens // self._block_size :])
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, block_ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if block_ids is None:
                continue
            resumed = request_id in cached.resumed_req_ids
            fresh.update(block_ids[0][num_computed // self._block_size :] if resumed else block_ids[0])
            if (tracked := self._tracked.get(request_id)) is not None:
                tracked.block_ids = list(block_ids[0]) if resumed else tracked.block_ids + list(block_ids[0])

    def _num_full_blocks(self, tracked: TrackedRequest, num_tokens: int) -> int:
        request = tracked.request
        computed = request.num_computed_tokens + num_tokens
        if not self._options.save_decoded:
            computed = min(computed, request.num_prompt_tokens)
        return int(min(computed // self._block_size, len(request.block_hashes), len(tracked.block_ids)))

    def _parts_as_is(self, tracked: TrackedRequest, full: int) -> list[SavePart]:
        # A request that was preempted meanwhile has not got all of its blocks again.
        numbers = [number for number in sorted(tracked.too_lossy) if number < full]
        tracked.too_lossy.clear()
        return [self._part(tracked, slice(number, number + 1)) for number in numbers]

    def _part(self, tracked: TrackedRequest, blocks: slice) -> SavePart:
        event = PlannedBlocks.of(tracked.request, blocks, self._block_size) if self._events is not None else None
        return SavePart(tracked, blocks, self._keys.of(tracked.request, blocks), event)

    def _plan_save(self, parts: list[SavePart], *, as_is: bool = False) -> None:
        keys = [key for part in parts for key in part.keys]
        block_ids = np.array([n for part in parts for n in part.tracked.block_ids[part.blocks]], dtype=np.int32)
        plan = self._control.plan_save(pack_keys(keys), block_ids, "save", as_is=as_is)
        if not plan.transfer.num_blocks:
            return
        job_id = next(self._job_ids)
        job = self._jobs[job_id] = OpenJob(plan, time.perf_counter(), as_is=as_is, parts=parts)
        keys_to_write = b""
        if self._tier is not None:
            positions = plan.positions.tolist()
            told = [(part.event, n) for part in parts if part.event is not None for n in range(len(part.keys))]
            keys_to_write, job.write_id = self._tier.plan_write(
                [keys[position] for position in positions], [told[position] for position in positions if told]
            )
        self._plan.saves.append(SaveJob(job_id, plan.transfer, keys_to_write, job.write_id))
        logger.debug("job %d saves %d of %d blocks", job_id, plan.transfer.num_blocks, len(keys))

    # -- outcomes ----------------------------------------------------------------------------------

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Take in what the workers report; rewrites the output for requests that were aborted while loading."""
        reports = reports_in(connector_output)
        self.accept_handshake([report for report in reports if isinstance(report, WorkerHandshake)])
        if changes := [report.last_plan for report in reports if isinstance(report, WeightsChanged)]:
            last_plan = max(changes)
            self._is_mixed |= self._first_plan is not None and self._first_plan <= last_plan
            self._forget_weights(last_plan)
        for outcome in reports:
            if isinstance(outcome, PoolShrunk):
                self._shrink(outcome.pool_bytes)
            if not isinstance(outcome, JobOutcome):
                continue
            if self._tier is not None and self._tier.report(outcome):
                continue
            job = self._jobs[outcome.job_id]
            job.add(outcome)
            if job.reports == self._num_workers:
                del self._jobs[outcome.job_id]
                self._finish(job)
        report_aborted_loads(connector_output, self._aborted)

    def _shrink(self, pool_bytes: int) -> None:
        allocator = self._control.allocator
        if pool_bytes < allocator.capacity_bytes:
            self._control.shrink(pool_bytes)
            logger.warning("no more of the pool can be pinned: it holds %s from now on", self._describe_pool())

    def _describe_pool(self) -> str:
        capacity_bytes = self._control.allocator.capacity_bytes
        num_blocks = capacity_bytes // self._sizes.packed
        return f"{format_bytes(capacity_bytes)} a rank, {num_blocks} blocks or {num_blocks * self._block_size} tokens"

    def _finish(self, job: OpenJob) -> None:
        count = job.plan.transfer.num_blocks
        succeeded = np.ones(count, dtype=np.bool_)
        succeeded[list(job.failed)] = False
        if isinstance(job.plan, SavePlan):
            self._finish_save(job, job.plan, succeeded)
        else:
            intact = np.ones(count, dtype=np.bool_)
            intact[list(job.corrupt)] = False
            self._finish_load(job, self._control.finish_load(job.plan, intact, succeeded))

    def _finish_save(self, job: OpenJob, plan: SavePlan, succeeded: NDArray[np.bool_]) -> None:
        count = len(succeeded)
        lossy = np.zeros(count, dtype=np.bool_)
        lossy[list(job.too_lossy)] = True
        self._control.finish_save(plan, np.zeros(count, dtype=np.uint64), succeeded, lossy)
        if self._tier is not None and job.write_id != NO_WRITE:
            self._tier.saved(job.write_id, succeeded)
        if job.as_is:
            self._stats.add("kept_as_is_blocks", int(np.count_nonzero(succeeded)))
        self._stats.count_save(len(job.failed - job.too_lossy), count - len(job.too_lossy), self._sizes.raw)
        if job.is_forgotten:  # requests that have nothing to do with what was forgotten go on, and save again
            for part in job.parts:
                part.tracked.num_planned = min(part.tracked.num_planned, part.blocks.start)
        if job.too_lossy or self._events is not None:
            self._report_to_parts(job, plan, succeeded, lossy)

    def _report_to_parts(
        self, job: OpenJob, plan: SavePlan, succeeded: NDArray[np.bool_], lossy: NDArray[np.bool_]
    ) -> None:
        positions, start = plan.positions, 0
        for part in job.parts:
            mine = slice(*np.searchsorted(positions, (start, start + len(part.keys))))
            numbers = positions[mine] - start
            part.tracked.too_lossy.update((part.blocks.start + numbers[lossy[mine]]).tolist())
            self._publish(part, numbers[succeeded[mine]], plan.transfer.offsets[mine][succeeded[mine]])
            start += len(part.keys)

    def _publish(self, part: SavePart, numbers: NDArray[np.intp], offsets: NDArray[np.int64]) -> None:
        if self._events is not None and part.event is not None:
            # A block that a reset has overtaken has come and gone: nothing is at its offset.
            seen = self._control.allocator.holds(offsets)
            self._events.stored(part.event, numbers[seen].tolist(), offsets[seen].tolist())

    def take_events(self) -> Iterable["KVCacheEvent"]:
        """KV events since the last call; none unless vLLM publishes them."""
        return self._events.take() if self._events is not None else ()

    def _finish_load(self, job: OpenJob, outcomes: Sequence[MissReason | None]) -> None:
        tracked = self._tracked.get(job.request_id)
        if tracked is not None:
            tracked.loading = None
            tracked.computes = any(outcome is not None for outcome in outcomes)
        self.stats.record_outcomes(outcomes)
        self._stats.count_load(outcomes, self._sizes.raw, time.perf_counter() - job.started_s)

    # -- ends --------------------------------------------------------------------------------------

    def request_finished(self, request: "Request") -> bool:
        """Forget a request; True if its blocks must be held because a load is still writing them."""
        self._waiting_since_s.pop(request.request_id, None)
        self._admission.settle(request.request_id)
        if self._tier is not None:
            self._tier.forget_request(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        used = self._keys.of(request, slice(tracked.num_planned))
        self._control.touch(pack_keys(used))
        if self._tier is not None:
            self._plan.used_keys += self._tier.used(used)
        if tracked.loading is None:
            return False
        self._aborted.add(request.request_id)
        return HOLD_ABORTED_LOADS

    def _forget_weights(self, last_plan: int) -> None:
        """The weights are others: nothing that is stored is served, nothing computed up to that plan is stored."""
        self._keys.forget_adapters()
        for tracked in self._tracked.values():
            tracked.has_stale_kv |= tracked.first_plan is not None and tracked.first_plan <= last_plan
            tracked.num_planned = 0
        for job in self._jobs.values():
            job.is_forgotten = True
        self.reset_cache()

    def vllm_was_reset(self) -> None:
        """vLLM has emptied its own prefix cache: until now it may have served what old weights computed."""
        self._plan.looks_at_weights = True
        if self._is_mixed:
            self._forget_weights(self._plan.number)
        self._is_mixed = False
        self._first_plan = None

    def reset_cache(self) -> bool:
        """Forget every cached block, those of the lower tier too; jobs under way end as usual."""
        if self._events is not None:
            self._events.forget()
        self._control.clear()
        if self._tier is not None:
            self._tier.forget_all()
        return True

    def has_work(self) -> bool:
        """Jobs are under way, whose end the workers report with a step."""
        return bool(self._jobs) or (self._tier is not None and self._tier.num_jobs > 0)

    def take_stats(self) -> ConnectorStats | None:
        """Figures since they were last taken; None if there are none. Asked for once a step, as it is taken in.

        vLLM 0.23's offline engine drops those of a step without tokens, so they wait for a later one.
        """
        are_kept = self._gives_tokens.popleft() if self._gives_tokens else True
        if self._stats.is_empty() or (self._tracked and not are_kept):
            return None
        taken, self._stats = self._stats, ConnectorStats()
        return taken

    def shutdown(self) -> None:
        """Forget everything, but for what the lower tier keeps; idempotent."""
        self._control.clear()
        if self._tier is not None:
            self._tier.close()
