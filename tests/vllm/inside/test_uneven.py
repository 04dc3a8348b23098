"""Layers of different shapes, ranks with different layers: the scheduler plans with what the workers registered."""

from pathlib import Path
from typing import Any

import pytest
import tiny_model
from engine_support import BLOCK_SIZE, running
from inside_fixtures import PROMPTS
from model_shapes import make_shape
from ranks_support import PROMPT_BLOCKS, run_program
from tiny_model import make_tiny_model

from kvortex.vllm.versions import IS_NEWER

LAYER_NBYTES = BLOCK_SIZE * 1024


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with twice the KV heads of the others."""
    monkeypatch.setattr(tiny_model, "NUM_KV_HEADS", 4)
    return make_tiny_model(tmp_path / "draft", "qwen3", seed=3)


@pytest.mark.skipif(not IS_NEWER, reason="the older version has no draft models")
def test_a_draft_model_with_other_kv_heads(
    model: str, draft: Path, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """One group of pages that differ; loads go to the prompt's own blocks, whatever is allocated for drafts."""
    drafts = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    options = {"disk": {"path": str(tmp_path / "disk"), "capacity_bytes": "1GiB"}}
    whole = ["whole blocks", "ends inside a block", "one token over", "long"]
    with running(model, options=options, speculative_config=drafts) as engine:
        assert engine.scheduler_half._sizes[0].raw == 4 * LAYER_NBYTES + 4 * 2 * LAYER_NBYTES
        for _ in range(3):
            for name in whole:
                assert engine.generate([PROMPTS[name]]) == expected[name]
                engine.settle()
        assert engine.loaded_blocks == 2 * sum(len(PROMPTS[name]) // BLOCK_SIZE for name in whole)


# vLLM's CPU backend takes pipeline stages only where it compiles.
TWO_STAGES: dict[str, Any] = {"pipeline_parallel_size": 2, "async_scheduling": False, "compiles": True}


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_stages_with_unequal_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model, "NUM_LAYERS", 3)
    result = run_program(tmp_path, make_tiny_model(tmp_path / "model", "qwen3"), **TWO_STAGES)
    assert result["cached"] == [0, PROMPT_BLOCKS, PROMPT_BLOCKS]
    assert result["answers"][1:] == result["answers"][:1] * 2
    two, one = 2 * LAYER_NBYTES, LAYER_NBYTES
    assert result["state"] == [[[two], [two], 64 << 20], [[one], [two], 32 << 20]]


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_a_stage_without_layers_of_a_group(tmp_path: Path) -> None:
    """Four groups of a layer each, in two stages of two layers."""
    model = make_shape(tmp_path / "model", "gemma3")
    disk = {"disk": str(tmp_path / "disk")}
    over_disk = run_program(tmp_path, model, extra=disk, **TWO_STAGES, enable_prefix_caching=True)
    assert over_disk["cached"] == [0, PROMPT_BLOCKS, PROMPT_BLOCKS]
    result = run_program(tmp_path, model, **TWO_STAGES, enable_prefix_caching=True)
    assert result["cached"] == [0, PROMPT_BLOCKS, PROMPT_BLOCKS]
    assert result["answers"] + over_disk["answers"] == result["answers"][:1] * 6
    (first, planned, _), (last, same, _) = result["state"]
    assert planned == same
    assert sorted(zip(first, last, strict=True)) == [(0, size) for size in planned[2:]] + [
        (size, 0) for size in planned[:2]
    ]
