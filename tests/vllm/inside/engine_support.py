"""Real engines over a tiny model, in this process, and what their connector did."""

import contextlib
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cpu_ops_0151
import numpy as np
import torch
import vllm
from tiny_model import VOCAB_SIZE, make_tiny_model

from kvortex.owner import RemoteControl
from kvortex.owner.tiering import tier_figures
from kvortex.planes.control import ControlPlane
from kvortex.types import MissReason
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.scheduler.half import SchedulerHalf
from kvortex.vllm.worker.half import WorkerHalf

cpu_ops_0151.install()


def _let_engines_follow_each_other() -> None:
    """vLLM's CPU worker looks through all loaded modules when it starts and trips over one of llvmlite's objects.

    A server's worker starts before numba is loaded; here one engine follows another in one process.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:
        return
    original = getattr(dispatcher, "_rebind_kernels", None)
    if original is None:
        return

    def rebind(overrides: Any) -> None:
        hidden = sys.modules.pop("llvmlite.binding.ffi", None)
        try:
            original(overrides)
        finally:
            if hidden is not None:
                sys.modules["llvmlite.binding.ffi"] = hidden

    dispatcher._rebind_kernels = rebind


_let_engines_follow_each_other()


def _own_the_freezing_of_garbage() -> Callable[[], None]:
    """A million objects are imported, and vLLM looks through them all some ten times an engine, for seconds.

    What is there before an engine starts is left out of it, and stays so when vLLM thaws what it has frozen itself.
    """
    freeze = gc.freeze
    gc.freeze = gc.unfreeze = lambda: None
    return freeze


freeze_imports = _own_the_freezing_of_garbage()
BLOCK_SIZE = 32
NUM_BLOCKS = 512
LIKELY = 20


def make_model(directory: Path) -> str:
    return str(make_tiny_model(directory, "qwen3"))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def ours(connector: Any) -> Any:
    """The connector of this project, which may be one of several."""
    return next(c for c in getattr(connector, "_connectors", [connector]) if type(c).__name__ == "KVortexConnector")


PATIENCE_S = 30.0
"""What a call to an owner may take: it may be a thread of this process, while this one loads a model."""
SETTLE_S = 30.0  # a save that has not ended by then never ends


class Engine:
    """An LLM and its connector's halves."""

    def __init__(self, llm: vllm.LLM) -> None:
        self.llm = llm

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler_half(self) -> SchedulerHalf:
        return ours(self.core.scheduler.connector)._scheduler

    @property
    def control(self) -> ControlPlane | RemoteControl:
        return self.scheduler_half._control

    @property
    def worker_half(self) -> WorkerHalf:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return ours(get_kv_transfer_group())._worker

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, *, adapter: Any = None, **options: Any
    ) -> list[list[int]]:
        parameters = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)
        inputs = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False, lora_request=adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def likely_first(self, tokens: Sequence[int]) -> set[int]:
        """The most likely tokens after a prompt."""
        parameters = vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=LIKELY)
        (output,) = self.llm.generate([{"prompt_token_ids": list(tokens)}], parameters, use_tqdm=False)
        (position,) = output.outputs[0].logprobs
        return {token for token, value in position.items() if value.rank <= LIKELY}

    @property
    def loaded_blocks(self) -> int:
        return self.scheduler_half.stats.snapshot().hits

    def misses(self, reason: MissReason) -> int:
        return self.scheduler_half.stats.snapshot().misses[reason]

    def settle(self) -> None:
        """Let the last outcomes come in: vLLM stops stepping when the answers are out, and a busy machine is slow."""
        until_s = time.monotonic() + SETTLE_S
        self.generate([prompt(3, seed=999)], max_tokens=2)
        while self.scheduler_half.has_work() and time.monotonic() < until_s:
            self.generate([prompt(3, seed=999)], max_tokens=2)


