"""The scheduler half in the real Scheduler, the workers played by hand: every order of events in a line each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from played import BLOCK_NBYTES, BLOCK_SIZE, Played, tokens
from scheduler_harness import SchedulerHarness

from kvortex.types import MissReason
from kvortex.vllm.versions import HOLD_ABORTED_LOADS, IS_NEWER


def test_a_prompt_is_saved_and_then_loaded(played: Callable[..., Played]) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=2)
    p.run("a")
    assert len(p.half._control.index) == 3
    p.harness.add_request("b", tokens(100), max_tokens=2)
    step = p.schedule()
    (job,) = step.metadata.loads
    assert job.request_id == "b"
    assert job.transfer.block_ids.tolist() == p.harness.block_ids("b")[:3]
    assert not step.num_scheduled_tokens
    p.harness.finish(step, p.report())
    step = p.step()
    assert step.num_scheduled_tokens["b"] == 100 - 96
    p.run("b")
    assert p.half.stats.snapshot().hits == 3


def test_decoded_blocks_are_saved(played: Callable[..., Played]) -> None:
    for save_decoded, blocks in ((True, 3), (False, 1)):
        p = played(extra={"save_decoded": save_decoded})
        p.harness.add_request("a", tokens(40), max_tokens=70)
        p.run("a")
        assert len(p.half._control.index) == blocks


def test_a_step_of_decoding_is_saved_as_one(played: Callable[..., Played]) -> None:
    p = played()
    for number in range(4):
        p.harness.add_request(f"r{number}", tokens(2 * BLOCK_SIZE - 1, number), max_tokens=2 * BLOCK_SIZE)
    moved: list[int] = []
    while not p.harness.requests["r3"].is_finished():
        step = p.step()
        assert len(step.metadata.saves) <= 1
        moved += [job.transfer.num_blocks for job in step.metadata.saves]
        for job in step.metadata.saves:
            moving = set(job.transfer.block_ids.tolist())
            assert all(moving.intersection(p.harness.block_ids(f"r{number}")) for number in range(4))
    p.step()
    assert moved == [4, 4, 4]
    for number in range(4):
        p.harness.add_request(f"again {number}", tokens(2 * BLOCK_SIZE - 1, number), max_tokens=1)
        p.run(f"again {number}")
    assert p.half.stats.snapshot().hits == 4


def test_larger_saves_are_not_put_together(played: Callable[..., Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.vllm.scheduler.saves.MIN_SAVE_BLOCKS", 3)
    p = played()
    for number, blocks in enumerate((3, 1, 1, 1, 2)):
        p.harness.add_request(str(number), tokens(BLOCK_SIZE * blocks + 1, number), max_tokens=1)
    step = p.step()
    assert [job.transfer.num_blocks for job in step.metadata.saves] == [3, 3, 2]


def test_a_block_that_two_requests_compute_is_saved_once(played: Callable[..., Played]) -> None:
    p = played(extra={"pending_wait_s": 0})
    for number in range(2):
        p.harness.add_request(f"r{number}", tokens(BLOCK_SIZE + 9), max_tokens=1)
    step = p.step()
    assert [job.transfer.num_blocks for job in step.metadata.saves] == [1]
    p.step()
    assert len(p.half._control.index) == 1


def test_what_packing_would_lose_is_saved_as_it_is(played: Callable[..., Played]) -> None:
    p = played(extra={"codec": "fp8"})
    for number in range(3):
        p.harness.add_request(f"r{number}", tokens(2 * BLOCK_SIZE + 1, number), max_tokens=3)
    p.step(lossy=(1, 4))  # the second block of the first request, the first of the third one
    (job,) = p.step().metadata.saves
    assert job.transfer.forms is None
    lossy = [p.harness.block_ids("r0")[1], p.harness.block_ids("r2")[0]]
    assert job.transfer.block_ids.tolist() == lossy
    p.run("r2")
    control = p.half._control
    assert control.index.committed_bytes == 4 * p.half._sizes[0].packed + 2 * p.half._sizes[0].raw


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_step_ahead(played: Callable[..., Played], async_scheduling: bool) -> None:
    p = played(async_scheduling=async_scheduling)
    p.harness.add_request("a", tokens(70), max_tokens=60)
    p.run("a")
    assert len(p.half._control.index) == (70 + 60 - 1) // BLOCK_SIZE


def test_a_chunked_prompt_is_saved_once(played: Callable[..., Played]) -> None:
    p = played(max_num_batched_tokens=64)
    p.harness.add_request("a", tokens(300), max_tokens=2)
    saved: list[int] = []
    while not p.harness.requests["a"].is_finished():
        step = p.step()
        saved += [b for job in step.metadata.saves for b in job.transfer.block_ids.tolist()]
    assert len(saved) == len(set(saved)) == 9


def test_a_request_waits_for_blocks_being_saved(played: Callable[..., Played]) -> None:
    p = played(extra={"pending_wait_s": 60})
    p.harness.add_request("a", tokens(100), max_tokens=4)
    step = p.schedule()
    p.harness.finish(step, p.report(saves=False))
    p.harness.add_request("b", tokens(100), max_tokens=4)
    step = p.schedule()
    assert "b" not in step.num_scheduled_tokens
    assert not step.metadata.loads
    p.harness.finish(step, p.report())
    step = p.schedule()
    assert [job.request_id for job in step.metadata.loads] == ["b"]
    p.harness.finish(step, p.report())


def test_waiting_has_an_end(played: Callable[..., Played]) -> None:
    p = played(extra={"pending_wait_s": 0.0})
    p.harness.add_request("a", tokens(100), max_tokens=4)
    p.harness.finish(p.schedule(), p.report(saves=False))
    p.harness.add_request("b", tokens(100), max_tokens=4)
    step = p.schedule()
    assert step.num_scheduled_tokens["b"] == 100
    p.harness.finish(step, p.report())


@pytest.mark.parametrize("fault", ["failed", "corrupt"])
@pytest.mark.parametrize("position", [0, 1])
def test_a_failed_load_is_computed(played: Callable[..., Played], fault: str, position: int) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=2)
    p.run("a")
    p.harness.add_request("b", tokens(100), max_tokens=2)
    step = p.schedule()
    bad = p.harness.block_ids("b")[position]
    p.harness.finish(step, p.report(invalid_block_ids={bad}, **{fault: (position,)}))
    step = p.step()
    assert not step.metadata.loads, "a failed load is not offered again"
    assert step.num_scheduled_tokens["b"] == 100 - position * BLOCK_SIZE
    p.run("b")
    stats = p.half.stats.snapshot()
    assert stats.misses[MissReason.CORRUPT if fault == "corrupt" else MissReason.TRANSFER_FAILED] == 1
    assert len(p.half._control.index) == 3


def test_abort_during_a_load(played: Callable[..., Played]) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=2)
    p.run("a")
    free = p.harness.num_free_blocks
    p.harness.add_request("b", tokens(100), max_tokens=2)
    p.harness.finish(p.schedule(), p.report(loads=False))
    p.harness.abort("b")
    p.harness.finish(p.schedule(), p.report(loads=False))
    assert p.harness.num_free_blocks < free, "the load still writes these blocks"
    p.step()
    p.step()
    assert p.harness.num_free_blocks == free
    assert "b" not in p.harness.held_request_ids
    assert not p.half._aborted


def test_abort_between_the_report_and_its_arrival(played: Callable[..., Played]) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=2)
    p.run("a")
    free = p.harness.num_free_blocks
    p.harness.add_request("b", tokens(100), max_tokens=2)
    step = p.schedule()
    p.harness.abort("b")
    p.harness.finish(step, p.report())
    p.step()
    p.step()
    assert p.harness.num_free_blocks == free
    assert not p.half._aborted


def test_abort_after_the_load(played: Callable[..., Played]) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=2)
    p.run("a")
    free = p.harness.num_free_blocks
    p.harness.add_request("b", tokens(100), max_tokens=2)
    p.step()
    p.harness.abort("b")
    p.step()
    p.step()
    assert p.harness.num_free_blocks == free
    assert not p.half._aborted
    p.harness.add_request("b", tokens(100), max_tokens=2)
    p.run("b")
    assert p.half.stats.snapshot().hits == 6


def test_preemption_resumes_from_the_cache(played: Callable[..., Played]) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=40)
    for _ in range(5):
        p.step()
    p.harness.preempt_all()
    step = p.schedule()
    assert [job.request_id for job in step.metadata.loads] == ["a"]
    p.harness.finish(step, p.report())
    p.run("a")
    assert p.half.stats.snapshot().hits == 3
    assert len(p.half._control.index) == (100 + 40 - 1) // BLOCK_SIZE


def test_preemption_for_want_of_blocks(played: Callable[..., Played]) -> None:
    p = played(num_blocks=10)
    for name in "ab":
        p.harness.add_request(name, tokens(100, ord(name)), max_tokens=80)
    p.run("a")
    p.run("b")
    assert p.harness.num_free_blocks == 9


def test_fresh_blocks_are_announced(played: Callable[..., Played]) -> None:
    """Whatever a forward or a load of a step writes for the first time stands in that step's plan."""
    p = played(num_blocks=16)
    known: dict[str, set[int]] = {}
    for name in "abc":
        p.harness.add_request(name, tokens(70, ord(name)), max_tokens=40)
    for _ in range(120):
        step = p.schedule()
        for name in list(p.harness.held_request_ids):
            now = set(p.harness.block_ids(name))
            new = now - known.get(name, set())
            if step.num_scheduled_tokens.get(name) or name in p.open_loads:
                assert new <= step.metadata.fresh_block_ids
                known[name] = now
        p.harness.finish(step, p.report())
        for name, request in p.harness.requests.items():
            if request.is_finished() or request.num_computed_tokens == 0:
                known.pop(name, None)
    assert all(request.is_finished() for request in p.harness.requests.values())


