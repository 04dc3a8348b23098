"""Save: the full blocks that a step completes, put together into jobs of a useful size."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.planes.control import ControlPlane
from kvortex.tiering.keys import split_keys
from kvortex.vllm.plans import ConnectorPlan, SaveJob
from kvortex.vllm.scheduler.blocks import BlockRun
from kvortex.vllm.scheduler.context import PlannerContext
from kvortex.vllm.scheduler.jobs import BegunSave, SaveInFlight, SavePart
from kvortex.vllm.scheduler.requests import TrackedRequest

logger = logging.getLogger(__name__)

MIN_SAVE_BLOCKS: Final = 64
"""A step's smaller saves are put together up to this many blocks of each group. A job has a fixed cost here and in
the workers, and a step of decoding may complete a block of every request. Larger saves gain nothing by being put
together."""

MIN_SAVE_BLOCKS_OF_OWNER: Final = 512
"""The same where an owner plans: each job is a question."""


class SavePlanner:
    """Plans the saves of each step.

    Args:
        context: the pool and its lower tier.
    """

    def __init__(self, context: PlannerContext) -> None:
        self._context = context
        self._control = context.control
        self._late: list[tuple[TrackedRequest, BlockRun]] = []  # held until this step's saves hold them
        self._new: list[BegunSave] = []  # begun by this step
        self._waiting: list[BegunSave] = []  # begun by the last step

    # -- plan --------------------------------------------------------------------------------------

    def begin(
        self,
        computing: Iterable[tuple[TrackedRequest, int]],
        drafts: Mapping[str, Sequence[int]],
        tails: Iterable[tuple[TrackedRequest, BlockRun]],
    ) -> None:
        """Begin to plan the save of every block that a step completes; `add_jobs` ends it.

        Args:
            computing: the step's requests, each with the number of tokens that it computes.
            drafts: the draft tokens among these, by request; they may be rejected, so they complete no block.
            tails: blocks that are not full, and from which a request may resume.
        """
        rules = self._context.rules
        late = rules.late()
        new = [self._part(tracked, run) for tracked, run in [*late, *tails] if not tracked.has_stale_kv]
        as_is: list[SavePart] = []
        for tracked, num_tokens in computing:
            if tracked.has_stale_kv:
                continue
            without_drafts = num_tokens - len(drafts.get(tracked.request.request_id, ()))
            new += [self._part(tracked, run) for run in rules.completed(tracked, without_drafts)]
            if tracked.too_lossy:
                as_is += [self._part(tracked, run) for run in rules.again(tracked)]
        least = rules.num_groups * (MIN_SAVE_BLOCKS_OF_OWNER if self._context.keeps_digests else MIN_SAVE_BLOCKS)
        self._new = [self._begin(parts) for parts in _jobs(new, least)]
        self._new += [self._begin(parts, as_is=True) for parts in _jobs(as_is, least)]
        self._late = late

    def _part(self, tracked: TrackedRequest, run: BlockRun) -> SavePart:
        events = self._context.events
        event = events.planned(tracked.request, run.group, run.blocks) if events is not None else None
        return SavePart(tracked, run, event)

    def _begin(self, parts: list[SavePart], *, as_is: bool = False) -> BegunSave:
        context, runs = self._context, [part.run for part in parts]
        keys = np.concatenate([run.keys for run in runs])
        block_ids = np.array([block_id for run in runs for block_id in run.block_ids], dtype=np.int32)
        groups = None
        if (order := context.rules.order(runs)) is not None:
            numbers = np.repeat([run.group for run in runs], [len(run.keys) for run in runs])
            keys, block_ids = keys[order], block_ids[order]
            groups = numbers[order].astype(np.uint8)
        planned = self._control.begin_save(keys, block_ids, "save", groups=groups, as_is=as_is)
        ids = list(dict.fromkeys(block_ids.tolist()))  # requests share blocks, and vLLM must not free one twice at once
        return BegunSave(planned=planned, parts=parts, order=order, as_is=as_is, block_ids=ids, pool=context.pool)

    def add_jobs(self, plan: ConnectorPlan) -> None:
        """Add the saves that were begun in the last step to the plan of this one, and those that were begun now.

        A step that completes few blocks is a short one, which would wait for the owner's answer: its saves become early
        jobs of the next step. Those of a prompt with which another server goes on do not wait for a next step.
        """
        rules = self._context.rules
        waiting, new, late = self._waiting, self._new, self._late
        self._waiting, self._new, self._late = [], [], []
        for begun in waiting:
            if any(part.tracked.has_stale_kv for part in begun.parts):
                self._give_up(begun)
            else:
                self._add_job(begun, plan.early_saves)
                rules.release(begun.block_ids)
        few = sum(len(begun.block_ids) for begun in new) < MIN_SAVE_BLOCKS
        for begun in new:
            if few and not begun.planned.is_made and not begun.is_handed_over:
                rules.hold(begun.block_ids)
                self._waiting.append(begun)
            else:
                self._add_job(begun, plan.saves)
        for _, run in late:
            rules.release(run.block_ids)  # those that are saved are held by their saves

    def _add_job(self, begun: BegunSave, saves: list[SaveJob]) -> None:
        context, save = self._context, begun.planned.result()
        moved = save.transfer.block_ids.tolist()
        if moved:
            job_id = next(context.job_ids)
            context.jobs.add(
                SaveInFlight(job_id=job_id, plan=save, parts=begun.parts, order=begun.order, as_is=begun.as_is)
            )
            context.rules.hold(moved)
            saves.append(SaveJob(job_id, save.transfer, begun.pool))
            logger.debug("job %d saves %d of %d blocks", job_id, len(moved), len(begun.block_ids))

    def _give_up(self, begun: BegunSave) -> None:
        """Save nothing: vLLM gives device blocks to others, or the KV is not what its keys say any more."""
        save = begun.planned.result()
        nothing = np.zeros(save.transfer.num_blocks, dtype=np.bool_)
        self._control.finish_save(save, np.zeros(len(nothing), dtype=np.uint64), nothing, tried=nothing)
        self._context.rules.release(begun.block_ids)
        _save_again(begun.parts)

    @property
    def waits(self) -> bool:
        """True if the next step has saves that this one has begun."""
        return bool(self._waiting)

    def give_up(self) -> None:
        """Give up what was begun and is no job yet."""
        waiting, self._waiting = self._waiting, []
        for begun in waiting:
            self._give_up(begun)

    # -- end ---------------------------------------------------------------------------------------

    def let_go(self) -> set[int]:
        """Hold no device blocks any more: what waits to be saved a step later is dropped.

        Returns:
            The blocks that saves in flight may still read: whoever overwrites them has to wait for those.
        """
        rules = self._context.rules
        for _, run in rules.late():
            rules.release(run.block_ids)
        saves = [job for job in self._context.jobs if isinstance(job, SaveInFlight)]
        return {block_id for job in saves for block_id in self._let_go_of(job)}

    def _let_go_of(self, job: SaveInFlight) -> list[int]:
        if not job.holds_blocks:
            return []
        job.holds_blocks = False
        block_ids: list[int] = job.plan.transfer.block_ids.tolist()
        self._context.rules.release(block_ids)
        return block_ids

    def finish(self, job: SaveInFlight) -> None:
        """Every worker has reported a save: its blocks become visible, or are dropped."""
        context, transfer = self._context, job.plan.transfer
        count = transfer.num_blocks
        self._let_go_of(job)
        succeeded, lossy = np.ones(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
        succeeded[list(job.failed)] = False
        lossy[list(job.too_lossy)] = True
        self._control.finish_save(job.plan, job.block_digests(context.num_parts), succeeded, lossy)
        if job.as_is:
            context.stats.add("kept_as_is_blocks", int(np.count_nonzero(succeeded)))
        nbytes = context.bytes_moved(transfer.forms, succeeded)
        context.stats.count_save(len(job.failed - job.too_lossy), count - len(job.too_lossy), nbytes)
        if job.is_stale:
            _save_again(job.parts)
        if job.too_lossy or context.events is not None:
            self._finish_parts(job, succeeded, lossy)

    def _finish_parts(self, job: SaveInFlight, succeeded: NDArray[np.bool_], lossy: NDArray[np.bool_]) -> None:
        """Note for each request which blocks it has to save raw, and publish events for the stored blocks."""
        moved = job.plan.positions if job.order is None else job.order[job.plan.positions]
        start = 0
        for part in job.parts:
            mine = np.flatnonzero((moved >= start) & (moved < start + len(part.run.keys)))
            numbers = moved[mine] - start
            first, group = part.run.blocks.start, part.run.group
            part.tracked.too_lossy.update((group, first + number) for number in numbers[lossy[mine]].tolist())
            stored = succeeded[mine]
            self._publish(part, numbers[stored], job.plan.transfer.offsets[mine][stored])
            start += len(part.run.keys)

    def _publish(self, part: SavePart, numbers: NDArray[np.intp], offsets: NDArray[np.int64]) -> None:
        events, of_owner = self._context.events, self._context.owner_events
        if events is None or part.event is None:
            return
        if of_owner is not None:
            keys = part.run.keys[numbers]
            of_owner.add_saved(split_keys(keys), [(part.event, number) for number in numbers.tolist()])
            offsets = of_owner.places(keys)
            there = offsets >= 0
        else:
            assert isinstance(self._control, ControlPlane)
            # A reset may have dropped a block before its save ended: nothing is at its offset then.
            there = self._control.allocator.holds(offsets)
        order = np.argsort(numbers[there], kind="stable")
        events.add_stored(part.event, numbers[there][order].tolist(), offsets[there][order].tolist())


def _save_again(parts: Iterable[SavePart]) -> None:
    """Have requests whose KV is not stale save these blocks again, if they still have them."""
    for part in parts:
        planned, run = part.tracked.num_planned, part.run
        if not run.is_tail:
            planned[run.group] = min(planned[run.group], run.blocks.start)
            part.tracked.looked_for = None


def _jobs(parts: Iterable[SavePart], least: int) -> Iterator[list[SavePart]]:
    """Parts that are saved by one job, of at least so many blocks if there are as many, in order."""
    together: list[SavePart] = []
    count = 0
    for part in parts:
        together.append(part)
        count += len(part.run.keys)
        if count >= least:
            yield together
            together, count = [], 0
    if together:
        yield together
