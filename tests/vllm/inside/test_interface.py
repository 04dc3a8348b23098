"""The installed vLLM's connector interface against what KVortex overrides: drift has a name before it has a victim."""

import inspect

import pytest
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvortex.vllm import KVortexConnector

# Overrides that only some versions have; each must exist in at least one supported version.
ONLY_NEWER = {
    "bind_gpu_block_pool",
    "bind_kv_cache_manager",
    "build_connector_worker_meta",
    "get_external_cache_hit_sources",
    "get_transfer_results",
    "handle_preemptions",
    "has_pending_block_frees",
    "has_pending_push_work",
    "register_finished_partial_tail",
    "request_finished_all_groups",  # of `SupportsHMA`
    "requires_kv_delivery",
    "restore_kv_caches",
    "set_xfer_handshake_metadata_pp_aware",
    "unregister_kv_caches",
}
# Base methods that KVortex leaves alone on purpose.
LEFT_ALONE = {
    "clear_connector_metadata",
    "finish_forward",
    "get_finished_count",  # None: every worker reports
    "get_loaded_kv_cache_group_ids",
    "get_mem_pool_context",
    "get_required_kvcache_layout",  # any layout is served
    "has_connector_metadata",
    "on_new_request",
    "prefer_cross_layer_blocks",
    "register_cross_layers_kv_cache",
    "requires_piecewise_for_cudagraph",
    "reset_capture_state",
    "role",
    "set_host_xfer_buffer_ops",  # KVortex copies by itself
    "supports_divergent_local_hybrid_hits",  # with it a hit is lost unless it reaches behind what the device has
    "supports_sleep_mode",  # True is the default
}


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_nothing_abstract_is_left() -> None:
    assert not KVortexConnector.__abstractmethods__, (
        f"vLLM {vllm.__version__} wants {KVortexConnector.__abstractmethods__}"
    )


def test_every_override_overrides_something() -> None:
    stray = public(KVortexConnector) - public(KVConnectorBase_V1) - ONLY_NEWER
    assert not stray, f"vLLM {vllm.__version__} has no {sorted(stray)} any more"


def test_every_new_method_was_looked_at() -> None:
    unknown = public(KVConnectorBase_V1) - public(KVortexConnector) - LEFT_ALONE
    assert not unknown, f"vLLM {vllm.__version__} has new methods: {sorted(unknown)}"


# Called by position; older versions pass the names of preempted requests, which KVortex learns otherwise.
PASSED_ANYTHING = {"handle_preemptions"}


@pytest.mark.parametrize("name", sorted(public(KVortexConnector) & public(KVConnectorBase_V1) - PASSED_ANYTHING))
def test_an_override_takes_what_the_base_takes(name: str) -> None:
    base, ours = getattr(KVConnectorBase_V1, name), getattr(KVortexConnector, name)
    if isinstance(base, property):
        assert isinstance(ours, property)
        return
    wanted = [p.name for p in inspect.signature(base).parameters.values()]
    offered = [p.name for p in inspect.signature(ours).parameters.values()]
    assert offered[: len(wanted)] == wanted
