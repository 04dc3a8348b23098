"""Eviction order over prefix chains."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import ConfigError
from kvortex.index import LRUPolicy, make_policy

A, B, C, D = (letter * 32 for letter in (b"a", b"b", b"c", b"d"))


@pytest.fixture
def policy():
    return make_policy("lru")


def test_the_tail_of_a_chain_goes_first(policy):
    policy.insert([A, B, C])
    assert list(policy.victims()) == [C, B, A]


def test_an_older_chain_goes_before_a_newer_one(policy):
    policy.insert([A, B])
    policy.insert([C, D])
    assert list(policy.victims()) == [B, A, D, C]


def test_access_makes_a_chain_recent_and_keeps_its_root_last(policy):
    policy.insert([A, B])
    policy.insert([C, D])
    policy.access([A, B])
    assert list(policy.victims()) == [D, C, B, A]


def test_a_shared_head_is_warmer_than_both_tails(policy):
    policy.insert([A, B])
    policy.insert([A, C])
    assert list(policy.victims()) == [B, C, A]


def test_inserting_a_held_key_counts_as_access(policy):
    policy.insert([A])
    policy.insert([B])
    policy.insert([A])
    assert list(policy.victims()) == [B, A]
    assert len(policy) == 2


def test_keys_not_held_are_ignored(policy):
    policy.access([A])
    policy.remove(A)
    assert list(policy.victims()) == []
    assert len(policy) == 0


def test_remove(policy):
    policy.insert([A, B, C])
    policy.remove(B)
    assert list(policy.victims()) == [C, A]
    assert len(policy) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from(["insert", "access", "remove"]), st.lists(st.sampled_from("abcdef"), max_size=4))
    )
)
def test_lru_agrees_with_a_list(steps):
    policy, coldest_first = LRUPolicy(), []
    for step, letters in steps:
        keys = [letter.encode() for letter in letters]
        if step == "remove":
            for key in keys:
                policy.remove(key)
            coldest_first = [key for key in coldest_first if key not in keys]
        else:
            getattr(policy, step)(keys)
            for key in reversed(keys):
                if key in coldest_first:
                    coldest_first.remove(key)
                elif step == "access":
                    continue
                coldest_first.append(key)
        assert list(policy.victims()) == coldest_first
        assert len(policy) == len(coldest_first)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'mru'.*lru"):
        make_policy("mru")


def test_each_policy_is_new():
    first = make_policy("lru")
    first.insert([A])
    assert len(make_policy("lru")) == 0