@pytest.mark.parametrize(("together", "pool_blocks"), [(1, 16), (4, 40)])
def test_events_tell_what_the_cache_holds(
    played: Callable[..., Played], monkeypatch: pytest.MonkeyPatch, together: int, pool_blocks: int
) -> None:
    extra = {"pool": {"bytes": pool_blocks * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES}}
    p = played(kv_events=True, extra=extra)
    events: list[Any] = []
    original = p.half.take_events

    def spy() -> list[Any]:
        taken = list(original())
        events.extend(taken)
        return taken

    monkeypatch.setattr(p.half, "take_events", spy)
    for number in range(0, 12, together):
        names = [f"r{n}" for n in range(number, number + together)]
        for n, name in enumerate(names, number):
            p.harness.add_request(name, tokens(100, n), max_tokens=40)
        for name in names:
            p.run(name)
    held: set[Any] = set()
    for event in events:
        assert event.medium == "CPU"
        if hasattr(event, "token_ids"):
            assert len(event.token_ids) == BLOCK_SIZE * len(event.block_hashes)
            assert event.parent_block_hash is None or event.parent_block_hash in held
            assert not held.intersection(event.block_hashes)
            held.update(event.block_hashes)
        else:
            assert held.issuperset(event.block_hashes)
            held.difference_update(event.block_hashes)
    assert len(held) == len(p.half._control.index)
    assert p.half._control.index.evicted_blocks > 0
    first = next(event for event in events if hasattr(event, "token_ids"))
    assert list(first.token_ids) == tokens(100, 0)[: len(first.token_ids)]
    p.half.reset_cache()
    assert {h for event in p.half.take_events() for h in event.block_hashes} == held


