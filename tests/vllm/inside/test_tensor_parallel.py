"""Two ranks, each with its shard: a hit needs both, outcomes are counted over both. Latent KV: one pool for both."""

from pathlib import Path
from typing import Any

import pytest
from model_shapes import make_shape
from owner_support import serving
from ranks_support import PROMPT_BLOCKS, run_program
from tiny_model import lacks_float32_latent, make_tiny_model

from kvortex.vllm.versions import IS_NEWER

TWO_RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "enforce_eager": True}

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
    digests = getattr(half._share, "digests", None)
    saved = 0 if digests is None else (digests != 0).sum().item()
    return half._share.rank, half._share.size, half._share.memory is not None, saved

def main():
    force_prefix_caching()
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config={
            "pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}, **json.loads(sys.argv[3])
        },
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
def test_two_ranks_find_on_disk_what_two_ranks_have_stored_in_an_owners_pool(tmp_path: Path) -> None:
    """The second engine has another owner, over the same disk."""
    model, disk = make_tiny_model(tmp_path / "model", "qwen3"), {"disk": str(tmp_path / "disk")}
    with serving(tmp_path / "kv.sock", **disk) as owner:
        first = run_program(tmp_path, model, extra={"owner": str(owner.path)}, **TWO_RANKS)
        owner.flush()
    second = run_program(tmp_path, model, extra=disk, **TWO_RANKS)
    assert first["cached"] == [0, PROMPT_BLOCKS, PROMPT_BLOCKS]
    assert second["cached"] == [PROMPT_BLOCKS] * 3
    assert first["answers"] + second["answers"] == first["answers"][:1] * 6


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_two_ranks(tmp_path: Path) -> None:
    result = run_program(tmp_path, make_tiny_model(tmp_path / "model", "qwen3"), **TWO_RANKS)
    assert result["cached"] == [0, PROMPT_BLOCKS, PROMPT_BLOCKS]
    assert result["answers"][1:] == result["answers"][:1] * 2


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_two_ranks_of_windows_and_full_attention(tmp_path: Path) -> None:
    result = run_program(tmp_path, make_shape(tmp_path / "model", "gemma3"), **TWO_RANKS, enable_prefix_caching=True)
    assert result["cached"] == [0, PROMPT_BLOCKS, PROMPT_BLOCKS]
    assert result["answers"][1:] == result["answers"][:1] * 2
    first, second = result["state"]
    assert len(first[0]) == 4
    assert first == second


@pytest.mark.skipif(not IS_NEWER, reason="the older version has no latent attention on CPUs")
@pytest.mark.skipif(lacks_float32_latent(), reason="vLLM's latent attention takes no float32 on this processor")
def test_latent_kv_is_stored_once(tmp_path: Path) -> None:
    result = run_program(tmp_path, make_tiny_model(tmp_path / "model", "deepseek_v2"), LATENT_PROGRAM)
    assert result["cold"] == 0
    assert result["again"] == [[result["answer"][1:], 192]] * 2
    blocks = 192 // 16  # vLLM's CPU kernel wants blocks of 16
    assert result["ranks"] == [[rank, 2, True, blocks] for rank in range(2)]


@pytest.mark.skipif(not IS_NEWER, reason="the older version has no latent attention on CPUs")
@pytest.mark.skipif(lacks_float32_latent(), reason="vLLM's latent attention takes no float32 on this processor")
def test_latent_kv_is_stored_once_in_an_owners_pool(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "deepseek_v2")
    with serving(tmp_path / "kv.sock") as owner:
        extra = {"owner": str(owner.path)}
        result = run_program(tmp_path, model, LATENT_PROGRAM, extra=extra)
        (cache,) = owner.owner.caches
        block_nbytes = owner.owner.control.extents[2 * cache.first]
        assert owner.allocated_bytes == owner.num_blocks * block_nbytes, "the block of one rank"
        assert len(result["ranks"]) == 2
    assert result["cold"] == 0
    assert result["again"] == [[result["answer"][1:], 192]] * 2
