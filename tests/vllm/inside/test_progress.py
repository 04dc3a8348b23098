"""The real Scheduler over few blocks, its workers played by a seed: every request ends, and none runs on foreign KV.

Device, pool and disk hold of each token what its KV depends on: all the tokens up to it. A request that runs must find
that of its own tokens in its blocks, whoever has put it there. Jobs end late, in any order, or fail; requests are
aborted and preempted; blocks are so few that hits, misses and those who wait stand in each other's way. A run
that fails names its seed; KVORTEX_HUNT_RUNS sets how many there are.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from groups_support import greet
from lives import NOTHING, Clock, Life, chain_of, stop_the_clock
from played_owner import PlayedOwner
from scheduler_harness import SchedulerHarness, Step, WorkerReport
from tiny_model import make_tiny_model
from vllm.v1.request import RequestStatus

from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, SaveJob
from kvortex.vllm.versions import IS_NEWER, WorkerReports

BLOCK_SIZE = 32
BLOCK_NBYTES = BLOCK_SIZE * 4096
RUNS = int(os.environ.get("KVORTEX_HUNT_RUNS", "240"))
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


class Workers:
    """One worker that does its jobs when the seed says so, over contents in place of bytes."""

    def __init__(self, harness: SchedulerHarness, random: Random) -> None:
        self.harness, self.random = harness, random
        self.device: dict[int, list[int]] = {}
        self.pool: dict[int, list[int]] = {}
        self.owner: PlayedOwner | None = None
        self.unread: list[SaveJob] = []
        self.read: list[tuple[SaveJob, frozenset[int]]] = []
        self.loads: list[LoadJob] = []
        self.fails = 0.0
        self.sloth = 0.0

    def step(self) -> Step:
        step = self.harness.schedule()
        plan: ConnectorPlan = step.metadata
        self.unread += plan.early_saves
        for save in [save for save in self.unread if not plan.fresh_block_ids.isdisjoint(block_ids(save))]:
            self._read(save)
        self.loads += plan.loads
        self._forward(step)
        self.unread += plan.saves
        self.harness.finish(step, self._report())
        return step

    def _forward(self, step: Step) -> None:
        tables = {name: self.harness.block_ids(name) for name in step.num_scheduled_tokens}
        for name, count in step.num_scheduled_tokens.items():
            request = self.harness.requests[name]
            end = request.num_computed_tokens  # counts this step's tokens already
            chain = chain_of(list(request.all_token_ids)[:end])
            for position in range(end):
                place = self.device.setdefault(tables[name][position // BLOCK_SIZE], [NOTHING] * BLOCK_SIZE)
                if position < end - count:
                    assert place[position % BLOCK_SIZE] == chain[position], f"{name} runs on foreign KV at {position}"
                else:
                    place[position % BLOCK_SIZE] = chain[position]

    def _read(self, save: SaveJob) -> None:
        self.unread.remove(save)
        failed = frozenset(i for i in range(save.transfer.num_blocks) if self.random.random() < self.fails)
        for i, (block_id, offset) in enumerate(zip(block_ids(save), save.transfer.offsets.tolist(), strict=True)):
            if i not in failed:
                self._put(offset, list(self.device[block_id]))
        self.read.append((save, failed))

    def _put(self, offset: int, content: list[int]) -> None:
        if self.owner is not None:
            self.owner.put(offset, BLOCK_NBYTES, tuple(content))
        else:
            self.pool[offset] = content

    def _at(self, offset: int) -> list[int]:
        if self.owner is not None:
            return list(self.owner.at(offset, BLOCK_NBYTES) or [NOTHING] * BLOCK_SIZE)
        return list(self.pool[offset])

    def _is_due(self) -> bool:
        return self.random.random() >= self.sloth

    def _report(self) -> WorkerReport:
        for save in [save for save in self.unread if self._is_due()]:
            self._read(save)
        if self.owner is not None:
            self.owner.turn(self.random.randrange(3) if self.sloth else 8)
        outcomes = [*self._saves()]
        received, invalid = set(), set()
        for job in [job for job in self.loads if self._is_due()]:
            self.loads.remove(job)
            failed = {i for i in range(job.transfer.num_blocks) if self.random.random() < self.fails}
            ids = job.transfer.block_ids.tolist()
            for i, (block_id, offset) in enumerate(zip(ids, job.transfer.offsets.tolist(), strict=True)):
                self.device[block_id] = [NOTHING] * BLOCK_SIZE if i in failed else self._at(offset)
            split = {i for i in failed if self.random.random() < 0.5}
            outcomes.append(JobOutcome(job.job_id, tuple(failed - split), tuple(split)))
            received.add(job.request_id)
            invalid |= {ids[i] for i in failed} | set(job.missing_block_ids)
        message = WorkerReports(outcomes) if outcomes else None
        channel: dict[str, Any] = {"worker_meta": message} if IS_NEWER else {"kv_cache_events": message}
        return WorkerReport(finished_recving=received, invalid_block_ids=invalid, **channel)

    def _saves(self) -> Iterator[JobOutcome]:
        for save, failed in [job for job in self.read if self._is_due()]:
            self.read.remove((save, failed))
            digests = None if self.owner is None else self.owner.digests_of(save.transfer)
            yield JobOutcome(save.job_id, tuple(failed), digests=digests)

    @property
    def is_idle(self) -> bool:
        return not (self.unread or self.read or self.loads)


def block_ids(save: SaveJob) -> list[int]:
    return [int(n) for n in save.transfer.block_ids]


class LlamaLife(Life):
    """The life of a server whose model has full attention."""

    def __init__(self, model: Path, home: Path, seed: int, clock: Clock) -> None:
        random = Random(seed)
        num_blocks = random.choice([6, 9, 12, 20])
        pool_blocks = random.choice([6, 12, 40])
        disk = {"disk": {"path": str(home), "capacity_bytes": 1 << 30}} if random.random() < 0.4 else {}
        lookahead = random.choice([0, 0, 1, 3, 8])
        harness = SchedulerHarness(
            model,
            num_blocks=num_blocks + 1,
            max_num_seqs=random.choice([2, 4, 8]),
            max_num_batched_tokens=random.choice([48, 128, 512]),
            enable_prefix_caching=random.random() < 0.5,
            kv_events=True,
            extra_config={
                "pool": {"bytes": pool_blocks * BLOCK_NBYTES, "pin_piece_bytes": pool_blocks * BLOCK_NBYTES},
                "pending_wait_s": random.choice([0.0, 0.1, 1.0]),
                "min_hit_blocks": random.choice([1, 1, 2]),
                **disk,
            },
        )
        workers = Workers(harness, random)
        workers.fails = random.choice([0.0, 0.0, 0.05, 0.3])
        workers.sloth = random.choice([0.0, 0.5, 0.9])
        longest = min((num_blocks - 1) * BLOCK_SIZE, MAX_MODEL_LEN) - 60 - lookahead
        super().__init__(random, clock, harness, workers, longest)
        workers.owner = greet(harness, random)
        if workers.owner is not None:
            workers.owner.fails = workers.fails
        # No model here drafts: only the room for it is asked for.
        self.harness.scheduler.num_lookahead_tokens = lookahead
        self.half._planners.admission._num_lookahead_tokens = lookahead
        self.sessions: list[Any] = []  # requests whose input goes on

    def disturb(self, chance: float) -> None:
        if chance < 0.05 and all(request.status == RequestStatus.RUNNING for request in self.holders()):
            self.harness.preempt_all()
        elif chance < 0.06:
            self.half.reset_cache()

    def add(self) -> None:
        open_sessions = [session for session in self.sessions if not session.is_finished()]
        if self.random.random() < 0.2:
            self._add_session(f"s{len(self.sessions)}", self.random.choice(self.prompts)[:60])
        elif open_sessions and self.random.random() < 0.4:
            session = self.random.choice(open_sessions)
            if not session.streaming_queue and session.num_tokens + 110 < len(self.base):  # its last token is dropped
                self._add_session(session.request_id, self.base[: self.random.choice([1, 5, 32, 40])])
        else:
            super().add()

    def _add_session(self, name: str, token_ids: list[int]) -> None:
        request = self.harness.add_request(name, token_ids, max_tokens=self.random.choice([1, 3, 4]), resumable=True)
        if request is self.harness.requests[name]:
            self.sessions.append(request)

    def before_end(self) -> None:
        self.harness.abort(session.request_id for session in self.sessions if not session.is_finished())


@pytest.mark.parametrize("part", range(8))
def test_every_request_ends_on_its_own_kv(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    clock = stop_the_clock(monkeypatch)
    for seed in range(part, RUNS, 8):
        home = tmp_path / str(seed)
        life = LlamaLife(model, home, seed, clock)
        try:
            life.live()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            life.harness.shutdown()
            life.close()


def test_hunts_are_not_empty() -> None:
    """What a hunt rests on: a foreign token is seen."""
    assert chain_of([1, 2, 3])[:2] == chain_of([1, 2])
    assert chain_of([9, 2])[1] != chain_of([1, 2])[1]
