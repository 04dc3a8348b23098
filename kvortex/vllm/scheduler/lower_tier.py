"""The lower tier behind the owner's pool, as the scheduler half asks for it. The owner moves the blocks by itself."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.index import pack_keys
from kvortex.owner import RemoteControl
from kvortex.owner.protocol import TierCall
from kvortex.owner.tiering import Known, RemoteCall, RemoteCalls, known_to_tier, tier_figures
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.scheduler.blocks import Wanted
from kvortex.vllm.scheduler.owner_events import OwnerEvents

if TYPE_CHECKING:
    from vllm.v1.request import Request

SCAN_WAIT_S: Final = 0.5
"""Enough to scan a small store before the server starts; a large one is scanned while it serves."""

PROGRESS_INTERVAL_S: Final = 0.001
"""Seconds between two questions how far the calls are, at least."""

FIGURES_INTERVAL_S: Final = 1.0
"""Seconds between two questions for the tier's counters, at least."""


ASK_AGAIN_S: Final = 0.05
"""Seconds between two questions of a request whose blocks another server is storing, at least."""


class _Question(NamedTuple):
    answer: RemoteCall
    due_s: float
    asked_s: float


class _Fetch(NamedTuple):
    call: RemoteCall
    started_s: float
    request: "Request"
    keys: NDArray[np.uint64]
    numbers: list[tuple[int, int]]


