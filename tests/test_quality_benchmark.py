"""The benchmark of packing's quality, on a tiny model: its figures are what the codecs can be expected to do."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TINY = {"prompts": 2, "prompt-tokens": 64, "positions": 32, "layers": 2, "hidden": 64, "heads": 2, "kv-heads": 1}
ARGUMENTS = [word for name, value in {**TINY, "vocab": 128}.items() for word in (f"--{name}", str(value))]


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load()


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    options = {name.replace("-", "_"): value for name, value in TINY.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other longer than such small matrices take
    try:
        measured: dict[str, list[Any]] = benchmark.measure(argparse.Namespace(**options, vocab=128), lambda step: None)
    finally:
        torch.set_num_threads(threads)
    return measured


def test_what_is_not_packed_changes_nothing(results: dict[str, list[Any]]) -> None:
    raw = [row for row in results["quality"] if row.codec == "raw"]
    assert [row.keys for row in raw] == list(benchmark.KEYS)
    for row in raw:
        assert (row.k_error, row.v_error, row.attention_overall, row.kl_mean, row.kl_p99) == (0.0,) * 5
        assert row.attention == row.attention_alone == (0.0,) * TINY["layers"]
        assert row.agreement == 1.0
        assert set(row.kept_as_is.values()) == {0.0}


@pytest.mark.parametrize(("codec", "least", "most"), [("fp8", 0.005, 0.05), ("bf16", 0.0005, 0.003)])
def test_errors_are_those_of_the_format(results: dict[str, list[Any]], codec: str, least: float, most: float) -> None:
    rows = [row for row in results["quality"] if row.codec == codec]
    assert len(rows) == len(benchmark.KEYS) * sum(kind[0] == codec for kind in benchmark.KINDS)
    for row in rows:
        assert least < row.k_error < most
        assert least < row.v_error < most
        assert least < row.block_error_median <= row.block_error_max < most
        assert 0 < row.kl_mean <= row.kl_p99 < 1
        assert row.attention[0] == pytest.approx(row.attention_alone[0])  # nothing in front of the first
        assert row.attention[1] > row.attention_alone[1]
        assert row.kept_as_is == {str(b): float(row.block_error_max > b) for b in benchmark.BOUNDS}


def test_attention_is_not_uniform_and_the_context_matters(results: dict[str, list[Any]]) -> None:
    for row in results["context"]:
        assert all(0.5 < entropy < row.uniform_entropy - 1 for entropy in row.attention_entropy)
        assert row.other_agreement < 0.5
        assert 0 < row.bfloat16_kl < row.other_kl / 10
        assert 0.5 < row.bfloat16_agreement <= 1


def test_outliers_in_keys_that_queries_make_up_for_are_the_same_model() -> None:
    tokens = torch.arange(64)[None]
    plain, scaled = (benchmark.make_model(keys, 1, 64, 2, 1, 128)(tokens).logits for keys in ("plain", "scaled"))
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-3)


def test_the_chosen_grouping_is_what_the_kernels_do() -> None:
    kv = torch.randn(2, 2, 3, 16, 2, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    kv[0, 0, 1, 3] *= 1e-4
    kv[1, 1, 2, :, 0, 7] *= 50
    kv[0, 1, 0, 0, 0] = 0
    unpacked, _ = benchmark.round_trip(kv, "fp8")
    assert torch.equal(unpacked, benchmark.round_in_groups(kv, "token, head", "power of two")[1])


def test_powers_of_two_round_once(results: dict[str, list[Any]]) -> None:
    for row in results["grouping"]:
        if row.scale == "power of two":
            assert (row.rounded_again, row.changed_by_second) == (0.0, 0.0)
        else:
            assert row.rounded_again > 0.1


def test_it_prints_json_or_tables(
    results: dict[str, list[Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda options, step: results)
    benchmark.main([*ARGUMENTS, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {"torch", "transformers", "numba", "numpy", "python"} == set(report["versions"])
    assert [len(report[name]) for name in results] == [len(rows) for rows in results.values()]
    benchmark.main(ARGUMENTS)
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert printed.count("\n| plain | fp8 of bfloat16 | ") == 1
