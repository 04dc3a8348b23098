"""Whoever is answered "not yet" does not keep others from going on, and loads leave room to go on."""

import itertools
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from groups_support import greet
from played import BLOCK_NBYTES, BLOCK_SIZE, Played, tokens

from kvortex.vllm.versions import watch_allocations


def finish_all(p: Played, names: str, **options: Any) -> None:
    for _ in range(60):
        p.step(**options)
        if all(p.harness.requests[name].is_finished() for name in names):
            return
    raise AssertionError({name: p.harness.requests[name].status.name for name in names})


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_one_that_waits_for_a_save_lets_a_load_behind_it_go_on(
    played: Callable[..., Played], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    p = played(num_blocks=10, extra={"pending_wait_s": 2.5})
    ticks = itertools.count()
    virtual = SimpleNamespace(monotonic=lambda: 0.2 * next(ticks), perf_counter=lambda: 0.0)
    monkeypatch.setattr("kvortex.vllm.scheduler.loads.time", virtual)
    prompts = {"b": tokens(4 * BLOCK_SIZE + 5, 1), "a": tokens(7 * BLOCK_SIZE + 5, 2)}
    p.harness.add_request("x", prompts["b"], max_tokens=2)
    p.run("x")
    p.harness.add_request("y", prompts["a"], max_tokens=1)
    for _ in range(5):
        p.step(saves=False)
    for name in order:
        p.harness.add_request(name, prompts[name], max_tokens=2)
    p.step(saves=False, loads=False)
    finish_all(p, order, saves=False)


@pytest.mark.parametrize("method", ["mtp", "eagle", "draft_model"])
@pytest.mark.parametrize(("blocks", "length"), [(8, 128), (9, 128), (10, 128), (8, 127), (8, 96)])
def test_loads_leave_room_for_drafts(played: Callable[..., Played], method: str, blocks: int, length: int) -> None:
    p = played(num_blocks=blocks + 1, speculative=(method, 3))
    for name, seed in (("x", 1), ("y", 2)):
        p.harness.add_request(name, tokens(length, seed), max_tokens=1)
        p.run(name)
    p.harness.add_request("a", tokens(length, 1), max_tokens=2)
    p.harness.add_request("b", tokens(length, 2), max_tokens=2)
    finish_all(p, "ab")
    assert p.half.stats.snapshot().hits >= length // BLOCK_SIZE


def test_blocks_that_another_connector_loads_into_are_fresh(played: Callable[..., Played]) -> None:
    p = played()

    class Several:
        """As much of a `MultiConnector` as hands blocks to the connector that loads into them."""

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            p.half.update_state_after_alloc(request, blocks.new_empty(), 0)

    several = Several()
    watch_allocations(several, p.half.allocated_for_others)
    request = p.harness.add_request("a", tokens(100), max_tokens=2)
    manager = p.harness.scheduler.kv_cache_manager
    p.half.get_num_new_matched_tokens(request, 0)
    manager.allocate_slots(request, 100)
    several.update_state_after_alloc(request, manager.get_blocks("a"), 96)
    assert set(p.harness.block_ids("a")) <= p.half._plan.fresh_block_ids
    manager.free(request)


def test_figures_go_out_with_tokens(played: Callable[..., Played]) -> None:
    """Two steps at a time: the one behind that which ends a load has no tokens, and some engines drop its figures."""
    p = played()
    p.harness.add_request("first", tokens(4 * BLOCK_SIZE + 1), max_tokens=2)
    p.run("first")
    p.harness.add_request("again", tokens(4 * BLOCK_SIZE + 1), max_tokens=4)
    told = Counter[str]()
    under_way = deque([p.schedule()])
    for _ in range(12):
        under_way.append(p.schedule())
        for output in p.harness.finish(under_way.popleft(), p.report()).values():
            if output.outputs and output.scheduler_stats is not None:
                told.update(output.scheduler_stats.kv_connector_stats or {})
    assert told["loaded_blocks"] == 4
    assert told["loads"] == 1


def test_events_and_index_are_equal_with_a_disk_and_a_small_pool(
    played: Callable[..., Played], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    p = played(
        kv_events=True,
        extra={
            "pool": {"bytes": 24 * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES},
            "disk": str(tmp_path / "disk"),
        },
    )
    owner = p.owner = greet(p.harness)
    assert owner is not None
    held: set[Any] = set()
    original = p.half.take_events

    def follow() -> list[Any]:
        taken = list(original())
        for event in [event for event in taken if event.medium == "CPU"]:
            if hasattr(event, "token_ids"):
                assert not held.intersection(event.block_hashes)
                held.update(event.block_hashes)
            else:
                assert held.issuperset(event.block_hashes)
                held.difference_update(event.block_hashes)
        return taken

    monkeypatch.setattr(p.half, "take_events", follow)
    for turn in range(3):
        for seed in range(10):
            p.harness.add_request(f"{turn}-{seed}", tokens(4 * BLOCK_SIZE + 1, seed), max_tokens=2)
            p.run(f"{turn}-{seed}")
            p.step()
            owner.settle()
            follow()
            assert len(held) == len(owner.control.index)
    (cache,) = owner.caches
    assert cache.tiering is not None
    assert cache.tiering.fetches.fetched_blocks > 0
    p.half.reset_cache()
    follow()
    assert not held
    assert p.half.stats.snapshot().hits > 0
    p.harness.shutdown()
    owner.close()
