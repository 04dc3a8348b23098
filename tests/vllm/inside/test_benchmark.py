"""The benchmark of vLLM with connectors, small, as a user runs it: two engines that start together."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kvortex.vllm.versions import IS_NEWER

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "vllm_ttft.py"

pytestmark = pytest.mark.skipif(
    not IS_NEWER, reason="the older version's operators have stand-ins in one process only, this takes more"
)


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    settings = json.dumps({"dtype": "float32", "enforce_eager": True, "block_size": 32})
    command = [sys.executable, str(BENCHMARK), "--shape", "tiny", "--lengths", "256", "--repeats", "1"]
    command += ["--batches", "2", "--prompts", "2", "--pool", "128MiB", "--engine", settings]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "KVORTEX_BENCHMARK": str(os.getpid())}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=400)
    assert not processes_with(f"KVORTEX_BENCHMARK={os.getpid()}")
    return done


def processes_with(variable: str) -> list[str]:
    """Processes that run with a variable set; one that ends meanwhile does not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
    return found


def test_rows_are_measured_and_written(tmp_path: Path) -> None:
    done = run("--rows", "none,kvortex", "--together", "2", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    none, kvortex = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert none["lengths"][0]["hit_ms"] == none["all_hits_per_s"] == []
    assert min(none["no_hits_per_s"]) > 0
    (length,) = kvortex["lengths"]
    assert length["tokens_equal"] == [8] * 4
    assert length["cached_tokens"] == 256
    assert len(kvortex["all_hits_per_s"]) == 2
    assert kvortex["counters"]["vllm:kvortex_loaded_blocks"] >= 4 * 256 // 32
    assert "4 of 4" in done.stdout


def test_a_row_that_fails_is_told_with_its_errors() -> None:
    done = run("--rows", "none", "--engine", json.dumps({"dtype": "nonsense"}))
    assert done.returncode == 1
    assert "none failed" in done.stderr
    assert "Error" in done.stderr.split("none failed", 1)[1]


def test_engines_share_a_pool(tmp_path: Path) -> None:
    """What one engine has computed counts as cached in the other."""
    settings = json.dumps({"dtype": "float32", "enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 64})
    command = [sys.executable, str(BENCHMARK.with_name("sharing.py")), "--rows", "shared", "--shape", "tiny"]
    command += ["--pool", "64MiB", "--conversations", "4", "--turns", "3", "--first", "300", "--question", "40"]
    command += ["--answer", "4", "--settle", "0", "--engine", settings, "--json", str(tmp_path / "figures.json")]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "KVORTEX_BENCHMARK": str(os.getpid())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(row["start_s"]) == 2
    assert row["requests"] == 4 * 2
    assert row["cached_tokens"] > 0.7 * row["prompt_tokens"]
    assert not processes_with(f"KVORTEX_BENCHMARK={os.getpid()}")
