"""Several engines, conversations whose turns go to any of them: a pool each against one pool for all. Needs vLLM.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --engines 2 --devices 0,1 --pool 40GiB --json FILE

A row is a way to store KV: `none`, `own` (each engine has a pool, all together of the size of `--pool`), `shared` (an
owner process has a pool of that size), or `native` (vLLM's OffloadingConnector, as `own`). In each round every
conversation asks its next question, of an engine that is drawn by lot, and the engines answer theirs side by side. The
question is the whole conversation so far, so its KV is on the right device in one case of so many as there are engines.

Printed are the seconds until the first and the second engine are there, requests per second, the share of the prompts'
tokens that was cached, and the time to the first token. The shapes are those of `vllm_ttft.py`, with random weights.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serve_pool import served_pool
from vllm_ttft import ENVIRONMENT, SHAPES, versions

from kvortex.config import GIB, format_bytes, parse_bytes

ROWS = ("none", "own", "shared", "native")


@dataclass
class Row:
    """What one way of storing did; times of the first round, in which nothing can be cached, are left out."""

    name: str
    start_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_ms: list[float] = field(default_factory=list)


def connector(name: str, pool_bytes: int, engines: int, socket: str) -> dict[str, Any] | None:
    """What `--kv-transfer-config` says of a row."""
    if name == "none":
        return None
    if name == "native":
        extra: dict[str, Any] = {"cpu_bytes_to_use": pool_bytes // engines}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    extra = {"owner": socket} if name == "shared" else {"pool": pool_bytes // engines}
    return {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


class Engine:
    """An engine in a process of its own."""

    def __init__(self, settings: dict[str, Any], device: str, log: Path) -> None:
        environment = {**os.environ, **ENVIRONMENT}
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self._log = log
        # -P: what vLLM imports must not be found beside this file (transformers looks for a package `kernels`).
        program = str(Path(__file__).with_name("sharing_engine.py"))
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", program, json.dumps(settings)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            wrong = [line for line in self._log.read_text().splitlines() if "Error" in line]
            raise RuntimeError("\n  ".join(["an engine ended; keep its log with --logs FOLDER:", *wrong[:6]]))
        return line

    def begin(self, prompts: list[list[int]]) -> None:
        """Let it answer these prompts."""
        print(json.dumps(prompts), file=self._process.stdin, flush=True)

    def answers(self) -> list[Any]:
        """Tokens, cached tokens and milliseconds to the first token of each."""
        found: list[Any] = json.loads(self._read())
        return found

    def close(self) -> None:
        """End it and every process that vLLM has started for it."""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measure(name: str, arguments: argparse.Namespace, model: str, logs: Path) -> Row:
    """One row, from the start of its engines to their end."""
    row, lots = Row(name), random.Random(1)
    devices = arguments.devices.split(",") if arguments.devices else [""]
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    socket = str(logs / "owner.sock")
    settings = {
        "model": model,
        "answer": arguments.answer,
        "transfer": connector(name, arguments.pool, arguments.engines, socket),
        "max_model_len": arguments.first + arguments.turns * (arguments.question + arguments.answer) + 64,
        **json.loads(arguments.engine),
    }

    def words(count: int) -> list[int]:
        return [lots.randrange(10, vocabulary) for _ in range(count)]

    with contextlib.ExitStack() as stack:
        if name == "shared":
            stack.enter_context(served_pool(socket, arguments.pool))
        engines: list[Engine] = []
        for number in range(arguments.engines):
            began = time.monotonic()
            engines.append(Engine(settings, devices[number % len(devices)], logs / f"{name}-{number}.log"))
            stack.callback(engines[-1].close)
            row.start_s.append(time.monotonic() - began)
        time.sleep(arguments.settle)  # pools are pinned in the background
        conversations = [words(arguments.first) for _ in range(arguments.conversations)]
        for turn in range(arguments.turns):
            chosen = [lots.randrange(len(engines)) for _ in conversations]
            began = time.monotonic()
            for number, engine in enumerate(engines):
                engine.begin([c for c, of in zip(conversations, chosen, strict=True) if of == number])
            answered = [engine.answers() for engine in engines]
            if turn:
                row.round_s.append(time.monotonic() - began)
            for number, conversation in enumerate(conversations):
                tokens, cached, first_token_ms = answered[chosen[number]].pop(0)
                if turn:
                    row.requests += 1
                    row.prompt_tokens += len(conversation)
                    row.cached_tokens += cached
                    row.first_token_ms.append(first_token_ms)
                conversation += [*tokens, *words(arguments.question)]
    return row


def print_row(row: Row) -> None:
    times = sorted(row.first_token_ms)
    start = " ".join(f"{seconds:>6.1f}" for seconds in row.start_s[:2])
    print(
        f"{row.name:<8} {start:>13} {row.requests / sum(row.round_s):>10.2f}"
        f" {row.cached_tokens / row.prompt_tokens:>9.1%} {statistics.median(times):>10.1f}"
        f" {times[int(0.9 * (len(times) - 1))]:>10.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="none,own,shared,native", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--devices", default="", help="CUDA devices, in turn; by default all share the first")
    parser.add_argument("--pool", type=parse_bytes, default=40 * GIB, help="of all engines together")
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--turns", type=int, default=6, help="the first of them is not counted")
    parser.add_argument("--first", type=int, default=4000, help="tokens of the first question")
    parser.add_argument("--question", type=int, default=200, help="tokens of a later one")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds between the start and the first question")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument(
        "--engine", default='{"gpu_memory_utilization": 0.4}', help="more arguments of vllm.LLM, as JSON"
    )
    parser.add_argument("--logs", type=Path, help="a folder for what the engines print (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row is named {unknown[0]!r}; there are {', '.join(ROWS)}")
    from kvortex.testing.dummy_model import write_config  # not in an engine's process before vLLM has started

    about = versions()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{arguments.engines} engines, {format_bytes(arguments.pool)}, {arguments.conversations} conversations")
    print(f"{'row':<8} {'start s: 1st, 2nd':>13} {'requests/s':>6} {'cached':>9} {'TTFT ms':>10} {'p90':>10}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        write_config(Path(folder), **SHAPES[arguments.shape])
        for name in names:
            rows.append(measure(name, arguments, folder, logs))
            print_row(rows[-1])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"environment": about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
