"""The command line, on the shipped trace and on bad input."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from kvortex.cli import replay
from kvortex.cli.main import main
from kvortex.config import EVICTION_POLICIES


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_replay_prints_json(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "12", "--pool", "16MiB", "--policy", policy, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == 12
    assert figures["mismatches"] == 0
    assert figures["hit_rate"] > 0
    assert figures["evicted_blocks"] > 0
    assert figures["bytes_loaded"] > 0


def test_replay_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--requests", "4"]) == 0
    out = capsys.readouterr().out
    assert "mismatches" in out
    assert "hit rate" in out


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
def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "4", "--json"]) == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    assert all(prompt["identical"] for prompt in json.loads(first)["transformer"])
    assert json.loads(second)["mismatches"] == 0


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
    "option", [["--requests", "0"], ["--pool", "many"], ["--concurrency", "x"], ["--policy", "fifo"]]
)
def test_bad_options(option: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["replay", *option])
    assert exit_.value.code == 2


def test_the_shipped_trace_is_whole() -> None:
    rows = lzma.decompress(replay._shipped_trace()).splitlines()
    assert len(rows) == 12031
    prompts = replay.read_trace(None, 3)
    assert [len(prompt) for prompt in prompts] == [6758, 7322, 7236]
    assert (prompts[0][:512] == prompts[1][:512]).all()
