"""The disk tier's index against a plain model, and what threads may do to each other."""

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.testing.tier_conformance import key_of
from kvortex.tiers.store_index import Admission, IndexedBlock, StoreIndex

CAPACITY = 10


def indexed(nbytes: int = 1, last_use_s: float = 0.0, namespace: str = "ns") -> IndexedBlock:
    return IndexedBlock(namespace, nbytes, last_use_s, last_use_s)


def store(index: StoreIndex, key: bytes, nbytes: int = 1) -> list[bytes]:
    """Write a block whole; the evicted keys."""
    admission, victims = index.reserve(key, nbytes)
    assert admission is Admission.RESERVED
    for victim, _ in victims:
        index.removed(victim)
    index.commit(key, "ns")
    return [victim for victim, _ in victims]


STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "read", "delete", "evict"]), st.integers(0, 12), st.integers(1, 4)), max_size=60
)


@given(STEPS)
def test_the_index_is_an_lru_of_bytes(steps: list[tuple[str, int, int]]) -> None:
    index, model = StoreIndex(CAPACITY), dict[bytes, int]()  # a dict keeps the order of insertion
    for kind, number, nbytes in steps:
        key = key_of(number)
        if kind == "write" and key not in model:
            expected = []
            while sum(model.values()) + nbytes > CAPACITY:
                expected.append(next(iter(model)))
                del model[expected[-1]]
            model[key] = nbytes
            assert store(index, key, nbytes) == expected
        elif kind == "write":
            assert index.reserve(key, nbytes) == (Admission.STORED, [])
            model[key] = model.pop(key)
        elif kind == "read" and key in model:
            index.use(key, indexed(model[key]), set(), 0.0)
            model[key] = model.pop(key)
        elif kind == "delete":
            assert index.claim(key)
            index.removed(key)
            model.pop(key, None)
        elif kind == "evict":
            for victim, _ in index.evict(nbytes):
                index.removed(victim)
                nbytes -= model.pop(victim)
            assert nbytes <= 0 or not model
        assert index.used_bytes == sum(model.values())
        assert len(index) == len(model)
        assert index.stored_bytes([key_of(n) for n in range(13)]) == [model.get(key_of(n), 0) for n in range(13)]


def test_a_key_has_one_owner() -> None:
    index = StoreIndex(CAPACITY)
    store(index, key_of(0))
    [(victim, block)] = index.evict(1)
    assert victim == key_of(0)
    assert index.reserve(key_of(0), 1) == (Admission.PENDING, [])
    assert not index.claim(key_of(0))
    assert not index.use(key_of(0), indexed(), set(), 0.0)
    index.merge([(key_of(0), indexed())], set())
    assert len(index) == index.used_bytes == 0
    index.put_back(victim, block)
    assert index.stored_bytes([key_of(0)]) == [1]
    assert index.evicted_blocks == 0


def test_what_is_being_written_is_not_there_yet() -> None:
    index = StoreIndex(CAPACITY)
    assert index.reserve(key_of(0), 4)[0] is Admission.RESERVED
    assert index.stored_bytes([key_of(0)]) == [0]
    assert index.used_bytes == 4
    assert index.reserve(key_of(0), 4)[0] is Admission.PENDING
    assert not index.claim(key_of(0))
    assert index.reserve(key_of(1), 7)[0] is Admission.NO_SPACE  # what is being written is never a victim
    index.abort(key_of(0))
    assert index.used_bytes == 0


def test_what_was_removed_since_it_was_seen_does_not_come_back() -> None:
    index = StoreIndex(CAPACITY)
    store(index, key_of(0))
    with index.watching() as early, index.watching() as other:
        assert index.claim(key_of(0))
        index.removed(key_of(0))
    with index.watching() as late:
        pass
    assert early == other == {key_of(0)}
    assert late == set()
    assert not index.use(key_of(0), indexed(), early, 0.0)
    index.merge([(key_of(0), indexed()), (key_of(1), indexed())], other)
    assert index.stored_bytes([key_of(0), key_of(1)]) == [0, 1]


def test_a_missing_file_is_not_held_against_its_successor() -> None:
    index = StoreIndex(CAPACITY)
    store(index, key_of(0))
    known = index.get(key_of(0))
    index.claim(key_of(0))
    index.removed(key_of(0))
    store(index, key_of(0))
    assert not index.discard(key_of(0), known)
    assert index.stored_bytes([key_of(0)]) == [1]
    assert index.discard(key_of(0), index.get(key_of(0)))
    assert index.used_bytes == 0


def test_a_scan_sorts_by_last_use_and_drops_what_it_does_not_see() -> None:
    index = StoreIndex(100)
    index.begin_scan()
    index.merge([(key_of(n), indexed(last_use_s=time)) for n, time in enumerate((3.0, 1.0, 2.0))], set())
    index.end_scan()
    assert [key for key, _ in index.evict(2)] == [key_of(1), key_of(2)]
    store(index, key_of(5))
    index.begin_scan()
    store(index, key_of(6))  # written behind the scan's back
    index.merge([(key_of(5), indexed(last_use_s=9.0))], set())
    index.end_scan()
    assert index.stored_bytes([key_of(n) for n in (0, 5, 6)]) == [0, 1, 1]
    assert index.used_bytes == 2
    index.begin_scan()
    index.end_scan(unread={"ns"})
    assert index.used_bytes == 2


def test_a_file_that_changed_its_length_is_counted_anew() -> None:
    index = StoreIndex(100)
    store(index, key_of(0), 3)
    index.merge([(key_of(0), indexed(5))], set())
    assert index.stored_bytes([key_of(0)]) == [5]
    assert index.used_bytes == 5


