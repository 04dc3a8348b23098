"""Eviction order over slots."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.index import LRUPolicy

CAPACITY = 16
slots = st.lists(st.integers(0, CAPACITY - 1), max_size=6)


def array(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def make(capacity: int = CAPACITY) -> LRUPolicy:
    policy = LRUPolicy()
    policy.resize(capacity)
    return policy


def pop(policy: LRUPolicy, target: int, *, busy: tuple[int, ...] = ()) -> list[int]:
    nbytes, pins = np.ones(CAPACITY, dtype=np.int64), np.zeros(CAPACITY, dtype=np.int32)
    pins[list(busy)] = 1
    return policy.pop_coldest(target, nbytes, pins).tolist()


def test_a_chain_loses_its_tail_first() -> None:
    policy = make()
    policy.insert(array(1, 2, 3))
    policy.insert(array(4, 5))
    assert pop(policy, 4) == [3, 2, 1, 5]
    assert len(policy) == 1


def test_access_moves_what_is_in_the_order_only() -> None:
    policy = make()
    policy.insert(array(1, 2))
    policy.access(array(2, 9))
    assert len(policy) == 2
    assert pop(policy, 9) == [1, 2]


def test_busy_slots_are_taken_out_but_do_not_count() -> None:
    policy = make()
    policy.insert(array(1, 2, 3))
    assert pop(policy, 1, busy=(3,)) == [3, 2]
    assert pop(policy, 0) == []


def test_growth_keeps_the_order() -> None:
    policy = make(4)
    policy.insert(array(1, 2, 3))
    policy.resize(CAPACITY)
    policy.insert(array(12))
    assert pop(policy, 9) == [3, 2, 1, 12]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["insert", "access", "remove", "pop"]), slots, st.integers(0, 3)), max_size=30)
)
def test_it_agrees_with_a_list(steps: list[tuple[str, list[int], int]]) -> None:
    policy, model = make(), []
    for verb, chain, target in steps:
        if verb == "pop":
            popped = pop(policy, target)
            assert popped == model[:target]
            del model[:target]
            continue
        getattr(policy, verb)(array(*chain))
        for slot in reversed(chain):
            known = slot in model
            if known:
                model.remove(slot)
            if verb == "insert" or (verb == "access" and known):
                model.append(slot)
        assert len(policy) == len(model)