@pytest.mark.parametrize("salt", [None, "pepper"])
def test_events_tell_what_hashes_are_made_of(
    played: Callable[..., Played], monkeypatch: pytest.MonkeyPatch, salt: str | None
) -> None:
    p = played(kv_events=True)
    original, told = p.half.take_events, []

    def spy() -> list[Any]:
        taken = list(original())
        told.extend(taken)
        return taken

    monkeypatch.setattr(p.half, "take_events", spy)
    p.harness.add_request("a", tokens(100), max_tokens=2, cache_salt=salt)
    p.run("a")
    spy()
    (event,) = told
    assert len(event.block_hashes) == 3
    if hasattr(event, "extra_keys"):  # 0.15 has no such field
        assert event.extra_keys == [(salt,) if salt else None, None, None]
        assert event.group_idx == 0


def test_without_events_nothing_is_kept(played: Callable[..., Played]) -> None:
    p = played()
    p.harness.add_request("a", tokens(100), max_tokens=2)
    p.run("a")
    assert list(p.half.take_events()) == []


def test_a_pool_too_small_for_a_block_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"raise pool\.bytes"):
        SchedulerHarness(llama, extra_config={"pool": {"bytes": 4096, "pin_piece_bytes": 4096}})


def test_an_unknown_option_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="unknown option 'cpu_pool'"):
        SchedulerHarness(llama, extra_config={"cpu_pool": 1 << 30})


def test_the_failure_policy_is_recompute(played: Callable[..., Played]) -> None:
    p = played(failure_policy="fail")
    assert p.harness.scheduler.recompute_kv_load_failures
    assert p.harness.vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_blocks_held_while_a_load_writes() -> None:
    assert HOLD_ABORTED_LOADS is not IS_NEWER
