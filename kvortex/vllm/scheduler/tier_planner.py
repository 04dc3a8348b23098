"""Plans for the lower tier: which blocks the workers write there, and which they fetch from it."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane
from kvortex.types import Direction, MissReason, TransferPlan, form_of
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.plans import NO_WRITE, FetchJob, JobOutcome
from kvortex.vllm.scheduler.blocks import Wanted
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


class _Question(NamedTuple):
    answer: "Future[None]"
    due_s: float


class TierPlanner:
    """Plans writes and fetches over one pool and one tier.

    Args:
        config: the engine's settings.
        control: the pool's index and allocator.
        index: which blocks the tier has.
        num_workers: workers that report each job.
        job_ids: numbers for jobs, shared with loads and saves.
        stats: counts for vLLM's metrics.
        events: takes note of what enters pool and disk; None where vLLM publishes no events.
        ask_wait_s: seconds that a request waits for the answer of a store that may have more than is known.
    """

    def __init__(
        self,
        config: KVortexConfig,
        control: ControlPlane,
        index: TierIndex,
        num_workers: int,
        job_ids: Iterator[int],
        stats: ConnectorStats,
        events: EventLog | None,
        ask_wait_s: float,
    ) -> None:
        self._events = events
        self._ask_wait_s = ask_wait_s
        self._questions: dict[str, _Question] = {}  # by request
        self._overdue: list[_Question] = []
        self._control = control
        self._index = index
        self._writes = JobsInFlight[WriteInFlight](num_workers)
        self._fetches = JobsInFlight[FetchInFlight](num_workers)
        self._job_ids = job_ids
        self._stats = stats
        self._wait_s = config.tier.timeout_s if config.tier.load_deadline_s is None else config.tier.load_deadline_s
        in_pool = control.allocator.capacity_bytes // int(control.extents.max())
        self._max_writing = max(1, min(config.tier.queue_blocks, int(WRITING_SHARE * in_pool)))
        self._max_fetching = max(1, in_pool // 2)
        self._num_writing = 0
        self._arriving: dict[bytes, float] = {}  # hash -> time at which its fetch was planned
        self._used_s: BoundedMap[float] = BoundedMap()  # last hash of a chain -> time of the last report of its use
        self._asked: dict[str, set[tuple[int, int]]] = {}  # request -> blocks that were fetched for it

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
        write.held = replace(held, positions=positions[held.positions])
        self._finish_write(write)

    def _finish_write(self, write: WriteInFlight) -> None:
        """End a write if its save is committed and every worker has reported it; of these either may be the last."""
        if write.held is None or not self._writes.is_reported(write):
            return
        self._writes.end(write)
        self._num_writing -= len(write.hashes)
        self._control.release(write.held.slots)
        stored = [i for i in range(len(write.keys)) if i not in write.failed]
        is_usual = (write.held.forms == self._control.usual_forms[write.held.forms // 2]).tolist()
        usual = dict(zip(write.held.positions.tolist(), is_usual, strict=True))
        for encoding in (True, False):
            of_encoding = [i for i in stored if usual.get(i, True) is encoding]
            self._index.add_written([write.keys[i] for i in of_encoding], encoding)
        self._announce_written(write, stored)
        self._stats.add("written_blocks", len(stored))
        self._stats.add("failed_writes", len(write.failed))

    def _announce_written(self, write: WriteInFlight, stored: Sequence[int]) -> None:
        if self._events is None:
            return
        for blocks, pairs in _by_event(write.event_of, stored):
            self._events.add_written(blocks, [n for n, _ in pairs])

    # -- fetch -------------------------------------------------------------------------------------

    def known(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which blocks the tier is known to have, `bool [n]`."""
        found = self._index.known(self._index.keys_of(keys))
        return np.array([there is not None for there in found], dtype=np.bool_)

    def waits_for_answer(self, request_id: str, blocks: Callable[[], Sequence[bytes]]) -> bool:
        """True while the store is asked which blocks of a request it has, unless that takes too long.

        A request asks once, for all its blocks together. While a store does not keep up, nobody asks it.

        Args:
            request_id: the request.
            blocks: gives the block hashes in question; called when it asks.
        """
        if (question := self._questions.get(request_id)) is None:
            self._overdue = [late for late in self._overdue if not late.answer.done()]
            if self._overdue or not self._index.asks_store:
                return False
            hashes = blocks()
            known = self._index.known(self._index.keys_of(hashes))
            unknown = [block_hash for block_hash, there in zip(hashes, known, strict=True) if there is None]
            if not unknown:
                return False
            question = _Question(self._index.ask(unknown), time.monotonic() + self._ask_wait_s)
            self._questions[request_id] = question
        if question.answer.done():
            return False
        if time.monotonic() < question.due_s:
            return True
        if question not in self._overdue:
            self._overdue.append(question)
        return False

    def plan_fetch(self, request: "Request", wanted: Wanted) -> FetchJob | None:
        """Have the workers fetch blocks from the tier into the pool.

        Args:
            request: the request that asks; each block is fetched for it once.
            wanted: blocks that are not in the pool.

        Returns:
            The job; None if the tier does not have the first block, or the pool has no room.
        """
        numbers, hashes = wanted.numbers[: self._max_fetching], wanted.keys[: self._max_fetching]
        asked = self._asked.setdefault(request.request_id, set())
        if not asked.isdisjoint(numbers[:1] if wanted.is_chain else numbers):
            return None
        keys = self._index.keys_of(hashes)
        known = self._index.known_prefix(keys) if wanted.is_chain else self._index.known(keys)
        there = [n for n, found in enumerate(known) if found is not None]
        asked.update([numbers[n] for n in there] or numbers[:1])
        forms = np.array([self._form(numbers[n][0], known[n]) for n in there], dtype=np.uint8)
        plan = self._control.plan_fetch(pack_keys([hashes[n] for n in there]), forms, "fetch")
        if not plan.positions.size:
            return None
        fetched = [there[position] for position in plan.positions.tolist()]
        job_id = next(self._job_ids)
        fetch = FetchInFlight(
            job_id=job_id,
            plan=plan,
            hashes=[hashes[n] for n in fetched],
            keys=[keys[n] for n in fetched],
            started_s=time.perf_counter(),
            event_of=self._events_of(request, [numbers[n] for n in fetched]),
        )
        self._fetches.add(fetch)
        self._arriving.update(dict.fromkeys(fetch.hashes, time.monotonic()))
        transfer = TransferPlan(
            Direction.LOAD,
            np.zeros(len(fetched), dtype=np.int32),
            plan.offsets,
            plan.forms if self._control.has_forms else None,
        )
        return FetchJob(job_id, transfer, b"".join(fetch.keys))

    def _form(self, group: int, usual: bool | None) -> int:
        return int(self._control.usual_forms[group]) if usual else form_of(group, False)

    def _events_of(self, request: "Request", numbers: Sequence[tuple[int, int]]) -> list[tuple[PlannedBlocks, int]]:
        """The event that will name each block, and its number in that event; nothing without events.

        Args:
            request: the request.
            numbers: the group and the number in the request of each block.
        """
        if self._events is None:
            return []
        event_of: dict[tuple[int, int], tuple[PlannedBlocks, int]] = {}
        run: list[tuple[int, int]] = []
        for group, number in sorted(numbers):
            if run and run[-1] != (group, number - 1):
                event_of.update(self._events_of_run(self._events, request, run))
                run = []
            run.append((group, number))
        event_of.update(self._events_of_run(self._events, request, run))
        return [event_of[number] for number in numbers]

    @staticmethod
    def _events_of_run(
        events: EventLog, request: "Request", run: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], tuple[PlannedBlocks, int]]]:
        (group, first), (_, last) = run[0], run[-1]
        event = events.planned(request, group, slice(first, last + 1))
        return ((number, (event, n)) for n, number in enumerate(run))

    def is_arriving(self, block_hash: bytes) -> bool:
        """True while a fetch of the block is in flight, unless it takes longer than a request should wait."""
        since_s = self._arriving.get(block_hash)
        return since_s is not None and time.monotonic() - since_s < self._wait_s

    def _finish_fetch(self, fetch: FetchInFlight) -> None:
        self._fetches.end(fetch)
        plan = fetch.plan
        columns = zip(plan.slots.tolist(), plan.offsets.tolist(), plan.forms.tolist(), strict=True)
        for position, (slot, offset, form) in enumerate(columns):
            if position in fetch.failed:
                self._control.abandon_fetch(slot, offset, MissReason.TRANSFER_FAILED)
            else:
                self._control.finish_fetch(slot, offset, form, 0)
        for block_hash in fetch.hashes:
            self._arriving.pop(block_hash, None)
        self._announce_fetched(fetch)
        self._index.add_lost([fetch.keys[i] for i in fetch.failed])
        self._stats.add("fetched_blocks", len(fetch.hashes) - len(fetch.failed))
        self._stats.add("failed_fetches", len(fetch.failed))
        self._stats.add("fetch_seconds", time.perf_counter() - fetch.started_s)

    def _announce_fetched(self, fetch: FetchInFlight) -> None:
        if self._events is None:
            return
        there = np.flatnonzero(self._control.allocator.holds(fetch.plan.offsets))  # not failed, nor dropped by a reset
        offsets = fetch.plan.offsets.tolist()
        for blocks, pairs in _by_event(fetch.event_of, there.tolist()):
            self._events.add_stored(blocks, [n for n, _ in pairs], [offsets[position] for _, position in pairs])
        self._events.add_lost([blocks.name(n) for blocks, n in (fetch.event_of[i] for i in sorted(fetch.failed))])

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

    def num_fetched(self, request_id: str, group: int, blocks: range) -> int:
        """How many of these blocks were fetched for the request."""
        fetched = self._asked.get(request_id, set())
        return sum((group, block) in fetched for block in blocks)

    def forget_request(self, request_id: str) -> None:
        """A request has ended: forget which blocks were fetched for it."""
        self._asked.pop(request_id, None)
        self._questions.pop(request_id, None)

    def forget_all(self) -> None:
        """The weights have changed: no block that the tier has now is found again."""
        self._index.forget_all()

    def close(self) -> None:
        """Close the tier."""
        self._index.close()


def _by_event(
    event_of: Sequence[tuple[PlannedBlocks, int]], positions: Sequence[int]
) -> Iterator[tuple[PlannedBlocks, list[tuple[int, int]]]]:
    """For each event its blocks among `positions`: number in the event, and position, in the order of the event."""
    found: dict[int, tuple[PlannedBlocks, list[tuple[int, int]]]] = {}
    for position in positions:
        blocks, number = event_of[position]
        found.setdefault(id(blocks), (blocks, []))[1].append((number, position))
    return ((blocks, sorted(pairs)) for blocks, pairs in found.values())
