"""The scheduler half: answers vLLM's scheduler and puts each step's plan together. Synchronous, microseconds a call."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from vllm.v1.request import RequestStatus

from kvortex.config import format_bytes
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane
from kvortex.stats import EngineStats
from kvortex.types import BlockSizes
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.model import expected_sizes, layer_specs, only_group, refuse_unserved
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, PoolShrunk, WeightsChanged, WorkerHandshake
from kvortex.vllm.scheduler.admission import Admission
from kvortex.vllm.scheduler.context import PlannerContext
from kvortex.vllm.scheduler.events import EventLog
from kvortex.vllm.scheduler.jobs import JobsInFlight, LoadInFlight, SaveInFlight
from kvortex.vllm.scheduler.loads import LoadPlanner
from kvortex.vllm.scheduler.requests import TrackedRequest, computing_requests, follow_block_tables
from kvortex.vllm.scheduler.saves import SavePlanner
from kvortex.vllm.scheduler.stale import StaleKV
from kvortex.vllm.scheduler.tier_index import TierIndex, check_supported
from kvortex.vllm.scheduler.tier_planner import TierPlanner
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
"""Steps that are remembered until they are over. vLLM has two or three in flight at a time."""


class SchedulerHalf:
    """Knows which blocks are cached, by vLLM's own block hashes, and plans every save and load.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes of the paged cache.
        options: the connector's options.
        handshake_in_step: True if the workers' handshakes come with the first step. Nothing is planned before.

    Raises:
        ConfigError: the model cannot be served, see `only_group` and `refuse_unserved`.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        options: ConnectorOptions,
        *,
        handshake_in_step: bool = False,
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
        self._may_save = transfer is None or transfer.is_kv_producer
        self._may_load = transfer is None or transfer.is_kv_consumer
        self._num_workers = int(vllm_config.parallel_config.world_size)
        self._ready = not handshake_in_step
        self._stale = StaleKV()
        self._sizes = expected_sizes(kv_cache_config, options.engine.codec.name)
        self._control = ControlPlane.from_config(options.engine, options.engine.pool.bytes, self._sizes)
        check_supported(options.engine)
        self._tier: TierPlanner | None = None
        self._tracked: dict[str, TrackedRequest] = {}
        self._jobs = JobsInFlight[LoadInFlight | SaveInFlight](self._num_workers)
        self._aborted: set[str] = set()  # requests that ended while they loaded
        self._job_ids = itertools.count()
        self._keys = BlockKeys(vllm_config.lora_config)
        self._plan_numbers = itertools.count()
        self._plan = self._next_plan()
        self._gives_tokens: deque[bool] = deque(maxlen=MAX_STEPS)  # whether each step in flight gives tokens
        self._stats = ConnectorStats()
        self.stats = EngineStats()
        events = vllm_config.kv_events_config
        self._events = EventLog(self._block_size) if events is not None and events.enable_kv_cache_events else None
        if self._events is not None:
            self._control.on_removed = self._events.add_removed
        self._make_planners()
        if hash_root_is_random(vllm_config.cache_config.prefix_caching_hash_algo):
            logger.warning(
                "vLLM's block hashes start from a random root: they serve this process only. "
                "Set PYTHONHASHSEED to share a cache between processes or restarts"
            )

    def _next_plan(self) -> ConnectorPlan:
        return ConnectorPlan(number=next(self._plan_numbers))

    def _make_planners(self) -> None:
        context = PlannerContext(
            block_size=self._block_size,
            sizes=self._sizes,
            control=self._control,
            tier=self._tier,
            keys=self._keys,
            jobs=self._jobs,
            job_ids=self._job_ids,
            stats=self._stats,
            events=self._events,
        )
        self._loads = LoadPlanner(context, self._options, self._admission, self._tracked, self.stats)
        self._saves = SavePlanner(context, save_decoded=self._options.save_decoded)

    # -- set-up ------------------------------------------------------------------------------------

    def accept_handshake(self, handshakes: Sequence[WorkerHandshake]) -> None:
        """Learn what the workers registered: how large their blocks are and how much their pools hold.

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
        self._make_planners()
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
        return TierPlanner(
            engine, self._control, self._sizes, index, self._num_workers, self._job_ids, self._stats, self._events
        )

    # -- look-up and load --------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded behind those that are computed, and whether that happens asynchronously.

        None asks vLLM to leave the request in its queue, and to ask again.
        """
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.request = request
        tracked.first = num_computed_tokens // self._block_size
        if request.status == RequestStatus.PREEMPTED:
            tracked.block_ids = []  # no step's output names the requests that a reset preempts
        if self._admission.must_let_pass(request, self._tracked.values()):
            self._admission.pass_over(request)
            return None, False
        found: int | None = 0
        if self._ready and self._may_load:
            found = self._loads.look_up(tracked, num_computed_tokens, self._plan)
        if found is None:
            self._admission.pass_over(request)
            return None, False
        self._admission.settle(request.request_id)
        logger.debug("request %s: %d blocks to load behind %d", request.request_id, found, tracked.first)
        return found * self._block_size, found > 0

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Pin the blocks that were promised, and plan their load into the device blocks that were just allocated."""
        block_ids = list(blocks.get_block_ids()[0])
        if not block_ids:
            return  # an older MultiConnector says so that another connector loads; see `allocated_for_others`
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.request = request
        self._loads.end_wait(request.request_id)
        self._admission.settle(request.request_id)
        tracked.block_ids = block_ids
        drop_stale_hashes(request, self._block_size)
        if num_external_tokens:
            self._loads.plan_load(tracked, num_external_tokens // self._block_size, self._plan)
        elif tracked.loading is None:
            self._loads.count_misses(request)

    def allocated_for_others(self, request: "Request", blocks: "KVCacheBlocks") -> None:
        """A request got device blocks into which some connector loads: saves must have read what they held before."""
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.block_ids = list(blocks.get_block_ids()[0])
        self._plan.fresh_block_ids.update(tracked.block_ids[tracked.first :])

    # -- steps -------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> ConnectorPlan:
        """This step's jobs: loads planned since the last step, and saves of the blocks that this one completes."""
        plan = self._plan
        plan.fresh_block_ids |= follow_block_tables(self._tracked, scheduler_output, self._block_size)
        computing = computing_requests(self._tracked, scheduler_output)
        for tracked, _ in computing:
            tracked.has_kv_from(plan.number)
        if self._ready and self._may_save:
            self._saves.plan(computing, scheduler_output.scheduled_spec_decode_tokens, plan)
        if scheduler_output.num_scheduled_tokens:
            self._stale.step_computes(plan.number)
        self._gives_tokens.append(any(tracked.gives_token_after(num_tokens) for tracked, num_tokens in computing))
        self._plan = self._next_plan()
        return plan

    # -- outcomes ----------------------------------------------------------------------------------

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Take in what the workers report; rewrites the output for requests that were aborted while they loaded."""
        reports = reports_in(connector_output)
        self.accept_handshake([report for report in reports if isinstance(report, WorkerHandshake)])
        if changes := [report.last_plan for report in reports if isinstance(report, WeightsChanged)]:
            self._stale.weights_changed(max(changes), self._tracked.values())
            self._drop_stale()
        for report in reports:
            if isinstance(report, PoolShrunk):
                self._shrink(report.pool_bytes)
            elif isinstance(report, JobOutcome):
                self._take_outcome(report)
        report_aborted_loads(connector_output, self._aborted)

    def _take_outcome(self, outcome: JobOutcome) -> None:
        if self._tier is not None and self._tier.take_outcome(outcome):
            return
        job = self._jobs.report(outcome)
        if self._jobs.is_reported(job):
            self._jobs.end(job)
            if isinstance(job, SaveInFlight):
                self._saves.finish(job)
            else:
                self._loads.finish(job)

    def _shrink(self, pool_bytes: int) -> None:
        allocator = self._control.allocator
        if pool_bytes < allocator.capacity_bytes:
            self._control.shrink(pool_bytes)
            logger.warning("no more of the pool can be pinned: it holds %s from now on", self._describe_pool())

    def _describe_pool(self) -> str:
        capacity_bytes = self._control.allocator.capacity_bytes
        num_blocks = capacity_bytes // self._sizes.packed
        return f"{format_bytes(capacity_bytes)} a rank, {num_blocks} blocks or {num_blocks * self._block_size} tokens"

    def take_events(self) -> Iterable["KVCacheEvent"]:
        """KV events since the last call; none unless vLLM publishes them."""
        return self._events.take() if self._events is not None else ()

    # -- ends --------------------------------------------------------------------------------------

    def request_finished(self, request: "Request") -> bool:
        """Forget a request; returns True if its device blocks must be held, because a load still writes into them."""
        self._loads.end_wait(request.request_id)
        self._admission.settle(request.request_id)
        if self._tier is not None:
            self._tier.forget_request(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        used = self._keys.of(request, slice(tracked.num_planned))
        self._control.touch(pack_keys(used))
        if self._tier is not None:
            self._plan.used_keys += self._tier.keys_to_touch(used)
        if tracked.loading is None:
            return False
        self._aborted.add(request.request_id)
        return HOLD_ABORTED_LOADS

    def _drop_stale(self) -> None:
        """The weights have changed: drop all that is stored, and what the saves in flight store."""
        self._keys.forget_adapters()
        for job in self._jobs:
            if isinstance(job, SaveInFlight):
                job.is_stale = True
        self.reset_cache()

    def vllm_was_reset(self) -> None:
        """vLLM has emptied its own prefix cache, which one does when weights change: have the workers compare them."""
        self._plan.compare_weights = True
        if self._stale.vllm_was_reset():
            self._stale.mark(self._plan.number, self._tracked.values())
            self._drop_stale()

    def reset_cache(self) -> bool:
        """Drop every cached block, those of the lower tier too; jobs in flight end as usual."""
        if self._events is not None:
            self._events.add_all_removed()
        self._control.clear()
        if self._tier is not None:
            self._tier.forget_all()
        return True

    def has_work(self) -> bool:
        """True while jobs are in flight: the workers report their ends with a step."""
        return bool(self._jobs) or (self._tier is not None and self._tier.num_jobs > 0)

    def take_stats(self) -> ConnectorStats | None:
        """Counters since they were last taken; None if there are none. vLLM asks once a step, when the step is over.

        vLLM 0.23's offline engine drops the counters of a step without tokens, so they are kept for a later one.
        """
        are_kept = self._gives_tokens.popleft() if self._gives_tokens else True
        if self._stats.is_empty() or (self._tracked and not are_kept):
            return None
        return self._stats.take()

    def shutdown(self) -> None:
        """Drop everything but what the lower tier keeps; idempotent."""
        self._control.clear()
        if self._tier is not None:
            self._tier.close()
