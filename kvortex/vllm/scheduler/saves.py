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
from kvortex.vllm.scheduler.jobs import SaveInFlight, SavePart
from kvortex.vllm.scheduler.requests import TrackedRequest

logger = logging.getLogger(__name__)

MIN_SAVE_BLOCKS: Final = 64
"""A step's smaller saves are put together up to this many blocks of each group. A job has a fixed cost here and in
the workers, and a step of decoding may complete a block of every request. Larger saves gain nothing by being put
together."""

MIN_SAVE_BLOCKS_OF_OWNER: Final = 512
"""The same where an owner plans: each job is a question, some 0.15 ms of the step."""


class SavePlanner:
    """Plans the saves of each step.

    Args:
        context: the pool and its lower tier.
    """

    def __init__(self, context: PlannerContext) -> None:
        self._context = context
        self._control = context.control

    # -- plan --------------------------------------------------------------------------------------

    def plan(
        self,
        computing: Iterable[tuple[TrackedRequest, int]],
        drafts: Mapping[str, Sequence[int]],
        tails: Iterable[tuple[TrackedRequest, BlockRun]],
        plan: ConnectorPlan,
    ) -> None:
        """Plan to save every block that a step completes.

        Args:
            computing: the step's requests, each with the number of tokens that it computes.
            drafts: the draft tokens among these, by request; they may be rejected, so they complete no block.
            tails: blocks that are not full, and from which a request may resume.
            plan: the plan of this step; the jobs are added to it.
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
        for parts in _jobs(new, least):
            self._plan_save(parts, plan)
        for parts in _jobs(as_is, least):
            self._plan_save(parts, plan, as_is=True)
        for _, run in late:
            rules.release(run.block_ids)  # those that move are held by their saves

    def _part(self, tracked: TrackedRequest, run: BlockRun) -> SavePart:
        events = self._context.events
        event = events.planned(tracked.request, run.group, run.blocks) if events is not None else None
        return SavePart(tracked, run, event)

    def _plan_save(self, parts: list[SavePart], plan: ConnectorPlan, *, as_is: bool = False) -> None:
        context, runs = self._context, [part.run for part in parts]
        keys = np.concatenate([run.keys for run in runs])
        block_ids = np.array([block_id for run in runs for block_id in run.block_ids], dtype=np.int32)
        groups = None
        if (order := context.rules.order(runs)) is not None:
            numbers = np.repeat([run.group for run in runs], [len(run.keys) for run in runs])
            keys, block_ids = keys[order], block_ids[order]
            groups = numbers[order].astype(np.uint8)
        save = self._control.plan_save(keys, block_ids, "save", groups=groups, as_is=as_is)
        if not save.transfer.num_blocks:
            return
        job_id = next(context.job_ids)
        context.jobs.add(SaveInFlight(job_id=job_id, plan=save, parts=parts, order=order, as_is=as_is))
        context.rules.hold(save.transfer.block_ids.tolist())
        plan.saves.append(SaveJob(job_id, save.transfer, context.pool))
        logger.debug("job %d saves %d of %d blocks", job_id, save.transfer.num_blocks, len(keys))

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
        if job.is_stale:  # requests whose KV is not stale save their blocks again
            for part in job.parts:
                planned, run = part.tracked.num_planned, part.run
                if not run.is_tail:
                    planned[run.group] = min(planned[run.group], run.blocks.start)
                    part.tracked.looked_for = None
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
