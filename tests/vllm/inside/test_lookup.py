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
NEEDS_UNLIKE_GROUPS = not HAS_PARTIAL_HITS
"""0.15.1 and 0.23.0 refuse several groups whose specs are all equal."""
CUTS_ALL_FULL_GROUPS = HAS_PARTIAL_HITS
"""0.15.1 and 0.23.0 cut the blocks of the first spec of full attention to the hit, not those of a second."""


class Block(NamedTuple):
    """A block that is there, in place of vLLM's own."""

    group: int
    number: int


class Facade:
    """In place of the block pool: all that a look-up asks of it, and nothing else."""

    __slots__ = ("_masks", "_positions", "_steps", "hash_block_size", "null_block")

    def __init__(self, groups: GroupSet, hashes: Sequence[bytes], masks: Sequence[NDArray[np.bool_]]) -> None:
        self.hash_block_size = groups.hash_block_size
        self.null_block = Block(-1, 0)
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


def check(layout: Layout, request: Request, **options: Any) -> None:
    """vLLM resumes where we do, and takes the blocks that we say are needed."""
    blocks, num_tokens = hit_of(layout, request, **options)
    assert num_tokens == match_of(layout, request)
    for number, group in enumerate(layout.groups.groups):
        places = num_tokens // group.block_size
        if CUTS_ALL_FULL_GROUPS or group.kind is not FULL:
            assert len(blocks[number]) == places
        needed = group.needed(num_tokens)
        expected = [Block(number, place) if place in needed else Block(-1, 0) for place in range(places)]
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
    hashes = [hashlib.sha256(b"%d" % position).digest() for position in range(num_hashes)]
    return Request(hashes, there, limit)


@st.composite
def layouts(draw: Callable[..., Any], kinds: Sequence[KVKind] = tuple(KVKind), *, is_alike: bool = False) -> Layout:
    """What this version takes, with windows of two tokens or more and chunks of whole blocks or whole parts of one.

    The tests below say what it refuses, and what it makes of other windows and chunks.
    """
    hash_block_size = draw(st.integers(1, 3))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    factor = draw(st.integers(1, 3))
    factors = [1 if len(chosen) == 1 else factor if is_alike else draw(st.integers(1, 4)) for _ in chosen]
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


@settings(max_examples=3000)
@given(st.data())
def test_the_hit_is_the_longest_match(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    check(layout, data.draw(requests(layout)))


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
    check(MODELS[name], data.draw(requests(MODELS[name])))
