"""Save: the full blocks that a step completes, put together into jobs of a useful size."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.index import pack_keys
from kvortex.vllm.plans import NO_WRITE, ConnectorPlan, SaveJob
from kvortex.vllm.scheduler.context import PlannerContext
from kvortex.vllm.scheduler.events import PlannedBlocks
from kvortex.vllm.scheduler.jobs import SaveInFlight, SavePart
from kvortex.vllm.scheduler.requests import TrackedRequest

logger = logging.getLogger(__name__)

MIN_SAVE_BLOCKS: Final = 64
"""A step's smaller saves are put together up to this many blocks. A job has a fixed cost here and in the workers, and
a step of decoding may complete a block of every request. Larger saves gain nothing by being put together."""


class SavePlanner:
    """Plans the saves of each step.

    Args:
        context: the pool and its lower tier.
        save_decoded: save the KV of generated tokens too, not only of the prompt.
    """

    def __init__(self, context: PlannerContext, *, save_decoded: bool) -> None:
        self._context = context
        self._control = context.control
        self._save_decoded = save_decoded

    # -- plan --------------------------------------------------------------------------------------

    def plan(
        self,
        computing: Iterable[tuple[TrackedRequest, int]],
        drafts: Mapping[str, Sequence[int]],
        plan: ConnectorPlan,
    ) -> None:
        """Plan to save every full block that a step completes.

        Args:
            computing: the step's requests, each with the number of tokens that it computes.
            drafts: the draft tokens among these, by request; they may be rejected, so they complete no block.
            plan: the plan of this step; the jobs are added to it.
        """
        new: list[SavePart] = []
        as_is: list[SavePart] = []
        for tracked, num_tokens in computing:
            if tracked.has_stale_kv:
                continue
            full = self._num_full_blocks(tracked, num_tokens - len(drafts.get(tracked.request.request_id, ())))
            if tracked.too_lossy:
                as_is += self._parts_as_is(tracked, full)
            if full > tracked.num_planned:
                new.append(self._part(tracked, slice(tracked.num_planned, full)))
                tracked.num_planned = full
        for group in _groups(new):
            self._plan_save(group, plan)
        for group in _groups(as_is):
            self._plan_save(group, plan, as_is=True)

    def _num_full_blocks(self, tracked: TrackedRequest, num_tokens: int) -> int:
        request = tracked.request
        computed = request.num_computed_tokens + num_tokens
        if not self._save_decoded:
            computed = min(computed, request.num_prompt_tokens)
        return int(min(computed // self._context.block_size, len(request.block_hashes), len(tracked.block_ids)))

    def _parts_as_is(self, tracked: TrackedRequest, full: int) -> list[SavePart]:
        # A request that was preempted in the meantime may not have computed all of its blocks again.
        numbers = [number for number in sorted(tracked.too_lossy) if number < full]
        tracked.too_lossy.clear()
        return [self._part(tracked, slice(number, number + 1)) for number in numbers]

    def _part(self, tracked: TrackedRequest, blocks: slice) -> SavePart:
        context = self._context
        event = PlannedBlocks.of(tracked.request, blocks, context.block_size) if context.events is not None else None
        return SavePart(tracked, blocks, context.keys.of(tracked.request, blocks), event)

    def _plan_save(self, parts: list[SavePart], plan: ConnectorPlan, *, as_is: bool = False) -> None:
        keys = [key for part in parts for key in part.keys]
        block_ids = np.array([n for part in parts for n in part.tracked.block_ids[part.blocks]], dtype=np.int32)
        save = self._control.plan_save(pack_keys(keys), block_ids, "save", as_is=as_is)
        if not save.transfer.num_blocks:
            return
        job_id = next(self._context.job_ids)
        tier_keys, write_id = b"", NO_WRITE
        if self._context.tier is not None:
            positions = save.positions.tolist()
            events = [(part.event, n) for part in parts if part.event is not None for n in range(len(part.keys))]
            tier_keys, write_id = self._context.tier.plan_write(
                [keys[position] for position in positions], [events[position] for position in positions if events]
            )
        self._context.jobs.add(SaveInFlight(job_id=job_id, plan=save, parts=parts, as_is=as_is, write_id=write_id))
        plan.saves.append(SaveJob(job_id, save.transfer, tier_keys, write_id))
        logger.debug("job %d saves %d of %d blocks", job_id, save.transfer.num_blocks, len(keys))

    # -- end ---------------------------------------------------------------------------------------

    def finish(self, job: SaveInFlight) -> None:
        """Every worker has reported a save: its blocks become visible, or are dropped."""
        context, count = self._context, job.plan.transfer.num_blocks
        succeeded, lossy = np.ones(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
        succeeded[list(job.failed)] = False
        lossy[list(job.too_lossy)] = True
        self._control.finish_save(job.plan, np.zeros(count, dtype=np.uint64), succeeded, lossy)
        if context.tier is not None and job.write_id != NO_WRITE:
            context.tier.hold_saved(job.write_id, succeeded)
        if job.as_is:
            context.stats.add("kept_as_is_blocks", int(np.count_nonzero(succeeded)))
        context.stats.count_save(len(job.failed - job.too_lossy), count - len(job.too_lossy), context.sizes.raw)
        if job.is_stale:  # requests whose KV is not stale save their blocks again
            for part in job.parts:
                part.tracked.num_planned = min(part.tracked.num_planned, part.blocks.start)
        if job.too_lossy or context.events is not None:
            self._finish_parts(job, succeeded, lossy)

    def _finish_parts(self, job: SaveInFlight, succeeded: NDArray[np.bool_], lossy: NDArray[np.bool_]) -> None:
        """Note for each request which blocks it has to save raw, and publish events for the stored blocks."""
        positions, start = job.plan.positions, 0
        for part in job.parts:
            mine = slice(*np.searchsorted(positions, (start, start + len(part.keys))))
            numbers = positions[mine] - start
            part.tracked.too_lossy.update((part.blocks.start + numbers[lossy[mine]]).tolist())
            self._publish(part, numbers[succeeded[mine]], job.plan.transfer.offsets[mine][succeeded[mine]])
            start += len(part.keys)

    def _publish(self, part: SavePart, numbers: NDArray[np.intp], offsets: NDArray[np.int64]) -> None:
        events = self._context.events
        if events is not None and part.event is not None:
            # A reset may have dropped a block before its save ended: nothing is at its offset then.
            there = self._control.allocator.holds(offsets)
            events.add_stored(part.event, numbers[there].tolist(), offsets[there].tolist())


def _groups(parts: Iterable[SavePart]) -> Iterator[list[SavePart]]:
    """Parts that are saved by one job, in order."""
    group: list[SavePart] = []
    count = 0
    for part in parts:
        group.append(part)
        count += len(part.keys)
        if count >= MIN_SAVE_BLOCKS:
            yield group
            group, count = [], 0
    if group:
        yield group
