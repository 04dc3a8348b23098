"""A conversation in vLLM with KVortex: each turn's prompt begins with the whole conversation so far, answers included.

    python examples/vllm_multi_turn.py MODEL [TURNS]

KVortex saves blocks as they fill up while decoding, so the answers of earlier turns are hits too.
"""

import sys

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main(model: str, turns: int) -> None:
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVortexConnector",
            kv_connector_module_path="kvortex.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"pool": "256MiB"},
        ),
    )
    parameters = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
    said = [3 + i % 500 for i in range(100)]  # the system prompt
    for turn in range(turns):
        said += [7 + turn] * 30  # the user speaks
        llm.reset_prefix_cache()  # other users' requests have taken the device's blocks meanwhile
        (output,) = llm.generate([{"prompt_token_ids": said}], parameters, use_tqdm=False)
        print(f"turn {turn + 1}: {output.num_cached_tokens or 0} of {len(said)} prompt tokens were cached")
        said += output.outputs[0].token_ids


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4)
