"""Where blocks are loaded to and what is stored under which key: speculation, sessions, roles, short prompts."""

from collections.abc import Callable

import pytest
from played import BLOCK_SIZE, Played, tokens
from scheduler_harness import SAMPLED_TOKEN

from kvortex.vllm.identity.adapters import as_keys


@pytest.mark.parametrize("method", ["draft_model", "eagle", "mtp", "ngram"])
@pytest.mark.parametrize("ahead", [0, 1, 3, 31, 33])
@pytest.mark.parametrize("length", [96, 106, 127])
def test_a_load_goes_to_the_first_blocks_whatever_is_allocated_behind_them(
    played: Callable[..., Played], method: str, ahead: int, length: int
) -> None:
    p = played(speculative=(method, ahead) if ahead else None)
    p.harness.scheduler.num_lookahead_tokens = ahead
    p.harness.add_request("a", tokens(length), max_tokens=2)
    p.run("a")
    p.harness.add_request("b", tokens(length), max_tokens=2)
    step = p.schedule()
    (job,) = step.metadata.loads
    assert job.transfer.block_ids.tolist() == p.harness.block_ids("b")[:3]
    assert not job.missing_block_ids
    p.harness.finish(step, p.report())
    p.run("b")


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_load_goes_behind_a_local_hit(played: Callable[..., Played], ahead: int) -> None:
    p = played(enable_prefix_caching=True, num_blocks=12)
    p.harness.scheduler.num_lookahead_tokens = ahead
    p.harness.add_request("a", tokens(5 * BLOCK_SIZE + 1), max_tokens=1)
    p.run("a")
    p.harness.scheduler.reset_prefix_cache()
    p.harness.add_request("b", tokens(2 * BLOCK_SIZE + 1), max_tokens=1)
    p.run("b")
    p.harness.add_request("c", tokens(5 * BLOCK_SIZE + 1), max_tokens=1)
    (job,) = p.step().metadata.loads
    assert job.transfer.block_ids.tolist() == p.harness.block_ids("c")[2:5]
    p.run("c")


@pytest.mark.parametrize("length", [59, 60, 61])
def test_a_session_stores_blocks_under_the_tokens_they_hold(played: Callable[..., Played], length: int) -> None:
    p = played()
    first, chunk = tokens(length, 1), tokens(80, 2)
    session = p.harness.add_request("s", first, max_tokens=4, resumable=True)
    for _ in range(8):
        p.step()
    p.harness.add_request("s", chunk, max_tokens=2, resumable=True)
    for _ in range(8):
        p.step()
    held = list(session.all_token_ids)
    right = p.harness.add_request("right", held, max_tokens=1).block_hashes
    stale = p.harness.add_request("stale", first + [SAMPLED_TOKEN] * 4 + chunk, max_tokens=1).block_hashes
    index = p.half._control.index
    assert index.prefix_length(as_keys(right)) == (length + 3 + 80) // BLOCK_SIZE
    same = next(i for i, (a, b) in enumerate(zip(right, stale, strict=False)) if a != b)
    assert index.prefix_length(as_keys(stale)) == same


@pytest.mark.parametrize(("role", "saves", "loads"), [("kv_both", 1, 1), ("kv_consumer", 0, 0), ("kv_producer", 1, 0)])
def test_roles(played: Callable[..., Played], role: str, saves: int, loads: int) -> None:
    p = played(kv_role=role)
    p.harness.add_request("a", tokens(100), max_tokens=2)
    step = p.step()
    assert len(step.metadata.saves) == saves
    p.run("a")
    p.harness.add_request("b", tokens(100), max_tokens=2)
    assert len(p.step().metadata.loads) == loads
    p.run("b")


def test_a_short_prompt_does_not_wait_for_blocks_being_saved(played: Callable[..., Played]) -> None:
    p = played(extra={"pending_wait_s": 60, "min_hit_blocks": 4})
    p.harness.add_request("a", tokens(100), max_tokens=4)
    p.harness.finish(p.schedule(), p.report(saves=False))
    p.harness.add_request("b", tokens(100), max_tokens=4)
    step = p.step()
    assert step.num_scheduled_tokens["b"] == 100


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_last_block_behind_a_local_hit_is_computed(played: Callable[..., Played], blocks: int) -> None:
    p = played(enable_prefix_caching=True)
    for name in "ab":
        p.harness.add_request(name, tokens(blocks * BLOCK_SIZE + BLOCK_SIZE), max_tokens=1)
        step = p.step()
        assert not step.metadata.loads
        p.run(name)
