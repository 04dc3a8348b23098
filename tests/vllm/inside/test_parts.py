"""The connector's smaller parts against the installed vLLM's classes."""

import inspect
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1 import kv_cache_interface
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvortex.errors import ConfigError
from kvortex.types import Direction, MissReason, TransferPlan
from kvortex.vllm.metrics import ConnectorPromMetrics, ConnectorStats
from kvortex.vllm.model import (
    ServedGroups,
    block_dims,
    expected_sizes,
    is_latent,
    refuse_unserved,
    why_not_reused,
)
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, SaveJob
from kvortex.vllm.versions import IS_NEWER, WorkerReports, report_aborted_loads, reports_in

RSWASpec = getattr(kv_cache_interface, "RSWASpec", None)
HiddenStateCacheSpec = getattr(kv_cache_interface, "HiddenStateCacheSpec", None)


def spec(kind: type, **extra: Any) -> Any:
    arguments = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32, **extra}
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in arguments.items() if name in known})


def config(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec([f"layer{i}"], s) for i, s in enumerate(specs)])


def test_groups_keep_their_kinds_and_vllms_numbers() -> None:
    full, sliding = spec(FullAttentionSpec), spec(SlidingWindowSpec, sliding_window=64)
    chunked = spec(ChunkedLocalAttentionSpec, attention_chunk_size=128)
    state = spec(MambaSpec, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align")
    groups = ServedGroups(config(sliding, full, chunked, state))
    assert [(g.kind.value, g.reach, g.layers) for g in groups.set.groups] == [
        ("window", 64, ("layer0",)),
        ("full", 0, ("layer1",)),
        ("chunk", 128, ("layer2",)),
        ("state", 0, ("layer3",)),
    ]
    assert groups.ids == (0, 1, 2, 3)
    assert groups.set.anchor == 1
    assert not groups.is_one_of_full_attention
    assert ServedGroups(config(full)).is_one_of_full_attention
    assert not ServedGroups(config(sliding)).is_one_of_full_attention


@pytest.mark.skipif(IS_NEWER, reason="newer versions let connectors serve several groups")
def test_models_that_this_version_does_not_serve_are_refused() -> None:
    full, sliding = spec(FullAttentionSpec), spec(SlidingWindowSpec, sliding_window=64)
    for groups in ([sliding], [full, sliding], [full, full]):
        with pytest.raises(ConfigError, match="full attention"):
            refuse_unserved(settings(), config(*groups))


@pytest.mark.skipif(not IS_NEWER, reason="older versions let connectors serve one group of full attention")
def test_models_that_mix_kinds_are_served_with_prefix_caching_and_snapshots_of_states() -> None:
    full, sliding = spec(FullAttentionSpec), spec(SlidingWindowSpec, sliding_window=64)
    mixed = config(full, sliding)
    assert why_not_reused(settings(prefix_caching=True), mixed) == ""
    assert "prefix caching" in why_not_reused(settings(), mixed)
    refuse_unserved(settings(), mixed)
    for mode, why in (("align", ""), ("none", "mamba_cache_mode")):
        state = spec(MambaSpec, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode=mode)
        found = why_not_reused(settings(prefix_caching=True), config(full, state))
        assert (why in found) == (found != "" or why == "")


def settings(device: str = "cuda", *, prefix_caching: bool = False, reused: bool = True, **parallel: int) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(is_prefix_caching_supported=reused),
        parallel_config=SimpleNamespace(**parallel),
        device_config=SimpleNamespace(device_type=device),
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
    )


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused(name: str) -> None:
    full = config(spec(FullAttentionSpec))
    refuse_unserved(settings(**{name: 1}), full)
    with pytest.raises(ConfigError, match=name):
        refuse_unserved(settings(**{name: 2}), full)


