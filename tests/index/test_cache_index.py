"""The index's promises: nothing visible early, nothing pinned evicted, every location back exactly once."""

import threading
import time

import numpy as np
import pytest

from kvortex.errors import ConfigError, EngineStateError, InvalidHashError
from kvortex.index import CacheIndex, Entry, LRUPolicy
from kvortex.types import MissReason, SaveOutcome


def key(n):
    return n.to_bytes(32, "big")


def keys(*numbers):
    return [key(n) for n in numbers]


@pytest.fixture
def index():
    return CacheIndex(LRUPolicy(), ghost_entries=4)


def store(index, *numbers, nbytes=10):
    """Reserve and commit; a block's location is its number."""
    chain = keys(*numbers)
    assert index.reserve(chain) == [None] * len(chain)
    assert index.commit(chain, list(numbers), [nbytes] * len(chain), [n + 100 for n in numbers]) == []


class TestReserve:
    def test_reserved_blocks_are_invisible_until_committed(self, index):
        assert index.reserve(keys(1)) == [None]
        assert index.prefix_length(keys(1)) == 0
        assert not index.contains_mask(keys(1)).any()
        assert index.pin(keys(1)) == [MissReason.PENDING]
        assert (len(index), index.num_pending, index.committed_bytes) == (0, 1, 0)
        index.commit(keys(1), ["here"], [10], [7])
        assert index.prefix_length(keys(1)) == 1
        assert (len(index), index.num_pending, index.committed_bytes) == (1, 0, 10)

    def test_outcomes(self, index):
        store(index, 1)
        index.reserve(keys(2))
        expected = [SaveOutcome.ALREADY_STORED, SaveOutcome.PENDING, None, SaveOutcome.PENDING]
        assert index.reserve(keys(1, 2, 3, 3)) == expected
        assert index.num_pending == 2

    @pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33), "x" * 32, bytearray(32)])
    def test_bad_keys_reserve_nothing(self, index, bad):
        with pytest.raises(InvalidHashError):
            index.reserve([key(1), bad])
        assert index.num_pending == 0

    def test_reserving_counts_as_access(self, index):
        store(index, 1)
        store(index, 2)
        index.reserve(keys(1))
        assert index.evict(1) == [2]


class TestCommitAndAbort:
    @pytest.mark.parametrize("chain", [(1, 9), (1, 1)], ids=["not reserved", "twice"])
    @pytest.mark.parametrize("verb", ["commit", "abort"])
    def test_all_or_nothing(self, index, verb, chain):
        index.reserve(keys(1))
        arguments = ([1, 2], [10, 10], [0, 0]) if verb == "commit" else (MissReason.TRANSFER_FAILED,)
        with pytest.raises(EngineStateError):
            getattr(index, verb)(keys(*chain), *arguments)
        assert (len(index), index.num_pending) == (0, 1)
        index.commit(keys(1), [1], [10], [0])

    @pytest.mark.parametrize("shorter", [0, 1, 2])
    def test_lists_must_match(self, index, shorter):
        index.reserve(keys(1))
        lists = [[1], [10], [0]]
        lists[shorter] = []
        with pytest.raises(InvalidHashError):
            index.commit(keys(1), *lists)
        assert len(index) == 0

    def test_a_committed_block_cannot_be_committed_again(self, index):
        store(index, 1)
        with pytest.raises(EngineStateError):
            index.commit(keys(1), [2], [10], [0])

    @pytest.mark.parametrize("reason", [None, MissReason.TRANSFER_FAILED])
    def test_abort_frees_the_key_and_remembers_why(self, index, reason):
        index.reserve(keys(1))
        index.abort(keys(1), reason)
        assert index.miss_reason(key(1)) == (reason or MissReason.NEVER_STORED)
        assert index.reserve(keys(1)) == [None]
        assert index.evict(1) == []

    def test_abort_without_reason_keeps_the_older_one(self, index):
        store(index, 1)
        index.evict(1)
        index.reserve(keys(1))
        index.abort(keys(1), None)
        assert index.miss_reason(key(1)) is MissReason.EVICTED


class TestReads:
    def test_prefix_ends_at_the_first_hole(self, index):
        store(index, 0, 1, 3)
        assert index.prefix_length(keys(0, 1, 2, 3)) == 2
        assert index.prefix_length(keys(0, 1, 3)) == 3
        assert index.prefix_length([]) == 0
        mask = index.contains_mask(keys(0, 2, 3, 3))
        assert mask.dtype == np.bool_
        assert mask.tolist() == [True, False, True, True]
        assert index.contains_mask([]).shape == (0,)

    def test_miss_reasons(self, index):
        assert index.miss_reason(key(1)) is MissReason.NEVER_STORED
        index.reserve(keys(1))
        assert index.miss_reason(key(1)) is MissReason.PENDING
        index.commit(keys(1), [1], [10], [0])
        index.drop(key(1), MissReason.CORRUPT)
        assert index.miss_reason(key(1)) is MissReason.CORRUPT

    def test_commit_forgets_the_old_reason(self, index):
        store(index, 1)
        index.drop(key(1), MissReason.CORRUPT)
        store(index, 1)
        index.reserve(keys(2))
        assert list(index._ghosts) == []

    @pytest.mark.parametrize("limit", [0, 3])
    def test_reasons_are_bounded_and_the_oldest_goes_first(self, limit):
        index = CacheIndex(LRUPolicy(), ghost_entries=limit)
        for n in (*range(10), 7):
            store(index, n)
            index.drop(key(n), MissReason.CORRUPT)
        remembered = [n for n in range(10) if index.miss_reason(key(n)) is MissReason.CORRUPT]
        assert remembered == [7, 8, 9][:limit]
        store(index, 8)
        assert len(index._ghosts) <= limit

    def test_negative_bound(self):
        with pytest.raises(ConfigError):
            CacheIndex(LRUPolicy(), ghost_entries=-1)


