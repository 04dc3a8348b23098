"""Engines of several processes: a program of its own, which prints what it found."""

import json
from pathlib import Path
from typing import Any

from engine_support import patient
from forked import Program

PROMPT_BLOCKS = 192
"""Tokens of the prompt's whole blocks."""
PROGRAM = """
import json, sys
import vllm
from vllm.config import KVTransferConfig

def state(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    half = get_kv_transfer_group()._worker
    own = getattr(half._places, "own", half._places.planned)
    raw = [[sizes.raw for sizes in of_groups] for of_groups in (own, half._places.planned)]
    return *raw, half._data.pool.capacity_bytes

def main():
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config={
            "pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}, **json.loads(sys.argv[3])
        },
    )
    llm = vllm.LLM(
        model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=512, block_size=32,
        kv_transfer_config=connector, disable_log_stats=False, **json.loads(sys.argv[2]),
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    def ask(prompt):
        (out,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        return list(out.outputs[0].token_ids), out.num_cached_tokens or 0
    answers, cached = [], []
    for _ in range(3):
        answer, hit = ask([3 + 7 * i % 900 for i in range(200)])
        answers.append(answer)
        cached.append(hit)
        ask([5, 6, 7])  # brings the last outcomes in
        llm.reset_prefix_cache()
    print("RESULT " + json.dumps({"answers": answers, "cached": cached, "state": llm.collective_rpc(state)}))

if __name__ == "__main__":
    main()
"""
"""Asks for the same answer three times, of an engine with the options of its second argument."""


def run_program(
    tmp_path: Path,
    model: Path,
    program: str = PROGRAM,
    *,
    compiles: bool = False,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """What a program prints behind "RESULT", with a model, engine options and ours as its arguments."""
    script = tmp_path / "ranks.py"
    script.write_text(program)
    environment: dict[str, str | None] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers for their state
    }
    if compiles:
        environment["TORCHDYNAMO_DISABLE"] = None
    output = tmp_path / "output.txt"
    arguments = [str(model), json.dumps(options), json.dumps(patient(extra or {}))]
    status = Program(script, arguments, environment, output=output).wait(400.0)
    said = output.read_text(errors="replace")
    assert status == 0, said[-9000:]
    (line,) = [line for line in said.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))
