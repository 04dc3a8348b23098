"""Models that mix kinds of KV in the real Scheduler, the workers played: what they hit, and what goes wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from groups_support import MODELS, GroupWorkers, greet, harness_of, prompt
from scheduler_harness import SchedulerHarness
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.request import RequestStatus

from kvortex.types import MissReason
from kvortex.vllm.versions import SERVES_GROUPS

pytestmark = pytest.mark.skipif(not SERVES_GROUPS, reason="this vLLM turns its hybrid manager off")

PROMPT = prompt(400, 1)


@pytest.fixture
def workers(llama: Path) -> Iterator[Callable[..., GroupWorkers]]:
    """Makes workers of one of `MODELS`; at the end they have nothing to do, and nobody holds a block."""
    made: list[GroupWorkers] = []

    def make(name: str, **options: Any) -> GroupWorkers:
        harness = harness_of(MODELS[name], llama, **{"num_blocks": 400, **options})
        made.append(GroupWorkers(harness, MODELS[name].groups, Random(0), greet(harness)))
        return made[-1]

    yield make
    for each in made:
        each.step()
        assert each.is_idle
        assert each.harness.num_free_blocks == each.harness.kv_cache_config.num_blocks - 1
        assert each.control.index.num_pending == 0
        each.harness.shutdown()
        if each.owner is not None:
            each.owner.close()


def reset(harness: SchedulerHarness) -> None:
    """Empty vLLM's own cache."""
    assert harness.scheduler.reset_prefix_cache()


def served(w: GroupWorkers, name: str, token_ids: list[int]) -> int:
    """Tokens that a request is given from the pool, before it ends."""
    w.harness.add_request(name, token_ids, max_tokens=2)
    step = w.step()
    loaded = w.harness.requests[name].num_computed_tokens if step.metadata.loads else 0
    w.run(name)
    return loaded


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [400, 300, 193, 97])
def test_hits_are_as_long_as_vllms_own(
    workers: Callable[..., GroupWorkers], llama: Path, name: str, length: int
) -> None:
    """What a twin without a connector finds in its own cache, after the same requests."""
    w = workers(name, max_num_batched_tokens=96)
    ours, own = hits_after(w, llama, name, PROMPT, PROMPT[:length] + prompt(30, 2))
    assert ours == own


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [310, 205, 170, 107])
def test_a_next_turn_hits_as_much_as_in_vllms_own_cache(
    workers: Callable[..., GroupWorkers], llama: Path, name: str, length: int
) -> None:
    """Also where vLLM resumes inside of a block, at the end of the prompt before."""
    w = workers(name, max_num_batched_tokens=96)
    ours, own = hits_after(w, llama, name, PROMPT[:length], PROMPT[:length] + prompt(60, 2))
    assert ours == own


@pytest.mark.parametrize("name", ["states and finer hashes", "states and much finer hashes"])
@pytest.mark.skipif(
    not hasattr(KVConnectorBase_V1, "register_finished_partial_tail"), reason="this vLLM hands no such tail over"
)
def test_a_request_that_ends_at_its_last_hash_leaves_its_tail(workers: Callable[..., GroupWorkers], name: str) -> None:
    w = workers(name, max_num_batched_tokens=96)
    request = w.harness.add_request("a", PROMPT[:310], max_tokens=9)
    while request.num_computed_tokens < 304:
        w.step()
    assert request.num_computed_tokens == 304
    w.harness.abort("a")
    w.step()
    w.step()
    reset(w.harness)
    assert served(w, "b", PROMPT[:310]) == 304


@pytest.mark.parametrize("name", ["Qwen3-Next", "gpt-oss", "states and finer hashes"])
def test_what_the_device_has_lost_of_one_group_comes_from_the_pool(
    workers: Callable[..., GroupWorkers], name: str
) -> None:
    """The device still has one group's blocks of the prompt and not the other's: the hit is as long as before."""
    w = workers(name)
    w.harness.add_request("a", PROMPT, max_tokens=2)
    w.run("a")
    pool: Any = w.harness.scheduler.kv_cache_manager.block_pool
    lost = next(number for number, group in enumerate(MODELS[name].groups) if group.kind != "full")
    for block in pool.blocks:
        if block.block_hash is not None and get_group_id(block.block_hash) == lost:
            pool._maybe_evict_cached_block(block)
    assert served(w, "b", PROMPT) == 384


