"""All differences between the supported vLLM versions. They are detected by features, not by version numbers.

Verified against 0.15.1, 0.23.0, 0.32.0 and, in its main parts, 0.33.0. In this file "older" is 0.15,
"newer" is 0.23 and later.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Final, TypeAlias

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1 import kv_cache_interface
from vllm.v1.core import kv_cache_utils

from kvortex.errors import ConfigError
from kvortex.vllm.plans import JobOutcome, PoolShrunk, WeightsChanged, WorkerHandshake

logger = logging.getLogger(__name__)

IS_NEWER: Final = hasattr(base, "KVConnectorWorkerMetadata")

if IS_NEWER:
    _MessageBase: Any = base.KVConnectorWorkerMetadata
else:
    from vllm.distributed.kv_events import KVConnectorKVEvents

    _MessageBase = KVConnectorKVEvents


SERVES_GROUPS: Final = IS_NEWER
"""Older versions turn the hybrid manager off whenever there is a connector, or refuse the model."""


def kind_name(spec: Any) -> str | None:
    """vLLM's own name of a spec's kind in KV events; None where events do not tell it."""
    if not hasattr(kv_cache_interface, "get_kv_cache_spec_kind"):
        return None
    kind = kv_cache_interface.get_kv_cache_spec_kind(spec)
    return str(getattr(kind, "value", kind))


REPORTS_FAILED_LOADS: Final = hasattr(base, "KVConnectorTransferResults")
"""Later ones take failed loads request by request. 0.23 has device block ids only, and not for several groups."""

OTHER_WINDOW_SPECS: Final[tuple[type, ...]] = tuple(
    spec for spec in [getattr(kv_cache_interface, "SlidingWindowMLASpec", None)] if spec is not None
)
"""Kinds of sliding windows that older versions do not have."""

Report: TypeAlias = JobOutcome | WorkerHandshake | WeightsChanged | PoolShrunk


class WorkerReports(_MessageBase):  # type: ignore[misc]
    """A message from the workers to the scheduler half after a step.

    Newer versions have worker metadata for it. Older ones have the channel of KV events only, which nothing else reads
    from a connector's output; there the executor adds the reports of the other workers to those of the first.
    """

    def __init__(self, reports: Iterable[Report] = ()) -> None:
        self.reports = list(reports)

    def aggregate(self, other: "WorkerReports | None" = None) -> "WorkerReports":
        """One message with the reports of both."""
        return WorkerReports([*self.reports, *(other.reports if other is not None else ())])

    def add_events(self, events: list[Report]) -> None:
        """Older: add the reports of another worker."""
        self.reports.extend(events)

    def get_all_events(self) -> list[Report]:
        """Older: the reports, for another worker's message."""
        return self.reports

    def increment_workers(self, count: int = 1) -> None:
        """Older: required by the base class; workers are not counted here."""

    def get_number_of_workers(self) -> int:
        """Older: required by the base class."""
        return 1

    def clear_events(self) -> None:
        """Older: required by the base class."""
        self.reports.clear()


def reports_in(connector_output: Any) -> list[Report]:
    """The reports of the workers in a step's output."""
    name = "kv_connector_worker_meta" if IS_NEWER else "kv_cache_events"
    message = getattr(connector_output, name, None)
    return message.reports if isinstance(message, WorkerReports) else []


HOLD_ABORTED_LOADS: Final = not IS_NEWER
"""The answer of `request_finished` while a load still writes into the request's device blocks.

Newer versions hold the blocks until the load is reported as received, whatever the answer is. Older ones free them at
once if it is False, and hold them until the request is reported as *sent* if it is True.
"""


def num_lookahead_tokens(vllm_config: Any) -> int:
    """Slots that every step needs beyond a request's tokens, for draft tokens.

    Newer versions have the number in their configuration. In older ones it depends on the method: at most the number of
    drafts.
    """
    drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
    return max(int(getattr(vllm_config, "num_lookahead_tokens", 0) or 0), int(drafts))


def drop_stale_hashes(request: Any, block_size: int) -> None:
    """Compute the block hashes of a streaming session again, from the block at which more input was added.

    When input is added, vLLM drops the token that was sampled last. Some versions keep the hash of the block that ended
    with this token, and the hashes of all blocks behind it are wrong then.
    """
    if not getattr(request, "resumable", False) or not request.num_computed_tokens:
        return
    del request.block_hashes[request.num_computed_tokens // block_size :]
    if hasattr(request, "update_block_hashes"):
        request.update_block_hashes()
    elif request.get_hash_new_full_blocks is not None:
        request.block_hashes.extend(request.get_hash_new_full_blocks())


def report_aborted_loads(connector_output: Any, aborted: set[str]) -> None:
    """Rewrite a step's output so that vLLM frees the blocks of requests that were aborted while they loaded.

    Args:
        connector_output: the step's output; it is changed.
        aborted: ids of such requests; those whose loads have ended are removed from it.
    """
    received = connector_output.finished_recving
    ended = aborted.intersection(received or ())
    aborted -= ended
    if HOLD_ABORTED_LOADS and ended:
        connector_output.finished_recving = set(received) - ended
        connector_output.finished_sending = set(connector_output.finished_sending or ()) | ended


def transfer_results(finished: set[str], failed: set[str]) -> Any:
    """The answer of `get_transfer_results`: requests whose loads have ended, and those among them that have failed."""
    return base.KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)