class TestPins:
    def test_pin_gives_the_entry(self, index):
        store(index, 1, nbytes=20)
        entry, miss = index.pin(keys(1, 2))
        assert isinstance(entry, Entry)
        assert (entry.key, entry.location, entry.nbytes, entry.digest) == (key(1), 1, 20, 101)
        assert miss is MissReason.NEVER_STORED

    def test_pinned_blocks_are_not_evicted_until_the_last_pin(self, index):
        store(index, 1)
        (first,), (second,) = index.pin(keys(1)), index.pin(keys(1))
        index.unpin([first])
        assert index.evict(1) == []
        index.unpin([second])
        assert index.evict(1) == [1]

    def test_pin_counts_as_access(self, index):
        store(index, 1)
        store(index, 2)
        index.unpin(index.pin(keys(1)))
        assert index.evict(1) == [2]

    def test_one_pin_too_few_takes_none(self, index):
        store(index, 1, 2)
        entries = index.pin(keys(1, 2))
        with pytest.raises(EngineStateError):
            index.unpin([*entries, entries[0]])
        assert [entry.pins for entry in entries] == [1, 1]
        assert index.evict(100) == []

    def test_a_key_pinned_twice_is_unpinned_twice_in_one_call(self, index):
        store(index, 1)
        entries = index.pin(keys(1, 1))
        index.drop(key(1), MissReason.CORRUPT)
        assert index.unpin(entries) == [1]


class TestDrop:
    def test_unpinned_comes_back_now(self, index):
        store(index, 1)
        assert index.drop(key(1), MissReason.CORRUPT) == 1
        assert index.drop(key(1), MissReason.CORRUPT) is None
        assert (index.prefix_length(keys(1)), index.committed_bytes, index.evict(1)) == (0, 0, [])

    def test_pinned_vanishes_now_and_comes_back_with_the_last_pin(self, index):
        store(index, 1)
        entries = index.pin(keys(1, 1))
        assert index.drop(key(1), MissReason.CORRUPT) is None
        assert index.prefix_length(keys(1)) == 0
        assert index.miss_reason(key(1)) is MissReason.CORRUPT
        assert index.unpin(entries[:1]) == []
        assert index.unpin(entries[1:]) == [1]

    def test_a_replaced_entry_is_not_dropped(self, index):
        store(index, 1)
        (old,) = index.pin(keys(1))
        index.drop(key(1), MissReason.CORRUPT, expected=old)
        index.reserve(keys(1))
        index.commit(keys(1), ["new"], [10], [0])
        assert index.drop(key(1), MissReason.CORRUPT, expected=old) is None
        assert index.prefix_length(keys(1)) == 1
        assert index.unpin([old]) == [1]
        (new,) = index.pin(keys(1))
        assert new.location == "new"
        index.unpin([new])
        assert index.drop(key(1), MissReason.CORRUPT, expected=new) == "new"

    def test_a_reservation_is_not_dropped(self, index):
        index.reserve(keys(1))
        assert index.drop(key(1), MissReason.CORRUPT) is None
        index.commit(keys(1), [1], [10], [0])


