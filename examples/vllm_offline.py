"""Offline inference in vLLM with KVortex: the second time, the prompt's KV comes from host memory.

    python examples/vllm_offline.py MODEL

Any model that vLLM serves will do; prompts are token ids, so that no tokenizer is needed.
"""

import sys

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main(model: str) -> None:
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
    parameters = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": [3 + i % 500 for i in range(300)]}

    def ask() -> tuple[list[int], int]:
        (output,) = llm.generate([prompt], parameters, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.num_cached_tokens or 0

    first, cached = ask()
    print(f"first answer: {cached} of 300 prompt tokens were cached")
    llm.reset_prefix_cache()  # the device forgets; KVortex does not
    ask()  # lets the last saves be counted
    llm.reset_prefix_cache()
    second, cached = ask()
    print(f"second answer: {cached} of 300 prompt tokens were cached")
    print("same tokens:", first == second)


if __name__ == "__main__":
    main(sys.argv[1])