def hits_after(w: GroupWorkers, llama: Path, name: str, first: list[int], again: list[int]) -> tuple[int, int]:
    """Tokens that a second prompt is given from the pool, and from the own cache of a twin without a connector."""
    twin = harness_of(MODELS[name], llama, num_blocks=400, max_num_batched_tokens=96, connector=None)
    for harness, run in ((w.harness, w.run), (twin, twin.run_until_finished)):
        harness.add_request("first", first, max_tokens=40)
        run("first")
    found = twin.add_request("again", again)
    _, own, *_ = twin.scheduler.kv_cache_manager.get_computed_blocks(found)
    reset(w.harness)
    return served(w, "again", again), own


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lost", ["all", "the first", "the last"])
def test_a_failed_load_is_computed(workers: Callable[..., GroupWorkers], name: str, lost: str) -> None:
    w = workers(name)
    w.harness.add_request("a", PROMPT, max_tokens=2)
    w.run("a")
    reset(w.harness)
    request = w.harness.add_request("b", PROMPT, max_tokens=2)
    w.paused = {"load"}
    (job,) = w.step().metadata.loads
    last = job.transfer.num_blocks - 1
    w.bad = {"all": frozenset(range(last + 1)), "the first": frozenset({0}), "the last": frozenset({last})}[lost]
    w.paused = set()
    w.step()
    step = w.step()
    assert not step.metadata.loads, "a failed load is not offered again"
    assert request.num_computed_tokens == step.num_scheduled_tokens["b"], "it is computed from the start"
    w.run("b")
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    misses = w.half.stats.snapshot().misses
    assert misses[MissReason.CORRUPT] + misses[MissReason.TRANSFER_FAILED] == len(w.bad)


@pytest.mark.parametrize("name", ["gpt-oss", "Qwen3-Next", "Llama 4"])
def test_what_is_saved_is_not_given_away_before(workers: Callable[..., GroupWorkers], name: str) -> None:
    w = workers(name)
    pool: Any = w.harness.scheduler.kv_cache_manager.block_pool
    w.paused = {"save"}
    w.harness.add_request("a", PROMPT, max_tokens=1)
    w.run("a")
    saving = w.saving
    assert saving
    assert w.half.holds_device_blocks()
    assert w.harness.num_free_blocks == w.harness.kv_cache_config.num_blocks - 1 - len(saving)
    taken = pool.get_new_blocks(w.harness.num_free_blocks)
    w.harness.add_request("b", prompt(40, 3), max_tokens=1)
    for _ in range(3):
        assert "b" not in w.step().num_scheduled_tokens, "all other blocks are taken"
    w.paused = set()
    w.run("b")
    assert not w.half.holds_device_blocks()
    pool.free_blocks(taken)
    reset(w.harness)
    assert served(w, "c", PROMPT) > 200, "what was saved is whole"


@pytest.mark.parametrize("name", ["gpt-oss", "Qwen3-Next", "Llama 4"])
def test_saves_do_not_keep_vllm_from_a_reset(workers: Callable[..., GroupWorkers], name: str) -> None:
    w = workers(name, num_blocks=120, pool_blocks=400)
    w.paused = {"save"}
    w.harness.add_request("a", PROMPT, max_tokens=1)
    w.run("a")
    saving = w.saving
    assert saving
    reset(w.harness)
    assert not w.half.holds_device_blocks()
    assert saving <= w.step().metadata.fresh_block_ids, "the next step waits until the saves have read them"
    w.paused = set()
    for seed in range(4):  # their blocks are used again
        w.harness.add_request(f"other {seed}", prompt(390, 10 + seed), max_tokens=1)
        w.run(f"other {seed}")
    reset(w.harness)
    assert served(w, "b", PROMPT) > 200


@pytest.mark.parametrize("name", MODELS)
def test_a_request_waits_for_blocks_that_are_being_saved(workers: Callable[..., GroupWorkers], name: str) -> None:
    w = workers(name, extra={"pending_wait_s": 60})
    w.paused = {"save"}
    w.harness.add_request("a", PROMPT, max_tokens=1)
    w.run("a")
    # Blocks that are saved cannot be evicted from the device; here vLLM has forgotten what they hold.
    w.harness.scheduler.kv_cache_manager.evict_blocks(w.saving)
    w.harness.add_request("b", PROMPT, max_tokens=1)
    for _ in range(3):
        step = w.step()
        assert not step.num_scheduled_tokens
        assert not step.metadata.loads
    w.paused = set()
    w.step()
    assert [job.request_id for job in w.step().metadata.loads] == ["b"]
    w.run("b")


@pytest.mark.parametrize("name", MODELS)
def test_a_lower_tier_brings_blocks_of_all_groups(
    workers: Callable[..., GroupWorkers], tmp_path: Path, name: str
) -> None:
    extra = {"disk": {"path": str(tmp_path / "disk"), "capacity_bytes": 1 << 30}}
    w = workers(name, pool_blocks=200, extra=extra)
    assert w.owner is not None
    w.harness.add_request("a", PROMPT, max_tokens=2)
    w.run("a")
    w.step()
    reset(w.harness)
    from_pool = served(w, "b", PROMPT)
    w.owner.settle()
    w.half._control.clear()
    reset(w.harness)
    w.harness.add_request("c", PROMPT, max_tokens=2)
    assert not w.step().metadata.loads  # it waits for the tier
    w.owner.settle()
    (load,) = w.step().metadata.loads
    assert w.harness.requests["c"].num_computed_tokens == from_pool > 0
    num_drafts = sum(group.is_draft for group in MODELS[name].groups)  # vLLM looks for their next block, too
    (cache,) = w.owner.caches
    assert cache.tiering is not None
    assert cache.tiering.fetches.fetched_blocks == load.transfer.num_blocks + num_drafts
    w.run("c")