def hit_sources(host_tokens: int, disk_tokens: int) -> dict[Any, int]:
    """The answer of `get_external_cache_hit_sources`: tokens by where they came from, without zeros."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    counts = {CacheHitSource.HOST: host_tokens, CacheHitSource.DISK: disk_tokens}
    return {source: count for source, count in counts.items() if count}


def connector_around() -> Any:
    """The `MultiConnector` that is creating our connector as one of several, or None if ours stands alone.

    It gives each of its connectors a configuration of its own, and no reference to itself.
    """
    return _caller(lambda owner: type(owner).__name__ == "MultiConnector")


def scheduler_binding() -> Any:
    """The scheduler that is just telling its connector about its block pool; 0.23 gives no reference to itself."""
    return _caller(lambda owner: hasattr(owner, "failed_recving_kv_req_ids") and hasattr(owner, "kv_cache_manager"))


def _caller(is_wanted: Callable[[Any], bool]) -> Any:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and is_wanted(owner):
            return owner
        frame = frame.f_back
    return None


def fail_load(scheduler: Any, request: Any) -> None:
    """0.23: have the scheduler compute a request whose load has failed, as later versions do themselves."""
    request.num_computed_tokens = 0
    scheduler.failed_recving_kv_req_ids.add(request.request_id)


def hold_local_hits(coordinator: Any) -> None:
    """0.23: have vLLM hold the blocks that it has found in its own cache while it allocates those that are loaded.

    There each group in turn takes the blocks that were found for it, and then new ones. So a group may be given blocks
    that were found for a group behind it, and a request would run on KV of another group.
    """
    managers, pool = coordinator.single_type_managers, coordinator.block_pool
    if hasattr(managers[0], "add_local_computed_blocks"):
        return
    original = coordinator.allocate_new_computed_blocks

    def allocate_new_computed_blocks(
        request_id: str, new_computed_blocks: Any, num_local_computed_tokens: int, num_external_computed_tokens: int
    ) -> None:
        used = []
        for manager, found in zip(managers, new_computed_blocks, strict=True):
            skipped = manager.get_num_skipped_tokens(num_local_computed_tokens + num_external_computed_tokens)
            used += found[max(skipped, 0) // manager.block_size :]
        pool.touch(used)
        try:
            original(request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens)
        finally:
            pool.free_blocks(used)

    vars(coordinator)["allocate_new_computed_blocks"] = allocate_new_computed_blocks


def hashes_of_blocks(block_hashes: Sequence[bytes], hash_block_size: int, block_size: int) -> Sequence[bytes]:
    """vLLM's hashes of a group's blocks, from those of a request, which may be finer; evaluated when they are read."""
    if block_size == hash_block_size:
        return block_hashes
    hashes: Sequence[bytes] = kv_cache_utils.BlockHashListWithBlockSize(block_hashes, hash_block_size, block_size)
    return hashes


def coordinator_over(coordinator: Any, pool: Any) -> Any:
    """A copy of vLLM's cache coordinator that looks blocks up in another pool, with its settings and its rules."""
    over = copy.copy(coordinator)
    over.block_pool = pool
    managers = [copy.copy(manager) for manager in coordinator.single_type_managers]
    for manager in managers:
        manager.block_pool = pool
    over.single_type_managers = tuple(managers)
    return over


def recompute_failed_loads(vllm_config: Any, around: Any) -> None:
    """Have vLLM compute blocks that could not be loaded, whatever `kv_load_failure_policy` says.

    So a failed load costs time, but no request fails. vLLM reads the policy after it has created its connector.

    Args:
        vllm_config: the configuration that our connector was given.
        around: the `MultiConnector` that contains ours, or None.
    """
    for config in (vllm_config, getattr(around, "_vllm_config", None)):
        transfer = config.kv_transfer_config if config is not None else None
        if transfer is not None and transfer.kv_load_failure_policy != "recompute":
            logger.info("kv_load_failure_policy is set to 'recompute': blocks that cannot be loaded are computed")
            transfer.kv_load_failure_policy = "recompute"


