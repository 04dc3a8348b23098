"""Models that mix kinds of KV over the real Scheduler and few blocks, its workers played by a seed.

As `test_progress.py`, for every kind of KV: every request ends, none runs on anything but its own KV, and at the end
nobody holds anything. Jobs end late, in any order, or fail; requests are aborted and preempted; vLLM's own cache is
reset. A life that fails names its model and its seed; KVORTEX_HUNT_RUNS sets how many a model has.
"""

import os
from pathlib import Path
from random import Random

import pytest
from groups_support import MODELS, GroupWorkers, Model, greet, harness_of
from lives import Clock, Life, stop_the_clock
from vllm.v1.request import RequestStatus

from kvortex.vllm.versions import SERVES_GROUPS

RUNS = int(os.environ.get("KVORTEX_HUNT_RUNS", "20"))
MAX_MODEL_LEN = 512

pytestmark = pytest.mark.skipif(not SERVES_GROUPS, reason="this vLLM turns its hybrid manager off")


class MixedLife(Life):
    """The life of a server whose model mixes kinds of KV."""

    def __init__(self, model: Model, folder: Path, home: Path, seed: int, clock: Clock) -> None:
        random = Random(seed)
        block_size = max(group.block_size for group in model.groups)
        longest = min(random.choice([4, 7, 9]) * block_size, MAX_MODEL_LEN - 60)
        # A request of that length, and a little more, fits the device by itself.
        need = sum(-(-(longest + 70) // group.block_size) + 1 for group in model.groups)
        num_blocks = random.choice([need, need + need // 2, 3 * need])
        self.has_disk = has_disk = random.random() < 0.4
        # Of drafts, which are counted before they are computed, a worker would have to know how many were right.
        is_ahead = not model.has_drafts and random.random() < 0.4
        harness = harness_of(
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
        workers = GroupWorkers(harness, model.groups, random, greet(harness, random))
        workers.num_ahead = int(is_ahead)
        workers.loses = random.choice([0.0, 0.05, 0.5])
        workers.fails = random.choice([0.0, 0.0, 0.05, 0.3])
        if workers.owner is not None:
            workers.owner.fails = workers.fails
        workers.sloth = random.choice([0.0, 0.5, 0.9])
        super().__init__(random, clock, harness, workers, longest)

    def disturb(self, chance: float) -> None:
        if chance < 0.06:
            self.harness.scheduler.reset_prefix_cache()
        elif chance < 0.07:
            self.half.reset_cache()
        elif chance < 0.09:
            self._preempt_all()
        elif chance < 0.13 and self.has_disk:
            self.control._evict(1 << 40)  # the pool has evicted all that it may, the disk nothing

    def _preempt_all(self) -> None:
        """Unless somebody holds blocks of whom vLLM takes none: those that wait with them."""
        self.workers.drain()
        if all(request.status == RequestStatus.RUNNING for request in self.holders()):
            self.harness.preempt_all()

    def before_end(self) -> None:
        self.workers.num_ahead = 0


@pytest.mark.parametrize("name", MODELS)
def test_every_request_ends_on_its_own_kv(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, hits = stop_the_clock(monkeypatch), 0
    for seed in range(RUNS):
        life = MixedLife(MODELS[name], llama, tmp_path / str(seed), seed, clock)
        try:
            life.live()
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {error}") from error
        finally:
            life.harness.shutdown()
            life.close()
        hits += life.half.stats.snapshot().hits
    assert hits, "lives without hits prove little"