class TestEvict:
    def test_tail_first_and_no_more_than_asked(self, index):
        store(index, 1, 2, 3, 4)
        assert index.evict(0) == []
        assert index.evict(11) == [4, 3]
        assert index.miss_reason(key(4)) is MissReason.EVICTED
        assert (len(index), index.committed_bytes, index.evicted_blocks) == (2, 20, 2)
        assert index.evict(1000) == [2, 1]

    def test_a_save_committed_in_batches_still_loses_its_tail_first(self, index):
        chain = keys(1, 2, 3, 4)
        index.reserve(chain)
        index.commit(chain[:2], [1, 2], [10, 10], [0, 0])
        index.commit(chain[2:], [3, 4], [10, 10], [0, 0])
        assert index.evict(1000) == [4, 3, 2, 1]

    def test_a_grown_chain_still_loses_its_tail_first(self, index):
        store(index, 1, 2)
        index.reserve(keys(1, 2, 3))
        index.commit(keys(3), [3], [10], [0])
        assert index.evict(1000) == [3, 2, 1]

    def test_reserved_blocks_are_passed_over(self, index):
        index.reserve(keys(1))
        store(index, 2)
        assert index.evict(1000) == [2]
        index.commit(keys(1), [1], [10], [0])
        assert index.evict(1000) == [1]

    @pytest.mark.parametrize("busy", ["pinned", "reserved"])
    def test_busy_blocks_at_the_cold_end_are_met_once(self, busy):
        yielded = 0

        class CountingPolicy(LRUPolicy):
            def victims(self):
                nonlocal yielded
                for victim in super().victims():
                    yielded += 1
                    yield victim

        index = CacheIndex(CountingPolicy())
        if busy == "pinned":
            store(index, *range(1000))
            index.pin(keys(*range(1000)))
        else:
            index.reserve(keys(*range(1000)))
        for n in range(1000, 1100):
            store(index, n)
            assert index.evict(1) == [n]
            assert index.evict(1) == []
        assert yielded == 1100

    def test_blocks_passed_over_come_back_into_the_order(self, index):
        store(index, 1, 2)
        entries = index.pin(keys(1, 2))
        assert index.evict(1000) == []
        index.pin(keys(1))
        index.reserve(keys(1, 2))
        index.unpin(entries)
        store(index, 3)
        assert index.evict(1000) == [2, 3]
        index.unpin(entries[:1])
        assert index.evict(1000) == [1]

    def test_a_parked_block_that_is_dropped_and_stored_anew_keeps_one_place(self, index):
        store(index, 1)
        (old,) = index.pin(keys(1))
        index.evict(1)
        index.drop(key(1), MissReason.CORRUPT)
        index.reserve(keys(1))
        index.evict(1)
        assert index.unpin([old]) == [1]
        assert list(index._policy.victims()) == [], "still reserved: the old pin says nothing about it"
        index.commit(keys(1), ["new"], [10], [0])
        assert index.evict(1000) == ["new"]


class TestClear:
    def test_forgets_blocks_and_reasons(self, index):
        store(index, 1, 2, 3)
        index.drop(key(1), MissReason.CORRUPT)
        (pinned,) = index.pin(keys(2))
        assert index.clear() == [3]
        assert (len(index), index.committed_bytes) == (0, 0)
        assert {index.miss_reason(key(n)) for n in (1, 2, 3)} == {MissReason.NEVER_STORED}
        assert index.unpin([pinned]) == [2]
        store(index, 1, 2, 3)
        assert index.evict(1000) == [3, 2, 1]

    def test_an_orphaned_reservation_never_becomes_visible(self, index):
        index.reserve(keys(1, 2))
        index.evict(1)
        index.clear()
        assert index.reserve(keys(1)) == [SaveOutcome.PENDING]
        assert index.commit(keys(1), [1], [10], [0]) == [1]
        index.abort(keys(2), MissReason.TRANSFER_FAILED)
        assert index.miss_reason(key(2)) is MissReason.NEVER_STORED
        assert (len(index), index.num_pending, index.evict(1000)) == (0, 0, [])
        store(index, 1, 2)
        assert index.prefix_length(keys(1, 2)) == 2


def test_readers_never_raise_and_never_see_uncommitted_blocks():
    """One thread stores and removes; readers look without a lock all the while."""
    index = CacheIndex(LRUPolicy(), ghost_entries=50)
    stable, moving, never = keys(*range(100)), keys(*range(1000, 1400)), keys(*range(9000, 9100))
    store(index, *range(100))
    index.pin(stable)
    index.reserve(never)
    stop, failures, reads = threading.Event(), [], [0, 0, 0]

    def read(reader):
        try:
            while not stop.is_set():
                assert index.prefix_length(stable + never) == 100
                assert not index.contains_mask(never + moving)[:100].any()
                assert index.miss_reason(never[0]) is MissReason.PENDING
                # Once stored, a moving key is there, reserved again, or remembered: never unknown.
                assert index.miss_reason(moving[0]) in (MissReason.PENDING, MissReason.EVICTED)
                reads[reader] += 1
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    store(index, *range(1000, 1010))
    readers = [threading.Thread(target=read, args=(n,)) for n in range(3)]
    for thread in readers:
        thread.start()
    deadline = time.monotonic() + 1.0
    rounds = 0
    while (time.monotonic() < deadline or not all(reads)) and not failures:
        index.evict(1 << 40) if rounds % 2 else index.evict(100)
        owned = [k for k, outcome in zip(moving[:40], index.reserve(moving[:40]), strict=True) if outcome is None]
        index.commit(owned, owned, [10] * len(owned), [0] * len(owned))
        rounds += 1
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures
    assert rounds > 10


def test_concurrent_saves_of_one_block_have_one_owner():
    index = CacheIndex(LRUPolicy())
    owners, barrier = [], threading.Barrier(4)

    def save():
        for n in range(200):
            barrier.wait()
            if index.reserve(keys(n)) == [None]:
                owners.append(n)
                index.commit(keys(n), [n], [10], [0])

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(owners) == list(range(200))
    assert index.committed_bytes == 2000