class LowerTier:
    """Asks the owner which blocks the tier has, and has it fetch them. On the scheduler's thread; waits for no I/O.

    Args:
        config: the engine's settings.
        control: the remote control plane, of a cache that has a lower tier.
        stats: counts for vLLM's metrics.
        events: takes note of what enters the pool; None where vLLM publishes no events.
        ask_wait_s: seconds that a request waits for the answer of a store that may have more than is known.
    """

    def __init__(
        self,
        config: KVortexConfig,
        control: RemoteControl,
        stats: ConnectorStats,
        events: "OwnerEvents | None",
        ask_wait_s: float,
    ) -> None:
        self._events = events
        self._control = control
        self._stats = stats
        self._ask_wait_s = ask_wait_s
        self._wait_s = config.tier.timeout_s if config.tier.load_deadline_s is None else config.tier.load_deadline_s
        in_pool = control.allocator.capacity_bytes // int(control.extents.max())
        self._max_fetching = max(1, in_pool // 2)
        self._calls = RemoteCalls(control)
        self._knows_all = False
        self._asked_s = 0.0
        self._questions: dict[str, _Question] = {}  # by request
        self._overdue: list[_Question] = []
        self._fetches: dict[str, _Fetch] = {}  # by request
        self._asked: dict[str, set[tuple[int, int]]] = {}  # request -> blocks that were fetched for it
        self._absent: dict[str, tuple[int, int]] = {}  # request -> the first block that the tier did not have
        self._counted = tier_figures(control)
        self._counted_s = time.monotonic()
        self._wait_for_scan()

    def _wait_for_scan(self) -> None:
        ready, until_s = self._calls.start(TierCall.READY), time.monotonic() + SCAN_WAIT_S
        while not ready.is_over and time.monotonic() < until_s:
            time.sleep(SCAN_WAIT_S / 100)
            self._calls.ask()

    def known(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which blocks the tier is known to have, `bool [n]`."""
        if not keys:
            return np.empty(0, dtype=np.bool_)
        return self._known(keys).mask

    def _known(self, keys: Sequence[bytes]) -> Known:
        known = known_to_tier(self._control, pack_keys(keys))
        self._knows_all = known.knows_all
        return known

    def waits_for_answer(self, request_id: str, blocks: Callable[[], Sequence[bytes]]) -> bool:
        """True while the store is asked which blocks of a request it has, unless that takes too long.

        A request asks once, for all its blocks together. While a store does not keep up, nobody asks it.

        Args:
            request_id: the request.
            blocks: gives the block hashes in question; called when it asks.
        """
        if self._questions or self._overdue:
            self._ask_progress()
        if (question := self._questions.get(request_id)) is None:
            self._overdue = [late for late in self._overdue if not late.answer.is_over]
            if self._overdue or self._knows_all:
                return False
            hashes = blocks()
            known = self._known(hashes)
            unknown = np.flatnonzero(~known.mask)
            if not unknown.size or not known.asks_store:
                return False
            asked = self._calls.start(TierCall.ASK, pack_keys([hashes[n] for n in unknown.tolist()]))
            now_s = time.monotonic()
            question = _Question(asked, now_s + self._ask_wait_s, now_s)
            self._questions[request_id] = question
        if question.answer.is_over:
            return False
        if time.monotonic() < question.due_s:
            return True
        if question not in self._overdue:
            self._overdue.append(question)
        return False

    def ask_again(self, request_id: str) -> None:
        """The store may have got more blocks of a request by now: have it asked, but not all the time."""
        question = self._questions.get(request_id)
        if question is None or (question.answer.is_over and time.monotonic() - question.asked_s >= ASK_AGAIN_S):
            self._questions.pop(request_id, None)
            self._absent.pop(request_id, None)

    def _ask_progress(self) -> None:
        """Ask how far the calls are: once for all requests that are looked at in a step."""
        now_s = time.monotonic()
        if now_s - self._asked_s >= PROGRESS_INTERVAL_S:
            self._asked_s = now_s
            self._calls.ask()

    def fetch(self, request: "Request", wanted: Wanted) -> bool:
        """Have blocks fetched from the tier into the pool.

        Args:
            request: the request that asks; each block is fetched for it once.
            wanted: blocks that are not in the pool.

        Returns:
            True if some are on their way; False if the tier does not have the first block, or the pool has no room.
        """
        numbers, hashes = wanted.numbers[: self._max_fetching], wanted.keys[: self._max_fetching]
        asked = self._asked.setdefault(request.request_id, set())
        if self._absent.get(request.request_id) == numbers[0]:
            return False
        if not asked.isdisjoint(numbers[:1] if wanted.is_chain else numbers):
            return False
        groups = np.array([group for group, _ in numbers], dtype=np.uint8)
        keys = pack_keys(hashes)
        call = self._calls.fetch(keys, groups, leading=wanted.is_chain)
        assert call.flags is not None
        coming = np.flatnonzero(call.flags)
        asked.update([numbers[n] for n in coming.tolist()])
        if not coming.size:
            self._absent[request.request_id] = numbers[0]
        if call.is_over:
            return False
        known = len(call.flags)
        self._fetches[request.request_id] = _Fetch(call, time.perf_counter(), request, keys[:known], numbers[:known])
        return True

    def is_fetching(self, request_id: str) -> bool:
        """True while blocks are fetched for a request, unless that takes longer than it should wait."""
        fetch = self._fetches.get(request_id)
        if fetch is None:
            return False
        self._ask_progress()
        seconds = time.perf_counter() - fetch.started_s
        if not fetch.call.is_over:
            return seconds < self._wait_s
        del self._fetches[request_id]
        self._stats.add("fetch_seconds", seconds)
        if self._events is not None:
            self._events.add_fetched(fetch.request, fetch.keys, fetch.numbers)
        return False

    def num_fetched(self, request_id: str, group: int, blocks: range) -> int:
        """How many of these blocks were fetched for the request."""
        fetched = self._asked.get(request_id, set())
        return sum((group, block) in fetched for block in blocks)

    def forget_request(self, request_id: str) -> None:
        """A request has ended: fetch nothing for it any more."""
        self._asked.pop(request_id, None)
        self._absent.pop(request_id, None)
        self._questions.pop(request_id, None)
        if (fetch := self._fetches.pop(request_id, None)) is not None:
            self._calls.cancel(fetch.call)

    def count(self) -> None:
        """Count what the owner's tier has done since the last time, for all engines with this cache together."""
        now_s = time.monotonic()
        if now_s - self._counted_s < FIGURES_INTERVAL_S:
            return
        self._counted_s = now_s
        if (figures := tier_figures(self._control)) is None:
            return
        before, self._counted = self._counted, figures
        if before is None:  # the owner did not answer then
            return
        for name, counter in (
            ("written_blocks", "written_blocks"),
            ("failed_writes", "failed_writes"),
            ("shed_blocks", "shed_writes"),
            ("fetched_blocks", "fetched_blocks"),
        ):
            if (more := getattr(figures, name) - getattr(before, name)) > 0:
                self._stats.add(counter, more)
        pauses = [sum(b.opened for b in found.breakers.values()) for found in (before, figures)]
        if pauses[1] > pauses[0]:
            self._stats.add("tier_pauses", pauses[1] - pauses[0])
