"""What a connector costs the process that schedules, with models that mix kinds of KV. Needs vLLM, and no device.

    python benchmarks/scheduling.py
    python benchmarks/scheduling.py --models gemma-3,gpt-oss --tokens 8192 --requests 16 --json FILE

vLLM's real scheduler serves a batch of prompts that are new, then the same prompts when only the connector has them.
The workers are played: every transfer has ended a step later, and a forward takes no time. Printed is the time in the
scheduler for the whole batch, a step and a request, without a connector, with KVortex, with its pool in an owner
process, and with vLLM's own OffloadingConnector; and how many tokens the connectors gave. Rows are measured in turns,
the medians are printed.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("PYTHONHASHSEED", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The scheduler without workers is a part of the tests.
sys.path[:0] = [str(Path(__file__).parents[1] / "tests/vllm/inside")]

from groups_support import Model, greet, harness_of, model  # noqa: E402
from scheduler_harness import Layers, SchedulerHarness, Step, WorkerReport  # noqa: E402
from serve_pool import served_pool  # noqa: E402
from vllm import __version__ as vllm_version  # noqa: E402

from kvortex.testing.dummy_model import write_config  # noqa: E402
from kvortex.vllm.metrics import ConnectorStats  # noqa: E402
from kvortex.vllm.options import ConnectorOptions  # noqa: E402
from kvortex.vllm.plans import JobOutcome, SaveDigests  # noqa: E402
from kvortex.vllm.versions import SERVES_GROUPS  # noqa: E402
from kvortex.vllm.worker.half import WorkerHalf  # noqa: E402

MODELS = {
    "gemma-3": model(*[Layers("window", 16, 1024)] * 6, Layers("full", 16)),
    "gpt-oss": model(Layers("full", 16), Layers("window", 16, 128)),
    "qwen3-next": model(Layers("full", 544), *[Layers("state", 544)] * 3),
    "llama": model(Layers("full", 16)),
}
ROWS = ("none", "kvortex", "owner", "native")
OWNER_POOL = "16GiB"  # no page of it is touched


@dataclass
class Batch:
    """Time in the scheduler for a batch."""

    seconds: float
    num_steps: int
    longest_step_s: float


class NoWorkers:
    """There is no connector."""

    def report(self, step: Step) -> WorkerReport | None:
        return None


class OurWorkers:
    """Every job of KVortex ends in the step after the one that began it."""

    def __init__(self, harness: SchedulerHarness) -> None:
        greet(harness)
        transfer = harness.vllm_config.kv_transfer_config
        options = ConnectorOptions.from_extra_config(transfer.kv_connector_extra_config)
        self._half = WorkerHalf(harness.vllm_config, harness.kv_cache_config, options)
        self._saves: list[Any] = []
        self._loads: list[Any] = []

    def report(self, step: Step) -> WorkerReport | None:
        for save in self._saves:
            count = save.transfer.num_blocks
            digests = SaveDigests(0, np.arange(count), np.zeros(count, dtype=np.uint64))
            self._half._reports.end(JobOutcome(save.job_id, digests=digests))
        for load in self._loads:
            self._half._reports.end_load(load, JobOutcome(load.job_id))
        self._saves = [*step.metadata.early_saves, *step.metadata.saves]
        self._loads = step.metadata.loads
        return WorkerReport(
            finished_recving=self._half.take_finished(),
            worker_meta=self._half.take_reports(),
            kv_connector_stats=ConnectorStats(),
        )


class NativeWorkers:
    """The same of vLLM's OffloadingConnector."""

    def __init__(self) -> None:
        self._jobs: list[int] = []
        self._loaded: set[str] = set()

    def report(self, step: Step) -> WorkerReport | None:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

        ended = OffloadingWorkerMetadata()
        for job_id in self._jobs:
            ended.mark_completed(job_id)
        loaded = self._loaded
        plan = step.metadata
        self._jobs = [*plan.load_jobs, *plan.store_jobs]
        self._loaded = {job.req_id for job in plan.load_jobs.values()}
        return WorkerReport(finished_recving=loaded, worker_meta=ended if ended.completed_jobs else None)


