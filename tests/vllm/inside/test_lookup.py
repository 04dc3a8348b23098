"""How far a request can resume: vLLM's own coordinator and `GroupSet` give the same answer.

The coordinator asks vLLM's block pool what is there. Here a `Facade` stands in the pool's place, which knows of one
request which of its blocks are there. So it answers for a store of blocks as it does for its own prefix cache.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from vllm.v1.core import kv_cache_coordinator
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from kvortex.groups import GroupSet, KVGroup, KVKind
from kvortex.types import BLOCK_HASH_BYTES

FULL, WINDOW, CHUNK, STATE = KVKind.FULL, KVKind.WINDOW, KVKind.CHUNK, KVKind.STATE
PARAMETERS = inspect.signature(kv_cache_coordinator.get_kv_cache_coordinator).parameters
HAS_PARTIAL_HITS = "allow_partial_hash_hits" in PARAMETERS
HAS_DRAFT_GROUPS = "is_eagle_group" in inspect.signature(KVCacheGroupSpec).parameters
NEEDS_UNLIKE_GROUPS = not HAS_PARTIAL_HITS
"""0.15.1 and 0.23.0 refuse several groups whose specs are all equal."""
CUTS_ALL_FULL_GROUPS = HAS_PARTIAL_HITS
"""0.15.1 and 0.23.0 cut the blocks of the first spec of full attention to the hit, not those of a second."""
LOOKS_BEHIND_THE_LIMIT = HAS_PARTIAL_HITS
"""Of several groups, one with draft layers may find its additional block behind the limit; not so in 0.23.0."""
NULL = -1
"""Group of the null block."""


class Block(NamedTuple):
    """A block that is there, in place of vLLM's own."""

    group: int
    number: int


class Facade:
    """In place of the block pool: all that a look-up asks of it, and nothing else."""

    __slots__ = ("_masks", "_positions", "_steps", "hash_block_size", "null_block")

    def __init__(self, groups: GroupSet, hashes: Sequence[bytes], masks: Sequence[NDArray[np.bool_]]) -> None:
        self.hash_block_size = groups.hash_block_size
        self.null_block = Block(NULL, 0)
        self._positions = {block_hash: position for position, block_hash in enumerate(hashes)}
        self._steps = [groups.hashes_a_block(number) for number in range(len(groups))]
        self._masks = masks

    def get_cached_block(self, block_hash: bytes, kv_cache_group_ids: Iterable[int]) -> list[Block] | None:
        """A block of each of these groups, or None if one of them has it not.

        The hash of a larger block is that of its last part; in 0.15.1 and 0.23.0 those of all parts, joined.
        """
        end = self._positions[block_hash[-BLOCK_HASH_BYTES:]] + 1
        blocks = []
        for group in kv_cache_group_ids:
            number, rest = divmod(end, self._steps[group])
            if rest or not self._masks[group][number - 1]:
                return None
            blocks.append(Block(group, number - 1))
        return blocks


class Layout(NamedTuple):
    """Groups of a model, as they are told to vLLM and to KVortex."""

    groups: GroupSet
    heads: tuple[int, ...]
    """For each group, so that specs of groups that are otherwise alike may differ."""
    eagle: tuple[int, ...] = ()
    """Groups with draft layers."""

    @property
    def specs(self) -> list[KVCacheSpec]:
        return [spec_of(group, heads) for group, heads in zip(self.groups.groups, self.heads, strict=True)]


class Request(NamedTuple):
    """A request of whole hash blocks, of which at most `limit` tokens may be resumed."""

    hashes: list[bytes]
    masks: list[NDArray[np.bool_]]
    limit: int


def group(number: int, kind: KVKind, block_size: int, reach: int = 0) -> KVGroup:
    return KVGroup(str(number), (f"layers.{number}",), block_size, kind, reach)


def layout(hash_block_size: int, *groups: tuple[KVKind, int] | tuple[KVKind, int, int]) -> Layout:
    made = [group(number, *fields) for number, fields in enumerate(groups)]
    return Layout(GroupSet(made, hash_block_size), (1,) * len(made))


def hashes_of(num_hashes: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % position).digest() for position in range(num_hashes)]


def spec_of(group: KVGroup, heads: int) -> KVCacheSpec:
    attention = {"block_size": group.block_size, "num_kv_heads": heads, "head_size": 8, "dtype": torch.float16}
    if group.kind is STATE:
        shapes, dtypes = ((heads, 8),), (torch.float32,)
        return MambaSpec(block_size=group.block_size, shapes=shapes, dtypes=dtypes, mamba_cache_mode="align")
    if group.kind is WINDOW:
        return SlidingWindowSpec(**attention, sliding_window=group.reach)
    if group.kind is CHUNK:
        return ChunkedLocalAttentionSpec(**attention, attention_chunk_size=group.reach)
    return FullAttentionSpec(**attention)


