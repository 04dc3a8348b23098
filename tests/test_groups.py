"""Groups of layers: what each kind of KV needs, against the same rules told token by token."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvortex.errors import ConfigError
from kvortex.groups import GroupSet, KVGroup, KVKind, Match, MissingKV
from kvortex.types import MAX_GROUPS, MissReason

FULL, WINDOW, CHUNK, STATE = KVKind.FULL, KVKind.WINDOW, KVKind.CHUNK, KVKind.STATE


def group(name: str, block_size: int = 4, kind: KVKind = FULL, reach: int = 0, **options: Any) -> KVGroup:
    return KVGroup(name, (f"layer of {name}",), block_size, kind, reach, **options)


def match(groups: GroupSet, masks: Sequence[Sequence[int]], num_tokens: int) -> Match:
    return groups.longest_match([np.array(mask, dtype=bool) for mask in masks], num_tokens)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": ""}, "needs a name"),
        ({"block_size": 0}, "'a': block_size is 0; it counts tokens, pass 1 or more"),
        ({"kind": "sparse"}, "'a': kind is 'sparse'; it is one of full, window, chunk, state"),
        ({"kind": WINDOW}, "'a': reach is 0; pass the tokens of a window"),
        ({"kind": CHUNK, "reach": -1}, "'a': reach is -1; pass the tokens of a chunk"),
        ({"kind": FULL, "reach": 8}, "'a': full attention has no reach, leave it out"),
        ({"kind": STATE, "reach": 8}, "'a': state attention has no reach, leave it out"),
    ],
)
def test_a_group_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KVGroup(**{"name": "a", "layers": ("0",), "block_size": 4, **options})


def test_a_group_takes_a_kinds_name_and_any_sequence_of_layers() -> None:
    made = KVGroup("a", ["0", "1"], 4, "window", 9)  # type: ignore[arg-type]
    assert made.kind is WINDOW
    assert made.layers == ("0", "1")
    assert made == KVGroup("a", ("0", "1"), 4, WINDOW, 9)
    assert hash(made) == hash(KVGroup("a", ("0", "1"), 4, WINDOW, 9))
    with pytest.raises(FrozenInstanceError):
        made.reach = 10  # type: ignore[misc]


def test_states_and_exact_groups_are_never_packed() -> None:
    assert group("a").may_pack
    assert group("a", kind=WINDOW, reach=8).may_pack
    assert group("a", kind=CHUNK, reach=8).may_pack
    assert not group("a", kind=STATE).may_pack
    assert not group("a", exact=True).may_pack


@pytest.mark.parametrize(
    ("made", "num_tokens", "blocks"),
    [
        (group("a"), 0, []),
        (group("a"), 12, [0, 1, 2]),
        (group("a", kind=STATE), 0, []),
        (group("a", kind=STATE), 12, [2]),
        (group("a", kind=WINDOW, reach=1), 12, []),  # a query sees itself only
        (group("a", kind=WINDOW, reach=2), 12, [2]),
        (group("a", kind=WINDOW, reach=5), 12, [2]),  # tokens 8 to 11
        (group("a", kind=WINDOW, reach=6), 12, [1, 2]),  # tokens 7 to 11
        (group("a", kind=WINDOW, reach=99), 12, [0, 1, 2]),
        (group("a", kind=CHUNK, reach=8), 8, []),  # a new chunk begins
        (group("a", kind=CHUNK, reach=8), 12, [2]),
        (group("a", kind=CHUNK, reach=6), 8, [1]),  # tokens 6 and 7
        (group("a", kind=CHUNK, reach=6), 4, [0]),
        (group("a", kind=CHUNK, reach=3), 12, []),
        (group("a", kind=CHUNK, reach=99), 12, [0, 1, 2]),
    ],
)
def test_what_is_needed(made: KVGroup, num_tokens: int, blocks: list[int]) -> None:
    assert list(made.needed(num_tokens)) == blocks


@pytest.mark.parametrize(
    ("groups", "hash_block_size", "says"),
    [
        ([], 4, f"1 to {MAX_GROUPS} groups of layers, not 0"),
        ([group(str(n)) for n in range(MAX_GROUPS + 1)], 4, f"not {MAX_GROUPS + 1}"),
        ([group("a"), KVGroup("a", ("0",), 4)], 4, "group 'a' is named twice"),
        ([KVGroup("a", ("0", "1"), 4), KVGroup("b", ("1",), 4)], 4, "layer '1' is named twice"),
        ([KVGroup("a", ("0", "0"), 4)], 4, "layer '0' is named twice"),
        ([group("a", 8), group("b", 12)], 8, "'b' has blocks of 12 tokens.*8 tokens of a block hash: hash smaller"),
        ([group("a", 4)], 8, "'a' has blocks of 4 tokens"),
        ([group("a", 4)], 0, "hash_block_size is 0; it counts tokens, pass 1 or more"),
        ([group("a", 4)], -4, "hash_block_size is -4"),
    ],
)
def test_a_set_that_cannot_be(groups: list[KVGroup], hash_block_size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GroupSet(groups, hash_block_size)


def test_a_set() -> None:
    groups = GroupSet((made for made in [group("w", 8, WINDOW, 9), group("f", 12), group("g", 6)]), 2)
    assert [made.name for made in groups.groups] == ["w", "f", "g"]
    assert len(groups) == 3
    assert not groups.is_single
    assert groups.alignment == 24
    assert groups.anchor == 1, "the first with full attention"
    assert [groups.number_of(name) for name in ("w", "f", "g")] == [0, 1, 2]
    assert [groups.hashes_a_block(number) for number in range(3)] == [4, 6, 3]
    with pytest.raises(ConfigError, match=r"no group of layers is named 'x'; there are w, f, g"):
        groups.number_of("x")


def test_a_set_of_one_and_of_most() -> None:
    assert GroupSet([group("a")], 4).is_single
    assert len(GroupSet([group(str(n)) for n in range(MAX_GROUPS)], 4)) == MAX_GROUPS


def test_without_full_attention_the_first_group_is_the_anchor() -> None:
    assert GroupSet([group("s", kind=STATE), group("w", kind=WINDOW, reach=8)], 4).anchor == 0


def test_tags() -> None:
    groups = GroupSet([group("w", kind=WINDOW, reach=8), group("f"), group("s", kind=STATE)], 4)
    assert groups.tags.shape == (3, 4)
    assert groups.tags.dtype == np.uint64
    assert groups.tags[1].tolist() == [0, 0, 0, 0]
    for number in (0, 2):
        assert groups.tags[number].tobytes() == hashlib.sha256(b"kvortex.group.v1 %d" % number).digest()
    with pytest.raises(ValueError, match="read-only"):
        groups.tags[0, 0] = 1


def test_the_same_group_has_the_same_tag_whatever_follows_it() -> None:
    """Blocks that were stored before a model got a draft's layers are still found."""
    few = GroupSet([group("f"), group("w", kind=WINDOW, reach=8)], 4)
    more = GroupSet([*few.groups, group("draft")], 4)
    assert np.array_equal(few.tags, more.tags[:2])


