"""The requests that the scheduler half follows, and which device blocks each of them has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvortex.vllm.scheduler.blocks import Reach
    from kvortex.vllm.scheduler.lookup import RequestKeys


@dataclass
class TrackedRequest:
    """One request, from its first look-up to its end."""

    request: "Request"
    block_ids: list[int] = field(default_factory=list)  # of all groups
    local_tokens: int = 0  # tokens that vLLM has found in its own cache, when it last asked
    num_planned: list[int] = field(default_factory=lambda: [0])  # leading blocks of each group whose save was planned
    looked_for: tuple[int, int] | None = None  # its block hashes, known and computed, when a save was last looked for
    too_lossy: set[tuple[int, int]] = field(default_factory=set)  # (group, block): to save raw, packing loses too much
    num_full: int = 0  # blocks that the last planned step has completed, with one group
    disk_tokens: int = 0  # tokens of its last load that came from the lower tier
    keys: "RequestKeys | None" = None  # of its blocks, where there are several groups
    loaded: range = range(0)  # tokens whose KV was loaded from the pool, so that it need not be saved
    loading: int | None = None  # the number of its load job in flight
    computes: bool = False  # a load failed: the request computes its KV, and is offered no other load
    first_plan: int | None = None  # number of the first plan that computes or loads its KV
    looked_up: "tuple[int, Reach] | None" = None  # what its last look-up found, and its tokens on the device then
    has_stale_kv: bool = False  # its KV comes from older weights: none of it is saved

    def has_kv_from(self, plan_number: int) -> None:
        """Note that this plan computes or loads KV of the request."""
        if self.first_plan is None:
            self.first_plan = plan_number

    def plan_saves_again(self) -> None:
        """Note that none of its blocks is stored any more."""
        self.num_planned = [0] * len(self.num_planned)
        self.looked_for = None
        self.loaded = range(0)

    def to_save(self, start: int, stop: int, block_size: int) -> list[range]:
        """Of the blocks from `start` to `stop`, of so many tokens each, those that were not loaded."""
        first, last = -(-self.loaded.start // block_size), self.loaded.stop // block_size
        return [blocks for blocks in (range(start, min(stop, first)), range(max(start, last), stop)) if blocks]

    def gives_token_after(self, num_tokens: int) -> bool:
        """True if a step that computes so many tokens, drafts included, gives the request a new one."""
        return bool(self.request.num_computed_tokens + num_tokens >= self.request.num_tokens)


def computing_requests(
    tracked: Mapping[str, TrackedRequest], scheduler_output: "SchedulerOutput"
) -> list[tuple[TrackedRequest, int]]:
    """The tracked requests of a step, each with the number of tokens that it computes, drafts included."""
    num_scheduled = scheduler_output.num_scheduled_tokens.items()
    return [(tracked[request_id], num_tokens) for request_id, num_tokens in num_scheduled if request_id in tracked]


def follow_block_tables(
    tracked: Mapping[str, TrackedRequest], scheduler_output: "SchedulerOutput", block_size: int
) -> set[int]:
    """Update the device blocks of the tracked requests, which have one group of layers, from a step's output.

    Returns:
        Block ids that were allocated for this step, to tracked requests and to others.
    """
    fresh: set[int] = set()
    for request_id in scheduler_output.preempted_req_ids or ():
        if (preempted := tracked.get(request_id)) is not None:
            preempted.block_ids = []
    for new in scheduler_output.scheduled_new_reqs:
        if (known := tracked.get(new.req_id)) is not None:
            known.block_ids = list(new.block_ids[0])
        fresh.update(new.block_ids[0][new.num_computed_tokens // block_size :])
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, block_ids, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is None:
            continue
        resumed = request_id in cached.resumed_req_ids
        fresh.update(block_ids[0][num_computed // block_size :] if resumed else block_ids[0])
        if (known := tracked.get(request_id)) is not None:
            known.block_ids = list(block_ids[0]) if resumed else known.block_ids + list(block_ids[0])
    return fresh
