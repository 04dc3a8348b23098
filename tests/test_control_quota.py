"""Priorities and quotas of the caches of one pool, in the control plane."""

from functools import partial

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.groups import GroupSet, KVGroup
from kvortex.index import Evicted, pack_keys
from kvortex.planes.control import ControlPlane
from kvortex.planes.plans import SavePlan
from kvortex.types import BlockSizes, MissReason, SaveOutcome

BLOCK = 4096
SIZES = (BlockSizes(BLOCK, BLOCK),)
STORED, NO_SPACE = SaveOutcome.STORED, SaveOutcome.NO_SPACE
POLICIES = ["lru", "s3fifo", "arc"]
GROUPS = GroupSet([KVGroup("full", ("f",), 16), KVGroup("window", ("w",), 16, "window", 40)], 16)
GROUP_SIZES = (BlockSizes(BLOCK, BLOCK), BlockSizes(BLOCK // 2, BLOCK // 2))


def make_control(blocks: int, num_caches: int = 2, **eviction: object) -> ControlPlane:
    config = KVortexConfig(pool=blocks * BLOCK, eviction={"watermark": 1.0, **eviction})
    control = ControlPlane.from_config(config, config.pool.bytes, ())
    for _ in range(num_caches):
        control.add_cache(SIZES)
    return control


def keys(count: int, cache: int, start: int = 0) -> np.ndarray:
    return pack_keys([bytes([cache]) * 16 + n.to_bytes(16, "little") for n in range(start, start + count)])


def plan(control: ControlPlane, cache: int, part: np.ndarray, **how: np.ndarray) -> SavePlan:
    groups = np.full(len(part), cache, np.uint8)
    return control.plan_save(part, np.arange(len(part), dtype=np.int32), name(cache), groups=groups, **how)


def save(control: ControlPlane, cache: int, part: np.ndarray, **how: np.ndarray) -> list[SaveOutcome]:
    planned = plan(control, cache, part, **how)
    return list(control.finish_save(planned, np.zeros(len(planned.slots), np.uint64)))


def name(cache: int) -> str:
    return f"cache {cache}"


def rank(control: ControlPlane, cache: int, priority: int = 0, blocks: int | None = None) -> None:
    quota = None if blocks is None else blocks * BLOCK
    control.rank(name(cache), range(cache, cache + 1), priority=priority, quota_bytes=quota)


def there(control: ControlPlane, chain: np.ndarray) -> int:
    return int(control.index.contains_mask(chain).sum())


def used(control: ControlPlane, cache: int) -> int:
    """Blocks that a cache takes, by a count of all extents."""
    return control.allocator.bytes_by_owner().get(name(cache), 0) // BLOCK


def ended(control: ControlPlane) -> None:
    control.clear()
    assert control.allocator.leak_report() == ""
    for watched in control._quotas:
        assert control.allocator.bytes_of(watched) == 0


# -- priorities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_what_has_a_lower_priority_makes_room(policy: str) -> None:
    control = make_control(10, 3, policy=policy, ratio=0.01)
    rank(control, 0, 1)
    rank(control, 2, -1)
    for cache in (2, 0, 1):
        save(control, cache, keys(3, cache))
    save(control, 0, keys(3, 0, 3))
    assert [there(control, keys(6, cache)) for cache in range(3)] == [6, 3, 0]
    save(control, 2, keys(1, 2, 3))
    save(control, 2, keys(2, 2, 4))
    assert [there(control, keys(6, cache)) for cache in range(3)] == [6, 1, 2], "its own last one, and then the next"
    assert save(control, 2, keys(10, 2, 10)) == [STORED] * 10, "if nothing else is left, what has a higher priority"
    assert [there(control, keys(6, cache)) for cache in range(3)] == [0, 0, 0]
    ended(control)


def test_what_is_in_use_is_passed_over_and_its_priority_stays() -> None:
    control = make_control(6, ratio=0.01)
    rank(control, 0, -1)
    save(control, 0, keys(3, 0))
    save(control, 1, keys(3, 1))
    load = control.plan_load(keys(3, 0), np.arange(3, dtype=np.int32))
    save(control, 1, keys(2, 1, 3))
    assert [there(control, keys(6, cache)) for cache in (0, 1)] == [3, 2]
    control.finish_load(load)
    save(control, 1, keys(2, 1, 5))
    assert [there(control, keys(9, cache)) for cache in (0, 1)] == [1, 4]
    ended(control)


def test_what_was_fetched_has_the_priority_of_its_cache() -> None:
    control = make_control(6, ratio=0.01)
    rank(control, 1, 1)
    fetch = control.plan_fetch(keys(3, 1), np.full(3, 2, np.uint8), name(1))
    for slot, offset in zip(fetch.slots.tolist(), fetch.offsets.tolist(), strict=True):
        control.finish_fetch(slot, offset, 2, 0)
    save(control, 0, keys(3, 0))
    save(control, 1, keys(1, 1, 3))
    assert [there(control, keys(4, cache)) for cache in (0, 1)] == [1, 4]
    ended(control)


# -- quotas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_keeps_to_its_quota_and_others_keep_their_blocks(policy: str) -> None:
    control = make_control(20, policy=policy, ratio=0.01)
    rank(control, 0, blocks=5)
    save(control, 1, keys(8, 1))
    for turn in range(8):
        assert save(control, 0, keys(3, 0, 3 * turn)) == [STORED] * 3
        assert used(control, 0) <= 5
    assert used(control, 0) == 4, "like a pool, it is never quite full after an eviction"
    assert there(control, keys(8, 1)) == 8
    assert there(control, keys(3, 0, 21)) == 3, "what came last is there"
    assert control.allocator.bytes_of(name(0)) == used(control, 0) * BLOCK
    ended(control)


def test_what_others_have_used_less_lately_stays() -> None:
    """The quota's victims are the cache's own, although others are colder; and none of the pool's own are needed."""
    control = make_control(8, ratio=0.01)
    save(control, 1, keys(4, 1))
    rank(control, 0, blocks=4)
    save(control, 0, keys(4, 0))
    assert save(control, 0, keys(4, 0, 4)) == [STORED] * 4
    assert (there(control, keys(4, 1)), there(control, keys(4, 0)), there(control, keys(4, 0, 4))) == (4, 0, 4)
    ended(control)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tail_that_exceeds_the_quota_is_not_planned_and_its_head_stays(policy: str) -> None:
    control = make_control(20, policy=policy)
    rank(control, 0, blocks=6)
    save(control, 0, keys(4, 0))
    outcomes = save(control, 0, keys(10, 0))
    assert outcomes == [SaveOutcome.ALREADY_STORED] * 4 + [STORED] * 2 + [NO_SPACE] * 4
    assert save(control, 0, keys(4, 0, 10), chain=keys(14, 0)) == [NO_SPACE] * 4
    assert there(control, keys(14, 0)) == 6
    reasons = {control.index.miss_reason(key.tobytes()) for key in keys(4, 0, 10)}
    assert reasons == {MissReason.NEVER_STORED}
    ended(control)


def test_where_all_its_blocks_are_in_use_nothing_is_planned() -> None:
    control = make_control(20)
    rank(control, 0, blocks=4)
    save(control, 0, keys(4, 0))
    load = control.plan_load(keys(3, 0), np.arange(3, dtype=np.int32))
    assert save(control, 0, keys(2, 0, 4)) == [STORED, NO_SPACE]
    assert (used(control, 0), there(control, keys(6, 0))) == (4, 4)
    control.finish_load(load)
    assert save(control, 0, keys(2, 0, 6)) == [STORED] * 2
    ended(control)


def test_a_lower_quota_makes_the_cache_shrink_with_its_next_save_and_with_no_other() -> None:
    control = make_control(20)
    save(control, 0, keys(10, 0))
    save(control, 1, keys(2, 1))
    rank(control, 0, blocks=3)
    assert used(control, 0) == 10, "what was saved before the first quota counts, and stays until then"
    save(control, 1, keys(2, 1, 2))
    assert used(control, 0) == 10
    assert save(control, 0, keys(1, 0, 20)) == [STORED]
    assert used(control, 0) == 3
    assert there(control, keys(4, 1)) == 4
    rank(control, 0, blocks=1)
    assert save(control, 0, keys(1, 0, 20)) == [SaveOutcome.ALREADY_STORED]
    rank(control, 0, blocks=8)
    save(control, 0, keys(6, 0, 30))
    assert there(control, keys(6, 0, 30)) == 6
    ended(control)


def test_a_fetch_keeps_to_the_quota_too() -> None:
    control = make_control(20)
    rank(control, 0, blocks=5)
    save(control, 0, keys(2, 0))
    save(control, 1, keys(4, 1))
    fetch = control.plan_fetch(keys(8, 0, 10), np.zeros(8, np.uint8), name(0), chain=keys(2, 0))
    assert fetch.positions.tolist() == [0, 1, 2]
    for slot, offset in zip(fetch.slots.tolist()[:2], fetch.offsets.tolist(), strict=False):
        control.finish_fetch(slot, offset, 0, 0)
    control.abandon_fetch(int(fetch.slots[2]), int(fetch.offsets[2]), MissReason.DEADLINE)
    assert (used(control, 0), control.allocator.bytes_of(name(0))) == (4, 4 * BLOCK)
    assert there(control, keys(4, 1)) == 4
    ended(control)


def every_end(control: ControlPlane) -> dict[str, partial[object]]:
    """Ways in which the blocks of a cache leave the pool, or do not come."""
    zeros = partial(np.zeros, dtype=np.uint64)

    def lossy() -> None:
        planned = plan(control, 0, keys(3, 0, 50))
        bad = np.array([True, False, False])
        control.finish_save(planned, zeros(3), bad, ~bad, tried=np.ones(3, bool))

    def cleared() -> None:
        planned = plan(control, 0, keys(3, 0, 60))
        control.clear_cache(0, 1)
        control.finish_save(planned, zeros(3), np.zeros(3, bool), tried=np.zeros(3, bool))

    def invalidated() -> None:
        planned = plan(control, 0, keys(3, 0, 70))
        load = control.plan_load(keys(2, 0), np.arange(2, dtype=np.int32))
        control.invalidate(keys(100, 0))
        control.finish_save(planned, zeros(3))
        control.finish_load(load)

    def corrupt() -> None:
        load = control.plan_load(keys(2, 0), np.arange(2, dtype=np.int32))
        control.finish_load(load, np.zeros(load.pins.num_hits, bool))

    def crashed() -> None:
        planned = plan(control, 0, keys(3, 0, 80))
        control.index.abort(planned.slots, None)
        for offset in planned.transfer.offsets.tolist():
            control.free(offset)

    def cleared_whole() -> None:
        planned = plan(control, 0, keys(3, 0, 90))
        control.clear()
        control.finish_save(planned, zeros(3))

    calls = {"lossy": lossy, "corrupt": corrupt, "crashed": crashed, "invalidated": invalidated}
    return {n: partial(c) for n, c in {**calls, "cleared": cleared, "cleared whole": cleared_whole}.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_counted_exactly_whatever_becomes_of_blocks(policy: str) -> None:
    control = make_control(16, policy=policy)
    rank(control, 0, 1, blocks=6)
    for what, end in every_end(control).items():
        for turn in range(4):
            save(control, turn % 2, keys(4, turn % 2, 4 * turn))
        save(control, 0, keys(2, 0))
        end()
        assert control.allocator.bytes_of(name(0)) == used(control, 0) * BLOCK, what
        visible = there(control, keys(100, 0)) + there(control, keys(100, 1))
        assert control.allocator.allocated_bytes == visible * BLOCK, what
    save(control, 0, keys(4, 0))
    control.shrink(2 * BLOCK)
    assert control.allocator.bytes_of(name(0)) == used(control, 0) * BLOCK <= 2 * BLOCK
    ended(control)


def test_a_quota_that_holds_no_block_of_each_group_is_refused_and_nothing_changes() -> None:
    control = make_control(20)
    second = control.add_cache(GROUP_SIZES, GROUPS)
    rank(control, 0, 3, blocks=2)
    with pytest.raises(ConfigError, match=r"a block takes 4096 bytes, and the quota has 4095: raise owner\.quota"):
        control.rank(name(0), range(1), priority=0, quota_bytes=BLOCK - 1)
    with pytest.raises(ConfigError, match=r"one block of each of 2 groups of layers takes 6144 bytes"):
        control.rank("groups", range(second, second + 2), quota_bytes=6143)
    control.rank("groups", range(second, second + 2), quota_bytes=6144)
    save(control, 0, keys(8, 0))
    assert used(control, 0) == 2
    save(control, 1, keys(18, 1))
    assert there(control, keys(8, 0)) == 2, "it still has priority 3"
    ended(control)


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_of_a_cache_share_its_quota_and_the_first_blocks_get_it(policy: str) -> None:
    control = make_control(40, policy=policy)
    first = control.add_cache(GROUP_SIZES, GROUPS)
    control.rank("groups", range(first, first + 2), quota_bytes=6 * BLOCK)
    save(control, 0, keys(6, 0))
    hashes = keys(8, 9)
    every = np.concatenate([GROUPS.tagged(hashes, n) for n in range(2)])
    of_blocks = np.repeat(np.array([first, first + 1], np.uint8), 8)
    ids = np.arange(16, dtype=np.int32)
    planned = control.plan_save(every, ids, "groups", groups=of_blocks)
    assert planned.positions.tolist() == [0, 1, 2, 3, 4, 5], "six blocks of full attention take all of it"
    control.finish_save(planned, np.zeros(6, np.uint64))
    order = np.arange(16).reshape(2, 8).T.ravel()[:8]  # four blocks of each group: as much as the quota
    other = keys(8, 10)
    mixed = np.concatenate([GROUPS.tagged(other, n) for n in range(2)])[order]
    planned = control.plan_save(mixed, ids[:8], "groups", groups=of_blocks[order])
    assert planned.positions.tolist() == list(range(8))
    control.finish_save(planned, np.zeros(8, np.uint64))
    assert control.allocator.bytes_of("groups") <= 6 * BLOCK
    # An evicted block of full attention takes the window's block of the same token with it.
    save_more = control.plan_save(GROUPS.tagged(keys(1, 11), 0), ids[:1], "groups", groups=of_blocks[:1])
    control.finish_save(save_more, np.zeros(1, np.uint64))
    full, window = (control.index.contains_mask(GROUPS.tagged(other, n))[:4] for n in range(2))
    assert not (window & ~full).any()
    assert there(control, keys(6, 0)) == 6
    ended(control)


def test_a_tier_gets_what_a_quota_evicts_and_that_counts_until_it_is_written() -> None:
    control = make_control(40, ratio=0.4)
    rank(control, 0, blocks=10)
    taken: list[int] = []

    def take(evicted: Evicted) -> np.ndarray:
        taken.extend(evicted.offsets.tolist())
        return np.ones(len(evicted.offsets), bool)

    control.on_evicted = take
    save(control, 1, keys(10, 1))
    save(control, 0, keys(8, 0))
    assert save(control, 0, keys(3, 0, 8)) == [STORED] * 3
    assert (len(taken), used(control, 0)) == (5, 10), "five are on their way, and one gave its room"
    assert there(control, keys(11, 0)) == 5
    for offset in taken:
        control.free(offset)
    assert (used(control, 0), control.allocator.bytes_of(name(0))) == (5, 5 * BLOCK)
    assert there(control, keys(10, 1)) == 10
    control.on_evicted = None
    ended(control)
