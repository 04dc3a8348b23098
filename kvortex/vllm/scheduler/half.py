"""The scheduler half: answers vLLM's scheduler and puts each step's plan together. Synchronous, microseconds a call."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vllm.v1.request import RequestStatus

from kvortex.config import KVortexConfig, format_bytes
from kvortex.errors import ConfigError, EngineStateError, KVortexError
from kvortex.owner import Control, RemoteControl
from kvortex.planes.control import ControlPlane
from kvortex.stats import EngineStats
from kvortex.types import BlockSizes
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.model import ServedGroups, expected_sizes, has_draft_layers, max_blocks_of_request, refuse_unserved
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import (
    ConnectorPlan,
    JobOutcome,
    OwnedHandshake,
    PoolShrunk,
    WeightsChanged,
    WorkerHandshake,
)
from kvortex.vllm.scheduler import handover
from kvortex.vllm.scheduler.admission import Admission
from kvortex.vllm.scheduler.blocks import BlockRules, FullAttention
from kvortex.vllm.scheduler.context import PlannerContext
from kvortex.vllm.scheduler.events import EventGroup, EventLog
from kvortex.vllm.scheduler.hybrid import Hybrid
from kvortex.vllm.scheduler.jobs import JobsInFlight, LoadInFlight, SaveInFlight
from kvortex.vllm.scheduler.joining import Members
from kvortex.vllm.scheduler.loads import LoadPlanner
from kvortex.vllm.scheduler.lower_tier import LowerTier
from kvortex.vllm.scheduler.owner_events import OwnerEvents
from kvortex.vllm.scheduler.requests import TrackedRequest, computing_requests
from kvortex.vllm.scheduler.saves import SavePlanner
from kvortex.vllm.scheduler.stale import StaleKV
from kvortex.vllm.versions import (
    HOLD_ABORTED_LOADS,
    drop_stale_hashes,
    fail_load,
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


class _Planners(NamedTuple):
    rules: BlockRules
    admission: Admission
    loads: LoadPlanner
    saves: SavePlanner


class SchedulerHalf:
    """Knows which blocks are cached, by vLLM's own block hashes, and plans every save and load.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes of the paged cache.
        options: the connector's options.
        is_alone: False inside of a `MultiConnector`. There the workers' handshakes come with the first step, and
            nothing is planned before. And another connector may carry prompts to other servers.

    Raises:
        ConfigError: the model cannot be served, see `refuse_unserved`.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        options: ConnectorOptions,
        *,
        is_alone: bool = True,
    ) -> None:
        refuse_unserved(vllm_config, kv_cache_config)
        self._options = options
        self._vllm_config = vllm_config
        self._groups = ServedGroups(kv_cache_config)
        self._manager: Any = None  # vLLM's, which hybrid models need
        self._scheduler: Any = None  # vLLM's, where failed loads of such models are not reported by workers
        self._num_device_blocks = int(kv_cache_config.num_blocks) - 1  # one is vLLM's null block
        transfer = vllm_config.kv_transfer_config
        self._may_save = transfer is None or transfer.is_kv_producer
        self._may_load = transfer is None or transfer.is_kv_consumer
        self._num_workers = int(vllm_config.parallel_config.world_size)
        self._has_owner = bool(options.engine.owner.socket or options.engine.lower_tier)
        self._members = Members(self._num_workers, options.engine.owner)
        self._num_parts = 1
        self._owner_events: OwnerEvents | None = None
        self._ready = is_alone and not self._has_owner
        self._hands_over = is_alone and _reaches_others(options.engine)
        self._num_weights = 0  # changes of the weights that are known here
        self._stale = StaleKV()
        self._sizes = expected_sizes(self._groups, options.engine.codec.name)
        self._control: Control = self._make_control(self._sizes, options.engine.pool.bytes)
        self._tier: LowerTier | None = None
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
        self._events: EventLog | None = None
        if events is not None and events.enable_kv_cache_events:
            described = [EventGroup(*facts) for facts in self._groups.facts]
            self._events = EventLog(described, self._groups.set.hash_block_size)
        if self._events is not None and isinstance(self._control, ControlPlane):
            self._control.on_removed = self._events.add_removed
        self._made: _Planners | None = None
        self._is_simple = self._groups.is_one_of_full_attention
        if self._is_simple:
            self._make_planners()
        if hash_root_is_random(vllm_config.cache_config.prefix_caching_hash_algo):
            logger.warning(
                "vLLM's block hashes start from a random root: they serve this process only. "
                "Set PYTHONHASHSEED to share a cache between processes or restarts"
            )

    def _next_plan(self) -> ConnectorPlan:
        return ConnectorPlan(number=next(self._plan_numbers))

    def _make_control(self, sizes: tuple[BlockSizes, ...], pool_bytes: int) -> ControlPlane:
        return ControlPlane.from_config(self._options.engine, pool_bytes, sizes, self._groups.set)

    def _make_rules(self) -> BlockRules:
        index, save_decoded = self._control.index, self._options.save_decoded
        if self._is_simple:
            return FullAttention(index, self._keys, self._groups.set.hash_block_size, save_decoded=save_decoded)
        return Hybrid(
            index,
            self._keys,
            self._groups,
            self._manager,
            max_blocks_of_request(self._vllm_config, self._groups.every),
            save_decoded=save_decoded,
            drafts=has_draft_layers(self._vllm_config),
        )

    def _make_planners(self) -> None:
        rules = self._make_rules()
        context = PlannerContext(
            rules=rules,
            control=self._control,
            tier=self._tier,
            num_parts=self._num_parts,
            owner_events=self._owner_events,
            jobs=self._jobs,
            job_ids=self._job_ids,
            stats=self._stats,
            events=self._events,
            num_weights=lambda: self._num_weights,
        )
        admission = Admission(self._num_device_blocks, rules, num_lookahead_tokens(self._vllm_config))
        loads = LoadPlanner(context, self._options, admission, self._tracked, self.stats, takes_over=self._hands_over)
        self._made = _Planners(rules, admission, loads, SavePlanner(context))

    @property
    def _planners(self) -> "_Planners":
        if self._made is None:
            raise EngineStateError("vLLM has not told the connector about its KV cache manager: call bind first")
        return self._made

    def bind(self, manager: Any, scheduler: Any = None) -> None:
        """Learn vLLM's `KVCacheManager`, and its scheduler in a version in which workers cannot report failed loads."""
        self._manager = manager
        self._scheduler = None if self._groups.is_one_of_full_attention else scheduler
        hash_block_size = int(getattr(manager.block_pool, "hash_block_size", self._groups.set.hash_block_size))
        if self._events is not None:
            self._events.hash_block_size = hash_block_size
        # Drafts are computed when a step's forward counts as over, so their KV must be saved later.
        saves_later = has_draft_layers(self._vllm_config) and self._vllm_config.cache_config.enable_prefix_caching
        self._is_simple &= hash_block_size == self._groups.set.hash_block_size and not saves_later
        self._make_planners()

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
            found = sorted([(s.raw, s.packed) for s in of_worker] for of_worker in sizes)
            raise ConfigError(f"workers registered blocks of {found} bytes (raw, packed): they must agree")
        if self._has_owner:
            self._ready = self._join_owner(handshakes)
            return
        self._plan_with(sizes.pop(), min(handshake.pool_bytes for handshake in handshakes))
        if self._made is not None:
            self._make_planners()
        self._ready = True
        logger.info("KVortexConnector is ready: a pool of %s; no lower tier", self._describe_pool())

    def _join_owner(self, handshakes: Sequence[WorkerHandshake]) -> bool:
        """Plan in the pool of the owner once all workers have joined it; False if they have not, or it is of no use."""
        first, control = self._members.add(handshakes), self._control
        if first is None:
            return self._ready
        if isinstance(control, RemoteControl):
            if control.client.label != first.pool:
                self._move_to(control, first)
            return True
        try:
            control = self._members.connect(handshakes[0].sizes, self._groups.set)
        except KVortexError as error:
            logger.error("the owner of the pool cannot be used, so nothing is stored: %s", error)
            return False
        self._control, self._sizes, self._num_parts = control, handshakes[0].sizes, first.num_parts
        if self._events is not None:
            self._events.tier = control.tier
            self._owner_events = OwnerEvents(control, self._events)
        if control.tier:
            wait_s = self._options.pending_wait_s
            self._tier = LowerTier(self._options.engine, control, self._stats, self._owner_events, wait_s)
        if self._made is not None:
            self._make_planners()
        logger.info(
            "KVortexConnector is ready: the pool of the owner at %s, %s; %s",
            first.socket,
            self._describe_pool(),
            f"lower tier: {control.tier}" if control.tier else "no lower tier",
        )
        return True

    def _move_to(self, control: RemoteControl, first: OwnedHandshake) -> None:
        """All workers have joined an owner that was started anew: plan in its pool from now on."""
        try:
            client = self._members.client(first)
            if client.label != first.pool:
                client.close()  # started anew once more: the workers will say so
                return
            control.move_to(client)
        except KVortexError as error:
            logger.error("the new owner of the pool cannot be used, so nothing is stored: %s", error)
            return
        logger.info("the pool of the new owner at %s is used, %s", first.socket, self._describe_pool())

    def _plan_with(self, sizes: tuple[BlockSizes, ...], pool_bytes: int) -> None:
        if (sizes, pool_bytes) == (self._sizes, self._control.allocator.capacity_bytes):
            return
        assert isinstance(self._control, ControlPlane)
        on_removed = self._control.on_removed
        self._sizes = sizes
        control = self._control = self._make_control(sizes, pool_bytes)
        control.on_removed = on_removed

    # -- look-up and load --------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded behind those that are computed, and whether that happens asynchronously.

        None asks vLLM to leave the request in its queue, and to ask again.
        """
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.request = request
        tracked.local_tokens = num_computed_tokens
        if request.status == RequestStatus.PREEMPTED:
            tracked.block_ids = []  # no step's output names the requests that a reset preempts
        if self._planners.admission.must_let_pass(request, self._tracked.values()):
            self._planners.admission.pass_over(request)
            return None, False
        found: int | None = 0
        if self._ready and self._may_load:
            found = self._planners.loads.look_up(tracked)
        if found is None:
            self._planners.admission.pass_over(request)
            return None, False
        self._planners.admission.settle(request.request_id)
        logger.debug("request %s: %d tokens to load behind %d", request.request_id, found, num_computed_tokens)
        return found, found > 0

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Pin the blocks that were promised, and plan their load into the device blocks that were just allocated."""
        block_ids = self._planners.rules.ids_of(blocks)
        if not block_ids:
            return  # an older MultiConnector says so that another connector loads; see `allocated_for_others`
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.request = request
        self._planners.loads.end_wait(request.request_id)
        self._planners.admission.settle(request.request_id)
        tracked.block_ids = block_ids
        drop_stale_hashes(request, self._groups.set.hash_block_size)
        if num_external_tokens:
            self._planners.loads.plan_load(tracked, num_external_tokens, blocks, self._plan)
        elif tracked.loading is None:
            self._planners.loads.count_misses(tracked)

    def disk_tokens(self, request: "Request") -> int:
        """How many of the tokens that a request loads now came from disk."""
        tracked = self._tracked.get(request.request_id)
        return tracked.disk_tokens if tracked is not None else 0

    def allocated_for_others(self, request: "Request", blocks: "KVCacheBlocks") -> None:
        """A request got device blocks into which some connector loads: saves must have read what they held before."""
        tracked = self._tracked.setdefault(request.request_id, TrackedRequest(request))
        tracked.block_ids = self._planners.rules.ids_of(blocks)
        self._plan.fresh_block_ids.update(self._planners.rules.fresh_ids(tracked))

    # -- steps -------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> ConnectorPlan:
        """This step's jobs: loads planned since the last step, and saves of the blocks that this one completes."""
        plan = self._plan
        plan.fresh_block_ids |= self._planners.rules.follow(self._tracked, scheduler_output)
        computing = computing_requests(self._tracked, scheduler_output)
        for tracked, _ in computing:
            tracked.has_kv_from(plan.number)
        if self._ready and self._may_save:
            tails = self._planners.rules.tails(self._tracked, scheduler_output)
            self._planners.saves.begin(computing, scheduler_output.scheduled_spec_decode_tokens, tails)
        if self._made is not None:
            self._made.loads.add_jobs(plan)
            self._made.saves.add_jobs(plan)
        plan.has_forward = bool(scheduler_output.num_scheduled_tokens)
        if plan.has_forward:
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
            self._num_weights += len(changes) // self._num_workers
            self._stale.weights_changed(max(changes), self._tracked.values())
            self._drop_stale()
        for report in reports:
            if isinstance(report, PoolShrunk):
                self._shrink(report.pool_bytes)
            elif isinstance(report, JobOutcome):
                self._take_outcome(report)
        report_aborted_loads(connector_output, self._aborted)

    def _take_outcome(self, outcome: JobOutcome) -> None:
        job = self._jobs.report(outcome)
        if self._jobs.is_reported(job):
            self._jobs.end(job)
            if isinstance(job, SaveInFlight):
                self._planners.saves.finish(job)
            elif self._planners.loads.finish(job) and self._fails_loads_itself:
                fail_load(self._scheduler, self._tracked[job.request_id].request)

    @property
    def _fails_loads_itself(self) -> bool:
        """True where workers report failed loads neither by device blocks nor by requests."""
        return self._scheduler is not None and not self._groups.is_one_of_full_attention

    def _shrink(self, pool_bytes: int) -> None:
        allocator = self._control.allocator
        if pool_bytes < allocator.capacity_bytes:
            self._control.shrink(pool_bytes)
            logger.warning("no more of the pool can be pinned: it holds %s from now on", self._describe_pool())

    def _describe_pool(self) -> str:
        capacity_bytes = self._control.allocator.capacity_bytes
        if len(self._sizes) > 1:
            return f"{format_bytes(capacity_bytes)} a rank, for {len(self._sizes)} groups of layers"
        num_blocks = capacity_bytes // self._sizes[0].packed
        num_tokens = num_blocks * self._groups.set.alignment
        return f"{format_bytes(capacity_bytes)} a rank, {num_blocks} blocks or {num_tokens} tokens"

    def take_events(self) -> Iterable["KVCacheEvent"]:
        """KV events since the last call; none unless vLLM publishes them."""
        if self._owner_events is not None:
            self._owner_events.update()
        return self._events.take() if self._events is not None else ()

    # -- ends --------------------------------------------------------------------------------------

    def add_finished_tail(
        self, request: "Request", block_ids: Sequence[Sequence[int]], tails: Sequence[tuple[int, int, int]]
    ) -> None:
        """Save the tail of a prompt whose request ends right there; see `BlockRules.add_finished_tail`."""
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and self._ready and self._may_save:
            self._planners.rules.add_finished_tail(tracked, block_ids, tails)

    def promise(self, request: "Request") -> dict[str, Any] | None:
        """What the answer to a request that ends says to the server that goes on with its prompt; None if nothing.

        Call it before `request_finished`.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not (self._hands_over and self._ready and self._may_save and handover.is_wanted(request)):
            return None
        return handover.promise(self._planners.rules.stored_tokens(tracked))

    def request_finished(self, request: "Request") -> bool:
        """Forget a request; returns True if its device blocks must be held, because a load still writes into them."""
        self._planners.loads.end_wait(request.request_id)
        self._planners.admission.settle(request.request_id)
        if self._tier is not None:
            self._tier.forget_request(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        self._control.touch(self._planners.rules.used(tracked))
        if tracked.loading is None:
            return False
        self._aborted.add(request.request_id)
        return HOLD_ABORTED_LOADS

    def _drop_stale(self) -> None:
        """The weights have changed: drop all that is stored, and what the saves in flight store."""
        self._keys.forget_adapters()
        if self._made is not None:
            self._made.saves.give_up()
        for job in self._jobs:
            if isinstance(job, SaveInFlight):
                job.is_stale = True
        self.reset_cache()

    def vllm_resets(self) -> None:
        """vLLM is about to empty its own prefix cache: let go of device blocks if no request has any.

        It refuses while blocks are in use. The next step waits for the saves that may still read them.
        """
        made = self._made
        if made is None:
            return
        made.saves.give_up()
        if not made.rules.holds or any(made.rules.num_held(t) for t in self._tracked.values()):
            return
        self._plan.fresh_block_ids |= made.saves.let_go()

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
        self._control.forget()
        return True

    def has_work(self) -> bool:
        """True while jobs are in flight: the workers report their ends with a step."""
        made = self._made
        is_late = made is not None and (made.rules.num_late > 0 or made.saves.waits)
        return is_late or bool(self._jobs)

    def holds_device_blocks(self) -> bool:
        """True while saves in flight keep device blocks from being given to others."""
        if self._is_simple:
            return False
        waits = self._made is not None and self._made.saves.waits
        return waits or any(isinstance(job, SaveInFlight) and job.holds_blocks for job in self._jobs)

    def take_stats(self) -> ConnectorStats | None:
        """Counters since they were last taken; None if there are none. vLLM asks once a step, when the step is over.

        vLLM 0.23's offline engine drops the counters of a step without tokens, so they are kept for a later one.
        """
        if self._tier is not None:
            self._tier.count()
        are_kept = self._gives_tokens.popleft() if self._gives_tokens else True
        if self._stats.is_empty() or (self._tracked and not are_kept):
            return None
        return self._stats.take()

    def shutdown(self) -> None:
        """Drop everything but what the lower tier keeps; idempotent."""
        if isinstance(self._control, RemoteControl):
            self._control.close()
        else:
            self._control.clear()


def _reaches_others(config: KVortexConfig) -> bool:
    """True if other servers may find what is saved: in a pool that they share, or in a tier that gets every block."""
    return bool(config.owner.socket) or (
        bool(config.lower_tier) and config.tier.inclusion == "inclusive" and config.tier.admission == "always"
    )
