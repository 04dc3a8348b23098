"""Ranks whose blocks differ in size follow one plan: no block of a rank overlaps another, none leaves its pool."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.config import KVortexConfig
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.memory.allocator import ExtentAllocator
from kvortex.types import PAGE_BYTES, BlockSizes, Direction, TransferPlan
from kvortex.vllm.worker.places import Places, largest

UNIT = EXTENT_ALIGNMENT_BYTES

pytestmark = pytest.mark.leaves_extents  # the allocators here stand for pools and hold no memory


@st.composite
def sizes(draw: st.DrawFn, *, raw: tuple[int, int] = (1, 300)) -> BlockSizes:
    whole = draw(st.integers(*raw)) * UNIT
    packs = draw(st.booleans())
    return BlockSizes(whole, draw(st.integers(1, whole // UNIT)) * UNIT if packs else whole)


Sizes = tuple[BlockSizes, ...]
NOTHING = BlockSizes(0, 0)


@st.composite
def unequal(draw: st.DrawFn) -> tuple[Sizes, list[Sizes]]:
    """Ranks with the blocks of some groups of layers; each group has layers on at least one of them."""
    num_ranks = draw(st.integers(1, 4))
    groups = draw(
        st.lists(st.lists(sizes() | st.just(NOTHING), min_size=num_ranks, max_size=num_ranks), min_size=1, max_size=4)
    )
    for of_group in groups:
        if of_group == [NOTHING] * num_ranks:
            of_group[0] = draw(sizes())
    ranks = [own for own in zip(*groups, strict=True) if any(size.raw for size in own)]
    return largest(ranks), ranks


def nbytes_of(sizes: Sizes, form: int) -> int:
    size = sizes[form // 2]
    return size.packed if form % 2 else size.raw


@settings(max_examples=300, deadline=None)
@given(
    unequal(),
    st.integers(1, 40),
    st.integers(PAGE_BYTES, 1 << 20),
    st.lists(st.integers(0, 7), min_size=1, max_size=200),
    st.randoms(use_true_random=False),
)
def test_what_is_planned_apart_lies_apart_in_every_rank(
    found: tuple[Sizes, list[Sizes]], blocks: int, extra: int, drawn: list[int], random: Random
) -> None:
    planned, ranks = found
    largest_nbytes = max(size.raw for size in planned)
    piece = -(-largest_nbytes * 3 // PAGE_BYTES) * PAGE_BYTES
    pool = largest_nbytes * blocks + extra
    allocator = ExtentAllocator(pool, piece)
    # Blocks come and go, in all forms, as a pool under load has them.
    extents: list[tuple[int, int]] = []
    for form in [form % (2 * len(planned)) for form in drawn]:
        offsets = allocator.allocate_many(1, nbytes_of(planned, form), "test")
        if offsets.size:
            extents.append((int(offsets[0]), form))
        elif extents:
            gone = extents.pop(random.randrange(len(extents)))
            allocator.free_many(np.array([gone[0]], dtype=np.int64))
    for own in ranks:
        places = Places(piece, planned, own)
        config = places.config(KVortexConfig(pool={"bytes": pool, "pin_piece_bytes": piece}))
        at = places.offsets(np.array([offset for offset, _ in extents], dtype=np.int64))
        used = sorted(
            (int(start), int(start) + nbytes_of(own, form))
            for start, (_, form) in zip(at, extents, strict=True)
            if nbytes_of(own, form)
        )
        assert all(start % UNIT == 0 for start, _ in used)
        assert all(end <= start for (_, end), (start, _) in pairwise(used))
        assert all(end <= config.pool.bytes for _, end in used)
        # Pieces are pinned one by one: no block may lie across two.
        assert all(
            start // config.pool.pin_piece_bytes == (end - 1) // config.pool.pin_piece_bytes for start, end in used
        )


@settings(max_examples=200, deadline=None)
@given(unequal(), st.integers(1, 60), st.integers(0, 1 << 16))
def test_what_a_smaller_pool_holds_is_planned_and_no_more(
    found: tuple[Sizes, list[Sizes]], blocks: int, extra: int
) -> None:
    """A rank could pin a part of its pool only: what is planned must lie inside that part."""
    planned, ranks = found
    piece = -(-max(size.raw for size in planned) * 3 // PAGE_BYTES) * PAGE_BYTES
    for own in ranks:
        places = Places(piece, planned, own)
        nbytes = max(size.raw for size in own) * blocks + extra
        for of_plan, of_rank in zip(planned, own, strict=True):
            allocator = ExtentAllocator(places.planned_bytes(nbytes), piece)
            offsets = places.offsets(allocator.allocate_many(10_000, of_plan.raw, "test"))
            assert all(offset + of_rank.raw <= nbytes for offset in offsets.tolist())


def test_equal_ranks_lie_where_they_were_planned() -> None:
    sizes = (BlockSizes(4096, 2048),)
    places = Places(1 << 20, sizes, sizes)
    plan = TransferPlan(Direction.SAVE, np.arange(3, dtype=np.int32), np.array([0, 4096, 8192], dtype=np.int64))
    assert places.place(plan) is plan
    config = KVortexConfig(pool=1 << 24)
    assert places.config(config) is config


@pytest.mark.parametrize(("own", "share"), [(2, 2 / 3), (1, 1 / 3), (3, 1)])
def test_a_stage_with_fewer_layers_takes_memory_in_proportion(own: int, share: float) -> None:
    layer = 64 << 10
    planned, mine = (BlockSizes(3 * layer, 3 * layer),), (BlockSizes(own * layer, own * layer),)
    pool, piece = 1 << 30, 16 << 20
    config = Places(piece, planned, mine).config(KVortexConfig(pool={"bytes": pool, "pin_piece_bytes": piece}))
    assert config.pool.bytes == pytest.approx(pool * share, rel=0.01)