def test_what_vllm_does_not_reuse_is_not_reused() -> None:
    full, latent = config(spec(FullAttentionSpec)), config(spec(MLAAttentionSpec, num_kv_heads=1))
    assert why_not_reused(settings(), full) == ""
    assert why_not_reused(settings("cpu"), full) == ""
    assert why_not_reused(settings(), latent) == ""
    assert why_not_reused(settings("cpu", prefix_caching=True), latent) == ""
    assert "latent" in why_not_reused(settings("cpu"), latent)
    assert "pooling" in why_not_reused(settings(reused=False), full)
    assert "keeps no KV" in why_not_reused(settings(), config())


@pytest.mark.parametrize("attention", ["hybrid", "attention_free"])
@pytest.mark.skipif(not IS_NEWER, reason="older versions let connectors serve one group of full attention")
def test_states_are_reused_where_vllm_is_told_to(attention: str) -> None:
    """Versions up to 0.23 say that models with states are not supported, and reuse them if prefix caching is on."""
    state = spec(MambaSpec, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align")
    model = config(spec(FullAttentionSpec), state)
    for caches, pooler, served in ((True, None, True), (False, None, False), (True, "MEAN", False)):
        told = settings(prefix_caching=caches, reused=False)
        told.model_config.attn_type, told.model_config.pooler_config = attention, pooler
        assert (why_not_reused(told, model) == "") == served


def test_kinds_of_attention_that_are_not_known_are_not_reused() -> None:
    """Kinds that are full attention by inheritance alone, such as sinks or reference windows."""
    kinds = [k for k in (SinkFullAttentionSpec, RSWASpec, HiddenStateCacheSpec) if k is not None]
    more = {"sink_len": 4, "rswa_window": 64, "head_size_v": 64}
    for kind in kinds:
        assert kind.__name__ in why_not_reused(settings(), config(spec(kind, **more)))


@pytest.mark.skipif("non_causal" not in inspect.signature(FullAttentionSpec).parameters, reason="no such field here")
def test_attention_that_looks_ahead_is_not_reused() -> None:
    ahead, full = spec(FullAttentionSpec, non_causal=True), spec(FullAttentionSpec)
    assert "not causal" in why_not_reused(settings(), config(ahead))
    mixed = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full, "b": ahead})
    assert "not causal" in why_not_reused(settings(), config(mixed))


def test_layers_of_different_shapes_are_served() -> None:
    """A draft head with other KV heads, layers whose cache has another dtype, a latent beside its indexer."""
    narrow, wide = spec(FullAttentionSpec), spec(FullAttentionSpec, num_kv_heads=8)
    bytes_of = spec(FullAttentionSpec, dtype=torch.uint8)
    latent = spec(MLAAttentionSpec, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    indexer = spec(MLAAttentionSpec, num_kv_heads=1, head_size=132, dtype=torch.uint8)
    for layers in ([narrow, wide], [narrow, bytes_of], [latent, indexer]):
        mixed = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=dict(zip("ab", layers, strict=True)))
        groups = SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(["a", "b"], mixed)])
        assert why_not_reused(settings(), groups) == ""
        refuse_unserved(settings(), groups)
        pages = sum(int(s.page_size_bytes) for s in layers)
        assert expected_sizes(ServedGroups(groups), "raw")[0].raw == -(-pages // 128) * 128
        assert is_latent(groups.kv_cache_groups[0]) == (latent in layers)


def test_the_dimension_of_blocks() -> None:
    caches = {"a": torch.empty(2, 40, 16, 4, 8), "b": torch.empty(40, 2, 16, 4, 8), "c": torch.empty(80, 8, 576)}
    assert block_dims(caches, 40) == {"a": 1, "b": 0, "c": 0}
    with pytest.raises(ConfigError, match="a: no dimension"):
        block_dims({"a": torch.empty(3, 41, 5)}, 40)


def test_options() -> None:
    options = ConnectorOptions.from_extra_config({"pool": "1GiB", "min_hit_blocks": 4, "eviction": {"watermark": 0.9}})
    assert (options.engine.pool.bytes, options.min_hit_blocks, options.engine.eviction.watermark) == (1 << 30, 4, 0.9)
    assert options.engine.transfer.max_batch_bytes == 32 << 20
    for bad in (
        {"min_hit_blocks": 0},
        {"pending_wait_s": "long"},
        {"save_decoded": 1},
        {"pool": -1},
        {"x": 1},
    ):
        with pytest.raises(ConfigError):
            ConnectorOptions.from_extra_config(bad)


def test_plans_and_outcomes_cross_a_process_border() -> None:
    transfer = TransferPlan(Direction.SAVE, np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int64) * 128)
    plan = ConnectorPlan([SaveJob(3, transfer)], [SaveJob(1, transfer)], [LoadJob(2, "r", transfer, (9,))], {4, 5})
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.fresh_block_ids == {4, 5}
    assert copy.loads[0].missing_block_ids == (9,)
    assert [copy.early_saves[0].job_id, copy.saves[0].job_id] == [3, 1]
    assert (copy.saves[0].transfer.offsets == transfer.offsets).all()
    message = pickle.loads(pickle.dumps(WorkerReports([JobOutcome(1), JobOutcome(2, (0,), (1,))])))
    assert message.reports[1] == JobOutcome(2, (0,), (1,))


