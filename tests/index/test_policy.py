"""The eviction policies: each against its naive model, what all have in common, and what is special in each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.config import EVICTION_POLICIES
from kvortex.errors import ConfigError
from kvortex.index import ARCPolicy, EvictionPolicy, LRUPolicy, S3FIFOPolicy, make_policy
from tests.index.naive_policies import NAIVE

CAPACITY = 16
SIZES = {slot: 1 + 3 * (slot % 4) for slot in range(CAPACITY)}
every_policy = pytest.mark.parametrize("name", EVICTION_POLICIES)
adaptive = pytest.mark.parametrize("name", ["arc", "s3fifo"])
chains = st.lists(st.integers(0, CAPACITY - 1), max_size=6)


def array(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def make(name: str = "lru", capacity: int = CAPACITY) -> EvictionPolicy:
    policy = make_policy(name)
    policy.resize(capacity)
    return policy


def pop(policy: EvictionPolicy, target: int, *, busy: tuple[int, ...] = (), capacity: int = CAPACITY) -> list[int]:
    """Of blocks of one byte."""
    nbytes, pins = np.ones(capacity, dtype=np.int64), np.zeros(capacity, dtype=np.int32)
    pins[list(busy)] = 1
    return policy.pop_coldest(target, nbytes, pins).tolist()


def store(policy: EvictionPolicy, *slots: int, evicted: bool = False, nbytes: int = 1) -> None:
    """What a save does: reserved, then committed."""
    policy.insert(array(*slots), np.full(len(slots), evicted))
    policy.weigh(array(*slots), np.full(len(slots), nbytes, np.int64))


# -- all of them


def test_names() -> None:
    classes = {"arc": ARCPolicy, "lru": LRUPolicy, "s3fifo": S3FIFOPolicy}
    assert {name: type(make_policy(name)) for name in EVICTION_POLICIES} == classes
    with pytest.raises(ConfigError, match="'mru'; known: arc, lru, s3fifo"):
        make_policy("mru")


@every_policy
def test_a_chain_loses_its_tail_first(name: str) -> None:
    policy = make(name)
    store(policy, 1, 2, 3)
    store(policy, 4, 5)
    assert pop(policy, 4) == [3, 2, 1, 5]
    assert len(policy) == 1


@every_policy
def test_busy_slots_are_taken_out_but_do_not_count(name: str) -> None:
    policy = make(name)
    store(policy, 1, 2, 3)
    assert pop(policy, 1, busy=(3,)) == [3, 2]
    assert pop(policy, 0) == []
    policy.insert(array(3))
    assert sorted(pop(policy, 9)) == [1, 3]
    assert len(policy) == 0


@every_policy
def test_growth_keeps_the_order(name: str) -> None:
    policy = make(name, 4)
    store(policy, 1, 2, 3)
    policy.resize(CAPACITY)
    store(policy, 12)
    assert pop(policy, 9) == [3, 2, 1, 12]


@every_policy
@settings(max_examples=300)
@given(data=st.data())
def test_it_agrees_with_its_naive_model(name: str, data: st.DataObject) -> None:
    """Any slots in any order, whether they make sense as chains or not."""
    policy, model = make(name), NAIVE[name]()
    nbytes = np.array([SIZES[slot] for slot in range(CAPACITY)], np.int64)
    for _ in range(data.draw(st.integers(1, 40))):
        verb = data.draw(st.sampled_from(["insert", "insert", "access", "weigh", "remove", "pop", "pop"]))
        slots = data.draw(chains)
        if verb == "insert":
            evicted = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
            policy.insert(array(*slots), np.array(evicted, np.bool_))
            model.insert(slots, evicted)
        elif verb == "weigh":
            sizes = [SIZES[slot] for slot in slots]
            policy.weigh(array(*slots), np.array(sizes, np.int64))
            model.weigh(slots, sizes)
        elif verb == "pop":
            target, pins = data.draw(st.integers(0, 20)), np.zeros(CAPACITY, np.int32)
            pins[slots[:3]] = 1
            popped = policy.pop_coldest(target, nbytes, pins).tolist()
            assert popped == model.pop_coldest(target, SIZES, set(slots[:3]))
            assert len(policy) == 0 or sum(SIZES[s] for s in popped if not pins[s]) >= target
        else:
            getattr(policy, verb)(array(*slots))
            getattr(model, verb)(slots)
        assert len(policy) == len(model)


@every_policy
@settings(max_examples=200)
@given(data=st.data())
def test_nothing_is_left_behind_a_hole(name: str, data: st.DataObject) -> None:
    """With true prefix chains, what is held is closed under prefixes after any eviction."""
    parents = data.draw(st.lists(st.integers(-1, 14), min_size=CAPACITY, max_size=CAPACITY))
    parents = [parent if parent < slot else slot - 1 for slot, parent in enumerate(parents)]
    policy, held, gone = make(name), set(), set()
    nbytes = np.array([SIZES[slot] for slot in range(CAPACITY)], np.int64)
    for _ in range(data.draw(st.integers(1, 40))):
        chain = [data.draw(st.integers(0, CAPACITY - 1))]
        while parents[chain[0]] >= 0:
            chain.insert(0, parents[chain[0]])
        known = len([slot for slot in chain if slot in held])
        assert set(chain[:known]) <= held
        policy.access(array(*chain[:known]))
        policy.insert(array(*chain), np.array([slot in gone for slot in chain]))
        policy.weigh(array(*chain), nbytes[chain])
        held.update(chain)
        popped = policy.pop_coldest(data.draw(st.integers(0, 25)), nbytes, np.zeros(CAPACITY, np.int32)).tolist()
        held.difference_update(popped)
        gone = (gone | set(popped)) - held
        assert all(parents[slot] in held for slot in held if parents[slot] >= 0)


# -- LRU


def test_access_moves_what_is_in_the_order_only() -> None:
    policy = make()
    policy.insert(array(1, 2))
    policy.access(array(2, 9))
    assert len(policy) == 2
    assert pop(policy, 9) == [1, 2]


# -- those that tell reuse from recency


def survivors_of_a_scan(name: str) -> int:
    """Of 50 blocks that two requests used, how many are left after 500 that one request each used."""
    policy = make(name, 1024)
    for _ in range(2):
        store(policy, *range(50))
    for number in range(100, 600):
        store(policy, number)
        policy.access(array(number))  # the request's end: no reuse
        if len(policy) > 100:
            pop(policy, 1, capacity=1024)
    held = len(policy)
    policy.remove(np.arange(50))
    return held - len(policy)


@adaptive
def test_a_scan_does_not_wash_out_what_is_used_again(name: str) -> None:
    assert survivors_of_a_scan(name) == 50


def test_a_scan_does_wash_it_out_of_lru() -> None:
    assert survivors_of_a_scan("lru") == 0


@adaptive
def test_a_request_uses_a_block_once_however_often_it_names_it(name: str) -> None:
    """Saved and touched, against loaded as well by a second request."""
    policy = make(name)
    for slot in (0, 1):
        store(policy, slot)
        policy.access(array(slot))
    policy.access(array(0))
    store(policy, 0)
    store(policy, 2)
    assert pop(policy, 2) == [1, 2]


@adaptive
def test_a_load_alone_is_a_use(name: str) -> None:
    policy = make(name)
    store(policy, 0)
    store(policy, 1)
    for _ in range(2):
        policy.access(array(0))
    store(policy, 2)
    assert pop(policy, 2) == [1, 2]


@adaptive
def test_what_comes_back_after_its_eviction_is_taken_for_reused(name: str) -> None:
    policy = make(name)
    store(policy, 0, 1, 2, 3)
    assert pop(policy, 1) == [3]
    store(policy, 3, evicted=True)
    store(policy, 4)
    assert 3 not in pop(policy, 3)


@adaptive
def test_another_block_in_the_slot_of_an_evicted_one_is_new(name: str) -> None:
    policy = make(name)
    store(policy, 0, 1, 2, 3)
    assert pop(policy, 1) == [3]
    store(policy, 3, evicted=False)
    store(policy, 3)
    store(policy, 4)
    store(policy, 4)
    store(policy, 3)
    fresh = make(name)
    store(fresh, 0, 1, 2)
    for slot in (3, 3, 4, 4, 3):
        store(fresh, slot)
    assert pop(policy, 9) == pop(fresh, 9)


@adaptive
def test_parts_of_a_chain_become_one_when_it_is_touched(name: str) -> None:
    """Planned in parts, used again in its first part only: the rest still goes before it."""
    policy = make(name)
    store(policy, 0, 1)
    store(policy, 2, 3)
    policy.access(array(0, 1, 2, 3))
    store(policy, 0, 1)
    assert pop(policy, 4) == [3, 2, 1, 0]


def test_s3_fifo_keeps_the_small_queue_at_a_tenth_of_the_bytes() -> None:
    policy = make("s3fifo", 64)
    for slot in range(30):  # 90 bytes, used again
        store(policy, slot, nbytes=3)
        policy.insert(array(slot))
    for slot in range(40, 49):
        store(policy, slot)
    nbytes, pins = np.array([3] * 30 + [1] * 34), np.zeros(64, np.int32)
    assert policy.pop_coldest(1, nbytes, pins).tolist() == [0], "9 of 99 bytes are less than a tenth"
    store(policy, 49)
    assert policy.pop_coldest(1, nbytes, pins).tolist() == [40], "10 of 97 are more"


def test_s3_fifo_passes_over_a_block_once_for_each_of_three_uses() -> None:
    policy = make("s3fifo")
    for _ in range(10):
        store(policy, 0)
    popped = []
    for slot in range(1, 6):  # in the main queue behind it, without further uses
        store(policy, slot)
        store(policy, slot)
        popped += pop(policy, 1)
    assert popped == [1, 2, 3, 0, 4]


def test_arc_moves_its_line_towards_what_is_missed() -> None:
    """Hits in B1 make the target of T1 larger, so T2 loses a block."""
    policy = make("arc")
    for slot in (0, 1, 2, 3):
        store(policy, slot)
        store(policy, slot)
    store(policy, 4, 5)
    assert pop(policy, 2) == [5, 4], "the target of T1 begins at 0"
    store(policy, 4, 5, evicted=True)
    store(policy, 6)
    assert pop(policy, 1) == [0], "one byte may now stay in T1"