def pass_reports_through(multi_connector: Any) -> None:
    """Have an older `MultiConnector` pass on the reports of our worker half: it does not know this channel."""
    kind = type(multi_connector)
    if IS_NEWER or "get_kv_connector_kv_cache_events" in vars(kind):
        return

    def get_kv_connector_kv_cache_events(self: Any) -> Any:
        found = (child.get_kv_connector_kv_cache_events() for child in self._connectors)
        return next((events for events in found if events is not None), None)

    kind.get_kv_connector_kv_cache_events = get_kv_connector_kv_cache_events


def watch_allocations(multi_connector: Any, allocated: Callable[[Any, Any], None]) -> None:
    """Have `allocated` called with a request and its blocks whenever one connector of a `MultiConnector` loads them.

    Older versions and 0.23 show the blocks to that connector only.
    """
    original = multi_connector.update_state_after_alloc

    def update_state_after_alloc(request: Any, blocks: Any, num_external_tokens: int) -> None:
        original(request, blocks, num_external_tokens)
        if num_external_tokens:
            allocated(request, blocks)

    vars(multi_connector)["update_state_after_alloc"] = update_state_after_alloc


HAS_SLEEP_HOOKS: Final = hasattr(base.KVConnectorBase_V1, "unregister_kv_caches")
"""From 0.33 on, vLLM calls a connector before it takes the memory of the paged cache away, and when it is back."""


def watch_sleep(
    model_config: Any, before_sleep: Callable[[bool], None], after_wake: Callable[[], None]
) -> Callable[[], None]:
    """Follow vLLM's sleep mode in a worker.

    Versions without hooks do not call a connector. There the methods of the worker's memory allocator are wrapped: all
    of sleep mode goes through it.

    Args:
        model_config: vLLM's, which says whether sleep mode is used.
        before_sleep: called before the memory of the paged cache is unmapped, with True if the weights are kept.
        after_wake: called when the memory is back.

    Returns:
        A function that ends this.

    Raises:
        ConfigError: sleep mode uses another mechanism than that allocator.
    """
    used = any(getattr(model_config, name, False) for name in ("enable_sleep_mode", "enable_cumem_allocator"))
    if HAS_SLEEP_HOOKS or not used:
        return lambda: None
    backend = getattr(model_config, "sleep_mode_backend", "cumem")
    if backend != "cumem":
        raise ConfigError(f"KVortex cannot follow the sleep-mode backend {backend!r} in this vLLM, only 'cumem'")
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    sleep, wake_up = allocator.sleep, allocator.wake_up

    def watched_sleep(offload_tags: tuple[str, ...] | str | None = None) -> None:
        before_sleep(offload_tags is not None and "weights" in offload_tags)
        sleep(offload_tags)

    def watched_wake_up(tags: list[str] | None = None) -> None:
        wake_up(tags)
        if tags is None or "kv_cache" in tags:
            after_wake()

    watched = {"sleep": watched_sleep, "wake_up": watched_wake_up}
    if hasattr(allocator, "discard"):
        discard = allocator.discard

        def watched_discard(tags: Sequence[str] | str) -> None:
            if "kv_cache" in tags:
                before_sleep(True)
            discard(tags)

        watched["discard"] = watched_discard
    vars(allocator).update(watched)

    def end() -> None:
        for name in watched:
            vars(allocator).pop(name, None)

    return end


def heads_dim(layer: Any, spec: Any) -> int | None:
    """The dimension of a layer's cache tensor that counts KV heads; None if there is none.

    Later versions have tensors `[blocks, heads, tokens, content]`. Earlier ones have a shape for each backend, which is
    asked for the dimension that changes with the number of heads.

    Args:
        layer: the layer; None if vLLM does not name it.
        spec: of the layer's cache.
    """
    if hasattr(kv_cache_interface, "compute_layer_kv_cache_shape_bytes"):
        return 1
    if layer is None:
        return None
    shape_of = layer.get_attn_backend().get_kv_cache_shape
    try:
        one, two = (shape_of(2, int(spec.block_size), heads, int(spec.head_size)) for heads in (3, 5))
    except (NotImplementedError, TypeError, ValueError):  # a backend with rules of its own
        return None
    differing = [dim for dim, (few, many) in enumerate(zip(one, two, strict=True)) if few != many]
    return differing[0] if len(differing) == 1 and one[differing[0]] == 3 else None


def hash_root_is_random(hash_algorithm: str) -> bool:
    """True if vLLM's block hashes start from a root that differs in every process.

    Older versions and 0.23 draw a random root for every algorithm, later ones only for those that are not
    cryptographic. PYTHONHASHSEED fixes the root in all versions.
    """
    if "PYTHONHASHSEED" in os.environ:
        return False
    return not (hasattr(kv_cache_utils, "resolve_none_hash_seed") and hash_algorithm.startswith("sha256"))
