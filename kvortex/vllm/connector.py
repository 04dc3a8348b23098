"""The class that vLLM loads: a facade over one of the two halves, which one depends on the role."""

import contextlib
import importlib
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvortex.errors import EngineStateError
from kvortex.vllm.logs import follow_vllm_logging
from kvortex.vllm.metrics import ConnectorPromMetrics, ConnectorStats
from kvortex.vllm.model import why_not_reused
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.passive import PassiveScheduler, PassiveWorker
from kvortex.vllm.plans import ConnectorPlan, WorkerHandshake
from kvortex.vllm.versions import (
    IS_NEWER,
    REPORTS_FAILED_LOADS,
    SERVES_GROUPS,
    WorkerReports,
    connector_around,
    hit_sources,
    hold_local_hits,
    pass_reports_through,
    recompute_failed_loads,
    scheduler_binding,
    transfer_results,
    watch_allocations,
    watch_sleep,
)
from kvortex.vllm.worker.weights import WeightsWatch, watch_resets

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvortex.vllm.scheduler.half import SchedulerHalf
    from kvortex.vllm.worker.half import WorkerHalf

logger = logging.getLogger(__name__)


class KVortexConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """KVortex as vLLM's KV connector; see `ConnectorOptions` for what `kv_connector_extra_config` takes.

    Loads are asynchronous: a request waits outside of the batch until its blocks are in place. So no forward has to
    wait layer by layer, and CUDA graphs work unchanged. Saves start after the forward, with all layers in one gather.
    Therefore `wait_for_layer_load` and `save_kv_layer` do nothing.
    """

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig | None" = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        follow_vllm_logging()
        if kv_cache_config is None:
            raise EngineStateError("this vLLM gives a connector no kv_cache_config; KVortex needs 0.15 or newer")
        transfer = vllm_config.kv_transfer_config
        options = ConnectorOptions.from_extra_config(transfer.kv_connector_extra_config if transfer else {})
        # The halves import numba. vLLM's CPU worker must not find it loaded before it has started.
        self._scheduler_half: SchedulerHalf | PassiveScheduler | None = None
        self._worker_half: WorkerHalf | PassiveWorker | None = None
        self._weights: WeightsWatch | None = None
        self._end_watches = contextlib.ExitStack()
        around = connector_around()
        if around is not None:
            pass_reports_through(around)
        if (why := why_not_reused(vllm_config, kv_cache_config)) != "":
            if role == KVConnectorRole.SCHEDULER:
                logger.warning("KVortex stores nothing: %s", why)
                self._scheduler_half = PassiveScheduler()
            else:
                self._worker_half = PassiveWorker()
        elif role == KVConnectorRole.SCHEDULER:
            recompute_failed_loads(vllm_config, around)
            scheduler = importlib.import_module("kvortex.vllm.scheduler.half")
            half = scheduler.SchedulerHalf(vllm_config, kv_cache_config, options, is_alone=around is None)
            self._scheduler_half = half
            if around is not None:
                watch_allocations(around, half.allocated_for_others)
            self._end_watches.callback(watch_resets(half.vllm_resets, half.vllm_was_reset))
        else:
            worker = importlib.import_module("kvortex.vllm.worker.half")
            ranks = importlib.import_module("kvortex.vllm.worker.ranks")
            peers = ranks.peers_of(vllm_config, kv_cache_config)
            handshake_in_step = around is not None
            self._worker_half = worker.WorkerHalf(
                vllm_config, kv_cache_config, options, peers, handshake_in_step=handshake_in_step
            )

    @property
    def _scheduler(self) -> "SchedulerHalf | PassiveScheduler":
        if self._scheduler_half is None:
            raise EngineStateError("this is the worker half")
        return self._scheduler_half

    @property
    def _worker(self) -> "WorkerHalf | PassiveWorker":
        if self._worker_half is None:
            raise EngineStateError("this is the scheduler half")
        return self._worker_half

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a cache may lose blocks, so nothing has to wait for its saves."""
        return False

    # -- worker ------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        worker = self._worker
        worker.register_kv_caches(kv_caches)
        self._end_watches.close()
        if isinstance(worker, PassiveWorker):
            return
        self._end_watches.callback(watch_sleep(self._vllm_config.model_config, worker.fall_asleep, worker.wake))
        self._weights = WeightsWatch(self._vllm_config, worker.forget)
        self._end_watches.callback(self._weights.end)

    def unregister_kv_caches(self) -> None:
        """The memory of the paged cache is about to go. The weights may be others afterwards."""
        self._worker.fall_asleep(keeps_weights=False)

    def restore_kv_caches(self) -> None:
        self._worker.wake()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.handshake()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """The first call of a step, before vLLM changes blocks. Older versions pass something else, or do not call."""
        if isinstance(kv_connector_metadata, ConnectorPlan):
            self._worker.wait_for_reads(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if not isinstance(connector_metadata, ConnectorPlan):
            raise EngineStateError(f"a plan of another connector: {type(connector_metadata).__name__}")
        if connector_metadata.compare_weights and self._weights is not None:
            self._weights.look()
        self._worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request is scheduled when all its layers are in place."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: `wait_for_save` saves all layers at once."""

    def wait_for_save(self) -> None:
        self._worker.start_saves()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.take_finished() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        finished = self._worker.take_finished()
        return transfer_results(finished, self._worker.take_failed_requests())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_block_ids()

    def build_connector_worker_meta(self) -> WorkerReports | None:
        return self._worker.take_reports()

    def get_kv_connector_kv_cache_events(self) -> WorkerReports | None:
        return None if IS_NEWER else self._worker.take_reports()

    # -- scheduler ---------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(kv_cache_manager)

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        """0.23 calls this alone, and names neither its cache manager nor its scheduler."""
        if REPORTS_FAILED_LOADS or not SERVES_GROUPS:
            return
        if (scheduler := scheduler_binding()) is not None:
            hold_local_hits(scheduler.kv_cache_manager.coordinator)
            self._scheduler.bind(scheduler.kv_cache_manager, scheduler)

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, KVConnectorHandshakeMetadata]) -> None:
        self._accept_handshakes(metadata.values())

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._accept_handshakes(metadata.values())

    def _accept_handshakes(self, handshakes: Iterable[KVConnectorHandshakeMetadata]) -> None:
        # Inside a MultiConnector the handshakes of other connectors may come here, too.
        self._scheduler.accept_handshake([h for h in handshakes if isinstance(h, WorkerHandshake)])

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[Any, int]:
        disk_tokens = min(self._scheduler.disk_tokens(request), num_external_tokens)
        return hit_sources(num_external_tokens - disk_tokens, disk_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> ConnectorPlan:
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.update_connector_output(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        promise = self._scheduler.promise(request)
        return self._scheduler.request_finished(request), promise

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        promise = self._scheduler.promise(request)
        return self._scheduler.request_finished(request), promise

    def register_finished_partial_tail(
        self,
        request: "Request",
        block_ids: tuple[list[int], ...],
        partial_tail_offloads: list[tuple[int, int, int]],
    ) -> bool:
        """False: the tail's blocks are held by themselves, so the others need not stay."""
        self._scheduler.add_finished_tail(request, block_ids, partial_tail_offloads)
        return False

    def take_events(self) -> Iterable["KVCacheEvent"]:
        return self._scheduler.take_events()

    def has_pending_push_work(self) -> bool:
        """True until the last jobs have been reported: an idle engine goes on stepping for them."""
        return self._scheduler.has_work()

    def has_pending_block_frees(self) -> bool:
        """True while saves hold device blocks of their own: these become free soon, so nothing has to be preempted."""
        return self._scheduler.holds_device_blocks()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset_cache()

    # -- both --------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        if self._scheduler_half is not None:
            return self._scheduler_half.take_stats()
        return ConnectorStats()  # 0.15 and 0.23 ask for the scheduler half's only beside a worker's

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        return ConnectorStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> ConnectorPromMetrics:
        return ConnectorPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        self._end_watches.close()
        if self._worker_half is not None:
            self._worker_half.shutdown()
        if self._scheduler_half is not None:
            self._scheduler_half.shutdown()