def coordinator_of(layout: Layout, **options: Any) -> Any:
    """vLLM's coordinator, with a pool of one block, the null block: it is replaced before the first look-up."""
    groups = [
        KVCacheGroupSpec(list(group.layers), spec, **({"is_eagle_group": True} if number in layout.eagle else {}))
        for number, (group, spec) in enumerate(zip(layout.groups.groups, layout.specs, strict=True))
    ]
    values = {
        "kv_cache_config": KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups),
        "max_model_len": 1 << 16,
        "max_num_batched_tokens": 1 << 10,
        "max_in_flight_tokens": 1 << 10,
        "use_eagle": bool(layout.eagle),
        "enable_caching": True,
        "enable_kv_cache_events": False,
        "dcp_world_size": 1,
        "pcp_world_size": 1,
        "scheduler_block_size": layout.groups.alignment,
        "hash_block_size": layout.groups.hash_block_size,
        "allow_partial_hash_hits": False,
        **options,
    }
    return kv_cache_coordinator.get_kv_cache_coordinator(
        **{name: values[name] for name in PARAMETERS if name in values}
    )


def ask(coordinator: Any, facade: Facade, request: Request) -> tuple[tuple[list[Block], ...], int]:
    """The blocks of each group, and the tokens of the hit."""
    coordinator.block_pool = facade
    for manager in coordinator.single_type_managers:
        manager.block_pool = facade
    blocks, num_tokens, *_ = coordinator.find_longest_cache_hit(request.hashes, request.limit)
    return blocks, num_tokens


def hit_of(layout: Layout, request: Request, **options: Any) -> tuple[tuple[list[Block], ...], int]:
    coordinator = coordinator_of(layout, **options)
    return ask(coordinator, Facade(layout.groups, request.hashes, request.masks), request)


