"""Two vLLM servers' engines over one directory: the second finds on disk what the first computed.

    PYTHONHASHSEED=0 python examples/vllm_shared_disk.py MODEL DIRECTORY

Each engine runs in a process of its own, as two servers on one machine would, or one server before and after a restart.
`PYTHONHASHSEED` makes vLLM's block hashes the same in both. Any model that vLLM serves will do.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

PROMPT_TOKENS = 300


def serve(model: str, directory: str) -> None:
    """One engine: answers one prompt twice, waits until its blocks are on disk."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVortexConnector",
            kv_connector_module_path="kvortex.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"pool": "256MiB", "disk": directory},
        ),
    )
    parameters = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": [3 + i % 500 for i in range(PROMPT_TOKENS)]}
    (output,) = llm.generate([prompt], parameters, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    cached = output.num_cached_tokens or 0
    print(f"process {os.getpid()}: {cached} of {PROMPT_TOKENS} prompt tokens were cached: {tokens}", flush=True)
    before = -1
    while (now := sum(1 for path in Path(directory).rglob("*.kv1") if path.is_file())) != before:
        before = now
        time.sleep(0.5)
    print(f"process {os.getpid()}: {now} blocks on disk", flush=True)


def main(model: str, directory: str) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, __file__, model, directory, "serve"], check=True)


if __name__ == "__main__":
    if sys.argv[3:] == ["serve"]:
        serve(*sys.argv[1:3])
    else:
        main(*sys.argv[1:3])
