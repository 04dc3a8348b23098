"""The command line, on the shipped trace and on bad input."""

import json
import lzma
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from kvortex import __version__
from kvortex.cli import commands, replay, trace
from kvortex.cli.interrupt import ends_on_interrupt
from kvortex.cli.main import main
from kvortex.config import EVICTION_POLICIES
from kvortex.errors import ConfigError
from kvortex.tiers.keyring import parse_keys


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_replay_prints_json(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "12", "--pool", "16MiB", "--eviction", policy, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == 12
    assert figures["mismatches"] == 0
    assert figures["hit_rate"] > 0
    assert figures["evicted_blocks"] > 0
    assert figures["bytes_loaded"] > 0


def test_replay_prints_a_table_and_its_progress_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "4"]) == 0
    out, err = capsys.readouterr()
    assert "mismatches" in out
    assert "hit rate" in out
    assert "replaying requests" not in out
    assert "4/4" in err


def test_replay_says_what_its_blocks_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "1", "--pool", "64MiB"]) == 0
    out, err = capsys.readouterr()
    assert "4.0 KiB" in out
    assert "262,144" in out  # tokens
    assert "--block-bytes" in err


@pytest.mark.parametrize(("pool", "block_bytes"), [("8GiB", "2MiB"), ("512MiB", "128KiB"), ("16MiB", "4KiB")])
def test_a_pool_holds_as_many_blocks_as_the_models_would(
    pool: str, block_bytes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "--requests", "12", "--pool", pool, "--block-bytes", block_bytes, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["pool_blocks"], figures["pool_tokens"]) == (4096, 65536)
    assert figures["evicted_blocks"] > 0


def test_a_pool_without_room_for_a_block_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "1", "--pool", "1MiB", "--block-bytes", "2MiB"]) == 2
    assert "raise --pool" in capsys.readouterr().err


