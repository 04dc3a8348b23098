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
from owner_support import serving

from kvortex.tiers import BaseTier, urls
from kvortex.types import MissReason
from kvortex.vllm.scheduler import lower_tier

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


@pytest.fixture(autouse=True)
def counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_tier, "FIGURES_INTERVAL_S", 0.0)


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
        settle_disk(engine)
        assert len(files_in(tmp_path)) == num_blocks("long")
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
    with (
        serving(tmp_path / "kv.sock", disk=str(tmp_path / "kv")) as owner,
        running(model, options={"owner": str(owner.path)}) as engine,
    ):
        counted = count_stats(engine)
        (cache,) = owner.owner.caches
        assert cache.tiering is not None
        cache.tiering.backing.guard.reads.hung()
        cache.tiering.backing.guard.writes.hung()
        engine.settle()
        assert counted()["tier_pauses"] == 2


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


@pytest.mark.parametrize(("setting", "value"), [("inclusion", "exclusive"), ("admission", "second_touch")])
def test_other_ways_to_fill_the_disk(
    model: str, expected: dict[str, list[list[int]]], tmp_path: Path, setting: str, value: str
) -> None:
    """Only what is evicted goes to the disk, or what is asked for again."""
    options = {
        "disk": {"path": str(tmp_path), "capacity_bytes": "1GiB"},
        "tier": {setting: value},
        "pool": {"bytes": 20 * BLOCK_NBYTES, "pin_piece_bytes": 20 * BLOCK_NBYTES},
        "eviction": {"watermark": 0.5, "ratio": 0.5},
    }
    with running(model, options=options) as engine:
        counted = count_stats(engine)
        assert engine.generate([PROMPTS["whole blocks"]]) == expected["whole blocks"]
        settle_disk(engine)
        assert not files_in(tmp_path)
        for round_number in range(4):
            for name in WHOLE:
                assert engine.generate([PROMPTS[name]]) == expected[name], (round_number, name)
                settle_disk(engine)
        assert counted()["fetched_blocks"] > 0


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
    """A scheme of this process: so the owner is in this process, too."""
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
    model: str, expected: dict[str, list[list[int]]], shared: type[SharedTier], tmp_path: Path
) -> None:
    options = {"owner": str(tmp_path / "kv.sock"), "pending_wait_s": 10.0}
    with serving(tmp_path / "kv.sock", tier="shared:"), running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        wait_for_objects(shared, engine, num_blocks("long"))
    shared.questions.clear()
    with serving(tmp_path / "kv.sock", tier="shared:"), running(model, options=options) as engine:
        assert engine.generate([PROMPTS["long"]]) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == num_blocks("long")
        assert len(shared.questions) == 1


def test_a_store_that_does_not_answer_costs_one_wait(
    model: str, expected: dict[str, list[list[int]]], shared: type[SharedTier], tmp_path: Path
) -> None:
    shared.answer_after_s = 60.0
    options = {"owner": str(tmp_path / "kv.sock"), "pending_wait_s": 0.05}
    tier = {"urls": ["shared:"], "timeout_s": 60.0}
    with serving(tmp_path / "kv.sock", tier=tier), running(model, options=options) as engine:
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
            engine.settle()
        assert len(shared.questions) == 1
