"""Engines over the pool of an owner: what one has computed another loads; tokens are those without a cache."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_support import BLOCK_SIZE, Engine, prompt, running, settle_disk
from forked import Program
from inside_fixtures import PROMPTS
from model_shapes import engine_options, make_shape
from owner_support import ServingOwner, serving

from kvortex.errors import ConfigError
from kvortex.owner import OwnerClient
from kvortex.types import MissReason
from kvortex.vllm.versions import REPORTS_FAILED_LOADS

KILLS = int(os.environ.get("KVORTEX_KILLS", "3"))
"""How many engines are killed; more of them for a long run."""
QUOTA_BYTES = 8 * (128 << 10)  # eight blocks
WHOLE = ["whole blocks", "ends inside a block", "one token over", "long"]


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[ServingOwner]:
    with serving(tmp_path / "kvortex.sock") as owner:
        yield owner


def num_blocks(name: str) -> int:
    return len(PROMPTS[name]) // BLOCK_SIZE


def loaded(engine: Engine) -> int:
    engine.settle()
    return engine.loaded_blocks


def test_a_new_engine_loads_what_an_earlier_one_has_computed(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    options = {"owner": str(owner.path)}
    with running(model, options=options) as engine:
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
        assert loaded(engine) == 0
    stored = owner.num_blocks
    assert stored >= sum(map(num_blocks, WHOLE))
    with running(model, options=options) as engine:
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
        assert loaded(engine) >= sum(num_blocks(name) - 1 for name in WHOLE)
    assert owner.allocated_bytes == owner.owner.control.index.committed_bytes


def test_prompts_whose_device_blocks_are_used_again_at_once_are_stored(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    """A short prompt's save is worked out while the next step, of another prompt, gets its blocks."""
    prompts = [prompt(3 * BLOCK_SIZE + 5, 70 + n) for n in range(5)]
    with running(model, options={"owner": str(owner.path)}) as engine:
        answers = [engine.generate([tokens], max_tokens=1) for tokens in prompts]
        answers.append(engine.generate([PROMPTS["long"]]))
    with running(model, options={"owner": str(owner.path)}) as engine:
        assert [engine.generate([tokens], max_tokens=1) for tokens in prompts] == answers[:-1]
        assert loaded(engine) == 5 * 3


