"""Engines of one and of two ranks over one lower tier: each finds what the other has written."""

from pathlib import Path
from typing import Any

import pytest
from engine_support import BLOCK_SIZE, running, settle_disk
from ranks_support import PROMPT_BLOCKS, run_program
from tiny_model import make_tiny_model

from kvortex.vllm.versions import IS_NEWER

FIRST, SECOND = ([3 + step * i % 900 for i in range(200)] for step in (7, 11))

# Asks for both prompts, and for a short one that brings the last outcomes in.
PROGRAM = """
import json, sys
import vllm
from vllm.config import KVTransferConfig

def main():
    extra = {"pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}, **json.loads(sys.argv[3])}
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config=extra,
    )
    llm = vllm.LLM(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512,
        block_size=32, tensor_parallel_size=2, kv_transfer_config=connector, disable_log_stats=False,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers, cached = [], []
    for step in (7, 11, 5):
        prompt = [3 + step * i % 900 for i in range(200 if step > 5 else 3)]
        (out,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        answers.append(list(out.outputs[0].token_ids))
        cached.append(out.num_cached_tokens or 0)
    print("RESULT " + json.dumps({"answers": answers, "cached": cached}))

if __name__ == "__main__":
    main()
"""


def over(directory: Path, **tier: Any) -> dict[str, Any]:
    return {"disk": str(directory), "tier": {"canonical_layout": True, **tier}}


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
@pytest.mark.parametrize("num_heads", [2, 1])
def test_one_rank_and_two_find_what_the_other_has_written(
    tmp_path: Path, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single KV head both ranks have it, and it is stored once."""
    monkeypatch.setattr("tiny_model.NUM_KV_HEADS", num_heads)
    model, options = make_tiny_model(tmp_path / "model", "qwen3"), over(tmp_path / "disk")
    with running(str(model), connector=False) as engine:
        expected = engine.generate([FIRST]) + engine.generate([SECOND])
    with running(str(model), options=options) as engine:
        assert engine.generate([FIRST]) == expected[:1]
        settle_disk(engine)
    two_ranks = run_program(tmp_path, model, PROGRAM, extra=options)
    assert two_ranks["cached"][:2] == [PROMPT_BLOCKS, 0]
    assert two_ranks["answers"][:2] == expected
    with running(str(model), options=options) as engine:
        assert engine.generate([SECOND]) == expected[1:]
        assert engine.loaded_blocks == PROMPT_BLOCKS // BLOCK_SIZE
