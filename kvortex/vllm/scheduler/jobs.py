"""What the scheduler half remembers: requests, and the jobs that are under way for them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvortex.planes.control import LoadPlan, SavePlan
from kvortex.types import BlockHash
from kvortex.vllm.plans import JobOutcome
from kvortex.vllm.scheduler.events import PlannedBlocks
from kvortex.vllm.scheduler.tier_planner import NO_WRITE

if TYPE_CHECKING:
    from vllm.v1.request import Request

MIN_SAVE_BLOCKS: Final = 64
"""A step's smaller saves are put together up to this many blocks: a job costs here and in the workers what it costs
however small it is, and a step of decoding may complete a block of every request. Larger ones gain nothing by it."""


@dataclass
class TrackedRequest:
    """One request, from its first allocation to its end."""

    request: "Request"
    block_ids: list[int] = field(default_factory=list)
    first: int = 0  # block behind those that vLLM found in its own cache, when it last asked
    num_planned: int = 0  # leading blocks that were saved, or found saved
    too_lossy: set[int] = field(default_factory=set)  # blocks that have to be saved as they are
    loading: int | None = None  # its load job
    computes: bool = False  # a load failed: it is not offered again
    first_plan: int | None = None  # number of the first plan that computes or loads its KV
    has_stale_kv: bool = False  # computed with weights that are others now: none of it is saved


@dataclass(slots=True)
class SavePart:
    """Consecutive blocks of one request in a save."""

    tracked: TrackedRequest
    blocks: slice  # of the request
    keys: list[BlockHash]
    event: PlannedBlocks | None


@dataclass
class OpenJob:
    """A job that is under way in the workers."""

    plan: SavePlan | LoadPlan
    started_s: float
    request_id: str = ""  # of a load
    reports: int = 0
    failed: set[int] = field(default_factory=set)
    corrupt: set[int] = field(default_factory=set)
    too_lossy: set[int] = field(default_factory=set)
    as_is: bool = False  # of a save: packing would have lost too much of these
    parts: list[SavePart] = field(default_factory=list)  # of a save: its call, in order
    is_forgotten: bool = False  # whatever comes of it is not kept
    write_id: int = NO_WRITE  # of a save: the write to the lower tier that follows it

    def add(self, outcome: JobOutcome) -> None:
        """Take in what one worker says."""
        self.reports += 1
        self.failed.update(outcome.failed)
        self.corrupt.update(outcome.corrupt)
        self.too_lossy.update(outcome.too_lossy)


def group_parts(parts: Iterable[SavePart]) -> Iterator[list[SavePart]]:
    """Parts that are saved as one, in order."""
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
