"""Layers of different shapes, ranks with different layers: the scheduler plans with what the workers registered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model
from engine_support import BLOCK_SIZE, running
from inside_fixtures import PROMPTS
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


PROGRAM = """
import json, sys
import vllm
from vllm.config import KVTransferConfig

def state(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    half = get_kv_transfer_group()._worker
    return half._places.own.raw, half._places.planned.raw, half._data.pool.capacity_bytes

def main():
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config={"pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}},
    )
    # vLLM's CPU backend takes pipeline stages only where it compiles.
    llm = vllm.LLM(
        model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=512, block_size=32,
        pipeline_parallel_size=2, async_scheduling=False, kv_transfer_config=connector, disable_log_stats=False,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers, cached = [], []
    for _ in range(3):
        (out,) = llm.generate([{"prompt_token_ids": [3 + 7 * i % 900 for i in range(200)]}], parameters, use_tqdm=False)
        answers.append(list(out.outputs[0].token_ids))
        cached.append(out.num_cached_tokens or 0)
        llm.reset_prefix_cache()
    print("RESULT " + json.dumps({"answers": answers, "cached": cached, "state": llm.collective_rpc(state)}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_stages_with_unequal_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model, "NUM_LAYERS", 3)
    model = make_tiny_model(tmp_path / "model", "qwen3")
    script = tmp_path / "two_stages.py"
    script.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"} | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers for their state
    }
    done = subprocess.run(
        [sys.executable, str(script), str(model)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["cached"] == [0, 192, 192]
    assert result["answers"][1:] == result["answers"][:1] * 2
    two, one = 2 * LAYER_NBYTES, LAYER_NBYTES
    assert result["state"] == [[two, two, 64 << 20], [one, two, 32 << 20]]