def test_engines_of_two_models_do_not_see_each_others_blocks(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    for name in ("one", "another"):
        with running(model, options={"owner": str(owner.path), "identity": {"model": name}}) as engine:
            assert engine.generate([PROMPTS["long"]]) == expected["long"]
            assert loaded(engine) == 0


@pytest.mark.skipif(not REPORTS_FAILED_LOADS, reason="this version serves full attention alone here")
def test_a_model_that_mixes_kinds_of_kv_shares_them_all(tmp_path: Path, owner: ServingOwner) -> None:
    directory = make_shape(tmp_path / "gemma3", "gemma3")
    settings = engine_options(directory, "gemma3")
    tokens = prompt(300, 11)
    with running(connector=False, **settings) as engine:
        (right,) = engine.generate([tokens], 12)
    for first in (True, False):
        with running(options={"owner": str(owner.path)}, **settings) as engine:
            assert engine.generate([tokens], 12) == [right]
            assert (loaded(engine) == 0) == first


def test_a_packed_pool_is_shared_too(model: str, owner: ServingOwner) -> None:
    options = {"owner": str(owner.path), "codec": "bf16"}
    answers = []
    for first in (True, False):
        with running(model, options=options) as engine:
            answers.append(engine.generate([PROMPTS["long"]]))
            assert (loaded(engine) == 0) == first
    assert answers[0] == answers[1]


def test_an_engine_goes_on_without_its_owner(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    with running(model, options={"owner": str(owner.path)}) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        owner.end()
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
        assert loaded(engine) == 0
    owner.begin()
    with running(model, options={"owner": str(owner.path)}) as engine:
        for hits in (False, True):
            assert engine.generate([PROMPTS["long"]]) == expected["long"]
            assert (loaded(engine) > 0) == hits


def hits_again(engine: Engine, answer: list[list[int]]) -> None:
    """Ask until blocks are loaded; the answer never changes."""
    before, due_s = loaded(engine), time.monotonic() + 30
    while loaded(engine) == before:
        assert time.monotonic() < due_s, "no hits"
        assert engine.generate([PROMPTS["long"]]) == answer
        time.sleep(0.1)


def test_an_engine_moves_to_an_owner_that_was_started_anew(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    """It says its priority and its quota to that one, too."""
    with running(model, options={"owner": {"socket": str(owner.path), "priority": 2, "quota": QUOTA_BYTES}}) as engine:
        for _ in range(2):
            assert engine.generate([PROMPTS["long"]]) == expected["long"]
            engine.settle()
            owner.end()
            assert engine.generate([PROMPTS["long"]]) == expected["long"]
            owner.begin()
            hits_again(engine, expected["long"])
            assert [(cache.priority, cache.quota_bytes) for cache in owner.owner.caches] == [(2, QUOTA_BYTES)]
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
        engine.settle()
        assert 0 < owner.allocated_bytes <= QUOTA_BYTES
        assert owner.owner.control.index.evicted_blocks > 0
        assert engine.misses(MissReason.CORRUPT) == 0


def test_the_pool_of_a_disk_is_killed_and_comes_back(
    model: str, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    options = {"disk": {"path": str(tmp_path / "disk"), "capacity_bytes": "1GiB"}}
    with running(model, options=options) as engine:
        for _ in range(2):
            assert engine.generate([PROMPTS["long"]]) == expected["long"]
            settle_disk(engine)
            child = engine.worker_half._share.child
            os.kill(child.pid, signal.SIGKILL)
            for name in WHOLE:
                assert engine.generate([PROMPTS[name]]) == expected[name]
            hits_again(engine, expected["long"])
        assert engine.misses(MissReason.CORRUPT) == 0


def test_without_an_owner_no_worker_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kvortex serve"):
        OwnerClient(tmp_path / "none", 1.0)


def test_a_reset_leaves_the_blocks_to_other_engines(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    options = {"owner": str(owner.path)}
    with running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        engine.scheduler_half.reset_cache()
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        assert loaded(engine) == 0
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        own = loaded(engine)
        assert own > 0
    with running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        assert loaded(engine) == own


def test_what_was_planned_for_other_weights_is_computed_again(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    """The worker knows of new weights before the scheduler half does: its next load must bring nothing."""
    with running(model, options={"owner": str(owner.path)}) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        engine.worker_half.forget()
        before = owner.num_blocks
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        assert loaded(engine) == 0
        assert owner.num_blocks > before  # computed and stored again, for this engine alone
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        assert loaded(engine) > 0


def test_a_corrupt_block_is_computed_again(
    model: str, expected: dict[str, list[list[int]]], owner: ServingOwner
) -> None:
    with running(model, options={"owner": str(owner.path)}) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        engine.worker_half._data.pool.bytes[4096 :: 64 << 10] ^= 1
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        assert engine.misses(MissReason.CORRUPT) > 0


class Process:
    """An engine in a process of its own."""

    def __init__(self, owner: Path, model: str) -> None:
        self._process = Program(Path(__file__).with_name("owner_engine.py"), [str(owner), model], has_pipes=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def begin(self, prompts: list[list[int]]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()

    def answer(self) -> tuple[list[list[int]], int]:
        assert self._process.stdout is not None
        tokens, blocks = json.loads(self._process.stdout.readline())
        return tokens, blocks

    def ask(self, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        self.begin(prompts)
        return self.answer()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60.0)


def test_engines_that_run_side_by_side_hit_each_others_blocks_and_survive_each_other(
    model: str, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Real processes; one engine is killed over and over while it computes, then the owner."""
    path = tmp_path / "kvortex.sock"
    command = [sys.executable, "-m", "kvortex", "serve", "--pool", "64MiB", "--socket", str(path), "--json"]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert owner.stdout is not None
    assert json.loads(owner.stdout.readline())["socket"] == str(path)
    right = {name: expected[name][0] for name in WHOLE}
    first = Process(path, model)
    try:
        assert first.ask([PROMPTS["long"]]) == ([right["long"]], 0)
        for kills in range(KILLS):
            second = Process(path, model)
            tokens, blocks = second.ask([PROMPTS["long"]])
            assert (tokens, blocks > 0) == ([right["long"]], True)
            crowd = [prompt(320, 1000 * kills + n) for n in range(20)]
            second.begin(crowd)
            time.sleep(0.05 + 0.1 * (kills % 8))
            second.kill()
            tokens, _ = first.ask([*crowd[:4], PROMPTS["whole blocks"]])
            assert tokens[-1] == right["whole blocks"]
        third = Process(path, model)
        tokens, blocks = third.ask([PROMPTS["whole blocks"], *crowd[:2]])
        assert tokens[0] == right["whole blocks"]
        assert blocks >= num_blocks("whole blocks") - 1
        owner.kill()
        owner.wait()
        for engine in (first, third):
            assert engine.ask([PROMPTS[name] for name in WHOLE])[0] == [right[name] for name in WHOLE]
        assert (first.end(), third.end()) == (0, 0)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
