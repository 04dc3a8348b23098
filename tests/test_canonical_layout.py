"""Canonical payloads are the same for every number of ranks, and come back byte for byte."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import LayoutError
from kvortex.groups import GroupSet, KVGroup
from kvortex.kernels.digest import digest_reference
from kvortex.kernels.relayout import from_canonical, to_canonical
from kvortex.layout.canonical import (
    SCALES,
    BlockShard,
    CanonicalCache,
    Heads,
    TensorShard,
    canonical_digest,
    runs_of,
)
from kvortex.tiering.canonical_blocks import CanonicalBlock
from tests.canonical_support import NUM_BLOCKS, Layer, RankedBlock

RANKS = (1, 2, 4, 8)


@st.composite
def layers(draw: st.DrawFn, name: str, num_heads: int, block_size: int, itemsize: int) -> Layer:
    """A layer of any backend: K and V apart or together, heads before tokens or behind them in memory, or a latent."""
    heads, size, blocks = num_heads, draw(st.sampled_from([8, 16, 40])), NUM_BLOCKS
    shape, block_dim, heads_dim = draw(
        st.sampled_from(
            [
                ((2, blocks, block_size, heads, size), 1, 3),
                ((blocks, 2, block_size, heads, size), 0, 3),
                ((blocks, heads, block_size, 2 * size), 0, 1),
                ((blocks, block_size, heads, size), 0, 2),
                ((2, blocks, heads, block_size, size), 1, 2),
                ((blocks, block_size, 4 * size), 0, None),
                ((blocks, 1, block_size, 4 * size), 0, None),
            ]
        )
    )
    outer = draw(st.permutations(range(len(shape) - 1)))
    return Layer(name, shape, block_dim, heads_dim, (*outer, len(shape) - 1), f"u{itemsize}")


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Layer], int]:
    """The layers of a model, and tokens of a block. Layers may differ in everything but the tokens."""
    block_size, num_heads = draw(st.sampled_from([2, 3, 16])), draw(st.sampled_from([1, 2, 4, 8]))
    names = draw(st.permutations([f"layers.{n}" for n in range(draw(st.integers(1, 3)))]))
    itemsize = draw(st.sampled_from([2, 4, 8]))
    return [draw(layers(name, num_heads, block_size, itemsize)) for name in names], block_size


@settings(deadline=None, max_examples=60)
@given(models())
def test_any_number_of_ranks_has_the_same_canonical_bytes_and_gets_its_own_back(model: tuple[list[Layer], int]) -> None:
    of_model, block_size = model
    expected = b"".join(layer.canonical() for layer in sorted(of_model, key=lambda layer: layer.name))
    namespaces = set()
    for size in RANKS:
        block = RankedBlock(of_model, size, block_size)
        namespaces |= block.namespaces
        runs = runs_of(block.parts, len(block.payload))
        assert runs.nbytes == len(expected)
        canonical = np.full(runs.nbytes, 0x5A, np.uint8)
        assert to_canonical(runs, block.payload, canonical)
        assert canonical.tobytes() == expected
        back = np.full(len(block.payload), 0xA5, np.uint8)
        behind = len(back) - (8 * size if size > 1 else 0)
        back[behind:] = block.payload[behind:]
        from_canonical(runs, back, canonical)
        assert back.tobytes() == block.payload.tobytes(), "what lies between and behind the parts is left alone"
        relaid, again, scratch = (
            CanonicalBlock(runs),
            np.full(len(back), 0xA5, np.uint8),
            np.zeros(runs.nbytes, np.uint8),
        )
        assert relaid.down(block.payload, scratch, block.digests[0]) == digest_reference(expected)
        assert relaid.up(scratch, again, digest_reference(expected)) == digest_reference(again)
        assert again.tobytes() == block.payload.tobytes(), "with the digests of the parts"
    assert len(namespaces) == 1


@settings(deadline=None, max_examples=60)
@given(models(), st.sampled_from(RANKS), st.data())
def test_no_byte_that_was_changed_in_the_pool_is_stored(
    model: tuple[list[Layer], int], size: int, data: st.DataObject
) -> None:
    block = RankedBlock(*model[:1], size, model[1])
    canonical = CanonicalBlock(runs_of(block.parts, len(block.payload)))
    scratch = np.zeros(canonical.nbytes, np.uint8)
    assert isinstance(canonical.down(block.payload, scratch, block.digests[0]), int)
    part, content = data.draw(st.sampled_from(list(zip(block.parts, block.contents, strict=True))))
    place = part.offset + data.draw(st.integers(0, len(content) - 1))
    if size > 1 and data.draw(st.booleans()):
        place = len(block.payload) - 1 - data.draw(st.integers(0, 8 * size - 1))
    block.payload[place] ^= 1 << data.draw(st.integers(0, 7))
    assert canonical.down(block.payload, scratch, block.digests[0]) == "the block is damaged in the pool"


@settings(deadline=None, max_examples=60)
@given(models(), st.sampled_from(RANKS), st.data())
def test_no_byte_that_was_changed_in_the_tier_gets_a_digest(
    model: tuple[list[Layer], int], size: int, data: st.DataObject
) -> None:
    block = RankedBlock(model[0], size, model[1])
    canonical = CanonicalBlock(runs_of(block.parts, len(block.payload)))
    scratch = np.zeros(canonical.nbytes, np.uint8)
    digest = canonical.down(block.payload, scratch, block.digests[0])
    assert isinstance(digest, int)
    payload = np.zeros_like(block.payload)
    assert canonical.up(scratch, payload, digest) == digest_reference(payload)
    scratch[data.draw(st.integers(0, canonical.nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert canonical.up(scratch, payload, digest) is None


def test_ranks_that_should_hold_the_same_and_do_not_store_nothing() -> None:
    layer = Layer("layer", (NUM_BLOCKS, 16, 2, 8), 0, 2, (0, 1, 2, 3), "u2")
    block = RankedBlock([layer], 4, 16)  # two ranks a head
    canonical = CanonicalBlock(runs_of(block.parts, len(block.payload)))
    part = block.payload[block.parts[3].offset :][: len(block.contents[3])]
    part[5] ^= 1
    block.payload[-8:].view(np.uint64)[:] = digest_reference(part)
    scratch = np.zeros(canonical.nbytes, np.uint8)
    assert canonical.down(block.payload, scratch, 0) == "ranks that should hold the same KV do not"


def test_what_a_rank_has_beside_other_groups_is_left_out() -> None:
    """The second of two pipeline stages has no layer of the group: its digest is zero."""
    block = RankedBlock([Layer("layer", (NUM_BLOCKS, 16, 2, 8), 0, 2, (0, 1, 2, 3), "u2")], 1, 16)
    payload = np.concatenate([block.payload, np.array([block.digests[0], 0], np.uint64).view(np.uint8)])
    canonical = CanonicalBlock(runs_of([*block.parts, BlockShard(len(block.payload), ())], len(payload)))
    scratch, back = np.zeros(canonical.nbytes, np.uint8), np.zeros_like(payload)
    digest = canonical.down(payload, scratch, 0)
    assert isinstance(digest, int)
    assert canonical.up(scratch, back, digest) is not None
    assert back.tobytes() == payload.tobytes()


SHARD = TensorShard("layer", "bfloat16", 2, (16, 4, 64), (0, 1, 2), Heads(1, 0, 4))
GROUPS = GroupSet([KVGroup("full", ("layer",), 16)], 16)


@pytest.mark.parametrize(
    "other",
    [
        replace(SHARD, name="other"),
        replace(SHARD, dtype="float16"),
        replace(SHARD, shape=(16, 8, 64), heads=Heads(1, 0, 8)),
        replace(SHARD, shape=(16, 4, 32)),
        replace(SHARD, shape=(4, 16, 64), heads=Heads(0, 0, 4)),
        replace(SHARD, heads=Heads(1, 0, 8)),
    ],
    ids=["layer", "dtype", "more heads", "head size", "axes", "heads of all ranks"],
)
def test_what_means_something_else_has_another_namespace(other: TensorShard) -> None:
    assert canonical_digest(GROUPS, [[SHARD]]) != canonical_digest(GROUPS, [[other]])


def test_the_dimension_of_the_heads_is_in_the_namespace() -> None:
    square = replace(SHARD, shape=(4, 4, 64))
    assert canonical_digest(GROUPS, [[square]]) != canonical_digest(GROUPS, [[replace(square, heads=Heads(0, 0, 4))]])


def test_strides_and_ranks_are_not_in_the_namespace() -> None:
    half = replace(SHARD, shape=(16, 2, 64), order=(1, 0, 2), heads=Heads(1, 2, 4))
    assert canonical_digest(GROUPS, [[SHARD]]) == canonical_digest(GROUPS, [[half]])
    other_blocks = GroupSet([KVGroup("full", ("layer",), 32)], 32)
    assert canonical_digest(GROUPS, [[SHARD]]) != canonical_digest(other_blocks, [[SHARD]])


def test_a_description_survives_json() -> None:
    latent = TensorShard("latent", "uint8", 1, (16, 64), (1, 0), Heads())
    cache = CanonicalCache(bytes(range(32)), ((BlockShard(0, (SHARD, latent)), BlockShard(9216, ())), ()))
    assert CanonicalCache.from_plain(json.loads(json.dumps(cache.as_plain()))) == cache


@pytest.mark.parametrize(
    "plain",
    [
        None,
        {},
        {"namespace": "00" * 31, "parts": [[[0, []]]]},
        {"namespace": "00" * 32, "parts": []},
        {"namespace": "00" * 32, "parts": [[[0, [["a"]]]]]},
        {"namespace": "00" * 32, "parts": [[[0, [["a", "u", 2, [16, 2], [0, 0], [1, 0, 2]]]]]]},
        {"namespace": "00" * 32, "parts": [[[0, [["a", "u", 2, [16, -2], [0, 1], [1, 0, 2]]]]]]},
        {"namespace": "00" * 32, "parts": [[[0, [["a", "u", 2, [16, 2], [0, 1], [2, 0, 2]]]]]]},
        {"namespace": "00" * 32, "parts": [[[0, [["a", "u", 2, [16, 2], [0, 1], [1, 1, 2]]]]]]},
        {"namespace": "00" * 32, "parts": [[[0, [["a", "u", 2, [1 << 40, 2], [0, 1], [1, 0, 2]]]]]]},
    ],
)
def test_other_descriptions_are_refused(plain: object) -> None:
    with pytest.raises(LayoutError):
        CanonicalCache.from_plain(plain)


HALF, MIDDLE, REST = (replace(SHARD, shape=(16, 2, 64), heads=Heads(1, first, 4)) for first in (0, 1, 2))
NBYTES = HALF.nbytes


@pytest.mark.parametrize(
    ("parts", "nbytes"),
    [
        ([BlockShard(0, (HALF,)), BlockShard(NBYTES - 8, (REST,))], 2 * NBYTES + 16),
        ([BlockShard(0, (HALF,)), BlockShard(NBYTES, (REST,))], 2 * NBYTES + 8),
        ([BlockShard(-8, (HALF,)), BlockShard(NBYTES, (REST,))], 2 * NBYTES + 16),
        ([BlockShard(0, (HALF,)), BlockShard(NBYTES + 4, (REST,))], 2 * NBYTES + 24),
        ([BlockShard(0, (HALF,)), BlockShard(NBYTES, (HALF,))], 2 * NBYTES + 16),
        ([BlockShard(0, (HALF,)), BlockShard(NBYTES, (replace(REST, dtype="float16"),))], 2 * NBYTES + 16),
        ([BlockShard(0, (HALF,)), BlockShard(NBYTES, (MIDDLE,)), BlockShard(2 * NBYTES, (REST,))], 3 * NBYTES + 24),
        ([BlockShard(0, (SHARD, SHARD))], 2 * SHARD.nbytes),
        ([BlockShard(0, (SHARD,))], SHARD.nbytes - 8),
        ([BlockShard(0, ())], 64),
        ([BlockShard(0, (SHARD, replace(SHARD, name="s", dtype=SCALES, itemsize=1, shape=(1, 4, 1))))], NBYTES * 2 + 8),
    ],
    ids=[
        "overlap",
        "no room",
        "before",
        "no words",
        "head missing",
        "dtypes",
        "half held",
        "twice",
        "too long",
        "nothing",
        "odd scales",
    ],
)
def test_parts_that_are_none_are_refused(parts: list[BlockShard], nbytes: int) -> None:
    with pytest.raises(LayoutError):
        runs_of(parts, nbytes)


def test_heads_of_which_single_elements_lie_together_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"only 2 bytes of a KV head lie together.*leave tier\.canonical_layout out"):
        runs_of([BlockShard(0, (replace(SHARD, order=(0, 2, 1)),))], SHARD.nbytes)


def test_payloads_of_other_lengths_are_refused() -> None:
    runs = runs_of([BlockShard(0, (SHARD,))], SHARD.nbytes)
    with pytest.raises(ValueError, match="instead of"):
        to_canonical(runs, np.zeros(runs.payload_nbytes - 8, np.uint8), np.zeros(runs.nbytes, np.uint8))
    with pytest.raises(ValueError, match="instead of"):
        from_canonical(runs, np.zeros(runs.payload_nbytes, np.uint8), np.zeros(runs.nbytes + 8, np.uint8))
