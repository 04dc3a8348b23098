"""Prompts, and what an engine without a connector makes of them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import BLOCK_SIZE, make_model, prompt, running
from played import BLOCK_NBYTES, Played
from scheduler_harness import SchedulerHarness
from tiny_model import make_tiny_model

from kvortex.owner import RemoteControl


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of whose folder schedulers read the configuration only."""
    return make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def played(llama: Path) -> Iterator[Callable[..., Played]]:
    """Makes harnesses with a pool of 64 blocks; at the end each pool holds what its index and its jobs say."""
    harnesses: list[SchedulerHarness] = []

    def make(**options: Any) -> Played:
        extra = {"pool": {"bytes": 64 * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES}, **options.pop("extra", {})}
        harnesses.append(SchedulerHarness(llama, extra_config=extra, **options))
        return Played(harnesses[-1])

    yield make
    for harness in harnesses:
        half = harness.connector._scheduler
        control = half._control
        if isinstance(control, RemoteControl):  # the owner accounts for its pool
            assert not control._in_flight
            continue
        assert control.allocator.allocated_bytes == control.index.committed_bytes + sum(
            job.plan.transfer.num_blocks * BLOCK_NBYTES for job in half._jobs if hasattr(job.plan, "states")
        )
        harness.shutdown()


PROMPTS = {
    "whole blocks": prompt(4 * BLOCK_SIZE, 1),
    "ends inside a block": prompt(4 * BLOCK_SIZE + 11, 2),
    "one token over": prompt(3 * BLOCK_SIZE + 1, 3),
    "less than a block": prompt(BLOCK_SIZE - 5, 4),
    "long": prompt(11 * BLOCK_SIZE + 7, 5),
}
SHARED = prompt(5 * BLOCK_SIZE + 9, 6)
TAILS = [prompt(40, 100 + i) for i in range(4)]
CROWD = [prompt(3 * BLOCK_SIZE + 5 * i, 200 + i) for i in range(12)]


@pytest.fixture(scope="session")
def expected(model: str) -> dict[str, list[list[int]]]:
    """What an engine without a connector says; the first of a run's processes asks it, the others read it."""
    shared = Path(os.environ["KVORTEX_EXPECTED"]) if "KVORTEX_EXPECTED" in os.environ else None
    if shared is not None and shared.exists():
        known: dict[str, list[list[int]]] = json.loads(shared.read_text())
        return known
    with running(model, connector=False) as engine:
        answers = {name: engine.generate([tokens]) for name, tokens in PROMPTS.items()}
        answers["shared"] = engine.generate([SHARED + tail for tail in TAILS])
        first = engine.generate([SHARED], max_tokens=70)[0]
        answers["turn 1"] = [first]
        answers["turn 2"] = engine.generate([SHARED + first + TAILS[0]], max_tokens=20)
        answers["crowd"] = engine.generate(CROWD, max_tokens=40)
    if shared is not None:
        written = shared.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(answers))
        written.rename(shared)  # whole, for those who look meanwhile
    return answers
