"""The installed vLLM's real Scheduler, with a connector's scheduler half and no worker.

A test plays the worker: it schedules a step, looks at the plan that the connector attached, and answers with
sampled tokens and a `WorkerReport` of whatever transfers it wants to have ended. So each order of events that
a real worker can produce, be it once in a month, is one line of a test:

    harness = SchedulerHarness(model_dir, extra_config={...})
    request = harness.add_request("a", prompt)
    harness.step()                                            # asks for the load
    harness.step(WorkerReport(finished_recving={"a"}))        # the load has ended
    step = harness.schedule()                                 # or in two halves, with an abort between them
    harness.abort("a")
    harness.finish(step)

Requests carry real block hashes, made the way the engine makes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

T = TypeVar("T")

# The token that the played worker samples unless told otherwise.
SAMPLED_TOKEN = 7
# Those of the tiny models.
NUM_KV_HEADS = 2
HEAD_SIZE = 64
LAYER_NAMES = tuple(f"model.layers.{index}.self_attn.attn" for index in range(4))


@dataclass(frozen=True)
class Layers:
    """A group of layers that share a block table.

    Args:
        kind: full attention, latent (MLA), sliding window, chunked local attention or state (Mamba, mode 'align').
        block_size: tokens of a block.
        reach: tokens of a window, the query included, or of a chunk.
        is_draft: draft layers are among them (EAGLE, MTP).
        num_heads: so that the specs of groups that are otherwise alike may differ.
    """

    kind: Literal["full", "latent", "window", "chunk", "state"]
    block_size: int = 32
    reach: int = 0
    is_draft: bool = False
    num_heads: int = 2

    @property
    def spec(self) -> KVCacheSpec:
        if self.kind == "state":
            shapes, dtypes = ((self.num_heads, HEAD_SIZE),), (torch.float32,)
            return MambaSpec(block_size=self.block_size, shapes=shapes, dtypes=dtypes, mamba_cache_mode="align")
        heads = 1 if self.kind == "latent" else self.num_heads
        attention: dict[str, Any] = {
            "block_size": self.block_size,
            "num_kv_heads": heads,
            "head_size": HEAD_SIZE,
            "dtype": torch.float32,
        }
        if self.kind == "window":
            return SlidingWindowSpec(**attention, sliding_window=self.reach)
        if self.kind == "chunk":
            return ChunkedLocalAttentionSpec(**attention, attention_chunk_size=self.reach)
        return (MLAAttentionSpec if self.kind == "latent" else FullAttentionSpec)(**attention)


@dataclass(frozen=True)
class WorkerReport:
    """What the workers have to say at the end of a step, already aggregated over them.

    `worker_meta` and `failed_recving` exist in newer versions only; giving them to an older one raises.
    `kv_cache_events` and `kv_connector_stats` are the connector's own objects.
    """

    finished_sending: frozenset[str] | set[str] = frozenset()
    finished_recving: frozenset[str] | set[str] = frozenset()
    failed_recving: frozenset[str] | set[str] = frozenset()
    invalid_block_ids: frozenset[int] | set[int] = frozenset()
    worker_meta: Any = None
    kv_connector_stats: Any = None
    kv_cache_events: Any = None

    def to_vllm(self) -> KVConnectorOutput:
        """vLLM's own object, with what this version has no field for refused instead of dropped."""
        values: dict[str, Any] = {
            "finished_sending": set(self.finished_sending),
            "finished_recving": set(self.finished_recving),
            "failed_recving": set(self.failed_recving),
            "invalid_block_ids": set(self.invalid_block_ids),
            "kv_connector_worker_meta": self.worker_meta,
            "kv_connector_stats": self.kv_connector_stats,
            "kv_cache_events": self.kv_cache_events,
        }
        known = inspect.signature(KVConnectorOutput).parameters
        for name in [name for name in values if name not in known]:
            if values.pop(name):
                raise ValueError(f"this version of vLLM has no KVConnectorOutput.{name}")
        return KVConnectorOutput(**values)