@pytest.mark.slow
def test_with_a_disk_every_block_is_written_and_found_by_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for _ in range(2):
        options = ["--requests", "8", "--concurrency", "1", "--disk", str(tmp_path / "disk"), "--json"]
        assert main(["replay", *options]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    first, second = runs
    assert (first["disk_shed_blocks"], second["disk_shed_blocks"]) == (0, 0)
    assert first["disk_written_blocks"] == second["disk_fetched_blocks"] > 4096  # more than waits by default
    assert second["hit_rate"] == 1.0


def test_what_the_disk_did_not_take_is_said() -> None:
    figures = {"disk_shed_blocks": 97, "disk_written_blocks": 3}
    (note,) = replay._notes(figures, commands._parser().parse_args(["replay", "--block-bytes", "2MiB"]))
    assert note.startswith("97%")


def test_compiling_does_not_count_as_replaying(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    register = replay.KVortexEngine.register_kv_caches

    def slow(*arguments: object) -> object:
        clock[0] += 1000.0
        return register(*arguments)

    monkeypatch.setattr(replay.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(replay.KVortexEngine, "register_kv_caches", slow)
    assert main(["replay", "--requests", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["start_seconds"], figures["seconds"]) == (1000.0, 0.0)


def test_a_wrong_byte_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = replay.Replay._compute

    def smudging(self: replay.Replay, hashes: list[bytes], block_ids: np.ndarray) -> None:
        original(self, hashes, block_ids)
        if len(block_ids):
            self.paged["layers.0"][0, int(block_ids[0]), 0, 0, 0] = 1.0

    monkeypatch.setattr(replay.Replay, "_compute", smudging)
    assert main(["replay", "--requests", "8", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["mismatches"] > 0


@pytest.mark.slow
def test_demo_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert all(prompt["identical"] for prompt in document["transformer"])
    assert document["replay"]["mismatches"] == 0


@pytest.mark.slow
def test_demo_prints_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.count("bit-identical") == 4
    assert "mismatches" in out
    assert "replaying requests" in err


@pytest.mark.parametrize("content", [b"not json\n", b'{"input_length": 3}\n', b"\xfd7zXZ\x00broken"])
def test_a_broken_trace_is_a_message(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace"
    trace.write_bytes(content)
    assert main(["replay", "--trace", str(trace)]) == 2
    assert "cannot be replayed" in capsys.readouterr().err


def test_a_missing_trace_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--trace", "/nowhere/trace.jsonl"]) == 2
    assert "/nowhere/trace.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ["--requests", "0"],
        ["--pool", "many"],
        ["--concurrency", "x"],
        ["--eviction", "fifo"],
        ["--policy", "fifo"],
        ["--block-bytes", "0"],
    ],
)
def test_bad_options(option: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["replay", *option])
    assert exit_.value.code == 2


# -- traces ------------------------------------------------------------------------------------------


def test_a_key_that_seals_is_a_line_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for arguments in ([], ["--id", "fleet-1"], ["--id", "fleet-2"]):
        assert main(["seal-key", *arguments]) == 0
        lines.append(capsys.readouterr().out)
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    keys = parse_keys("".join(lines), "keys")
    assert [key.id for key in keys][1:] == ["fleet-1", "fleet-2"]
    date.fromisoformat(keys[0].id)
    assert main(["seal-key", "--id", "two words"]) == 2
    assert "an id has up to 16 letters" in capsys.readouterr().err


def test_the_shipped_trace_is_whole() -> None:
    rows = lzma.decompress(trace.shipped_trace()).splitlines()
    assert len(rows) == 12031
    prompts = trace.read_trace(None, 3)
    assert [len(prompt) for prompt in prompts] == [6758, 7322, 7236]
    assert (prompts[0][:512] == prompts[1][:512]).all()


WriteTrace = Callable[..., Path]


@pytest.fixture
def write_trace(tmp_path: Path) -> WriteTrace:
    def write(*rows: tuple[int, Sequence[object]], **fields: object) -> Path:
        path = tmp_path / "trace.jsonl"
        lines = [json.dumps({"input_length": length, "hash_ids": ids, **fields}) for length, ids in rows]
        path.write_text("\n\n".join(lines) + "\n")
        return path

    return write


@pytest.mark.parametrize("fields", [{}, {"block_size": 16}])
def test_hash_ids_of_a_few_tokens_keep_different_prompts_apart(
    write_trace: WriteTrace, fields: dict[str, object]
) -> None:
    path = write_trace((100, [1, 2, 3, 4, 5, 6, 7]), (100, [1, 2, 8, 4, 5, 6, 9]), **fields)
    first, second = trace.read_trace(path, 10)
    assert len(first) == len(second) == 100
    assert np.flatnonzero(first != second).tolist() == [*range(32, 48), *range(96, 100)]


def test_the_number_of_tokens_can_be_given(write_trace: WriteTrace) -> None:
    path = write_trace((100, [1, 2, 3, 4]), (110, [1, 2, 3, 5]))
    assert [len(prompt) for prompt in trace.read_trace(path, 10, 25)] == [100, 100]  # the last 10 have no name
    assert [len(prompt) for prompt in trace.read_trace(path, 10)] == [100, 110]
    with pytest.raises(ConfigError, match="--trace-block-size"):
        trace.read_trace(path, 10, 20)


@pytest.mark.parametrize("rows", [[(100, [1]), (64, [1, 2, 3, 4])], [(50, [])]])
def test_lengths_that_go_with_no_number_of_tokens_are_a_message(
    write_trace: WriteTrace, rows: list[tuple[int, list[int]]]
) -> None:
    with pytest.raises(ConfigError, match=r"trace\.jsonl cannot be replayed.*--trace-block-size"):
        trace.read_trace(write_trace(*rows, (32, [1, 2])), 10)


@pytest.mark.parametrize("ids", [[0, 1 << 23], [3, (1 << 32) + 3], ["a", "b"], [-1, 1 << 63]])
def test_hash_ids_of_any_size_are_told_apart(write_trace: WriteTrace, ids: list[object]) -> None:
    first, second = trace.read_trace(write_trace((512, ids[:1]), (512, ids[1:])), 2)
    assert not set(first.tolist()) & set(second.tolist())


def test_requests_count_and_short_prompts_are_served(
    write_trace: WriteTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace((5, [1]), (0, []), (600, [2, 3]), (600, [2, 3]), (9, [4]))
    options = ["--requests", "4", "--concurrency", "1000", "--pool", "1MiB", "--json"]
    assert main(["replay", "--trace", str(path), *options]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 4


# -- the command as a process ------------------------------------------------------------------------


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_package_is_the_command(option: str) -> None:
    done = run_python("-m", "kvortex", option)
    assert done.returncode == 0
    assert done.stdout.startswith({"--version": f"kvortex {__version__}\n", "--help": "usage: kvortex"}[option])


@pytest.mark.parametrize("command", ["replay", "demo"])
def test_without_rich_there_is_a_message_and_json(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "kvortex.cli.report", raising=False)
    monkeypatch.delattr("kvortex.cli.report", raising=False)
    assert main([command, "--requests", "2"]) == 2
    assert "pip install 'kvortex[demo]'" in capsys.readouterr().err
    assert main(["replay", "--requests", "2", "--json"]) == 0


INTERRUPTED = """
import os, signal, sys, time
from kvortex.cli.main import main

def interrupt(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        time.sleep(1)
{patch}
main(["replay", "--requests", "2"])
"""
IN_AN_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        return interrupt() if name == "torch" else None
sys.meta_path.insert(0, Finder())
"""
AS_IT_COMPILES = "import kvortex.planes.control; kvortex.planes.control.warm_up = interrupt"
IN_A_TRANSFER = """
import kvortex.engine
async def save_blocks(*arguments, **options):
    interrupt()
kvortex.engine.KVortexEngine.save_blocks = save_blocks
"""
IN_A_THREAD_AND_THE_LOOP = """
import asyncio, kvortex.engine
async def save_blocks(*arguments, **options):
    await asyncio.to_thread(interrupt)
kvortex.engine.KVortexEngine.save_blocks = save_blocks
"""


@pytest.mark.parametrize("patch", [IN_AN_IMPORT, AS_IT_COMPILES, IN_A_TRANSFER, IN_A_THREAD_AND_THE_LOOP])
def test_an_interrupt_ends_the_command_wherever_it_is(patch: str) -> None:
    done = run_python("-c", INTERRUPTED.format(patch=patch))
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("kvortex: interrupted\n")
    assert "Traceback" not in done.stderr


def test_the_interrupt_of_before_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ends_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_may_run_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["replay", "--requests", "1", "--json"])))
    thread.start()
    thread.join(timeout=300)
    assert codes == [0]
