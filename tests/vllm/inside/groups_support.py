"""Models that mix kinds of KV, and workers that are played for them: contents in place of bytes.

Of each token a block holds what its KV depends on: all the tokens up to it. A state holds that of the last token that
it has taken in. A forward looks at every block that the rule of its group needs, and then writes those that it
computes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from lives import NOTHING, chain_of
from played_owner import PlayedOwner, hello_to_owner, join_played_owner
from scheduler_harness import Layers, SchedulerHarness, Step, WorkerReport, config_of_groups

from kvortex.arithmetic import align_up
from kvortex.codecs import RAW
from kvortex.types import BlockSizes
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.model import ServedGroups, expected_sizes
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, SaveJob, WorkerHandshake
from kvortex.vllm.scheduler.half import SchedulerHalf
from kvortex.vllm.versions import REPORTS_FAILED_LOADS
from kvortex.vllm.worker.half import WorkerHalf

NOBODY = -1
"""In place of a group: the block holds nothing."""


@dataclass(frozen=True)
class Model:
    """Groups of layers, and tokens of a block hash where that is not what an engine would choose."""

    groups: tuple[Layers, ...]
    hash_block_size: int | None = None

    @property
    def has_drafts(self) -> bool:
        return any(group.is_draft for group in self.groups)


def model(*groups: Layers, hash_block_size: int | None = None) -> Model:
    return Model(groups, hash_block_size)


# vLLM ends chunks of a prompt where a block of the smallest size ends, so states are of that size.
MODELS = {
    "gpt-oss": model(Layers("full", 16), Layers("window", 16, 40)),
    "Gemma 3": model(*[Layers("window", 16, 50)] * 5, Layers("full", 16)),
    "Gemma 4": model(Layers("window", 16, 33, num_heads=4), Layers("full", 64)),
    "Llama 4": model(*[Layers("chunk", 16, 64)] * 3, Layers("full", 16)),
    "Mistral with a window": model(Layers("window", 16, 50)),
    "Mamba 2": model(Layers("state", 32)),
    "Qwen3-Next": model(*[Layers("state", 32)] * 3, Layers("full", 32)),
    "Kimi-Linear": model(Layers("latent", 32), Layers("state", 32, num_heads=8)),
    "latent attention and a window": model(Layers("latent", 32), Layers("window", 16, 20)),
    "window, state and full attention": model(Layers("window", 32, 60), Layers("state", 32), Layers("full", 64)),
    "states and finer hashes": model(Layers("full", 32), Layers("state", 32), hash_block_size=16),
    "states and much finer hashes": model(*[Layers("state", 96)] * 2, Layers("full", 96), hash_block_size=16),
    "states of fewer tokens": model(Layers("full", 96), Layers("state", 32)),
    "drafts over a window": model(Layers("full", 16), Layers("window", 16, 40, is_draft=True)),
    "drafts over full attention": model(Layers("full", 16, is_draft=True), Layers("window", 16, 40)),
}


@dataclass(frozen=True)
class Content:
    """What a block holds: of each of its tokens, or the one state."""

    group: int
    values: tuple[int, ...]


EMPTY = Content(NOBODY, ())


class Work(NamedTuple):
    """What a step computes of a request: tokens `start` to `end`, in these blocks of each group."""

    name: str
    start: int
    end: int
    tables: list[list[int]]


def first_needed(group: Layers, position: int) -> int:
    """The first token that the token at a position attends to."""
    if group.kind == "window":
        return max(position - group.reach + 1, 0)
    return position // group.reach * group.reach if group.kind == "chunk" else 0


class Memory:
    """The blocks of a device, for the groups of a model."""

    def __init__(self, harness: SchedulerHarness, groups: Sequence[Layers]) -> None:
        self.harness, self.groups = harness, groups
        self.blocks: dict[int, Content] = {}

    def work_of(self, step: Step) -> list[Work]:
        """What a step computes that was scheduled just now."""
        works = []
        for name, count in step.num_scheduled_tokens.items():
            end = self.harness.requests[name].num_computed_tokens  # counts this step's tokens already
            works.append(Work(name, end - count, end, self.harness.block_tables(name)))
        return works

    def forward(self, step: Step, works: Sequence[Work]) -> None:
        """Compute a step. Raises `AssertionError` if a request would run on anything but its own KV."""
        self._prepare(step)
        for work in works:
            self._compute(work)

    def _prepare(self, step: Step) -> None:
        for block_id in step.output.new_block_ids_to_zero or ():
            self.blocks[block_id] = EMPTY
        for copy in getattr(step.output, "kv_cache_block_copies", None) or ():
            self.blocks[copy.dst_block_id] = self.blocks.get(copy.src_block_id, EMPTY)

    def _compute(self, work: Work) -> None:
        known = list(self.harness.requests[work.name].all_token_ids)[: work.end]
        chain = chain_of(known) + [NOTHING] * (work.end - len(known))  # drafts, which all turn out wrong
        for number, group in enumerate(self.groups):
            if group.kind == "state":
                self._compute_state(work, number, chain)
            else:
                self._look(work, number, chain)
                self._write(work, number, chain)

    def _look(self, work: Work, number: int, chain: list[int]) -> None:
        group, table, start = self.groups[number], work.tables[number], work.start
        first = first_needed(group, start)
        for block in range(first // group.block_size, -(-start // group.block_size)):
            begin = block * group.block_size
            own = slice(max(first, begin), min(start, begin + group.block_size))
            found = self.blocks.get(table[block], EMPTY)
            values = found.values[own.start - begin : own.stop - begin]
            assert found.group == number, f"{work.name}: block {block} of group {number} holds group {found.group}"
            assert values == tuple(chain[own]), f"{work.name}: block {block} of group {number} holds foreign KV"

    def _write(self, work: Work, number: int, chain: list[int]) -> None:
        size, table = self.groups[number].block_size, work.tables[number]
        for block in range(work.start // size, -(-work.end // size)):
            begin = block * size
            assert table[block] != self.harness.null_block_id, "nothing may be written to the null block"
            found = self.blocks.get(table[block], EMPTY)
            values = list(found.values) if found.group == number else [NOTHING] * size
            own = slice(max(work.start, begin), min(work.end, begin + size))
            values[own.start - begin : own.stop - begin] = chain[own]
            self.blocks[table[block]] = Content(number, tuple(values))

    def _compute_state(self, work: Work, number: int, chain: list[int]) -> None:
        size, table = self.groups[number].block_size, work.tables[number]
        before, now = -(-work.start // size) - 1, -(-work.end // size) - 1
        assert table[now] != self.harness.null_block_id, "no state may be written to the null block"
        if work.start:
            found, own = self.blocks.get(table[before], EMPTY), Content(number, (chain[work.start - 1],))
            assert found == own, f"{work.name}: block {before} of group {number} is not the state at {work.start}"
        self.blocks[table[now]] = Content(number, (chain[work.end - 1],))


class GroupWorkers:
    """One worker that does its jobs when the seed says so.

    Attributes:
        fails: the share of blocks whose transfer fails.
        sloth: the share of jobs that do not end in a step.
        paused: jobs that do not end at all: "save" or "load".
        loses: the share of blocks that packing would lose too much of; they are not saved.
        bad: positions of blocks that do not arrive with a load.
        num_ahead: steps that are scheduled before the oldest of them is executed.
    """

    def __init__(
        self, harness: SchedulerHarness, groups: Sequence[Layers], random: Random, owner: PlayedOwner | None = None
    ) -> None:
        self.harness, self.random, self.owner = harness, random, owner
        self.memory = Memory(harness, groups)
        transfer = harness.vllm_config.kv_transfer_config
        options = ConnectorOptions.from_extra_config(transfer.kv_connector_extra_config)
        self._half = WorkerHalf(harness.vllm_config, harness.kv_cache_config, options)
        self.pool: dict[int, tuple[int, Content]] = {}
        """Offset -> bytes, and what they hold; with an owner its pool has that."""
        self.unread: list[SaveJob] = []
        self.read: list[tuple[SaveJob, frozenset[int], frozenset[int]]] = []
        self.loads: list[LoadJob] = []
        self.fails = 0.0
        self.loses = 0.0
        self.sloth = 0.0
        self.paused: set[str] = set()
        self.bad: frozenset[int] = frozenset()
        self.num_ahead = 0
        self._under_way: deque[tuple[Step, list[Work]]] = deque()

    @property
    def half(self) -> SchedulerHalf:
        half: SchedulerHalf = self.harness.connector._scheduler
        return half

    @property
    def is_idle(self) -> bool:
        return not (self.unread or self.read or self.loads or self._under_way)

    @property
    def control(self) -> Any:
        """The control plane of the pool, wherever it is."""
        return self.half._control if self.owner is None else self.owner.control

    @property
    def saving(self) -> set[int]:
        """Device blocks that saves have yet to read, and hold until then."""
        jobs = self.half._jobs
        unread = [save for save in self.unread if getattr(jobs[save.job_id], "holds_blocks", True)]
        return {block_id for save in unread for block_id in save.transfer.block_ids.tolist()}

    # -- a step ------------------------------------------------------------------------------------

    def run(self, request_id: str) -> None:
        """Step until a request has ended, and once more."""
        for _ in range(400):
            is_over = self.harness.requests[request_id].is_finished()
            self.step()
            if is_over:
                return
        raise TimeoutError(request_id)

    def step(self) -> Step:
        step = self.harness.schedule()
        self._under_way.append((step, self.memory.work_of(step)))
        self.drain(self.num_ahead)
        return step

    def drain(self, num_left: int = 0) -> None:
        """Execute and finish the steps that are under way, but for the last few."""
        while len(self._under_way) > num_left:
            oldest, works = self._under_way.popleft()
            self.execute(oldest, works)
            self.harness.finish(oldest, self.report())

    def execute(self, step: Step, works: Sequence[Work]) -> None:
        """What a worker does in a step. Saves read as late as they can: when they end."""
        plan: ConnectorPlan = step.metadata
        self.unread += plan.early_saves
        for save in [s for s in self.unread if not plan.fresh_block_ids.isdisjoint(s.transfer.block_ids.tolist())]:
            assert not self.half._jobs[save.job_id].holds_blocks, "a block is given away while it is saved"
            self._read(save)
        assert self.saving.isdisjoint(step.output.new_block_ids_to_zero or ()), "a block is zeroed while it is saved"
        self.loads += plan.loads
        for load in plan.loads:
            self._wipe(load)
        self.memory.forward(step, works)
        self.unread += plan.saves

    def _wipe(self, load: LoadJob) -> None:
        """From now on the load may write at any time."""
        for block_id in [*load.transfer.block_ids.tolist(), *load.missing_block_ids]:
            self.memory.blocks[block_id] = EMPTY

    def report(self) -> WorkerReport:
        """Some jobs have ended."""
        for save in [save for save in self.unread if self._is_due("save")]:
            self._read(save)
        if self.owner is not None:
            self.owner.turn(self.random.randrange(3) if self.sloth else 8)
        for outcome in self._saves():
            self._half._reports.end(outcome)
        for job in [job for job in self.loads if self._is_due("load")]:
            self.loads.remove(job)
            self._half._reports.end_load(job, self._load(job))
        return self.told()

    def told(self) -> WorkerReport:
        """What the worker half tells vLLM of the jobs that have ended."""
        received, failed = self._half.take_finished(), self._half.take_failed_requests()
        assert failed <= received
        return WorkerReport(
            finished_recving=received,
            failed_recving=failed if REPORTS_FAILED_LOADS else set(),
            invalid_block_ids=self._half.take_failed_block_ids(),
            worker_meta=self._half.take_reports(),
            kv_connector_stats=ConnectorStats(),
        )

    # -- jobs --------------------------------------------------------------------------------------

    def _is_due(self, kind: str) -> bool:
        return kind not in self.paused and self.random.random() >= self.sloth

    def _failed(self, count: int) -> frozenset[int]:
        return frozenset(n for n in range(count) if self.random.random() < self.fails)

    def _read(self, save: SaveJob) -> None:
        self.unread.remove(save)
        packed = [n for n in range(save.transfer.num_blocks) if self._is_packed(save.transfer, n)]
        lossy = frozenset(n for n in packed if self.random.random() < self.loses)
        failed = self._failed(save.transfer.num_blocks) | lossy
        for n, block_id in enumerate(save.transfer.block_ids.tolist()):
            if n not in failed:
                self._put(save.transfer, n, self.memory.blocks[block_id])
        self.read.append((save, failed, lossy))

    def _is_packed(self, transfer: Any, position: int) -> bool:
        sizes = self.half._sizes[self._form(transfer, position) // 2]
        return sizes.packed < sizes.raw and self._nbytes(transfer, position) == sizes.packed

    def _put(self, transfer: Any, position: int, content: Content) -> None:
        """Write to the pool. What these bytes held before is gone."""
        offset, nbytes = int(transfer.offsets[position]), self._nbytes(transfer, position)
        if self.owner is not None:
            self.owner.put(offset, nbytes, content)
            return
        for begin in [b for b, (n, _) in self.pool.items() if b < offset + nbytes and offset < b + n]:
            del self.pool[begin]
        self.pool[offset] = (nbytes, content)

    def _at(self, offset: int, nbytes: int) -> Content:
        if self.owner is not None:
            found: Content | None = self.owner.at(offset, nbytes)
            return EMPTY if found is None else found
        return self.pool.get(offset, (0, EMPTY))[1]

    def _nbytes(self, transfer: Any, position: int) -> int:
        return int(self.half._control.extents[self._form(transfer, position)])

    @staticmethod
    def _form(transfer: Any, position: int) -> int:
        return 0 if transfer.forms is None else int(transfer.forms[position])

    def _load(self, job: LoadJob) -> JobOutcome:
        failed = self._failed(job.transfer.num_blocks) | self.bad.intersection(range(job.transfer.num_blocks))
        corrupt = frozenset(n for n in failed if self.random.random() < 0.5)
        for n, block_id in enumerate(job.transfer.block_ids.tolist()):
            content = self._at(int(job.transfer.offsets[n]), self._nbytes(job.transfer, n))
            self.memory.blocks[block_id] = EMPTY if n in failed else content
        return JobOutcome(job.job_id, tuple(failed - corrupt), tuple(corrupt))

    def _saves(self) -> Iterator[JobOutcome]:
        for save, failed, lossy in [job for job in self.read if self._is_due("save")]:
            self.read.remove((save, failed, lossy))
            digests = None if self.owner is None else self.owner.digests_of(save.transfer)
            yield JobOutcome(save.job_id, tuple(failed), too_lossy=tuple(lossy), digests=digests)


def sizes_of(model: Model) -> tuple[BlockSizes, ...]:
    """Bytes that a block of each group takes in the pool."""
    return expected_sizes(ServedGroups(config_of_groups(model.groups, 1)), RAW)


def harness_of(
    model: Model,
    folder: Path,
    *,
    pool_blocks: int = 64,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> SchedulerHarness:
    """A scheduler for a model, with prefix caching, over a pool of so many blocks of each group."""
    nbytes = align_up(pool_blocks * sum(sizes.raw for sizes in sizes_of(model)), 4096)
    if model.has_drafts:
        options.setdefault("speculative", ("eagle", 2))
    return SchedulerHarness(
        folder,
        groups=model.groups,
        hash_block_size=model.hash_block_size,
        enable_prefix_caching=True,
        extra_config={"pool": {"bytes": nbytes, "pin_piece_bytes": nbytes}, **(extra or {})},
        **options,
    )


def greet(harness: SchedulerHarness, random: Random | None = None) -> PlayedOwner | None:
    """The handshake of a worker that has registered what the scheduler expects.

    Args:
        harness: with settings that name a lower tier, or an owner, or none of these.
        random: decides what the tier does.

    Returns:
        The owner that a lower tier needs; None if there is none.
    """
    half: SchedulerHalf = harness.connector._scheduler
    engine, num_blocks = half._options.engine, harness.kv_cache_config.num_blocks
    if engine.lower_tier:
        return join_played_owner(half, num_blocks, random or Random(0))
    if engine.owner.socket:
        half.accept_handshake([hello_to_owner(half, num_blocks, engine.owner.socket)])
    else:
        pool_bytes = half._control.allocator.capacity_bytes
        half.accept_handshake([WorkerHandshake(b"layout", half._sizes, num_blocks, pool_bytes)])
    return None


def prompt(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 1000, count).tolist()