def test_keys_of_all_groups_differ_and_those_of_the_anchor_are_the_hashes() -> None:
    groups = GroupSet([group("f", 4), group("w", 4, WINDOW, 8), group("s", 4, STATE), group("g", 4)], 4)
    hashes = np.random.default_rng(0).integers(0, 2**64, (50, 4), dtype=np.uint64)
    keys = [groups.keys(hashes, number) for number in range(4)]
    assert np.array_equal(keys[0], hashes)
    assert len({row.tobytes() for row in np.concatenate(keys)}) == 200
    assert all(array.dtype == np.uint64 for array in keys)


def test_a_larger_blocks_key_is_that_of_its_last_hash() -> None:
    groups = GroupSet([group("f", 4), group("s", 12, STATE)], 4)
    hashes = np.arange(32, dtype=np.uint64).reshape(8, 4)
    assert np.array_equal(groups.keys(hashes, 1), hashes[[2, 5]] ^ groups.tags[1])
    assert np.array_equal(groups.keys(hashes, 1), groups.tagged(hashes[[2, 5]], 1))
    assert groups.keys(hashes[:2], 1).shape == (0, 4)
    assert groups.keys(hashes[:0], 0).shape == (0, 4)


def evicted(groups: GroupSet, blocks: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The blocks of a request, each with its group and the token at which it ends, in the order in which they go."""
    numbers = np.array([groups.number_of(name) for name, _ in blocks], dtype=np.int64)
    ends = np.array([end for _, end in blocks], dtype=np.int64)
    return [blocks[place] for place in groups.order(numbers, ends)[::-1]]


def test_a_tail_is_evicted_before_its_head_and_at_a_boundary_first_what_serves_only_it() -> None:
    groups = GroupSet(
        [
            group("s", 8, STATE),
            group("w", kind=WINDOW, reach=8),
            group("c", kind=CHUNK, reach=8),
            group("f"),
            group("g"),
        ],
        4,
    )
    blocks = [("f", 4), ("s", 8), ("g", 8), ("w", 4), ("f", 8), ("c", 8), ("w", 8), ("g", 4), ("c", 4)]
    assert evicted(groups, blocks) == [
        *[("s", 8), ("w", 8), ("c", 8), ("g", 8), ("f", 8)],
        *[("w", 4), ("c", 4), ("g", 4), ("f", 4)],
    ]


def test_the_order_of_nothing() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert GroupSet([group("f")], 4).order(nothing, nothing).shape == (0,)


@pytest.mark.parametrize("kinds", list(itertools.permutations([WINDOW, CHUNK, STATE])))
def test_without_full_attention_the_anchor_goes_last_too(kinds: tuple[KVKind, ...]) -> None:
    groups = GroupSet([group(kind.value, kind=kind, reach=0 if kind is STATE else 8) for kind in kinds], 4)
    for blocks in itertools.permutations([(kind.value, 4) for kind in kinds]):
        assert evicted(groups, blocks)[-1] == (kinds[0].value, 4)


def test_one_group_resumes_behind_its_first_run() -> None:
    groups = GroupSet([group("f")], 4)
    assert match(groups, [[1, 1, 0, 1]], 16) == Match(8, MissingKV("f", 12, 2))
    assert match(groups, [[1, 1, 1, 1]], 16) == Match(16, None)
    assert match(groups, [[1, 1, 1]], 15) == Match(12, None)
    assert match(groups, [[0]], 4) == Match(0, MissingKV("f", 4, 0))
    assert match(groups, [[]], 3) == Match(0, None)
    assert match(groups, [[]], 0) == Match(0, None)


def test_a_window_and_a_state_skip_what_they_do_not_need() -> None:
    assert match(GroupSet([group("w", kind=WINDOW, reach=6)], 4), [[0, 0, 1, 1, 0]], 20) == Match(
        16, MissingKV("w", 20, 4)
    )
    assert match(GroupSet([group("s", kind=STATE)], 4), [[0, 0, 0, 1, 0]], 20) == Match(16, MissingKV("s", 20, 4))


def test_missing_is_what_keeps_the_others_from_where_full_attention_ends() -> None:
    """A prefix of 16 tokens is there, and of the states only that at 8: it is the state at 16 that is missing."""
    groups = GroupSet([group("s", kind=STATE), group("f")], 4)
    assert match(groups, [[0, 1, 0, 0, 0], [1, 1, 1, 1, 0]], 20) == Match(8, MissingKV("s", 16, 3))


def test_missing_is_full_attention_where_that_ends() -> None:
    groups = GroupSet([group("s", kind=STATE), group("f")], 4)
    assert match(groups, [[0, 1, 0, 0, 0], [1, 1, 0, 1, 0]], 20) == Match(8, MissingKV("f", 12, 2))


def test_missing_says_a_reason_that_a_caller_can_replace() -> None:
    missing = match(GroupSet([group("f")], 4), [[0]], 4).missing
    assert missing is not None
    assert missing.reason is MissReason.NEVER_STORED
    assert missing._replace(reason=MissReason.EVICTED).reason is MissReason.EVICTED


def test_a_request_resumes_only_where_the_blocks_of_all_groups_end() -> None:
    groups = GroupSet([group("f", 4), group("s", 12, STATE)], 4)
    assert match(groups, [[1, 1, 1, 1, 1], [1]], 23) == Match(12, None)
    assert match(groups, [[1, 1, 1, 1, 1, 0], [1, 1]], 24) == Match(12, MissingKV("f", 24, 5))


def test_each_group_needs_its_mask() -> None:
    with pytest.raises(ValueError, match="shorter"):
        match(GroupSet([group("f"), group("g")], 4), [[1]], 4)


class Request(NamedTuple):
    """Groups, which blocks of a request are there, and the limit."""

    groups: GroupSet
    masks: list[NDArray[np.bool_]]
    num_tokens: int


def masks_of(length: int) -> st.SearchStrategy[NDArray[np.bool_]]:
    """Of any kind, or with a few holes, so that long matches occur."""
    any_kind = st.lists(st.booleans(), min_size=length, max_size=length)
    holes = st.sets(st.integers(0, max(length - 1, 0)), max_size=4)
    few_holes = holes.map(lambda missing: [block not in missing for block in range(length)])
    return st.one_of(any_kind, few_holes).map(lambda mask: np.array(mask, dtype=bool))


@st.composite
def requests(draw: Callable[..., Any]) -> Request:
    hash_block_size = draw(st.integers(1, 3))
    made = []
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(KVKind))
        reach = draw(st.integers(1, 40)) if kind in (WINDOW, CHUNK) else 0
        made.append(group(str(number), hash_block_size * draw(st.integers(1, 4)), kind, reach))
    num_tokens = draw(st.integers(0, 100))
    masks = [draw(masks_of(num_tokens // one.block_size)) for one in made]
    return Request(GroupSet(made, hash_block_size), masks, num_tokens)


def is_served(group: KVGroup, mask: NDArray[np.bool_], num_tokens: int) -> bool:
    """Whether a group has what the token behind the first `num_tokens` needs: the table of rules, token by token."""
    if num_tokens % group.block_size:
        return False
    for token in range(num_tokens):
        is_needed = {
            FULL: True,
            WINDOW: token > num_tokens - group.reach,
            CHUNK: token // group.reach == num_tokens // group.reach if group.reach else False,
            STATE: token == num_tokens - 1,
        }[group.kind]
        if is_needed and not mask[token // group.block_size]:
            return False
    return True


def all_served(request: Request, num_tokens: int) -> bool:
    groups = request.groups.groups
    return all(is_served(group, mask, num_tokens) for group, mask in zip(groups, request.masks, strict=True))


@given(requests())
def test_the_longest_match_is_the_last_boundary_at_which_the_rules_hold(request: Request) -> None:
    longest = max(n for n in range(request.num_tokens + 1) if all_served(request, n))
    assert request.groups.longest_match(request.masks, request.num_tokens).num_tokens == longest


@given(requests())
def test_what_is_needed_at_the_match_is_there(request: Request) -> None:
    num_tokens = request.groups.longest_match(request.masks, request.num_tokens).num_tokens
    assert num_tokens % request.groups.alignment == 0
    for one, mask in zip(request.groups.groups, request.masks, strict=True):
        blocks = list(one.needed(num_tokens))
        assert mask[blocks].all()
        assert all((block + 1) * one.block_size <= num_tokens for block in blocks)


@given(requests(), st.data())
def test_the_blocks_needed_are_those_whose_tokens_are(request: Request, data: st.DataObject) -> None:
    """Where all is there but one block, a boundary is served unless the block is among those needed for it."""
    boundary = data.draw(st.integers(0, request.num_tokens // request.groups.alignment)) * request.groups.alignment
    for one, mask in zip(request.groups.groups, request.masks, strict=True):
        for block in range(len(mask)):
            all_but = np.arange(len(mask)) != block
            assert is_served(one, all_but, boundary) == (block not in one.needed(boundary))


@given(requests())
@example(Request(GroupSet([group("f")], 4), [np.zeros(0, dtype=bool)], 3))
def test_missing_is_a_block_that_a_later_boundary_needs(request: Request) -> None:
    groups = request.groups
    reached, missing = groups.longest_match(request.masks, request.num_tokens)
    if missing is None:
        assert reached + groups.alignment > request.num_tokens
        return
    assert reached < missing.num_tokens <= request.num_tokens
    assert missing.num_tokens % groups.alignment == 0
    number = groups.number_of(missing.group)
    assert not request.masks[number][missing.block]
    assert missing.block in groups.groups[number].needed(missing.num_tokens)


@given(requests())
def test_missing_is_at_the_end_of_full_attention_or_just_behind_the_match(request: Request) -> None:
    groups = request.groups
    reached, missing = groups.longest_match(request.masks, request.num_tokens)
    anchor, mask = groups.groups[groups.anchor], request.masks[groups.anchor]
    boundaries = range(0, request.num_tokens + 1, groups.alignment)
    end = max(n for n in boundaries if is_served(anchor, mask, n)) if anchor.kind is FULL else reached
    if missing is not None:
        assert missing.num_tokens == (end if end > reached else reached + groups.alignment)


@given(requests(), st.data())
def test_more_blocks_or_a_larger_limit_never_shorten_a_match(request: Request, data: st.DataObject) -> None:
    groups, masks, num_tokens = request
    longest = groups.longest_match(masks, num_tokens).num_tokens
    fewer = data.draw(st.integers(0, num_tokens))
    cut = [mask[: fewer // one.block_size] for one, mask in zip(groups.groups, masks, strict=True)]
    assert groups.longest_match(cut, fewer).num_tokens <= longest
    more = [mask | data.draw(masks_of(len(mask))) for mask in masks]
    assert groups.longest_match(more, num_tokens).num_tokens >= longest


@given(requests())
def test_the_eviction_order_is_by_end_then_anchor_first(request: Request) -> None:
    groups = request.groups
    sizes = [one.block_size for one in groups.groups]
    blocks = [(n, end) for n, size in enumerate(sizes) for end in range(size, request.num_tokens + 1, size)]
    numbers = np.array([number for number, _ in blocks], dtype=np.int64)
    ends = np.array([end for _, end in blocks], dtype=np.int64)
    order = groups.order(numbers, ends)
    assert sorted(order.tolist()) == list(range(len(blocks)))
    ordered = [blocks[place] for place in order]
    assert [end for _, end in ordered] == sorted(end for _, end in blocks)
    for _, at_one_end in itertools.groupby(ordered, key=lambda block: block[1]):
        numbers_there = [number for number, _ in at_one_end]
        assert groups.anchor not in numbers_there[1:]
