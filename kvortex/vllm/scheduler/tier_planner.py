"""Plans for the lower tier: which blocks the workers write there, and which they fetch from it."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane, HeldBlocks
from kvortex.types import BlockSizes, Direction, MissReason, TransferPlan
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.plans import NO_WRITE, FetchJob, JobOutcome
from kvortex.vllm.scheduler.events import EventLog, PlannedBlocks
from kvortex.vllm.scheduler.jobs import FetchInFlight, JobsInFlight, WriteInFlight
from kvortex.vllm.scheduler.tier_index import BoundedMap, TierIndex

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

WRITING_SHARE = 0.25
"""Share of the pool that may be in flight to the tier at a time: these blocks cannot be evicted."""
USED_AGAIN_S = 30.0
"""Seconds between two reports of the same chain's use to the workers, at least."""


class TierPlanner:
    """Plans writes and fetches over one pool and one tier.

    Args:
        config: the engine's settings.
        control: the pool's index and allocator.
        sizes: bytes that a block takes in the pool.
        index: which blocks the tier has.
        num_workers: workers that report each job.
        job_ids: numbers for jobs, shared with loads and saves.
        stats: counts for vLLM's metrics.
        events: takes note of what enters pool and disk; None where vLLM publishes no events.
    """

    def __init__(
        self,
        config: KVortexConfig,
        control: ControlPlane,
        sizes: BlockSizes,
        index: TierIndex,
        num_workers: int,
        job_ids: Iterator[int],
        stats: ConnectorStats,
        events: EventLog | None,
    ) -> None:
        self._events = events
        self._control = control
        self._sizes = sizes
        self._index = index
        self._writes = JobsInFlight[WriteInFlight](num_workers)
        self._fetches = JobsInFlight[FetchInFlight](num_workers)
        self._job_ids = job_ids
        self._stats = stats
        self._wait_s = config.tier.timeout_s if config.tier.load_deadline_s is None else config.tier.load_deadline_s
        in_pool = control.allocator.capacity_bytes // sizes.packed
        self._max_writing = max(1, min(config.tier.queue_blocks, int(WRITING_SHARE * in_pool)))
        self._max_fetching = max(1, in_pool // 2)
        self._num_writing = 0
        self._arriving: dict[bytes, float] = {}  # hash -> time at which its fetch was planned
        self._used_s: BoundedMap[float] = BoundedMap()  # last hash of a chain -> time of the last report of its use
        self._asked: dict[str, int] = {}  # request -> number of the last block that was fetched for it

    # -- write -------------------------------------------------------------------------------------

    def plan_write(
        self, hashes: Sequence[bytes], events: Sequence[tuple[PlannedBlocks, int]] = ()
    ) -> tuple[bytes, int]:
        """Have the workers write the blocks of a save to the lower tier once they are saved.

        Args:
            hashes: block hashes, in the order of the save.
            events: one pair a block: the event that will name it, and its number in that event; empty without events.

        Returns:
            The tier's keys, 32 bytes a block, and the number of the write; no keys and `NO_WRITE` where too many
            blocks are in flight to the tier already.
        """
        if self._num_writing + len(hashes) > self._max_writing:
            self._stats.add("shed_writes", len(hashes))
            return b"", NO_WRITE
        keys = self._index.keys_of(hashes)
        job_id = next(self._job_ids)
        self._writes.add(WriteInFlight(job_id=job_id, hashes=list(hashes), keys=keys, event_of=events))
        self._num_writing += len(hashes)
        return b"".join(keys), job_id

    def hold_saved(self, write_id: int, succeeded: NDArray[np.bool_]) -> None:
        """A save is committed: hold its blocks, `bool [n]`, in the pool until the workers have written them."""
        write = self._writes[write_id]
        positions = np.flatnonzero(succeeded)
        held = self._control.hold(pack_keys([write.hashes[i] for i in positions.tolist()]))
        write.held = HeldBlocks(positions[held.positions], held.slots, held.offsets, held.nbytes, held.digests)
        self._finish_write(write)

    def _finish_write(self, write: WriteInFlight) -> None:
        """End a write if its save is committed and every worker has reported it; of these either may be the last."""
        if write.held is None or not self._writes.is_reported(write):
            return
        self._writes.end(write)
        self._num_writing -= len(write.hashes)
        self._control.release(write.held.slots)
        stored = [i for i in range(len(write.keys)) if i not in write.failed]
        sizes = dict(zip(write.held.positions.tolist(), write.held.nbytes.tolist(), strict=True))
        for packed in (True, False):
            of_encoding = [i for i in stored if self._control.is_packed(sizes.get(i, self._sizes.packed)) is packed]
            self._index.add_written([write.keys[i] for i in of_encoding], packed)
        self._announce_written(write, stored)
        self._stats.add("written_blocks", len(stored))
        self._stats.add("failed_writes", len(write.failed))

    def _announce_written(self, write: WriteInFlight, stored: Sequence[int]) -> None:
        if self._events is None:
            return
        by_part: dict[int, tuple[PlannedBlocks, list[int]]] = {}
        for position in stored:
            blocks, number = write.event_of[position]
            by_part.setdefault(id(blocks), (blocks, []))[1].append(number)
        for blocks, numbers in by_part.values():
            self._events.add_written(blocks, numbers)

    # -- fetch -------------------------------------------------------------------------------------

    def plan_fetch(self, request: "Request", number: int, hashes: Sequence[bytes]) -> FetchJob | None:
        """Have the workers fetch blocks from the tier into the pool.

        Args:
            request: the request that asks; each block is fetched for it once.
            number: position of the first block in the request.
            hashes: the request's block hashes from there on; none of these blocks is in the pool.

        Returns:
            The job; None if the tier does not have the first block, or the pool has no room.
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
        positions = plan.positions.tolist()
        job_id = next(self._job_ids)
        event = None
        if self._events is not None:
            event = PlannedBlocks.of(request, slice(number, number + len(packed)), self._events.block_size)
        fetch = FetchInFlight(
            job_id=job_id,
            plan=plan,
            hashes=[hashes[i] for i in positions],
            keys=[keys[i] for i in positions],
            started_s=time.perf_counter(),
            event=event,
        )
        self._fetches.add(fetch)
        self._arriving.update(dict.fromkeys(fetch.hashes, time.monotonic()))
        transfer = TransferPlan(
            Direction.LOAD,
            np.zeros(len(positions), dtype=np.int32),
            plan.offsets,
            packed[plan.positions] if self._sizes.packs else None,
        )
        return FetchJob(job_id, transfer, b"".join(fetch.keys))

    def is_arriving(self, block_hash: bytes) -> bool:
        """True while a fetch of the block is in flight, unless it takes longer than a request should wait."""
        since_s = self._arriving.get(block_hash)
        return since_s is not None and time.monotonic() - since_s < self._wait_s

    def _finish_fetch(self, fetch: FetchInFlight) -> None:
        self._fetches.end(fetch)
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
        self._index.add_lost([fetch.keys[i] for i in fetch.failed])
        self._stats.add("fetched_blocks", len(fetch.hashes) - len(fetch.failed))
        self._stats.add("failed_fetches", len(fetch.failed))
        self._stats.add("fetch_seconds", time.perf_counter() - fetch.started_s)

    def _announce_fetched(self, fetch: FetchInFlight) -> None:
        if self._events is None or fetch.event is None:
            return
        there = self._control.allocator.holds(fetch.plan.offsets)  # neither failed, nor dropped by a reset
        positions, offsets = fetch.plan.positions[there], fetch.plan.offsets[there]
        self._events.add_stored(fetch.event, positions.tolist(), offsets.tolist())
        self._events.add_lost([fetch.event.hashes[fetch.plan.positions[i]] for i in sorted(fetch.failed)])

    # -- use ---------------------------------------------------------------------------------------

    def keys_to_touch(self, hashes: Sequence[bytes]) -> bytes:
        """A request has used a chain of blocks: count those of the tier as used, too.

        Returns:
            The tier's keys for the workers, 32 bytes a block; empty if the tier has none of the blocks, or if the
            same chain was reported less than `USED_AGAIN_S` seconds ago.
        """
        keys = self._index.keys_of(hashes)
        keys = keys[: len(self._index.known_prefix(keys))]
        if not keys:
            return b""
        now_s, reported_s = time.monotonic(), self._used_s.get(keys[-1])
        if reported_s is not None and now_s - reported_s < USED_AGAIN_S:
            return b""
        self._used_s.add([keys[-1]], now_s)
        return b"".join(keys)

    # -- both --------------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        """Writes and fetches in flight."""
        return len(self._writes) + len(self._fetches)

    def take_outcome(self, outcome: JobOutcome) -> bool:
        """Take in one worker's outcome; returns False if its job is neither a write nor a fetch."""
        if outcome.job_id in self._writes:
            self._finish_write(self._writes.report(outcome))
            return True
        if outcome.job_id in self._fetches:
            fetch = self._fetches.report(outcome)
            if self._fetches.is_reported(fetch):
                self._finish_fetch(fetch)
            return True
        return False

    def forget_request(self, request_id: str) -> None:
        """A request has ended: forget which blocks were fetched for it."""
        self._asked.pop(request_id, None)

    def forget_all(self) -> None:
        """The weights have changed: no block that the tier has now is found again."""
        self._index.forget_all()

    def close(self) -> None:
        """Close the tier."""
        self._index.close()
