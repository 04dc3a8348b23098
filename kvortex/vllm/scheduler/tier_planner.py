"""The scheduler half's part of the lower tier: which blocks the workers write there, and which they fetch."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane, FetchPlan, HeldBlocks
from kvortex.types import BlockSizes, Direction, MissReason, TransferPlan
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.plans import FetchJob, JobOutcome
from kvortex.vllm.scheduler.events import EventLog, PlannedBlocks
from kvortex.vllm.scheduler.tier_index import Memory, TierIndex

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

WRITING_SHARE = 0.25
"""Of the pool: blocks that are being written cannot be evicted, so no more than this at a time."""
NO_WRITE = -1
USED_AGAIN_S = 30.0
"""The workers are told of the same chain's use at most this often."""


@dataclass
class _OpenWrite:
    """Blocks that the workers write when they have saved them; `held` once the save is over here too."""

    hashes: list[bytes]
    keys: list[bytes]
    told: Sequence[tuple[PlannedBlocks, int]] = ()  # what events say of each block, where there are events
    reports: int = 0
    failed: set[int] = field(default_factory=set)
    held: HeldBlocks | None = None


@dataclass
class _OpenFetch:
    plan: FetchPlan
    hashes: list[bytes]
    keys: list[bytes]
    started_s: float
    told: PlannedBlocks | None = None
    reports: int = 0
    failed: set[int] = field(default_factory=set)


