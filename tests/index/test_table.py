"""The hash table and the slots under the index: crowded buckets, growth, reuse."""

import numpy as np
import pytest

from kvortex.config import EVICTION_POLICIES
from kvortex.index import MISS_REASONS, ARCPolicy, CacheIndex, LRUPolicy, S3FIFOPolicy, make_policy, pack_keys
from kvortex.index import table as steps
from kvortex.types import MissReason

HOMES = (29, 30, 31, 0, 1)  # of 32 buckets: runs that go over the end of the table


def crowded(count: int, rng: np.random.Generator) -> np.ndarray:
    """Keys whose homes lie side by side; a third share all 32 bits that the table keeps."""
    keys = rng.integers(0, 1 << 63, (count, 4), dtype=np.uint64)
    upper = np.where(np.arange(count) % 3 == 0, 0, rng.integers(0, 1 << 40, count)).astype(np.uint64)
    keys[:, 0] = upper << np.uint64(5) | rng.choice(HOMES, count).astype(np.uint64)
    return keys


def store(index: CacheIndex, keys: np.ndarray, first_offset: int = 0) -> np.ndarray:
    slots = index.reserve(keys).slots
    index.commit(slots, np.arange(len(keys)) + first_offset, 1, np.zeros(len(keys), np.uint64))
    return slots


@pytest.mark.parametrize("seed", range(8))
def test_deletion_closes_the_gap_in_crowded_and_wrapping_runs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = crowded(60, rng)
    index = CacheIndex(LRUPolicy(), ghost_entries=0, expected_entries=16)
    stored = np.zeros(60, np.bool_)
    for _ in range(300):
        chosen = int(rng.integers(60))
        if stored[chosen]:
            index.drop_keys(pack_keys([keys[chosen].tobytes()]), MissReason.CORRUPT)
            stored[chosen] = False
        elif stored.sum() < 16:
            store(index, keys[chosen : chosen + 1])
            stored[chosen] = True
        assert np.array_equal(index.contains_mask(keys), stored)
    assert index._table.capacity == 16
    assert np.count_nonzero(index._table.buckets) == stored.sum()


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_growth_in_the_middle_of_a_life_loses_nothing(policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = crowded(120, rng)
    index = CacheIndex(make_policy(policy), ghost_entries=5, expected_entries=2)
    store(index, keys[:10])
    reserved = index.reserve(keys[10:20]).slots
    pinned = index.pin(keys[:2]).slots
    index.drop(pinned[:1], MissReason.CORRUPT)
    store(index, keys[20:], first_offset=20)
    assert index._table.capacity == 128
    index.commit(reserved, np.arange(10, 20), 1, np.zeros(10, np.uint64))
    assert index.contains_mask(keys).tolist() == [False] + [True] * 119
    assert index.miss_reason(keys[0].tobytes()) is MissReason.CORRUPT
    assert index.unpin(pinned).tolist() == [0]
    assert sorted(index.evict(1000).offsets.tolist()) == list(range(1, 120))


def test_slots_are_used_again_and_ghosts_stay_bounded() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 63, (500, 4), dtype=np.uint64)
    index = CacheIndex(LRUPolicy(), ghost_entries=3, expected_entries=16)
    for n in range(500):
        store(index, keys[n : n + 1], first_offset=n)
        assert index.evict(1).offsets.tolist() == [n]
        if n % 7 == 0:  # gone a second time: its older place in the ring is void and must not cost it the newer one
            store(index, keys[n : n + 1], first_offset=n)
            index.evict(1)
    assert index._table.totals[steps.SLOTS_USED] == 4, "three ghosts and one that was stored"
    remembered = [index.miss_reason(key.tobytes()) is MissReason.EVICTED for key in keys]
    assert remembered == [False] * 497 + [True] * 3


def test_a_slot_is_not_used_again_while_it_is_pinned() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 63, (100, 4), dtype=np.uint64)
    index = CacheIndex(LRUPolicy(), ghost_entries=0, expected_entries=16)
    store(index, keys[:1], first_offset=77)
    (held,) = index.pin(keys[:1]).slots.tolist()
    index.drop_keys(pack_keys([keys[0].tobytes()]), MissReason.CORRUPT)
    for n in range(100):
        assert held not in store(index, keys[n : n + 1])
        index.evict(1)
    assert index.unpin(np.array([held])).tolist() == [77]
    assert held in store(index, keys[:1])


@pytest.mark.parametrize("busy", ["pinned", "reserved"])
@pytest.mark.parametrize("policy", [ARCPolicy, LRUPolicy, S3FIFOPolicy])
def test_busy_blocks_at_the_cold_end_are_met_once(busy: str, policy: type[LRUPolicy]) -> None:
    popped = 0

    class CountingPolicy(policy):  # type: ignore[misc, valid-type]
        def pop_coldest(self, target_bytes: int, nbytes: np.ndarray, pins: np.ndarray) -> np.ndarray:
            nonlocal popped
            slots = super().pop_coldest(target_bytes, nbytes, pins)
            popped += len(slots)
            return slots

    keys = np.random.default_rng(0).integers(0, 1 << 63, (1100, 4), dtype=np.uint64)
    index = CacheIndex(CountingPolicy())
    if busy == "pinned":
        store(index, keys[:1000])
        index.pin(keys[:1000])
    else:
        index.reserve(keys[:1000])
    for n in range(1000, 1100):
        store(index, keys[n : n + 1], first_offset=n)
        assert index.evict(1).offsets.tolist() == [n]
        assert index.evict(1).offsets.size == 0
    assert popped == 1100


def test_every_reason_has_a_number() -> None:
    assert set(MISS_REASONS) == set(MissReason)
    assert MISS_REASONS.index(MissReason.NEVER_STORED) == 0