def test_use_asks_for_a_touch_once_an_interval() -> None:
    index = StoreIndex(100)
    index.merge([(key_of(0), indexed(last_use_s=time.time() - 100))], set())
    assert index.use(key_of(0), indexed(), set(), 60.0)
    assert not index.use(key_of(0), indexed(), set(), 60.0)


@pytest.mark.parametrize("num_threads", [4])
def test_threads_leave_the_books_balanced(num_threads: int) -> None:
    index = StoreIndex(CAPACITY)
    files: set[bytes] = set()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            key = key_of(rng.randrange(20))
            if rng.random() < 0.6:
                admission, victims = index.reserve(key, rng.randrange(1, 4))
                if admission is Admission.RESERVED:
                    for victim, _ in victims:
                        files.discard(victim)
                        index.removed(victim)
                    files.add(key)
                    index.commit(key, "ns")
            elif rng.random() < 0.5:
                if index.claim(key):
                    files.discard(key)
                    index.removed(key)
            else:
                with index.watching() as changed:
                    if key in files:
                        index.use(key, indexed(), changed, 1e9)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [key_of(n) for n in range(20)]
    assert {key for key in keys if index.get(key) is not None} == files
    assert index.used_bytes == sum(index.stored_bytes(keys))


def test_what_is_too_much_to_remember_is_forgotten_from_the_least_recently_used() -> None:
    index = StoreIndex(1000)
    for number in range(6):
        index.reserve(bytes([number]), 10, float(number))
        index.commit(bytes([number]), "")
    index.touch([bytes([0])], [9.0], 0.0)
    index.forget_beyond(6)
    assert len(index) == 6
    index.forget_beyond(3)
    assert [key for key, _ in index.blocks()] == [bytes([0]), bytes([4]), bytes([5])]
    assert (index.used_bytes, index.evicted_blocks) == (30, 0)
    index.forget_beyond(0)
    assert len(index) == 0


# -- files that cannot be opened -------------------------------------------------------------------------


def test_a_condemned_file_is_not_offered_and_is_written_over() -> None:
    index = StoreIndex(CAPACITY)
    store(index, key_of(0), 3)
    index.condemn(key_of(0), indexed(3), set())
    assert index.stored_bytes([key_of(0)]) == [0]
    assert (index.used_bytes, len(index)) == (3, 1)
    assert index.touch([key_of(0)], [time.time() + 1e6], 0.0) == []
    assert store(index, key_of(0), 4) == []
    assert index.stored_bytes([key_of(0)]) == [4]
    assert index.used_bytes == 4
    assert index.reserve(key_of(0), 4) == (Admission.STORED, [])


def test_a_condemned_file_keeps_its_place_if_there_is_no_room_to_write_over_it() -> None:
    index = StoreIndex(CAPACITY)
    store(index, key_of(0), 3)
    store(index, key_of(1), 7)
    index.condemn(key_of(0), indexed(3), set())
    assert index.reserve(key_of(0), 4, used_s=1.0) == (Admission.NO_SPACE, [])
    assert index.used_bytes == CAPACITY
    assert index.stored_bytes([key_of(0), key_of(1)]) == [0, 7]
    assert [victim for victim, _ in index.evict(1)] == [key_of(0)]


def test_a_file_that_nobody_knew_is_condemned_with_its_length() -> None:
    index = StoreIndex(CAPACITY)
    index.condemn(key_of(0), indexed(3), set())
    assert (index.used_bytes, index.stored_bytes([key_of(0)])) == (3, [0])
    index.merge([(key_of(0), indexed(3))], set())  # a scan sees it again
    assert index.stored_bytes([key_of(0)]) == [0]
    index.merge([(key_of(0), indexed(5))], set())  # another process has written another one
    assert index.stored_bytes([key_of(0)]) == [5]
    index.condemn(key_of(0), indexed(3), set())  # and one more
    assert (index.used_bytes, index.stored_bytes([key_of(0)])) == (3, [0])
    index.use(key_of(0), indexed(3), set(), 1e9)  # it could be read
    assert (index.used_bytes, index.stored_bytes([key_of(0)])) == (3, [3])


def test_what_this_process_writes_while_it_is_read_is_not_condemned() -> None:
    index = StoreIndex(CAPACITY)
    with index.watching() as changed:
        index.reserve(key_of(0), 3)
        index.condemn(key_of(0), indexed(3), changed)
        assert (index.used_bytes, len(index)) == (3, 0)
        index.commit(key_of(0), "ns")
        index.condemn(key_of(0), indexed(3), changed)
        assert index.stored_bytes([key_of(0)]) == [3]
        index.claim(key_of(0))
        index.removed(key_of(0))
        index.condemn(key_of(0), indexed(3), changed)
    assert (index.used_bytes, len(index)) == (0, 0)


@pytest.mark.parametrize("one_length", [False, True])
def test_where_a_block_has_one_length_a_file_of_another_one_is_written_over(one_length: bool) -> None:
    index = StoreIndex(CAPACITY, one_length=one_length)
    index.merge([(key_of(0), indexed(3))], set())
    admission, _ = index.reserve(key_of(0), 4)
    assert admission is (Admission.RESERVED if one_length else Admission.STORED)
    assert index.reserve(key_of(1), 3)[0] is Admission.RESERVED
    index.commit(key_of(1), "ns")
    assert index.reserve(key_of(1), 3)[0] is Admission.STORED