class Row:
    """A scheduler with one connector, or without.

    Args:
        name: of `ROWS`.
        of_model: groups of its layers.
        folder: of a model's configuration.
        arguments: of the command line.
        socket: of the owner of a pool, for the row `owner`.
    """

    def __init__(self, name: str, of_model: Model, folder: Path, arguments: argparse.Namespace, socket: Path) -> None:
        self.name = name
        self._arguments = arguments
        num_tokens = arguments.tokens + arguments.answer
        blocks = arguments.requests * sum(num_tokens // layers.block_size + 2 for layers in of_model.groups) + 200
        options: dict[str, Any] = {
            "num_blocks": blocks,
            "max_num_seqs": arguments.requests,
            "max_num_batched_tokens": 8192,
            "max_model_len": num_tokens + 64,
        }
        if name == "native":
            options |= {
                "connector": "OffloadingConnector",
                "module_path": None,
                "extra": {"cpu_bytes_to_use": 16 << 30},
            }
        elif name == "none":
            options["connector"] = None
        elif name == "owner":
            options["extra"] = {"owner": str(socket)}
        self._harness = harness_of(of_model, folder, pool_blocks=2 * blocks, **options)
        self._workers: Any = NativeWorkers() if name == "native" else NoWorkers()
        if name in ("kvortex", "owner"):
            self._workers = OurWorkers(self._harness)
        self._names = (f"{n}" for n in range(1 << 30))
        self.new: list[Batch] = []
        self.hits: list[Batch] = []
        self.hit_tokens = 0

    def measure(self, prompts: list[list[int]]) -> None:
        """Serve prompts that are new, then again if only the connector has them."""
        self.new.append(self._serve(prompts))
        if self.name != "none":
            if not self._harness.scheduler.reset_prefix_cache():
                raise RuntimeError(f"{self.name}: vLLM could not reset its prefix cache")
            self.hits.append(self._serve(prompts))

    def _serve(self, prompts: list[list[int]]) -> Batch:
        harness, names = self._harness, [next(self._names) for _ in prompts]
        for name, tokens in zip(names, prompts, strict=True):
            harness.add_request(name, tokens, max_tokens=self._arguments.answer)
        self._num_computed = 0
        times = list(self._steps(names))
        for _ in range(4):  # what is in flight ends
            self._step()
        needed = sum(harness.requests.pop(name).num_tokens - 1 for name in names)
        self.hit_tokens = needed - self._num_computed
        return Batch(sum(times), len(times), max(times))

    def _steps(self, names: list[str]) -> Iterator[float]:
        requests = self._harness.requests
        while not all(requests[name].is_finished() for name in names):
            yield self._step()

    def _step(self) -> float:
        started_s = time.perf_counter()
        step = self._harness.schedule()
        planned_s = time.perf_counter()
        self._num_computed += sum(step.num_scheduled_tokens.values())
        report = self._workers.report(step)
        reported_s = time.perf_counter()
        self._harness.finish(step, report)
        return planned_s - started_s + time.perf_counter() - reported_s

    def close(self) -> None:
        self._harness.shutdown()


def print_batches(name: str, what: str, batches: list[Batch], requests: int, hit_tokens: int = 0) -> None:
    seconds = statistics.median(batch.seconds for batch in batches)
    steps = statistics.median(batch.num_steps for batch in batches)
    longest = statistics.median(batch.longest_step_s for batch in batches)
    print(
        f"  {name:<10} {what:<5} {seconds * 1e3:>9.1f} {seconds * 1e3 / requests:>9.2f} {steps:>6.0f}"
        f" {seconds * 1e3 / steps:>8.2f} {longest * 1e3:>8.1f} {hit_tokens or '':>10}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=64, help="of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    arguments = parser.parse_args()
    chosen = arguments.models.split(",")
    if unknown := [name for name in chosen if name not in MODELS]:
        parser.error(f"no model is named {unknown[0]!r}; there are {', '.join(MODELS)}")
    rows = arguments.rows.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        parser.error(f"no row is named {unknown[0]!r}; there are {', '.join(ROWS)}")
    if not SERVES_GROUPS:
        parser.error(f"vLLM {vllm_version} turns its hybrid manager off: take 0.23 or newer")
    print(
        f"vLLM {vllm_version}, {arguments.requests} prompts of {arguments.tokens} tokens, answers of {arguments.answer}"
    )
    print(f"  {'':<16} {'batch ms':>9} {'a request':>9} {'steps':>6} {'a step':>8} {'longest':>8} {'hit tokens':>10}")
    random, found = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(
            Path(folder),
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=1000,
            max_position_embeddings=1 << 20,
        )
        for name in chosen:
            print(name)
            with contextlib.ExitStack() as stack:
                socket = Path(folder) / "owner.sock"
                if "owner" in rows:
                    stack.enter_context(served_pool(str(socket), OWNER_POOL))
                measured = [Row(row, MODELS[name], Path(folder), arguments, socket) for row in rows]
                for row in measured:
                    stack.callback(row.close)
                for _ in range(arguments.repeats):
                    prompts = [random.integers(3, 1000, arguments.tokens).tolist() for _ in range(arguments.requests)]
                    for row in measured:
                        row.measure(prompts)
            for row in measured:
                print_batches(row.name, "new", row.new, arguments.requests)
                if row.hits:
                    print_batches(row.name, "hits", row.hits, arguments.requests, row.hit_tokens)
            found[name] = [
                {"row": row.name, "new": [asdict(b) for b in row.new], "hits": [asdict(b) for b in row.hits]}
                for row in measured
            ]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"vllm": vllm_version, "models": found}, indent=1))


if __name__ == "__main__":
    main()