def match_of(layout: Layout, request: Request) -> int:
    groups = layout.groups
    masks = [mask[: request.limit // one.block_size] for one, mask in zip(groups.groups, request.masks, strict=True)]
    return groups.longest_match(masks, request.limit).num_tokens


def check(layout: Layout, request: Request, num_tokens: int, **options: Any) -> None:
    """vLLM resumes after that many tokens, and takes the blocks that we say are needed."""
    blocks, hit = hit_of(layout, request, **options)
    assert hit == num_tokens
    for number, group in enumerate(layout.groups.groups):
        places = num_tokens // group.block_size
        if CUTS_ALL_FULL_GROUPS or group.kind is not FULL:
            assert len(blocks[number]) == places
        needed = group.needed(num_tokens)
        expected = [Block(number, place) if place in needed else Block(NULL, 0) for place in range(places)]
        assert blocks[number][:places] == expected


@st.composite
def masks(draw: Callable[..., Any], length: int) -> NDArray[np.bool_]:
    """All of a prefix but perhaps one block, and then anything, so that hits of all lengths occur."""
    prefix = length - draw(st.integers(0, length))
    hole = draw(st.none() | st.integers(0, length))
    rest = draw(st.lists(st.booleans(), min_size=length - prefix, max_size=length - prefix))
    return np.array([*(block != hole for block in range(prefix)), *rest], dtype=bool)


@st.composite
def requests(draw: Callable[..., Any], layout: Layout) -> Request:
    """A request, and which of its blocks are there; also behind the limit, where nobody may look."""
    alignment, hash_block_size = layout.groups.alignment, layout.groups.hash_block_size
    limit = draw(st.integers(1, 8)) * alignment + draw(st.integers(0, alignment - 1))
    num_hashes = limit // hash_block_size + draw(st.integers(0, 2 * alignment // hash_block_size))
    there = [draw(masks(num_hashes * hash_block_size // one.block_size)) for one in layout.groups.groups]
    return Request(hashes_of(num_hashes), there, limit)


@st.composite
def layouts(draw: Callable[..., Any], kinds: Sequence[KVKind] = tuple(KVKind)) -> Layout:
    """What this version takes, with windows of two tokens or more and chunks of whole blocks or whole parts of one.

    The tests below say what it refuses, and what it makes of other windows and chunks.
    """
    hash_block_size = draw(st.integers(1, 3))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    factors = [1 if len(chosen) == 1 else draw(st.integers(1, 4)) for _ in chosen]
    longest = math.lcm(*factors)
    made = []
    for number, (kind, factor) in enumerate(zip(chosen, factors, strict=True)):
        block_size = hash_block_size * (longest if kind is CHUNK else factor)
        parts = [size for size in range(1, block_size) if block_size % size == 0]
        chunks = st.one_of(st.integers(1, 5).map(block_size.__mul__), st.sampled_from(parts or [block_size]))
        reach = {WINDOW: st.integers(2, 40), CHUNK: chunks}.get(kind, st.just(0))
        made.append(group(number, kind, block_size, draw(reach)))
    heads = tuple(draw(st.lists(st.integers(1, 2), min_size=len(made), max_size=len(made))))
    drawn = Layout(GroupSet(made, hash_block_size), heads)
    if NEEDS_UNLIKE_GROUPS and len(made) > 1 and len(set(drawn.specs)) == 1:
        return drawn._replace(heads=(3, *heads[1:]))
    return drawn


@settings(max_examples=2000)
@given(st.data())
def test_the_hit_is_the_longest_match(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    request = data.draw(requests(layout))
    check(layout, request, match_of(layout, request))


MODELS = {
    "Llama 3": layout(16, (FULL, 16)),
    "Mistral with a window": layout(16, (WINDOW, 16, 64)),
    "Mamba 2": layout(16, (STATE, 16)),
    "gpt-oss": layout(16, (FULL, 16), (WINDOW, 16, 128)),
    "Gemma 3": layout(16, *[(WINDOW, 16, 100)] * 5, (FULL, 16)),
    "Gemma 4": layout(16, (WINDOW, 16, 100), (FULL, 32)),
    "Llama 4": layout(16, *[(CHUNK, 16, 64)] * 3, (FULL, 16)),
    "Qwen3-Next": layout(16, *[(STATE, 48)] * 3, (FULL, 48)),
    "window, state and full attention": layout(16, (WINDOW, 16, 60), (STATE, 32), (FULL, 16)),
}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=300)
@given(st.data())
def test_of_a_model_that_people_serve(name: str, data: st.DataObject) -> None:
    request = data.draw(requests(MODELS[name]))
    check(MODELS[name], request, match_of(MODELS[name], request))


def request_of(layout: Layout, limit: int, *present: Iterable[int]) -> Request:
    """A request of `limit` tokens and what is behind them, with these blocks of each group."""
    num_hashes = limit // layout.groups.hash_block_size + 1
    masks = [np.isin(np.arange(num_hashes), list(blocks)) for blocks in present]
    return Request(hashes_of(num_hashes), masks, limit)


REFUSED = [
    (layout(4, (FULL, 8)), "hash_block_size == block_size"),
    (layout(4, (CHUNK, 4, 8), (FULL, 8)), "different block sizes are not compatible with chunked local attention"),
    *([(layout(4, (FULL, 4), (FULL, 4)), "at least two attention groups")] if NEEDS_UNLIKE_GROUPS else []),
]


@pytest.mark.parametrize(("layout", "says"), REFUSED)
def test_what_this_version_refuses(layout: Layout, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        hit_of(layout, request_of(layout, 16, *[range(4)] * len(layout.groups)))


def test_a_window_of_one_token_costs_vllm_a_block() -> None:
    """A token that sees only itself needs nothing that was kept. vLLM asks for the block before it all the same."""
    one = layout(4, (WINDOW, 4, 1))
    assert match_of(one, request_of(one, 12, [])) == 12
    assert hit_of(one, request_of(one, 12, [])) == (([],), 0)
    assert hit_of(one, request_of(one, 12, [1])) == (([Block(NULL, 0), Block(0, 1)],), 8)


def test_vllm_resumes_without_a_part_of_a_chunk_that_begins_within_a_block() -> None:
    """Token 4 sees all from token 0 on, as its chunk has 6 tokens. vLLM asked for that of token 11: it begins at 6.

    So it takes the block before that one for one that nobody needs. Chunks of whole blocks have no such block.
    """
    chunks = layout(4, (FULL, 4), (CHUNK, 4, 6))
    request = request_of(chunks, 11, range(2), [])
    assert hit_of(chunks, request) == (([Block(0, 0)], [Block(NULL, 0)]), 4)
    assert match_of(chunks, request) == 0


def eagle_match(layout: Layout, request: Request) -> int:
    """As `match_of`, where a group with draft layers needs one more block, which vLLM looks for and does not take."""
    specs = layout.specs
    drafts = {number for number, spec in enumerate(specs) if any(spec == specs[draft] for draft in layout.eagle)}
    can_look_behind = LOOKS_BEHIND_THE_LIMIT and len(specs) > 1
    end = len(request.hashes) * layout.groups.hash_block_size if can_look_behind else request.limit

    def is_served(number: int, num_tokens: int) -> bool:
        group = layout.groups.groups[number]
        blocks = list(group.needed(num_tokens))
        if number in drafts and num_tokens:
            blocks.append(num_tokens // group.block_size)
        return all((block + 1) * group.block_size <= end and request.masks[number][block] for block in blocks)

    boundaries = range(0, request.limit + 1, layout.groups.alignment)
    return max(n for n in boundaries if all(is_served(number, n) for number in range(len(specs))))


@st.composite
def drafts(draw: Callable[..., Any]) -> Layout:
    """Draft layers in any groups of full attention, and in one group of windows whose blocks are not the smaller ones.

    Elsewhere vLLM's hit is another: the next test has an example of each.
    """
    made = draw(layouts(tuple(kind for kind in KVKind if kind is not CHUNK)).filter(has_draft_places))
    full, windows = draft_places(made)
    chosen = set(draw(st.lists(st.sampled_from(full), max_size=3)) if full else [])
    if windows and (not chosen or draw(st.booleans())):
        chosen.add(draw(st.sampled_from(windows)))
    return made._replace(eagle=tuple(sorted(chosen or {full[0]})))


def draft_places(layout: Layout) -> tuple[list[int], list[int]]:
    numbered = list(enumerate(layout.groups.groups))
    full = [number for number, group in numbered if group.kind is FULL]
    alignment = layout.groups.alignment
    return full, [number for number, group in numbered if group.kind is WINDOW and group.block_size == alignment]


def has_draft_places(layout: Layout) -> bool:
    return any(draft_places(layout))


@pytest.mark.skipif(not HAS_DRAFT_GROUPS, reason="this version drops a block of every group in each of its passes")
@settings(max_examples=1000)
@given(st.data())
def test_a_group_with_draft_layers_needs_one_block_more(data: st.DataObject) -> None:
    layout = data.draw(drafts())
    request = data.draw(requests(layout))
    check(layout, request, eagle_match(layout, request))


TWO_KINDS_OF_WINDOWS = layout(4, (WINDOW, 4, 5), (WINDOW, 4, 9))._replace(eagle=(0, 1))
SMALLER_WINDOWS = layout(4, (FULL, 8), (WINDOW, 4, 13))._replace(eagle=(1,))
CHUNKS = layout(4, (FULL, 4), (CHUNK, 4, 8))._replace(eagle=(1,))
STATES = layout(4, (FULL, 4), (STATE, 4))._replace(eagle=(0, 1))


@pytest.mark.skipif(not HAS_DRAFT_GROUPS, reason="this version drops a block of every group in each of its passes")
def test_where_draft_layers_make_vllm_answer_otherwise() -> None:
    # The first finds its additional block behind 12 tokens. The second shortens the hit to 4, and the first is not
    # asked for its additional block behind those.
    request = request_of(TWO_KINDS_OF_WINDOWS, 16, [0, 2, 3], [0, 1])
    assert hit_of(TWO_KINDS_OF_WINDOWS, request)[1] == 4
    assert eagle_match(TWO_KINDS_OF_WINDOWS, request) == 0
    # Three blocks are rounded to two, one of them is dropped, and the other is rounded to none.
    request = request_of(SMALLER_WINDOWS, 16, [0], [0, 1, 2])
    assert hit_of(SMALLER_WINDOWS, request)[1] == 0
    assert eagle_match(SMALLER_WINDOWS, request) == 8
    with pytest.raises(AssertionError, match="eagle \\+ chunked local"):
        hit_of(CHUNKS, request_of(CHUNKS, 16, range(5), range(5)))
    # 0.23.0 lets a state's look-up go one block further and drops none: it resumes behind what full attention has.
    request = request_of(STATES, 8, [], [0])
    assert hit_of(STATES, request)[1] == (0 if HAS_PARTIAL_HITS else 4)
    assert eagle_match(STATES, request) == 0


@pytest.mark.skipif(not HAS_PARTIAL_HITS, reason="this version has no hits within a block")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2), (2, 4, 8), (3, 3, 6)])
@settings(max_examples=200)
@given(st.data())
def test_hits_within_a_block_change_nothing_for_a_store_of_whole_blocks(sizes: tuple[int, ...], data: Any) -> None:
    """Where the blocks of states are multiples of those of full attention; else vLLM may use a part of such a block."""
    of_full, *of_states = sizes
    made = layout(2, (FULL, 2 * of_full), *[(STATE, 2 * size) for size in of_states])
    request = data.draw(requests(made))
    check(made, request, match_of(made, request), allow_partial_hash_hits=True)
