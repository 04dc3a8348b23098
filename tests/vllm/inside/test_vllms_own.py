"""vLLM's own tests of its scheduler and of its connectors' scheduler side, with KVortex as the connector.

They are those of vLLM's source distribution, which `scripts/vllm_cpu_env.py` puts into the environment. `vllms_own.py`
puts KVortex into their schedulers. Each test of `FILES` passes or has its reason here. Not run are files that test
other connectors, or engines with real weights; files in which no scheduler is made; and `test_error_propagation` and
`test_cache_pollution_prevention`, in which every request is to fail with its load.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm_settings import INSIDE, REPOSITORY

pytestmark = pytest.mark.skipif(not vllm.__version__.startswith("0.33."), reason="the tests of 0.33.0 are run")

TESTS = Path(sys.prefix) / "vllm-tests"
FILES = (
    "core/test_scheduler.py",
    "core/test_async_scheduler.py",
    "core/test_deferred_block_free.py",
    "core/test_prefix_replay.py",
    "core/test_priority_preemption_bug.py",
    "core/test_swa_inflight_window_free.py",
    "core/test_worker_slot_overflow.py",
    "kv_connector/unit/test_invalid_blocks_correctness.py",
    "kv_connector/unit/test_kv_load_failure_recovery.py",
    "kv_connector/unit/test_remote_prefill_lifecycle.py",
)
TIMEOUT_S = 400

OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "dtype": "float16",
}
CONFIGURATIONS = {"facebook/opt-125m": OPT, "facebook/opt-350m": OPT}
"""All that schedulers need of a model."""
MODELS_LEFT_OUT = {
    "llava-hf/llava-1.5-7b-hf": "vLLM imports this model with torchvision alone; what its tests are about is encoders",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "its tests are about hashes that vLLM does not make beside a connector",
}
"""Tests that ask for these models are skipped."""
NOT_COMPUTED = "test_no_spec_decode_padding_up_to_max_model_len"
LEFT_OUT = {
    "the test takes a load for a part of the step; KVortex loads between steps": (
        "test_external_prefix_cache_metrics[True-False]",
        "test_has_sync_kv_loads[load_modes1-True]",
        "test_has_sync_kv_loads[load_modes2-True]",
        "test_kv_connector_honors_skip_reading_prefix_cache",
        "test_kv_connector_records_external_cache_hit_sources[False]",
    ),
    "the second request is to share blocks that the first one loads within the step; it loads blocks of its own": (
        "test_sync_load_failure_with_shared_blocks",
    ),
    "the hit ends inside of a block, KVortex's hits are whole blocks": (
        "test_basic_lifecycle",
        "test_external_prefix_cache_metrics[False-False]",
        "test_external_prefix_cache_metrics[False-True]",
        "test_kv_load_carrying_window_does_not_replay[63-False]",
        "test_kv_load_carrying_window_does_not_replay[63-True]",
        "test_prefix_hit_is_capped_at_retained_auxiliary_outputs[external-mid-block]",
    ),
    "the hit is a single block behind one of vLLM's own cache, which KVortex leaves to be computed": (
        "test_hybrid_fa_deeper_hit_respects_connector_lookup_policy[False-16-6-32]",
        "test_hybrid_per_group_hit_divergence_with_connector[16-32]",
        "test_kv_connector_handles_preemption",
    ),
    "the hit is behind one of vLLM's own cache that differs between groups, for which KVortex does not ask": (
        "test_hybrid_divergent_hit_fallback_is_capped_at_retained_auxiliary_outputs[kept]",
        "test_hybrid_fa_deeper_hit_respects_connector_lookup_policy[True-16-6-80]",
    ),
    "a request is to fail with its load; KVortex has blocks computed that it could not load": (
        "test_failed_receive_completion_honors_failure_policy[fail]",
        "test_sync_fail_invalid_blocks_evicted",
    ),
    "a connector of a producer is to require that its saves end; KVortex's may be lost": (
        "test_kv_pressure_preempt_mid_handoff[kv_producer-False]",
        "test_requires_kv_delivery_defaults_to_producer_role",
    ),
    "vLLM empties its cache while a load is in flight, which it refuses with any connector": (
        "test_reset_prefix_cache_with_inflight_output_under_kv_pressure[1]",
    ),
    "a block has one more reference while KVortex saves it": ("test_hit_replays_window_without_reallocating",),
    "the prompt is being saved when the test wants it loaded": (
        "test_abort_deferred_async_load_frees_after_inflight_step",
        "test_async_load_registers_immediately_without_deferral",
        "test_deferred_async_load_records_hit_sources_when_started",
        "test_deferred_async_load_registers_after_inflight_step",
    ),
    "the second request has the first one's prompt, so it loads as well, and is not computed": (
        "test_no_spurious_prefix_caching",
    ),
    "the last device block is to be used; KVortex loads only if the next token has room too": (
        "test_async_load_does_not_double_reserve_mamba_spec_blocks[align-16-18]",
    ),
    "states without snapshots are loaded, which KVortex does not save": (
        "test_async_load_does_not_double_reserve_mamba_spec_blocks[none-128-18]",
    ),
    "the test reads what only its own connector has, or does without one": (
        "test_kv_cache_release_after_keep_pause_preserves_requests",  # handshakes that are mocks
        "test_kv_load_zeroing_respects_loaded_groups",
        "test_p_side_chunked_prefill_mamba",
        "test_reset_connector_cache_no_connector_is_no_op_success",
    ),
    "vLLM is told that tokens are computed which nobody has computed: the played worker finds no KV": (NOT_COMPUTED,),
    "it fails here without KVortex too: on CPUs vLLM refuses this configuration, or a fixture is elsewhere": (
        "test_async_scheduling_pp_allows_rescheduling_with_output_placeholders",
        "test_encoder_cache_rejects_mismatched_embed_count",
    ),
}
"""Tests that fail, by reason: of a function all sets of parameters, or one of them."""
AT_LEAST = {
    "passed": 250,
    "num_steps": 1000,
    "num_saved": 500,
    "num_loaded": 2000,
    "num_not_loaded": 3,
    "num_checked": 2000,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each test came to; see `vllms_own.py`."""
    work = tmp_path_factory.mktemp("vllms_own")
    make_hub(work / "hub")
    paths = [str(TESTS), *(path for path in sys.path if path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_CACHE": str(work / "hub"),
        "VLLMS_OWN_REPORTS": str(work / "reports.jsonl"),
    }
    files = [str(TESTS / "tests" / "v1" / name) for name in FILES]
    options = ["-q", "-p", "vllms_own", "-p", "no:cacheprovider", "-c", os.devnull, "-W", "ignore", "--color=no"]
    # vLLM's outermost conftest imports what only its other tests need.
    options += ["--rootdir", str(TESTS), "--confcutdir", str(TESTS / "tests" / "v1")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=environment,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode in (0, 1), f"pytest ended with {done.returncode}:\n{done.stdout[-8000:]}"
    return [json.loads(line) for line in (work / "reports.jsonl").read_text().splitlines()]


def make_hub(hub: Path) -> None:
    """A cache of the hub's, as transformers looks for it."""
    for name, configuration in CONFIGURATIONS.items():
        model = hub / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / "only"
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(snapshot.name)
        (snapshot / "config.json").write_text(json.dumps(configuration))


def name_of(result: dict[str, Any]) -> str:
    return str(result["test"].split("::")[-1])


def entry_of(result: dict[str, Any]) -> str | None:
    """The entry of `LEFT_OUT` that a test belongs to."""
    name = name_of(result)
    entries = {entry for names in LEFT_OUT.values() for entry in names}
    return next((entry for entry in (name, name.split("[")[0]) if entry in entries), None)


def test_each_passes_or_has_a_reason(results: list[dict[str, Any]]) -> None:
    surprises = [
        f"{result['test']} failed in {result['raised_in']}\n{result['reason']}"
        for result in results
        if result["outcome"] == "failed" and entry_of(result) is None
    ]
    assert not surprises, "\n\n".join(surprises)


def test_those_left_out_fail_in_vllm(results: list[dict[str, Any]]) -> None:
    left_out: dict[str, list[dict[str, Any]]] = {entry: [] for names in LEFT_OUT.values() for entry in names}
    for result in results:
        if (entry := entry_of(result)) is not None:
            left_out[entry].append(result)
    assert not [entry for entry, found in left_out.items() if not found], "no test has this name"
    found = [result for of_entry in left_out.values() for result in of_entry]
    assert not [name_of(result) for result in found if result["outcome"] != "failed"], "need not be left out"
    ours = (REPOSITORY / "kvortex", INSIDE)
    raised_here = {name_of(result) for result in found if any(map(Path(result["raised_in"]).is_relative_to, ours))}
    assert raised_here == {NOT_COMPUTED}


def test_models_left_out(results: list[dict[str, Any]]) -> None:
    skipped = Counter(result["reason"] for result in results if result["outcome"] == "skipped")
    assert set(skipped) == set(MODELS_LEFT_OUT)


def test_kvortex_was_there(results: list[dict[str, Any]]) -> None:
    """vLLM's tests scheduled steps with KVortex, which saved and loaded, and was told that loads had failed."""
    outcomes = Counter(result["outcome"] for result in results)
    sums = {name: sum(result[name] for result in results) for name in AT_LEAST if name.startswith("num_")}
    figures = {"passed": outcomes["passed"], **sums}
    sys.stdout.write(f"vLLM's own tests: {dict(outcomes)}, {figures}\n")
    assert all(figures[name] >= least for name, least in AT_LEAST.items()), figures
    with_steps = Counter(result["test"].split("::")[0] for result in results if result["num_steps"])
    assert {Path(name).name for name in with_steps} == {Path(name).name for name in FILES}
