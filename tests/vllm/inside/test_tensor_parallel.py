"""Two ranks, each with its shard: a hit needs both, outcomes are counted over both. Latent KV: one pool for both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import lacks_float32_latent, make_tiny_model

from kvortex.vllm.versions import IS_NEWER

PROGRAM = """
import json, sys
import vllm
from vllm.config import KVTransferConfig

def main():
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config={"pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}},
    )
    llm = vllm.LLM(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512,
        block_size=32, tensor_parallel_size=2, kv_transfer_config=connector, disable_log_stats=False,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers, cached = [], []
    for _ in range(4):
        (out,) = llm.generate([{"prompt_token_ids": [3 + 7 * i % 900 for i in range(200)]}], parameters, use_tqdm=False)
        answers.append(list(out.outputs[0].token_ids))
        cached.append(out.num_cached_tokens or 0)
        llm.reset_prefix_cache()
    print("RESULT " + json.dumps({"answers": answers, "cached": cached}))

if __name__ == "__main__":
    main()
"""


# vLLM's CPU kernels for latent attention differ between prefill and decode: a token that a hit leaves to compute is
# compared with one that was decoded. Because of that KVortex refuses such models on CPUs unless the device has a prefix
# cache, which is forced on here.
LATENT_PROGRAM = """
import json, sys
import vllm
from tiny_model import force_prefix_caching
from vllm.config import KVTransferConfig

def state(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    half = get_kv_transfer_group()._worker
    return half._share.rank, half._share.size, half._share.memory is not None, (half._share.digests != 0).sum().item()

def main():
    force_prefix_caching()
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config={"pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}},
    )
    llm = vllm.LLM(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512,
        tensor_parallel_size=2, kv_transfer_config=connector, disable_log_stats=False,
    )
    def ask(prompt, count):
        parameters = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        return list(out.outputs[0].token_ids), out.num_cached_tokens or 0
    prompt = [3 + 7 * i % 900 for i in range(192)]
    answer, cold = ask(prompt, 9)
    ask([5, 6, 7], 2)  # brings the last outcomes in
    again = []
    for _ in range(2):
        llm.reset_prefix_cache()
        again.append(ask(prompt + answer[:1], 8))
    print("RESULT " + json.dumps({"answer": answer, "cold": cold, "again": again, "ranks": llm.collective_rpc(state)}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_two_ranks(tmp_path: Path) -> None:
    result = run(tmp_path, PROGRAM, make_tiny_model(tmp_path / "model", "qwen3"))
    assert result["cached"][0] == 0
    assert result["cached"][-1] == 192
    assert all(answer == result["answers"][0] for answer in result["answers"])


@pytest.mark.skipif(not IS_NEWER, reason="the older version has no latent attention on CPUs")
@pytest.mark.skipif(lacks_float32_latent(), reason="vLLM's latent attention takes no float32 on this processor")
def test_latent_kv_is_stored_once(tmp_path: Path) -> None:
    result = run(tmp_path, LATENT_PROGRAM, make_tiny_model(tmp_path / "model", "deepseek_v2"))
    assert result["cold"] == 0
    assert result["again"] == [[result["answer"][1:], 192]] * 2
    blocks = 192 // 16  # vLLM's CPU kernel wants blocks of 16
    assert result["ranks"] == [[rank, 2, True, blocks] for rank in range(2)]


def run(tmp_path: Path, program: str, model: Path) -> Any:
    script = tmp_path / "two_ranks.py"
    script.write_text(program)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers for their state
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(model)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))