@dataclass
class Step:
    """One scheduled step."""

    output: SchedulerOutput
    # Requests whose last known token is computed in this step: those that the worker samples for.
    sampling_ids: frozenset[str] = field(default_factory=frozenset)

    @property
    def metadata(self) -> Any:
        """The plan that the connector attached for its worker half."""
        return self.output.kv_connector_metadata

    @property
    def num_scheduled_tokens(self) -> Mapping[str, int]:
        return self.output.num_scheduled_tokens


class Speculation:
    """As much of a speculative configuration as the scheduler and a connector ask for."""

    disable_lookahead_block_hashes = True
    """As vLLM has it beside a connector: there it hashes blocks without the tokens behind them."""

    def __init__(self, method: str, num_speculative_tokens: int) -> None:
        self.method = method
        self.num_speculative_tokens = num_speculative_tokens

    def use_eagle(self) -> bool:
        return self.method in ("eagle", "eagle3", "mtp")

    def needs_eagle_block_drop(self) -> bool:
        return self.use_eagle()

    def use_eagle_block_drop(self) -> bool:
        return self.use_eagle()

    def uses_draft_model(self) -> bool:
        return self.method == "draft_model"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (lambda *_: False) if name.startswith(("use", "is_")) else 0


class SchedulerHarness:
    """A Scheduler over `num_blocks` blocks, of one group of full attention unless other `groups` are named.

    One of the blocks is vLLM's null block: `num_blocks` - 1 can be allocated. With `groups`, `block_size` is ignored;
    `hash_block_size` is what an engine would choose unless it is given. `retention` is vLLM's interval, in tokens, of
    the blocks of windows and states that its own cache keeps: "all" of them, or what the version has as its default.
    Without a `connector` there is only vLLM.

    `model_dir` is a tiny model's folder: only its config is read. `failure_policy` is vLLM's
    ``kv_load_failure_policy``. With `async_scheduling`, vLLM's default on a GPU, the engine schedules the
    next step before it has the last one's tokens: call `schedule` twice before the first `finish`. Close the
    harness with `shutdown`.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        extra_config: Mapping[str, Any] | None = None,
        connector: str | None = "KVortexConnector",
        module_path: str = "kvortex.vllm",
        block_size: int = 32,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = False,
        async_scheduling: bool = False,
        failure_policy: Literal["recompute", "fail"] = "recompute",
        hash_algorithm: str = "sha256",
        kv_events: bool = False,
        kv_role: str = "kv_both",
        speculative: tuple[str, int] | None = None,
        groups: Sequence[Layers] | None = None,
        hash_block_size: int | None = None,
        retention: int | Literal["all"] | None = None,
        max_model_len: int = 512,
    ) -> None:
        transfer = KVTransferConfig(
            kv_connector=connector,
            kv_connector_module_path=module_path,
            kv_role=kv_role,
            kv_load_failure_policy=failure_policy,
            kv_connector_extra_config=dict(extra_config or {}),
        )
        self.vllm_config = _vllm_config(
            model_dir,
            transfer if connector is not None else None,
            block_size=min(group.block_size for group in groups) if groups else block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            async_scheduling=async_scheduling,
            hash_algorithm=hash_algorithm,
            max_model_len=max_model_len,
        )
        if kv_events:
            self.vllm_config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        if speculative is not None:
            self.vllm_config.speculative_config = Speculation(*speculative)  # type: ignore[assignment]
        if groups:
            cache_config = self.vllm_config.cache_config
            if any(group.kind == "state" for group in groups):
                cache_config.mamba_cache_mode = "align"
            name = "prefix_match_unit" if hasattr(cache_config, "prefix_match_unit") else "hash_block_size"
            setattr(cache_config, name, hash_block_size)
            interval = getattr(cache_config, "prefix_cache_retention_interval", None)
            interval = interval if retention is None else None if retention == "all" else retention
            self.kv_cache_config = config_of_groups(groups, num_blocks, interval)
            sizes = kv_cache_utils.resolve_kv_cache_block_sizes(self.kv_cache_config, self.vllm_config)
            self.block_size, self.hash_block_size = sizes
        else:
            self.kv_cache_config = kv_cache_config(block_size, num_blocks)
            self.block_size = self.hash_block_size = block_size
        values: dict[str, Any] = {
            "vllm_config": self.vllm_config,
            "kv_cache_config": self.kv_cache_config,
            "structured_output_manager": StructuredOutputManager(self.vllm_config),
            "block_size": self.block_size,
            "log_stats": True,
        }
        if groups:
            values["hash_block_size"] = self.hash_block_size
        self.scheduler: Scheduler = (AsyncScheduler if async_scheduling else Scheduler)(**values)
        hash_function = get_hash_fn_by_name(hash_algorithm)
        init_none_hash(hash_function)
        self._block_hasher = get_request_block_hasher(self.hash_block_size, hash_function)
        # Requests by id, finished ones too: the scheduler forgets those.
        self.requests: dict[str, Request] = {}

    @property
    def connector(self) -> Any:
        """The connector's scheduler half."""
        return self.scheduler.get_kv_connector()

    @property
    def num_free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def held_request_ids(self) -> set[str]:
        """Requests that the scheduler still knows: finished ones whose blocks are not freed are among them."""
        return set(self.scheduler.requests)

    def block_ids(self, request_id: str) -> list[int]:
        (block_ids,) = self.block_tables(request_id)
        return block_ids

    def block_tables(self, request_id: str) -> list[list[int]]:
        """A request's device blocks in each group; that of the null block stands for those that it does not have."""
        return [list(block_ids) for block_ids in self.scheduler.kv_cache_manager.get_block_ids(request_id)]

    @property
    def null_block_id(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.null_block.block_id)

    def add_request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        max_tokens: int = 16,
        cache_salt: str | None = None,
        resumable: bool = False,
    ) -> Request:
        request = _call_with_known(
            Request,
            request_id=request_id,
            prompt_token_ids=list(token_ids),
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False),
            pooling_params=None,
            eos_token_id=2,
            cache_salt=cache_salt,
            block_hasher=self._block_hasher,
            resumable=resumable,
        )
        self.requests.setdefault(request_id, request)
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> Step:
        """The first half of a step: everything up to the worker's start."""
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        sampling = (
            request_id
            for request_id in output.num_scheduled_tokens
            if requests[request_id].num_computed_tokens >= requests[request_id].num_tokens
        )
        return Step(output, frozenset(sampling))

    def finish(self, step: Step, report: WorkerReport | None = None, *, tokens: Mapping[str, int] | None = None) -> Any:
        """The second half: the worker's answer; a sampling request gets `tokens[id]` or `SAMPLED_TOKEN`.

        Returns vLLM's outputs by client. Without a `report` the answer carries no connector output at all, as
        after an empty step in which a worker had nothing to say.
        """
        ids = list(step.num_scheduled_tokens)
        chosen = tokens or {}
        model_output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[
                [chosen.get(request_id, SAMPLED_TOKEN)] if request_id in step.sampling_ids else [] for request_id in ids
            ],
            kv_connector_output=report.to_vllm() if report is not None else None,
        )
        return self.scheduler.update_from_output(step.output, model_output)

    def step(self, report: WorkerReport | None = None, *, tokens: Mapping[str, int] | None = None) -> Step:
        """One whole step; see `schedule` and `finish`."""
        step = self.schedule()
        self.finish(step, report, tokens=tokens)
        return step

    def run_until_finished(self, request_id: str, *, max_steps: int = 100) -> int:
        """Step, reporting nothing, until the request has finished; returns the number of steps taken."""
        for taken in range(max_steps):
            if self.requests[request_id].is_finished():
                return taken
            self.step(WorkerReport())
        raise TimeoutError(f"request {request_id} is {self.requests[request_id].status.name} after {max_steps} steps")

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """What the engine does when a client has gone."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def preempt_all(self) -> None:
        """Take the blocks of all running requests away, as a reset of the prefix cache does.

        Preemption for want of blocks needs no help: give the harness few blocks and several long requests.
        """
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def shutdown(self) -> None:
        self.scheduler.shutdown()


def kv_cache_config(block_size: int, num_blocks: int) -> KVCacheConfig:
    """One group of the tiny models' layers, in the layout that this version's CPU worker gives them."""
    spec = _call_with_known(
        FullAttentionSpec,
        block_size=block_size,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
    )
    layer_bytes = spec.page_size_bytes * num_blocks
    one_per_layer = "shared_by" in inspect.signature(KVCacheTensor).parameters
    tensors = [
        # Newer versions place all layers in one allocation, older ones each in its own.
        _call_with_known(
            KVCacheTensor,
            size=layer_bytes if one_per_layer else layer_bytes * len(LAYER_NAMES),
            shared_by=list(names),
            layers=list(names),
            layer_stride=layer_bytes,
            block_stride=spec.page_size_bytes,
        )
        for names in ([(name,) for name in LAYER_NAMES] if one_per_layer else [LAYER_NAMES])
    ]
    return _call_with_known(
        KVCacheConfig,
        num_blocks=num_blocks,
        kv_cache_tensors=tensors,
        kv_cache_groups=[KVCacheGroupSpec(list(LAYER_NAMES), spec)],
        hash_block_size=block_size,
    )


def config_of_groups(groups: Sequence[Layers], num_blocks: int, retention: int | None = None) -> KVCacheConfig:
    """Groups of two layers each, in two tensors, each of which serves a layer of every group."""
    page_bytes = max(group.spec.page_size_bytes for group in groups)
    tensors = [
        _call_with_known(
            KVCacheTensor,
            size=page_bytes * num_blocks,
            shared_by=names,
            layers=names,
            layer_stride=page_bytes * num_blocks,
            block_stride=page_bytes,
        )
        for names in [[f"model.layers.{2 * n + layer}" for n in range(len(groups))] for layer in range(2)]
    ]
    specs = [
        _call_with_known(
            KVCacheGroupSpec,
            layer_names=[f"model.layers.{2 * number + layer}" for layer in range(2)],
            kv_cache_spec=group.spec,
            is_eagle_group=group.is_draft,
        )
        for number, group in enumerate(groups)
    ]
    return _call_with_known(
        KVCacheConfig,
        num_blocks=num_blocks,
        kv_cache_tensors=tensors,
        kv_cache_groups=specs,
        prefix_cache_retention_interval=retention,
    )


def _vllm_config(
    model_dir: Path,
    kv_transfer_config: KVTransferConfig | None,
    *,
    block_size: int,
    num_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    enable_prefix_caching: bool,
    async_scheduling: bool,
    hash_algorithm: str,
    max_model_len: int,
) -> VllmConfig:
    cache_config = _call_with_known(
        CacheConfig,
        block_size=block_size,
        cache_dtype="auto",
        enable_prefix_caching=enable_prefix_caching,
        prefix_caching_hash_algo=hash_algorithm,
    )
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(model_dir), skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len
        ),
        scheduler_config=_call_with_known(
            SchedulerConfig,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            watermark=0.0,
        ),
        cache_config=cache_config,
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=kv_transfer_config,
    )
    # vLLM turns it off for its CPU backend; the scheduler alone does not care for the device.
    config.scheduler_config.async_scheduling = async_scheduling
    cache_config.num_gpu_blocks = num_blocks
    return config


def _call_with_known(target: Callable[..., T], /, **arguments: Any) -> T:
    """Call `target` with those of `arguments` that this version of it has a parameter for."""
    known = inspect.signature(target).parameters
    return target(**{name: value for name, value in arguments.items() if name in known})