class TierPlanner:
    """Plans writes and fetches over one pool and one tier.

    Args:
        config: the engine's.
        control: decides what is in the pool.
        sizes: bytes that a block takes in the pool.
        index: what the tier has.
        num_workers: that report.
        next_id: numbers for jobs.
        stats: gives the counters of the moment.
        events: told of what comes into the pool and onto the disk; None where nobody listens.
    """

    def __init__(
        self,
        config: KVortexConfig,
        control: ControlPlane,
        sizes: BlockSizes,
        index: TierIndex,
        num_workers: int,
        next_id: Callable[[], int],
        stats: Callable[[], ConnectorStats],
        events: EventLog | None,
    ) -> None:
        self._events = events
        self._control = control
        self._sizes = sizes
        self._index = index
        self._num_workers = num_workers
        self._next_id = next_id
        self._stats = stats
        self._wait_s = config.tier.timeout_s if config.tier.load_deadline_s is None else config.tier.load_deadline_s
        in_pool = control.allocator.capacity_bytes // sizes.packed
        self._max_writing = max(1, min(config.tier.queue_blocks, int(WRITING_SHARE * in_pool)))
        self._max_fetching = max(1, in_pool // 2)
        self._num_writing = 0
        self._writes: dict[int, _OpenWrite] = {}
        self._fetches: dict[int, _OpenFetch] = {}
        self._arriving: dict[bytes, float] = {}  # hash -> when its fetch was planned
        self._used_s: Memory[float] = Memory()  # last hash of a chain -> when the workers were told of its use
        self._asked: dict[str, int] = {}  # request -> block up to which it has had blocks fetched

    # -- write -------------------------------------------------------------------------------------

    def plan_write(self, hashes: Sequence[bytes], told: Sequence[tuple[PlannedBlocks, int]] = ()) -> tuple[bytes, int]:
        """Have the workers write the blocks of a save when they have them.

        Args:
            hashes: block hashes, in the order of the save.
            told: for each block what an event will say, and which of those blocks it is; nothing without events.

        Returns:
            The keys for the save job, 32 bytes a block, and the number of the write; no keys where too much is being
            written already.
        """
        if self._num_writing + len(hashes) > self._max_writing:
            self._stats().add("shed_writes", len(hashes))
            return b"", NO_WRITE
        keys = self._index.keys_of(hashes)
        number = self._next_id()
        self._writes[number] = _OpenWrite(list(hashes), keys, told)
        self._num_writing += len(hashes)
        return b"".join(keys), number

    def saved(self, number: int, succeeded: NDArray[np.bool_]) -> None:
        """A save is committed: its blocks stay where they are until the workers have written them."""
        write = self._writes[number]
        positions = np.flatnonzero(succeeded)
        held = self._control.hold(pack_keys([write.hashes[i] for i in positions.tolist()]))
        write.held = HeldBlocks(positions[held.positions], held.slots, held.offsets, held.nbytes, held.digests)
        self._end_if_written(number, write)

    def _end_if_written(self, number: int, write: _OpenWrite) -> None:
        # Of several workers one may have written before another has reported the save.
        if write.held is None or write.reports < self._num_workers:
            return
        del self._writes[number]
        self._num_writing -= len(write.hashes)
        self._control.release(write.held.slots)
        stored = [i for i in range(len(write.keys)) if i not in write.failed]
        sizes = dict(zip(write.held.positions.tolist(), write.held.nbytes.tolist(), strict=True))
        for packed in (True, False):
            of_form = [i for i in stored if self._control.is_packed(sizes.get(i, self._sizes.packed)) is packed]
            self._index.written([write.keys[i] for i in of_form], packed)
        self._announce_written(write, stored)
        self._stats().add("written_blocks", len(stored))
        self._stats().add("failed_writes", len(write.failed))

    def _announce_written(self, write: _OpenWrite, stored: Sequence[int]) -> None:
        if self._events is None:
            return
        by_part: dict[int, tuple[PlannedBlocks, list[int]]] = {}
        for position in stored:
            blocks, number = write.told[position]
            by_part.setdefault(id(blocks), (blocks, []))[1].append(number)
        for blocks, numbers in by_part.values():
            self._events.written(blocks, numbers)

    # -- fetch -------------------------------------------------------------------------------------

    def plan_fetch(self, request: "Request", number: int, hashes: Sequence[bytes]) -> FetchJob | None:
        """Have the workers bring blocks from the tier.

        Args:
            request: who asks; the same block is fetched for it once.
            number: position of the first block in the request.
            hashes: the request's block hashes from there on, none of which is in the pool.

        Returns:
            The job; None where the tier has not got the first block, or the pool has no room.
        """
        request_id = request.request_id
        if self._asked.get(request_id, -1) >= number:
            return None
        keys = self._index.keys_of(hashes[: self._max_fetching])
        packed = np.array(self._index.known_prefix(keys), dtype=np.bool_)
        self._asked[request_id] = number + max(len(packed) - 1, 0)
        plan = self._control.plan_fetch(pack_keys(hashes[: len(packed)]), packed, "fetch")
        if not plan.positions.size:
            return None
        places = plan.positions.tolist()
        job_id = self._next_id()
        told = None
        if self._events is not None:
            told = PlannedBlocks.of(request, slice(number, number + len(packed)), self._events.block_size)
        fetched, its_keys = [hashes[i] for i in places], [keys[i] for i in places]
        fetch = _OpenFetch(plan, fetched, its_keys, time.perf_counter(), told)
        self._fetches[job_id] = fetch
        self._arriving.update(dict.fromkeys(fetch.hashes, time.monotonic()))
        transfer = TransferPlan(
            Direction.LOAD,
            np.zeros(len(places), dtype=np.int32),
            plan.offsets,
            packed[plan.positions] if self._sizes.packs else None,
        )
        return FetchJob(job_id, transfer, b"".join(fetch.keys))

    def is_arriving(self, block_hash: bytes) -> bool:
        """A block is on its way, and not for too long yet."""
        since_s = self._arriving.get(block_hash)
        return since_s is not None and time.monotonic() - since_s < self._wait_s

    def _end_fetch(self, job_id: int, fetch: _OpenFetch) -> None:
        del self._fetches[job_id]
        plan = fetch.plan
        columns = zip(plan.slots.tolist(), plan.offsets.tolist(), plan.nbytes.tolist(), strict=True)
        for position, (slot, offset, nbytes) in enumerate(columns):
            if position in fetch.failed:
                self._control.abandon_fetch(slot, offset, MissReason.TRANSFER_FAILED)
            else:
                self._control.finish_fetch(slot, offset, nbytes, 0)
        for block_hash in fetch.hashes:
            self._arriving.pop(block_hash, None)
        self._announce_fetched(fetch)
        self._index.lost([fetch.keys[i] for i in fetch.failed])
        self._stats().add("fetched_blocks", len(fetch.hashes) - len(fetch.failed))
        self._stats().add("failed_fetches", len(fetch.failed))
        self._stats().add("fetch_seconds", time.perf_counter() - fetch.started_s)

    def _announce_fetched(self, fetch: _OpenFetch) -> None:
        if self._events is None or fetch.told is None:
            return
        seen = self._control.allocator.holds(fetch.plan.offsets)  # not what has failed, or what a reset overtook
        positions, offsets = fetch.plan.positions[seen], fetch.plan.offsets[seen]
        self._events.stored(fetch.told, positions.tolist(), offsets.tolist())
        self._events.lost([fetch.told.hashes[fetch.plan.positions[i]] for i in sorted(fetch.failed)])

    # -- use ---------------------------------------------------------------------------------------

    def used(self, hashes: Sequence[bytes]) -> bytes:
        """A request has used a chain, wherever its blocks came from.

        Returns:
            What the workers are told, 32 bytes a block: the keys of those that the tier has; nothing where they were
            told of the same chain shortly before.
        """
        keys = self._index.keys_of(hashes)
        keys = keys[: len(self._index.known_prefix(keys))]
        if not keys:
            return b""
        now_s, told_s = time.monotonic(), self._used_s.get(keys[-1])
        if told_s is not None and now_s - told_s < USED_AGAIN_S:
            return b""
        self._used_s.add([keys[-1]], now_s)
        return b"".join(keys)

    # -- both --------------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        """Writes and fetches under way."""
        return len(self._writes) + len(self._fetches)

    def report(self, outcome: JobOutcome) -> bool:
        """Take in what one worker says of a job; False if it is none of these."""
        number = outcome.job_id
        if (write := self._writes.get(number)) is not None:
            write.reports += 1
            write.failed.update(outcome.failed)
            self._end_if_written(number, write)
            return True
        if (fetch := self._fetches.get(number)) is not None:
            fetch.reports += 1
            fetch.failed.update(outcome.failed)
            if fetch.reports == self._num_workers:
                self._end_fetch(number, fetch)
            return True
        return False

    def forget_request(self, request_id: str) -> None:
        """A request has ended."""
        self._asked.pop(request_id, None)

    def forget_all(self) -> None:
        """Whatever the tier has is of no use any more."""
        self._index.forget_all()

    def close(self) -> None:
        """Close the tier."""
        self._index.close()