def test_outcomes_of_several_workers_add_up() -> None:
    one, two = WorkerReports([JobOutcome(1)]), WorkerReports([JobOutcome(1, (3,))])
    if IS_NEWER:
        both = one.aggregate(two)
        output = SimpleNamespace(kv_connector_worker_meta=both)
    else:
        one.add_events(two.get_all_events())
        one.increment_workers(1)
        output = SimpleNamespace(kv_cache_events=one)
    assert reports_in(output) == [JobOutcome(1), JobOutcome(1, (3,))]
    assert reports_in(SimpleNamespace(kv_cache_events=None, kv_connector_worker_meta=None)) == []


def test_aborted_loads_are_reported_the_way_the_version_frees_them() -> None:
    output = SimpleNamespace(finished_recving={"a", "b"}, finished_sending=None)
    aborted = {"b", "c"}
    report_aborted_loads(output, aborted)
    assert aborted == {"c"}
    assert output.finished_recving == ({"a", "b"} if IS_NEWER else {"a"})
    assert (output.finished_sending or set()) == (set() if IS_NEWER else {"b"})
    report_aborted_loads(SimpleNamespace(finished_recving=None, finished_sending=None), aborted)
    assert aborted == {"c"}


def test_figures_add_up_and_reach_prometheus() -> None:
    stats = ConnectorStats()
    assert stats.is_empty()
    stats.count_save(1, 4, 300)
    stats.count_load([None, None, MissReason.CORRUPT], 200, 0.5)
    stats.count_misses(MissReason.EVICTED, 7)
    total = ConnectorStats(dict(stats.data)).aggregate(stats)
    assert total.data["saved_blocks"] == 6
    assert total.data["loaded_bytes"] == 400
    assert total.reduce()["hit_rate"] == round(4 / 20, 3)
    registry = CollectorRegistry()

    config = SimpleNamespace(kv_transfer_config=None)
    types = {Counter: partial(Counter, registry=registry), Gauge: Gauge, Histogram: Histogram}
    metrics = ConnectorPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    metrics.observe(total.data, 1)
    labels = {"model_name": "m", "engine": "1"}
    assert registry.get_sample_value("vllm:kvortex_saved_bytes_total", labels) == 600
    missed = {**labels, "reason": "evicted"}
    assert registry.get_sample_value("vllm:kvortex_missed_blocks_total", missed) == 14
    assert registry.get_sample_value("vllm:kvortex_saved_bytes_total", {**labels, "engine": "0"}) == 0
    stats.reset()
    assert stats.is_empty()
