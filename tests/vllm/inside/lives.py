"""A server's life: the real Scheduler over few blocks, with workers that are played by a seed."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

import pytest
from played_owner import PlayedOwner
from scheduler_harness import SchedulerHarness

from kvortex.planes.control import ControlPlane
from kvortex.vllm.scheduler import loads, lower_tier
from kvortex.vllm.scheduler.half import SchedulerHalf

STEPS_A_REQUEST = 100  # for its tokens, one after the other, its prompt in pieces, its load and those of others
STEP_S = 0.02
NOTHING = -1
"""In place of a token's KV: no KV."""


class Clock:
    """Time goes by with steps."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the scheduler half, which goes on with steps only."""
    clock = Clock()
    for module in (loads, lower_tier):
        monkeypatch.setattr(module, "time", clock)
    return clock


def chain_of(token_ids: Sequence[int]) -> list[int]:
    """For each token what its KV depends on."""
    chain, before = [], 0
    for token in token_ids:
        before = hash((before, token))
        chain.append(before)
    return chain


class PlayedWorkers(Protocol):
    """What a life asks of its workers."""

    sloth: float
    """How likely a job waits for another step."""

    owner: PlayedOwner | None

    @property
    def is_idle(self) -> bool: ...

    def step(self) -> None: ...


class Life(ABC):
    """One life, from one seed.

    Args:
        random: seeded.
        clock: of the scheduler half.
        harness, workers: of the server.
        longest: tokens that a prompt may have.
    """

    def __init__(
        self, random: Random, clock: Clock, harness: SchedulerHarness, workers: PlayedWorkers, longest: int
    ) -> None:
        self.random = random
        self.clock = clock
        self.harness = harness
        self.workers: Any = workers
        # Prompts with common beginnings, none too long for the device by itself.
        self.base = base = [random.randrange(3, 1000) for _ in range(longest)]
        cuts = [random.randrange(1, longest) for _ in range(6)]
        self.prompts = [base[:cut] + [random.randrange(3, 1000) for _ in range(min(40, longest - cut))] for cut in cuts]
        self._num_requests = 0
        self._announced: dict[str, set[tuple[int | None, Any]]] = defaultdict(set)  # by medium
        self._take_events = self.half.take_events  # vLLM asks for them, in the middle of a step
        vars(self.half)["take_events"] = self._listen

    @property
    def half(self) -> SchedulerHalf:
        half: SchedulerHalf = self.harness.connector._scheduler
        return half

    @property
    def control(self) -> ControlPlane:
        """That of the pool, here or in an owner."""
        control: Any = self.half._control if self.workers.owner is None else self.workers.owner.control
        assert isinstance(control, ControlPlane)
        return control

    def live(self) -> None:
        """Requests come, things happen, and at the end nobody holds anything."""
        for _ in range(self.random.choice([10, 40, 80])):
            for _ in range(self.random.choice([0, 0, 1, 2])):
                self.add()
            chance = self.random.random()
            running = [name for name, request in self.harness.requests.items() if not request.is_finished()]
            if chance < 0.04 and running:
                self.harness.abort(self.random.choice(running))
            elif chance >= 0.04:
                self.disturb(chance)
            self._step()
        self.before_end()
        self._end()

    def add(self) -> None:
        """A request comes."""
        name, self._num_requests = f"r{self._num_requests}", self._num_requests + 1
        self.harness.add_request(name, self.random.choice(self.prompts), max_tokens=self.random.choice([1, 3, 50]))

    def close(self) -> None:
        """Give back what is not the harness's."""
        if self.workers.owner is not None:
            self.workers.owner.close()

    @abstractmethod
    def disturb(self, chance: float) -> None:
        """Perhaps something happens; `chance` is 0.04 to 1."""

    @abstractmethod
    def before_end(self) -> None:
        """Nobody comes any more."""

    def holders(self) -> Sequence[Any]:
        """Requests that wait and have blocks; vLLM takes none from them."""
        held = [self.harness.requests[name] for name in self.harness.held_request_ids]
        return [request for request in held if any(self.harness.block_tables(request.request_id))]

    def _step(self) -> None:
        self.clock.now_s += STEP_S
        self.workers.step()
        self._listen()
        # A block that is dropped while it is read has left when that has ended.
        told, known = len(self._announced["CPU"]), len(self.control.index)
        if self.workers.owner is not None:  # of what it fetches it tells when the request asks again, if it does
            assert told <= known or self.half.has_work(), "a block has left, and nobody was told"
        else:
            assert told >= known if self.half.has_work() else told == known, "events and index differ"

    def _listen(self) -> list[Any]:
        events = list(self._take_events())
        for event in events:
            group = getattr(event, "group_idx", None)
            place, names = self._announced[event.medium], {(group, name) for name in event.block_hashes}
            if hasattr(event, "token_ids"):
                assert len(event.token_ids) == event.block_size * len(event.block_hashes)
                assert place.isdisjoint(names), "a block is announced twice"
                place.update(names)
            else:
                assert place.issuperset(names), "a block leaves that was not announced"
                place.difference_update(names)
        return events

    def _end(self) -> None:
        """Jobs end: everybody must, within a bound of steps."""
        self.workers.sloth = 0.0
        num_open = sum(not r.is_finished() for r in self.harness.requests.values())
        for _ in range(STEPS_A_REQUEST * (num_open + 1)):
            open_requests = [r for r in self.harness.requests.values() if not r.is_finished()]
            if not open_requests and self.workers.is_idle and not self.half.has_work():
                break
            self._step()
        else:
            states = {r.request_id: r.status.name for r in open_requests}
            raise AssertionError(f"no end: {states}, {self.harness.num_free_blocks} blocks free")
        self._step()  # vLLM may keep blocks for a step
        pool: Any = self.harness.scheduler.kv_cache_manager.block_pool
        assert self.harness.num_free_blocks == pool.num_gpu_blocks - 1
        assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null), "a block is held"
        if self.workers.owner is not None:
            self.workers.owner.settle()
        control = self.control
        assert control.allocator.allocated_bytes == control.index.committed_bytes
        assert control.index.num_pending == 0
        assert not self.half._jobs
        assert not self.half._aborted
        assert not self.half._tracked
        assert not self.half._planners.admission._passed_over
