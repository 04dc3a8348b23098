"""The vLLM examples, each in a process of its own, the engine in another as in production where that is possible."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Program
from tiny_model import make_tiny_model

from kvortex.vllm.versions import IS_NEWER

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3"))


def run(name: str, *arguments: str) -> str:
    # With the older version operators have stand-ins, which live in this process: its engine has to as well.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if IS_NEWER else "0"}
    output = Path(arguments[0]) / f"{name}.txt"
    status = Program(EXAMPLES / name, arguments, environment, output=output).wait(300.0)
    said = output.read_text(errors="replace")
    assert status == 0, said[-9000:]
    return said


def test_offline(model: str) -> None:
    out = run("vllm_offline.py", model)
    assert "first answer: 0 of 300" in out
    cached = re.search(r"second answer: (\d+) of 300", out)
    assert cached is not None
    assert int(cached[1]) >= 256
    assert "same tokens: True" in out


def test_multi_turn(model: str) -> None:
    out = run("vllm_multi_turn.py", model)
    turns = [(int(a), int(b)) for a, b in re.findall(r"turn \d: (\d+) of (\d+)", out)]
    assert len(turns) == 4
    assert turns[0][0] == 0
    for (_, before), (cached, _) in itertools.pairwise(turns):
        assert cached > before - 128, "the answer's blocks are hits too"


@pytest.mark.skipif(not IS_NEWER, reason="the older version's stand-in operators live in this process alone")
def test_shared_disk(model: str, tmp_path: Path) -> None:
    """Run as printed: it starts its two engines itself."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "vllm_shared_disk.py"), model, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    first, second = re.findall(r"(\d+) of 300 prompt tokens were cached: (\[.*\])", done.stdout)
    assert int(first[0]) == 0
    assert int(second[0]) >= 256
    assert first[1] == second[1]
