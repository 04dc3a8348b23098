"""An engine of `sharing.py`, in a process of its own, with the arguments of `vllm.LLM` as JSON on its command line.

Each line of standard input is a list of prompts; a line of standard output says how they were answered: tokens, cached
tokens and milliseconds to the first token of each. Nothing of KVortex is imported before vLLM has started.
"""

import json
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is a log
    import vllm
    from vllm.config import KVTransferConfig

    settings = json.loads(sys.argv[1])
    answer, transfer = settings.pop("answer"), settings.pop("transfer")
    if transfer is not None:
        settings["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = vllm.LLM(
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        disable_log_stats=False,
        enable_prefix_caching=True,
        **settings,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": tokens} for tokens in json.loads(line)]
        outputs = llm.generate(prompts, parameters, use_tqdm=False) if prompts else []
        answers = [
            [list(o.outputs[0].token_ids), o.num_cached_tokens or 0, o.metrics.first_token_latency * 1e3]
            for o in outputs
        ]
        print(json.dumps(answers), file=out, flush=True)


if __name__ == "__main__":
    main()
