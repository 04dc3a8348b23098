"""Blocks on disk: a killed server starts warm, and what the pool lost comes back; tokens as without a cache."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from engine_support import BLOCK_SIZE, Engine, count_stats, prompt, running, settle_disk
from inside_fixtures import PROMPTS

from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.tiers import BaseTier, urls
from kvortex.types import MissReason
from kvortex.vllm.scheduler import tier_index

WHOLE = ["whole blocks", "ends inside a block", "one token over", "long"]
BLOCK_NBYTES = BLOCK_SIZE * 4096
FILE_NBYTES = BLOCK_NBYTES + 4096


def num_blocks(name: str) -> int:
    return len(PROMPTS[name]) // BLOCK_SIZE


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*.kv1") if path.is_file()]


def wait_for_files(directory: Path, count: int) -> None:
    due_s = time.monotonic() + 20
    while len(files_in(directory)) < count:
        assert time.monotonic() < due_s, f"{len(files_in(directory))} of {count} blocks on disk"
        time.sleep(0.02)


def fetched(engine: Engine) -> int:
    engine.settle()
    return engine.loaded_blocks


def test_what_the_pool_evicted_comes_back(model: str, expected: dict[str, list[list[int]]], tmp_path: Path) -> None:
    options = {
        "disk": {"path": str(tmp_path), "capacity_bytes": "1GiB"},
        "pool": {"bytes": 20 * BLOCK_NBYTES, "pin_piece_bytes": 20 * BLOCK_NBYTES},
    }
    with running(model, options=options) as engine:
        counted = count_stats(engine)
        for round_number in range(3):
            for name in WHOLE:
                assert engine.generate([PROMPTS[name]]) == expected[name], (round_number, name)
                engine.settle()
        assert engine.control.index.evicted_blocks > 0
        assert counted()["fetched_blocks"] > 0


def test_a_damaged_file_is_computed_again(model: str, expected: dict[str, list[list[int]]], tmp_path: Path) -> None:
    options = {"disk": {"path": str(tmp_path), "capacity_bytes": "1GiB"}}
    with running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        wait_for_files(tmp_path, num_blocks("long"))
        engine.settle()
        assert engine.scheduler_half._tier.num_jobs == 0
    for path in files_in(tmp_path)[::3]:
        data = bytearray(path.read_bytes())
        data[6000] ^= 4
        path.write_bytes(data)
    behind = tmp_path / "behind"
    urls = [f"disk://{tmp_path}?capacity_bytes=1GiB", f"disk://{behind}?capacity_bytes=1GiB"]
    with running(model, options={"tier": urls}) as engine:  # the same directory as a URL, and another one behind it
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        assert 0 < engine.loaded_blocks < num_blocks("long")
        assert engine.generate([PROMPTS["long"]]) == expected["long"]


def test_a_disk_that_is_left_alone_shows_in_the_figures(model: str, tmp_path: Path) -> None:
    with running(model, options={"disk": {"path": str(tmp_path), "capacity_bytes": "1GiB"}}) as engine:
        worker = engine.worker_half
        worker._mover._guard.reads.hung()
        worker._mover._guard.writes.hung()
        assert worker.take_stats().data == {"tier_pauses": 2}
        assert worker.take_stats().is_empty()


def test_a_reset_forgets_the_disk_too(model: str, expected: dict[str, list[list[int]]], tmp_path: Path) -> None:
    options = {"disk": {"path": str(tmp_path), "capacity_bytes": "1GiB"}}
    with running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        wait_for_files(tmp_path, num_blocks("long"))
        engine.settle()
        engine.scheduler_half.reset_cache()
        before = engine.loaded_blocks
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == before
        wait_for_files(tmp_path, 2 * num_blocks("long"))
        engine.settle()
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks - before == num_blocks("long")


@pytest.mark.parametrize("settings", [{}, {"enable_prefix_caching": True}], ids=["in the pool", "on the device"])
def test_what_is_hit_above_the_disk_is_in_use_there(model: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The disk drives out what nobody asks for, not what the pool, or vLLM itself, serves all the time."""
    asked, idle, new = (prompt(4 * BLOCK_SIZE + 1, seed) for seed in (71, 72, 73))
    capacity = 10 * FILE_NBYTES
    options = {"disk": {"path": str(tmp_path), "capacity_bytes": capacity}}
    with running(model, options=options, **settings) as engine:
        for tokens in (asked, idle, asked, new):
            engine.generate([tokens], max_tokens=2)
            settle_disk(engine)
    with running(model, options=options) as engine:
        for tokens, blocks in ((asked, 4), (new, 4), (idle, 2)):
            before = engine.loaded_blocks
            engine.generate([tokens], max_tokens=2)
            assert fetched(engine) - before == blocks


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_index, "REMEMBERED_KEYS", 3)
    memory: tier_index.BoundedMap[bool] = tier_index.BoundedMap()
    memory.add([b"a", b"b", b"c", b"d"], True)
    assert [key in memory for key in (b"a", b"b", b"c", b"d")] == [False, True, True, True]
    memory.discard([b"b", b"x"])
    assert b"b" not in memory


