"""KVortex as the connector of schedulers in vLLM's own tests, and workers, of which these tests know nothing."""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from groups_support import EMPTY, Content, GroupWorkers, Memory, Work
from lives import NOTHING, chain_of
from numpy.typing import NDArray
from scheduler_harness import Layers, SchedulerHarness, Step
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowMLASpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

from kvortex.index import pack_keys
from kvortex.vllm import KVortexConnector
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, SaveJob
from kvortex.vllm.scheduler.half import SchedulerHalf
from kvortex.vllm.scheduler.jobs import SaveInFlight

Told = tuple[int | None, bool]
"""What a test has a connector say of a request: tokens that it can load, and whether that is asynchronous."""
Answer = Callable[[Request, int], Told]
"""Says it of a request of which so many tokens are computed."""


class TestedConnector(KVortexConnector):
    """KVortex, and what vLLM's tests ask of the connectors that they are written for.

    Attributes:
        told: what the connector says that a test has configured. None: its pool holds what it has saved.
        instant: loads end in the step that begins them, because the test does not expect to tell of their ends.
        worker: carries out the jobs.
    """

    __test__ = False
    told: Answer | None = None
    instant: bool = True
    worker: "Worker"

    @property
    def is_active(self) -> bool:
        """False for a model whose KV KVortex leaves alone."""
        return isinstance(self._scheduler, SchedulerHalf)

    def __setattr__(self, name: str, value: Any) -> None:
        # A test that has this method replaced says what the connector finds.
        super().__setattr__(name, partial(self.ask, value) if name == "get_num_new_matched_tokens" else value)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> Told:
        if self.told is not None:
            return self.ask(self.told, request, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def ask(self, told: Answer, request: Request, num_computed_tokens: int) -> Told:
        """Have the pool hold what a test has its connector say, and ask KVortex."""
        num_tokens, is_async = told(request, num_computed_tokens)
        if num_tokens is None:
            return None, False
        self.instant = not is_async
        if self.is_active:
            self.worker.store(request, num_computed_tokens, num_computed_tokens + num_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ConnectorPlan:
        plan = super().build_connector_meta(scheduler_output)
        # vLLM's tests look at this list in the metadata of a connector of their own.
        cached = scheduler_output.scheduled_cached_reqs
        resumed = [name for name in cached.req_ids if name in cached.resumed_req_ids]
        vars(plan)["requests"] = [*(new.req_id for new in scheduler_output.scheduled_new_reqs), *resumed]
        return plan

    def request_finished_all_groups(self, request: Request, block_ids: tuple[list[int], ...]) -> tuple[bool, Any]:
        return self.request_finished(request, block_ids[0])  # whose calls a test may count


class ServedMemory(Memory):
    """The blocks of the groups that KVortex serves."""

    def __init__(self, harness: Any, groups: Sequence[Layers], served: Sequence[int]) -> None:
        super().__init__(harness, groups)
        self.blocks = defaultdict(lambda: EMPTY)
        self._served = served

    def compute(self, work: Work) -> None:
        known = list(self.harness.requests[work.name].all_token_ids)[: work.end]
        chain = chain_of(known) + [NOTHING] * (work.end - len(known))
        for number in self._served:
            if self.groups[number].kind == "state":
                self._compute_state(work, number, chain)
            else:
                self._look(work, number, chain)
                self._write(work, number, chain)


class Harness:
    """What `GroupWorkers` asks of a `SchedulerHarness`, over a scheduler that a test has made."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.vllm_config = scheduler, scheduler.vllm_config
        self.kv_cache_config = scheduler.kv_cache_config
        self.connector: TestedConnector = scheduler.connector
        self.requests: dict[str, Request] = {}
        self.null_block_id = int(scheduler.kv_cache_manager.block_pool.null_block.block_id)

    def block_tables(self, request_id: str) -> list[list[int]]:
        return [list(block_ids) for block_ids in self.scheduler.kv_cache_manager.get_block_ids(request_id)]


class Worker(GroupWorkers):
    """The worker of a scheduler that a test has made. Saves end with the next step, loads when the test says so.

    Attributes:
        num_steps: steps scheduled so far.
        num_saved: blocks saved.
        num_loaded: blocks loaded.
        num_not_loaded: blocks of loads that did not arrive.
        num_checked: blocks of requests that were found in the pool at the end.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        groups = [_layers_of(group) for group in scheduler.kv_cache_config.kv_cache_groups]
        super().__init__(cast(SchedulerHarness, Harness(scheduler)), groups, Random(0))
        self.memory: ServedMemory = ServedMemory(self.harness, groups, self.half._groups.ids)
        self.num_steps = self.num_saved = self.num_loaded = self.num_not_loaded = self.num_checked = 0
        self._steps: deque[tuple[Step, list[Work]]] = deque()
        self._planned: list[SaveJob] = []
        self._unfilled: set[int] = set()  # device blocks that the test says were not filled
        # Steps with drafts may be scheduled before it is known where they start: a worker goes by its own count.
        has_drafts = scheduler.vllm_config.speculative_config is not None
        self._counts: dict[str, int] | None = {} if has_drafts and isinstance(scheduler, AsyncScheduler) else None

    @property
    def connector(self) -> TestedConnector:
        connector: TestedConnector = self.harness.connector
        return connector

    # -- before a step -----------------------------------------------------------------------------

    def store(self, request: Request, start: int, end: int) -> None:
        """Have the pool hold the blocks of these tokens of a request."""
        control = self.half._control
        for number, vllm_number in enumerate(self.half._groups.ids):
            size = self.memory.groups[vllm_number].block_size
            blocks = slice(start // size, end // size)
            keys, contents = self._keys(request, number)[blocks], self._contents(request, vllm_number)[blocks]
            groups = np.full(len(keys), number, np.uint8)
            save = control.plan_save(keys, np.zeros(len(keys), np.int32), "save", groups=groups)
            for n, position in enumerate(save.positions.tolist()):
                self._put(save.transfer, n, contents[position])
            control.finish_save(save, np.zeros(len(save.slots), np.uint64))

    def _keys(self, request: Request, number: int) -> NDArray[np.uint64]:
        """Keys of a request's full blocks, `uint64 [n, 4]`."""
        if self.half._is_simple:
            return pack_keys(self.half._keys.of(request))
        rules: Any = self.half._planners.rules
        stride = rules._strides[number]
        keys: NDArray[np.uint64] = rules._keys_of(SimpleNamespace(request=request, keys=None)).keys(number)
        return keys[stride - 1 :: stride]

    def _contents(self, request: Request, vllm_number: int) -> list[Content]:
        """What these blocks hold."""
        group, chain = self.memory.groups[vllm_number], chain_of(request.all_token_ids)
        ends = range(group.block_size, len(chain) + 1, group.block_size)
        length = 1 if group.kind == "state" else group.block_size
        return [Content(vllm_number, tuple(chain[end - length : end])) for end in ends]

    @property
    def is_alone(self) -> bool:
        """True if the steps before the last one compute nothing."""
        return not any(works for _, works in list(self._steps)[:-1])

    def scheduled(self, output: SchedulerOutput) -> None:
        """A step has been scheduled."""
        self.num_steps += 1
        self.harness.requests.update(self.scheduler.requests)
        step = Step(output)
        self._steps.append((step, self.memory.work_of(step)))

    # -- a step ------------------------------------------------------------------------------------

    def begin(self, output: SchedulerOutput) -> list[Work]:
        """Do what comes before the forward of a step, and of those before it; returns what they compute."""
        works: list[Work] = []
        if not any(step.output is output for step, _ in self._steps):
            return works  # the test has made it up
        while True:
            step, of_step = self._steps.popleft()
            works += of_step
            if isinstance(plan := step.metadata, ConnectorPlan):
                self.unread += plan.early_saves
            self._read_all()
            self.memory._prepare(step)
            if isinstance(plan, ConnectorPlan):
                for load in plan.loads:
                    self._wipe(load)
                self.loads += plan.loads
                self._planned += plan.saves
            self._count_anew(step.output, of_step)
            if step.output is output:
                return works

    def _count_anew(self, output: SchedulerOutput, works: Iterable[Work]) -> None:
        anew = {new.req_id for new in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        if self._counts is not None:
            self._counts |= {work.name: work.start for work in works if work.name in anew}

    def _read_all(self) -> None:
        for save in list(self.unread):
            self.num_saved += save.transfer.num_blocks
            self._read(save)

    def tell(self, told: KVConnectorOutput | None) -> KVConnectorOutput:
        """What is reported at the end of a step: what the test has the workers say, and what KVortex's add."""
        told = copy.copy(told) if told is not None else KVConnectorOutput()
        self._unfilled |= told.invalid_block_ids
        self._read_all()
        for outcome in self._saves():
            self._half._reports.end(outcome)
        received = set(told.finished_recving or ())
        if self.connector.instant:
            received |= {job.request_id for job in self.loads}
            told.finished_recving = received
        for job in [job for job in self.loads if job.request_id in received]:
            self.loads.remove(job)
            self._half._reports.end_load(job, self._ended(job, job.request_id in told.failed_recving))
        assert self._half.take_finished() <= received
        failed = self._half.take_failed_block_ids()
        assert told.failed_recving or failed <= self._unfilled, "a load lacks blocks that were in the pool"
        self._half.take_failed_requests()
        told.kv_connector_worker_meta = self._half.take_reports()
        return told

    def _ended(self, job: LoadJob, has_failed: bool) -> JobOutcome:
        block_ids = job.transfer.block_ids.tolist()
        self.bad = frozenset(n for n, block_id in enumerate(block_ids) if has_failed or block_id in self._unfilled)
        self.num_loaded += len(block_ids) - len(self.bad)
        self.num_not_loaded += len(self.bad)
        return self._load(job)

    def finish(self, works: Iterable[Work], output: SchedulerOutput, runner: ModelRunnerOutput) -> None:
        """The forward of steps, of which the tokens are known now."""
        for work in works:
            self.memory.compute(work if self._counts is None else self._as_counted(work, self._counts, output, runner))
        self.unread += self._planned
        self._planned = []

    def _as_counted(
        self, work: Work, counts: dict[str, int], output: SchedulerOutput, runner: ModelRunnerOutput
    ) -> Work:
        start = counts[work.name]
        end = start + work.end - work.start
        sampled = runner.sampled_token_ids[runner.req_id_to_index[work.name]]
        num_drafts = len(output.scheduled_spec_decode_tokens.get(work.name, ()))
        counts[work.name] = end - (num_drafts + 1 - len(sampled) if sampled else 0)
        return work._replace(start=start, end=end)

    def check(self) -> None:
        """When the saves have ended that have begun, each block that a request would find is its own."""
        self._read_all()
        for outcome in self._saves():
            self.half._take_outcome(outcome)
        control = self.half._control
        plans = [job.plan for job in self.half._jobs if isinstance(job, SaveInFlight)]
        in_flight = sum(int(np.broadcast_to(plan.nbytes, len(plan.slots)).sum()) for plan in plans)
        assert control.allocator.allocated_bytes == control.index.committed_bytes + in_flight, "the pool leaks"
        for request in self.harness.requests.values():
            for number, vllm_number in enumerate(self.half._groups.ids):
                pins = control.index.hold(self._keys(request, number))
                own = self._contents(request, vllm_number)
                for position, offset in zip(np.flatnonzero(pins.slots >= 0), pins.offsets.tolist(), strict=True):
                    foreign = f"block {position} of {request.request_id} is not its own"
                    assert self._at(offset, 0) == own[position], foreign
                self.num_checked += pins.num_hits
                control.index.unpin(pins.hits)


def _layers_of(group: Any) -> Layers:
    spec = group.kv_cache_spec
    if isinstance(spec, SlidingWindowSpec | SlidingWindowMLASpec):
        return Layers("window", spec.block_size, spec.sliding_window)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return Layers("chunk", spec.block_size, spec.attention_chunk_size)
    return Layers("state" if isinstance(spec, MambaSpec) else "full", spec.block_size)
