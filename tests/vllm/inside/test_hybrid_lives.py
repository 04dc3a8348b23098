"""Models that mix kinds of KV over the real Scheduler and few blocks, its workers played by a seed.

As `test_progress.py`, for every kind of KV: every request ends, none runs on anything but its own KV, and at the end
nobody holds anything. Jobs end late, in any order, or fail; requests are aborted and preempted; vLLM's own cache is
reset. A life that fails names its model and its seed; KVORTEX_HUNT_RUNS sets how many a model has.
"""

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from groups_support import MODELS, GroupWorkers, Model, greet, harness_of
from vllm.v1.request import RequestStatus

from kvortex.vllm.scheduler import loads, tier_planner
from kvortex.vllm.scheduler.half import SchedulerHalf
from kvortex.vllm.versions import SERVES_GROUPS

RUNS = int(os.environ.get("KVORTEX_HUNT_RUNS", "20"))
STEPS_A_REQUEST = 100
STEP_S = 0.02
MAX_MODEL_LEN = 512

pytestmark = pytest.mark.skipif(not SERVES_GROUPS, reason="this vLLM turns its hybrid manager off")


class Clock:
    """Time goes by with steps."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic


class Life:
    """A server's life, from one seed."""

    def __init__(self, model: Model, folder: Path, home: Path, seed: int, clock: Clock) -> None:
        self.random = random = Random(seed)
        self.clock = clock
        block_size = max(group.block_size for group in model.groups)
        longest = min(random.choice([4, 7, 9]) * block_size, MAX_MODEL_LEN - 60)
        # A request of that length, and a little more, fits the device by itself.
        need = sum(-(-(longest + 70) // group.block_size) + 1 for group in model.groups)
        num_blocks = random.choice([need, need + need // 2, 3 * need])
        self.has_disk = has_disk = random.random() < 0.4
        # Of drafts, which are counted before they are computed, a worker would have to know how many were right.
        is_ahead = not model.has_drafts and random.random() < 0.4
        self.harness = harness_of(
            model,
            folder,
            pool_blocks=random.choice([4, 10, 40]),
            num_blocks=num_blocks + 1,
            async_scheduling=is_ahead,
            kv_events=True,
            retention=random.choice([None, None, "all"]),
            max_num_seqs=random.choice([2, 4, 8]),
            max_num_batched_tokens=random.choice([96, 160, 512]),
            extra={
                "pending_wait_s": random.choice([0.0, 0.1, 1.0]),
                "codec": random.choice(["raw", "raw", "fp8"]),
                "min_hit_blocks": random.choice([1, 1, 2]),
                **({"disk": {"path": str(home), "capacity_bytes": 1 << 30}} if has_disk else {}),
            },
        )
        greet(self.harness, has_disk=has_disk)
        self.workers = GroupWorkers(self.harness, model.groups, random)
        self.workers.num_ahead = int(is_ahead)
        self.workers.loses = random.choice([0.0, 0.05, 0.5])
        self.workers.fails = random.choice([0.0, 0.0, 0.05, 0.3])
        self.workers.sloth = random.choice([0.0, 0.5, 0.9])
        base = [random.randrange(3, 1000) for _ in range(longest)]
        cuts = [random.randrange(1, longest) for _ in range(6)]
        self.prompts = [base[:cut] + [random.randrange(3, 1000) for _ in range(min(40, longest - cut))] for cut in cuts]
        self.names = 0
        self.hits = 0
        self.announced: dict[str, set[tuple[int, Any]]] = {"CPU": set(), "STORAGE": set()}
        self._take_events = self.half.take_events  # vLLM asks for them, in the middle of a step
        vars(self.half)["take_events"] = self._listen

    @property
    def half(self) -> SchedulerHalf:
        half: SchedulerHalf = self.harness.connector._scheduler
        return half

    def live(self) -> None:
        for _ in range(self.random.choice([10, 40, 80])):
            for _ in range(self.random.choice([0, 0, 1, 2])):
                self._add()
            chance = self.random.random()
            running = [name for name, request in self.harness.requests.items() if not request.is_finished()]
            if chance < 0.04 and running:
                self.harness.abort(self.random.choice(running))
            elif chance < 0.06:
                self.harness.scheduler.reset_prefix_cache()
            elif chance < 0.07:
                self.half.reset_cache()
            elif chance < 0.09:
                self._preempt_all()
            elif chance < 0.13 and self.has_disk:
                self.half._control._evict(1 << 40)  # the pool has evicted all that it may, the disk nothing
            self._step()
        self._end()

    def _preempt_all(self) -> None:
        """Unless somebody holds blocks of whom vLLM takes none: those that wait with them."""
        self.workers.drain()
        held = [self.harness.requests[name] for name in self.harness.held_request_ids]
        holders = [request for request in held if any(self.harness.block_tables(request.request_id))]
        if all(r.status == RequestStatus.RUNNING for r in holders):
            self.harness.preempt_all()

    def _add(self) -> None:
        name, self.names = f"r{self.names}", self.names + 1
        self.harness.add_request(name, self.random.choice(self.prompts), max_tokens=self.random.choice([1, 3, 50]))

    def _step(self) -> None:
        self.clock.now_s += STEP_S
        self.workers.step()
        self._listen()
        # A block that is dropped while it is read has left when that has ended.
        told, known = len(self.announced["CPU"]), len(self.half._control.index)
        assert told >= known if self.half.has_work() else told == known, "events and index differ"

    def _listen(self) -> list[Any]:
        events = list(self._take_events())
        for event in events:
            place, names = self.announced[event.medium], {(event.group_idx, name) for name in event.block_hashes}
            if hasattr(event, "token_ids"):
                assert len(event.token_ids) == event.block_size * len(event.block_hashes)
                assert place.isdisjoint(names), "a block is announced twice"
                place.update(names)
            else:
                assert place.issuperset(names), "a block leaves that was not announced"
                place.difference_update(names)
        return events

    def _end(self) -> None:
        """Nobody comes any more, jobs end: everybody must, within a bound of steps."""
        self.workers.sloth = 0.0
        self.workers.num_ahead = 0
        num_open = sum(not r.is_finished() for r in self.harness.requests.values())
        for _ in range(STEPS_A_REQUEST * (num_open + 1)):
            open_requests = [r for r in self.harness.requests.values() if not r.is_finished()]
            if not open_requests and self.workers.is_idle and not self.half.has_work():
                break
            self._step()
        else:
            states = {r.request_id: r.status.name for r in open_requests}
            raise AssertionError(f"no end: {states}, {self.harness.num_free_blocks} blocks free")
        self._check_nothing_is_held()

    def _check_nothing_is_held(self) -> None:
        self._step()  # vLLM may keep blocks for a step
        pool: Any = self.harness.scheduler.kv_cache_manager.block_pool
        assert self.harness.num_free_blocks == self.harness.kv_cache_config.num_blocks - 1
        assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null), "a block is held"
        control = self.half._control
        assert control.allocator.allocated_bytes == control.index.committed_bytes
        assert control.index.num_pending == 0
        assert not self.half._jobs
        assert not self.half._aborted
        assert not self.half._tracked
        assert not self.half._planners.admission._passed_over
        self.hits = self.half.stats.snapshot().hits


@pytest.mark.parametrize("name", MODELS)
def test_every_request_ends_on_its_own_kv(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, hits = Clock(), 0
    for module in (loads, tier_planner):
        monkeypatch.setattr(module, "time", clock)
    for seed in range(RUNS):
        life = Life(MODELS[name], llama, tmp_path / str(seed), seed, clock)
        try:
            life.live()
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {error}") from error
        finally:
            life.harness.shutdown()
        hits += life.hits
    assert hits, "lives without hits prove little"