def settle_disk(engine: Engine) -> None:
    """Let every block be written, if there is a lower tier."""
    engine.settle()
    control, until_s = engine.control, time.monotonic() + SETTLE_S
    while isinstance(control, RemoteControl) and control.tier:
        figures = tier_figures(control)
        if figures is not None and figures.usable and not figures.waiting_blocks:
            return
        assert time.monotonic() < until_s, "writes do not end"
        time.sleep(0.01)


def patient(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the connector with more time for the owner, if there is one."""
    owner = options.get("owner", {})
    named = owner if isinstance(owner, dict) else {"socket": owner}
    return {**options, "owner": {"deadline_s": PATIENCE_S, **named}}


@contextlib.contextmanager
def running(
    model: str,
    *,
    connector: bool = True,
    stores: bool = True,
    options: dict[str, Any] | None = None,
    transfer: dict[str, Any] | None = None,
    beside: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
    **extra: Any,
) -> Iterator[Engine]:
    """An engine; shut down at the end, its pool checked to hold what its index says and nothing else.

    `transfer` are settings beside the connector's own, `beside` makes of ours the list of a `MultiConnector`'s.
    """
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": NUM_BLOCKS,
        "seed": 0,
        **extra,
    }
    if connector:
        pool = {"bytes": "256MiB", "pin_piece_bytes": 16 << 20, **(options or {}).get("pool", {})}
        mine: dict[str, Any] = {
            "kv_connector": "KVortexConnector",
            "kv_connector_module_path": "kvortex.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": patient({**(options or {}), "pool": pool}),
        }
        if beside is not None:
            several = {"connectors": beside(mine)}
            mine = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": several}
        arguments["kv_transfer_config"] = vllm.config.KVTransferConfig(**{**mine, **(transfer or {})})
    freeze_imports()
    llm = vllm.LLM(**arguments)
    engine = Engine(llm)
    try:
        yield engine
        if connector and stores:
            engine.settle()
            control = engine.control
            assert not engine.scheduler_half._jobs
            if isinstance(control, RemoteControl):
                assert not control._in_flight
            else:
                assert control.index.num_pending == 0
                assert control.allocator.allocated_bytes == control.index.committed_bytes
    finally:
        engine.core.shutdown()
        del engine.llm  # a caller's name for it may live on, and what it takes along would be the next engine's
        del llm, engine
        gc.collect()


def count_stats(engine: Engine) -> Callable[[], Counter[str]]:
    """The connector's counters since now, whoever takes them."""
    half, total = engine.scheduler_half, Counter[str]()
    take = half.take_stats

    def counting() -> ConnectorStats | None:
        taken = take()
        total.update(taken.data if taken is not None else {})
        return taken

    half.take_stats = counting  # type: ignore[method-assign]
    return lambda: total + Counter(half._stats.data)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def keys_of(engine: Engine, tokens: Sequence[int]) -> list[bytes]:
    """The block hashes that vLLM gives a prompt, seen on its way through the connector."""
    seen: list[bytes] = []
    half = engine.scheduler_half
    original = half.get_num_new_matched_tokens

    def spy(request: object, num_computed: int) -> object:
        seen[:] = [bytes(h) for h in request.block_hashes]
        return original(request, num_computed)

    half.get_num_new_matched_tokens = spy
    try:
        engine.generate([tokens], max_tokens=1)
    finally:
        del half.get_num_new_matched_tokens
    engine.settle()
    return seen


def flip_a_bit(engine: Engine, key: bytes) -> None:
    """Damage one cached block in the pool."""
    from kvortex.index import pack_keys

    pins = engine.control.index.pin(pack_keys([key]))
    offset = int(pins.offsets[0])
    engine.control.allocator.free_many(engine.control.index.unpin(pins.slots))
    data = engine.worker_half._data
    assert data is not None
    data.pool.bytes[offset + 1234] ^= 16


def drop_torch_threads() -> None:
    torch.set_num_threads(1)