def test_another_inclusion_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"in vLLM tier\.inclusion can be 'inclusive' only"):
        tier_index.check_supported(KVortexConfig(tier={"inclusion": "exclusive"}))


SERVER = """
import json, sys, time
from inside_fixtures import PROMPTS
from engine_support import running
names, model, directory = sys.argv[1].split(","), sys.argv[2], sys.argv[3]
with running(model, options={"disk": {"path": directory, "capacity_bytes": "1GiB"}}) as engine:
    print(json.dumps({name: engine.generate([PROMPTS[name]]) for name in names}), flush=True)
    time.sleep(600)
"""


def test_a_killed_server_starts_warm(model: str, expected: dict[str, list[list[int]]], tmp_path: Path) -> None:
    """SIGKILL, no chance to clean up: the next server hits what was on disk, with the same tokens."""
    total = sum(num_blocks(name) for name in WHOLE)
    arguments = [sys.executable, "-c", SERVER, ",".join(WHOLE), model, str(tmp_path)]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert server.stdout is not None
    try:
        answers = next(json.loads(line) for line in server.stdout if line.startswith("{"))
        assert answers == {name: expected[name] for name in WHOLE}
        wait_for_files(tmp_path, total)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
    with running(model, options={"disk": {"path": str(tmp_path), "capacity_bytes": "1GiB"}}) as engine:
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
        assert fetched(engine) == total
        assert engine.misses(MissReason.CORRUPT) == 0


class SharedTier(BaseTier):
    """A store that many hosts write to and nobody can list."""

    name = "shared"
    lists_objects = False
    objects: ClassVar[dict[str, bytes]] = {}
    questions: ClassVar[list[int]] = []
    answer_after_s: ClassVar[float] = 0.0

    async def get_object(self, name: str) -> bytes | None:
        return self.objects.get(name)

    async def put_object(self, name: str, data: bytes) -> None:
        self.objects[name] = data

    async def find_objects(self, names: Sequence[str]) -> list[int]:
        if len(names) > 1:  # a writer asks for one
            self.questions.append(len(names))
            await asyncio.sleep(self.answer_after_s)
        return [len(self.objects.get(name, b"")) for name in names]

    async def delete_objects(self, names: Sequence[str]) -> None:
        for name in names:
            self.objects.pop(name, None)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> type[SharedTier]:
    monkeypatch.setitem(urls.OWN, "shared", lambda url, namespace: SharedTier(namespace=namespace))  # type: ignore[arg-type]
    monkeypatch.setattr(SharedTier, "objects", {})
    monkeypatch.setattr(SharedTier, "questions", [])
    monkeypatch.setattr(SharedTier, "answer_after_s", 0.0)
    return SharedTier


def wait_for_objects(shared: type[SharedTier], engine: Engine, count: int) -> None:
    due_s = time.monotonic() + 20
    while len(shared.objects) < count:
        assert time.monotonic() < due_s, f"{len(shared.objects)} of {count} blocks in the store"
        engine.settle()


def test_a_store_that_others_write_to_is_asked_for_a_whole_prompt(
    model: str, expected: dict[str, list[list[int]]], shared: type[SharedTier]
) -> None:
    options = {"tier": "shared:", "pending_wait_s": 10.0}
    with running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        wait_for_objects(shared, engine, num_blocks("long"))
    shared.questions.clear()
    with running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == num_blocks("long")
        assert len(shared.questions) == 1


def test_a_store_that_does_not_answer_costs_one_wait(
    model: str, expected: dict[str, list[list[int]]], shared: type[SharedTier]
) -> None:
    shared.answer_after_s = 60.0
    options = {"tier": {"urls": ["shared:"], "timeout_s": 60.0}, "pending_wait_s": 0.05}
    with running(model, options=options) as engine:
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
            engine.settle()
        assert len(shared.questions) == 1
