"""Parts of blocks that ranks fill together, without vLLM: where they lie, and that each rank notices any change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvortex.codecs import Codec, Encodings
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.kernels.digest import digests_of_rows
from kvortex.tiering import TieredPool
from kvortex.tiers import WriteRequest
from kvortex.tiers.payload import payload_digest
from kvortex.types import BlockSizes, Direction, TransferPlan
from kvortex.vllm.worker.parts import WORD_BYTES, BlockParts, PartSizes

UNIT = EXTENT_ALIGNMENT_BYTES
NOTHING = (BlockSizes(0, 0), (0, 0), (Codec.RAW, Codec.RAW))
Words = NDArray[np.uint64]


def sizes_of(groups: Sequence[tuple[BlockSizes, tuple[int, int], tuple[Codec, Codec]]]) -> PartSizes:
    """A part from size, payloads and codecs of each group."""
    payloads = tuple(nbytes for _, of_group, _ in groups for nbytes in of_group)
    codecs = tuple(codec for _, _, of_group in groups for codec in of_group)
    return PartSizes(tuple(size for size, _, _ in groups), payloads, codecs)


@st.composite
def groups_of_parts(draw: st.DrawFn) -> tuple[BlockSizes, tuple[int, int], tuple[Codec, Codec]]:
    """What a part stores of the blocks of one group: with a packing or without."""
    raw = draw(st.integers(1, 6))
    packed = draw(st.integers(1, raw))
    codec = Codec.RAW if packed == raw else draw(st.sampled_from([Codec.FP8, Codec.BF16]))
    spare = draw(st.integers(0, UNIT // WORD_BYTES - 1)) * WORD_BYTES
    return BlockSizes(raw * UNIT, packed * UNIT), (raw * UNIT - spare, packed * UNIT - spare), (Codec.RAW, codec)


@st.composite
def all_sizes(draw: st.DrawFn, least: int = 1, most: int = 5) -> list[PartSizes]:
    """Parts of blocks of some groups; each group is in one part at least."""
    num_parts, num_groups = draw(st.integers(least, most)), draw(st.integers(1, 4))
    of_groups = []
    for _ in range(num_groups):
        having = draw(st.sets(st.integers(0, num_parts - 1), min_size=1))
        of_groups.append([draw(groups_of_parts()) if part in having else NOTHING for part in range(num_parts)])
    return [sizes_of(of_part) for of_part in zip(*of_groups, strict=True)]


def forms_of(parts: BlockParts) -> list[int]:
    """The forms that blocks can have."""
    return [2 * group + packed for group, size in enumerate(parts.sizes) for packed in range(1 + size.packs)]


def nbytes_of(sizes: PartSizes, form: int) -> int:
    size = sizes.sizes[form // 2]
    return size.packed if form % 2 else size.raw


def plan_of(offsets: Sequence[int], forms: Sequence[int] | None) -> TransferPlan:
    of_blocks = None if forms is None else np.array(forms, np.uint8)
    return TransferPlan(Direction.LOAD, np.arange(len(offsets), dtype=np.int32), np.array(offsets, np.int64), of_blocks)


# -- places ------------------------------------------------------------------------------------------


@given(all_sizes())
def test_parts_lie_in_the_extent_one_behind_another(sizes: list[PartSizes]) -> None:
    ranks = [BlockParts(sizes, own) for own in range(len(sizes))]
    for form in forms_of(ranks[0]):
        extent = ranks[0].sizes[form // 2].packed if form % 2 else ranks[0].sizes[form // 2].raw
        payload = ranks[0].encodings.payloads[form]
        assert extent % UNIT == 0
        assert 0 < payload <= extent
        end = 1000 * UNIT
        for rank, size in zip(ranks, sizes, strict=True):
            placed = rank.place(plan_of([1000 * UNIT], [form]))
            assert placed.offsets.tolist() == [end], "parts are in order, without holes and overlaps"
            assert end % UNIT == 0
            end += nbytes_of(size, form)
        tail = len(sizes) * WORD_BYTES if len(sizes) > 1 else 0
        assert end + tail - 1000 * UNIT == (payload if tail else extent)


@given(all_sizes())
def test_all_ranks_agree_on_whole_blocks(sizes: list[PartSizes]) -> None:
    ranks = [BlockParts(sizes, own) for own in range(len(sizes))]
    first = ranks[0]
    for number, rank in enumerate(ranks):
        assert (rank.number, rank.count) == (number, len(sizes))
        assert rank.sizes == rank.planned == first.sizes
        assert (rank.encodings.payloads, rank.encodings.codecs) == (first.encodings.payloads, first.encodings.codecs)
        assert rank.smallest == min(min(size.raw, size.packed) for size in first.sizes)
        assert rank.planned_bytes(12345) == 12345
    for group, size in enumerate(first.sizes):
        assert size.packs == any(part.sizes[group].packs for part in sizes) == first.encodings.packs[group]
        assert first.encodings.codecs[2 * group] is Codec.RAW
        assert first.encodings.codecs[2 * group + 1] in {part.codecs[2 * group + 1] for part in sizes}


@given(all_sizes(), st.data())
def test_a_rank_moves_blocks_that_it_does_not_pack_raw(sizes: list[PartSizes], data: st.DataObject) -> None:
    own = data.draw(st.integers(0, len(sizes) - 1))
    parts = BlockParts(sizes, own)
    forms = data.draw(st.lists(st.sampled_from(forms_of(parts)), max_size=8))
    plan = plan_of([n * 100 * UNIT for n in range(len(forms))], forms)
    placed = parts.place(plan)
    assert placed.forms is not None
    assert placed.forms.dtype == np.uint8
    for form, own_form in zip(forms, placed.forms.tolist(), strict=True):
        assert own_form // 2 == form // 2
        assert own_form == form if sizes[own].sizes[form // 2].packs or not form % 2 else own_form == form - 1
        assert nbytes_of(sizes[own], own_form) == nbytes_of(sizes[own], form), "it fits its place"
    assert plan.forms is not None
    assert plan.forms.tolist() == forms
    assert plan.offsets.tolist() == [n * 100 * UNIT for n in range(len(forms))]
    assert placed.block_ids.tolist() == plan.block_ids.tolist()


@given(all_sizes(least=2), st.data())
def test_a_plan_without_forms_is_of_form_0(sizes: list[PartSizes], data: st.DataObject) -> None:
    parts = BlockParts(sizes, data.draw(st.integers(0, len(sizes) - 1)))
    placed = parts.place(plan_of([0, 50 * UNIT], None))
    assert placed.forms is None
    assert placed.offsets.tolist() == parts.place(plan_of([0, 50 * UNIT], [0, 0])).offsets.tolist()


@given(all_sizes(most=1), st.integers(0, 2**64 - 1))
def test_one_part_is_the_block_itself(sizes: list[PartSizes], digest: int) -> None:
    parts, (only,) = BlockParts(sizes, 0), sizes
    assert parts.sizes == only.sizes
    assert (parts.encodings.payloads, parts.encodings.codecs) == (only.payloads, only.codecs)
    plan = plan_of([0, 10 * UNIT], [0, 0])
    assert parts.place(plan) is plan
    pool = np.arange(20 * UNIT // WORD_BYTES, dtype=np.uint64)
    digests = np.array([digest, 7], np.uint64)
    parts.write_digests(pool, plan, digests)
    assert (pool == np.arange(pool.size, dtype=np.uint64)).all()
    assert parts.are_intact(pool, plan, digests, digests).tolist() == [True, True]
    assert parts.are_intact(pool, plan, digests, digests ^ np.array([1, 0], np.uint64)).tolist() == [False, True]
    assert parts.are_intact(pool, plan, digests ^ np.array([0, 1], np.uint64), digests).tolist() == [True, False]


def test_a_rank_with_layers_of_some_groups_has_nothing_of_the_others() -> None:
    encodings = Encodings([300, 200, 500, 500], [Codec.RAW, Codec.FP8, Codec.RAW, Codec.RAW])
    sizes = [BlockSizes(384, 256), BlockSizes(512, 512)]
    part = PartSizes.of_groups(encodings, sizes, here=[2, 0], count=4)
    assert part.sizes == (BlockSizes(512, 512), BlockSizes(0, 0), BlockSizes(384, 256), BlockSizes(0, 0))
    assert part.payloads == (500, 500, 0, 0, 300, 200, 0, 0)
    assert part.codecs == (Codec.RAW,) * 5 + (Codec.FP8, Codec.RAW, Codec.RAW)


# -- digests -----------------------------------------------------------------------------------------


@dataclass
class Saved:
    """Blocks in a pool that was dirty before, of which each rank has saved its parts, in any order.

    Attributes:
        pool: the pool, `uint64 [n]`.
        plan: all blocks.
        table: digests of the parts, `uint64 [blocks, parts]`; zero where a part has nothing of a block.
        own: for each rank the positions of the blocks that it has something of.
    """

    ranks: list[BlockParts]
    sizes: list[PartSizes]
    pool: Words
    plan: TransferPlan
    table: Words
    own: list[NDArray[np.intp]]

    @property
    def expected(self) -> Words:
        return digests_of_rows(self.table)

    def tail(self, block: int) -> int:
        """Index of a block's first digest in the pool, counted from the end of its payload."""
        offset, form = int(self.plan.offsets[block]), int(self.plan.forms[block])  # type: ignore[index]
        return (offset + self.ranks[0].encodings.payloads[form]) // WORD_BYTES - len(self.ranks)

    def intact(self, expected: Words, table: Words) -> list[set[int]]:
        """For each rank the blocks that it does not refuse, of those that it loads."""
        found = []
        for number, (rank, own) in enumerate(zip(self.ranks, self.own, strict=True)):
            good = rank.are_intact(self.pool, self.plan.part(own), expected[own], table[own, number])
            assert good.dtype == np.bool_
            found.append(set(own[good].tolist()))
        return found

    @property
    def all_own(self) -> list[set[int]]:
        return [set(own.tolist()) for own in self.own]


@st.composite
def saves(draw: st.DrawFn) -> Saved:
    sizes = draw(all_sizes(least=2))
    ranks = [BlockParts(sizes, own) for own in range(len(sizes))]
    forms = draw(st.lists(st.sampled_from(forms_of(ranks[0])), min_size=1, max_size=6))
    extents = [ranks[0].sizes[form // 2].packed if form % 2 else ranks[0].sizes[form // 2].raw for form in forms]
    ends = np.cumsum(extents)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = random.integers(1, 2**64, size=int(ends[-1]) // WORD_BYTES, dtype=np.uint64, endpoint=False)
    plan = plan_of((ends - extents).tolist(), forms)
    table = random.integers(0, 2**64, size=(len(forms), len(sizes)), dtype=np.uint64, endpoint=False)
    has = np.array([[nbytes_of(size, form) > 0 for size in sizes] for form in forms])
    table[~has] = 0
    own = [np.flatnonzero(has[:, part]) for part in range(len(sizes))]
    for part in draw(st.permutations(range(len(sizes)))):
        placed = ranks[part].place(plan.part(own[part]))
        for offset, form in zip(placed.offsets.tolist(), plan.part(own[part]).forms.tolist(), strict=True):  # type: ignore[union-attr]
            start, count = offset // WORD_BYTES, nbytes_of(sizes[part], form) // WORD_BYTES
            pool[start : start + count] = part + 1
        ranks[part].write_digests(pool, plan.part(own[part]), table[own[part], part])
    return Saved(ranks, sizes, pool, plan, table, own)


@given(saves())
def test_what_every_rank_has_saved_is_intact_for_each(saved: Saved) -> None:
    assert saved.intact(saved.expected, saved.table) == saved.all_own
    for block in range(saved.plan.num_blocks):
        tail = saved.tail(block)
        assert saved.pool[tail : tail + len(saved.ranks)].tolist() == saved.table[block].tolist()
    for part, own in enumerate(saved.own):  # no digest lies on the bytes of a part
        placed = saved.ranks[part].place(saved.plan.part(own))
        for offset, form in zip(placed.offsets.tolist(), saved.plan.part(own).forms.tolist(), strict=True):  # type: ignore[union-attr]
            start, count = offset // WORD_BYTES, nbytes_of(saved.sizes[part], form) // WORD_BYTES
            assert (saved.pool[start : start + count] == part + 1).all()


@given(saves(), st.integers(1, 2**64 - 1))
def test_a_change_of_any_one_word_behind_the_parts_is_seen_by_all(saved: Saved, change: int) -> None:
    for block in range(saved.plan.num_blocks):
        for word in range(saved.tail(block), saved.tail(block) + len(saved.ranks)):
            saved.pool[word] ^= np.uint64(change)
            assert saved.intact(saved.expected, saved.table) == [own - {block} for own in saved.all_own]
            saved.pool[word] ^= np.uint64(change)
    assert saved.intact(saved.expected, saved.table) == saved.all_own


@given(saves(), st.integers(1, 2**64 - 1))
def test_a_change_of_what_was_loaded_is_seen_by_the_rank_that_loaded_it(saved: Saved, change: int) -> None:
    for block in range(saved.plan.num_blocks):
        for part in range(len(saved.ranks)):
            loaded = saved.table.copy()
            loaded[block, part] ^= np.uint64(change)
            want = [own - {block} if n == part else own for n, own in enumerate(saved.all_own)]
            assert saved.intact(saved.expected, loaded) == want


@given(saves(), st.integers(1, 2**64 - 1))
def test_another_digest_than_the_index_has_is_seen_by_all(saved: Saved, change: int) -> None:
    for block in range(saved.plan.num_blocks):
        expected = saved.expected
        expected[block] ^= np.uint64(change)
        assert saved.intact(expected, saved.table) == [own - {block} for own in saved.all_own]


def test_words_of_parts_that_lack_a_group_are_zero_even_if_memory_was_not() -> None:
    """Parts 1 and 3 have the first group, part 2 the second: of each block the first part that has it writes zeros."""
    one = (BlockSizes(UNIT, UNIT), (UNIT, UNIT), (Codec.RAW, Codec.RAW))
    sizes = [sizes_of(groups) for groups in ((NOTHING,) * 2, (one, NOTHING), (NOTHING, one), (one, NOTHING))]
    ranks = [BlockParts(sizes, own) for own in range(4)]
    pool = np.full(64 * UNIT // WORD_BYTES, 0xABABABABABABABAB, np.uint64)
    plan = plan_of([0, 10 * UNIT], [0, 2])
    ranks[3].write_digests(pool, plan.part(np.array([0])), np.array([33], np.uint64))
    ranks[1].write_digests(pool, plan.part(np.array([0])), np.array([11], np.uint64))
    ranks[2].write_digests(pool, plan.part(np.array([1])), np.array([22], np.uint64))
    first, second = 2 * UNIT // WORD_BYTES, 11 * UNIT // WORD_BYTES
    assert pool[first : first + 4].tolist() == [0, 11, 0, 33]
    assert pool[second : second + 4].tolist() == [0, 0, 22, 0]
    assert np.count_nonzero(pool != 0xABABABABABABABAB) == 8


# -- digests in lower tiers --------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_digest_of_a_row_is_that_of_a_payload_of_the_same_words(count: int, num_rows: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 2**64, size=(num_rows, count), dtype=np.uint64, endpoint=False)
    assert digests_of_rows(rows).tolist() == [payload_digest(row.view(np.uint8)) for row in rows]


@given(saves())
def test_a_block_from_a_lower_tier_gets_the_digest_that_its_ranks_expect(saved: Saved) -> None:
    encodings, count = saved.ranks[0].encodings, len(saved.ranks)
    pool = TieredPool(None, saved.pool.view(np.uint8), encodings, count)  # type: ignore[arg-type]
    blocks = list(zip(saved.plan.offsets.tolist(), saved.plan.forms.tolist(), strict=True))  # type: ignore[union-attr]
    found = [pool.digest_in_pool(offset, form, 12345) for offset, form in blocks]
    assert found == saved.expected.tolist()
    assert saved.intact(np.array(found, np.uint64), saved.table) == saved.all_own
    for offset, form in blocks:
        payload = pool.payload(offset, form)
        assert payload.size == encodings.payloads[form]
        request = WriteRequest(b"k" * 32, payload, 12345, payload.size, encodings.codecs[form], None, 1.0)
        assert pool.digest_in_tier(request).digest == payload_digest(payload)
        assert TieredPool(None, pool.bytes, encodings).digest_in_pool(offset, form, 12345) == 12345  # type: ignore[arg-type]


@given(saves(), st.data())
def test_a_block_that_comes_back_elsewhere_is_intact(saved: Saved, data: st.DataObject) -> None:
    """Only the payload goes down and comes up, to another place of a pool that was dirty."""
    plan, encodings = saved.plan, saved.ranks[0].encodings
    order = data.draw(st.permutations(range(plan.num_blocks)))
    moved = np.full(saved.pool.nbytes + UNIT, 0xAB, np.uint8)
    offsets, end = np.zeros(plan.num_blocks, np.int64), UNIT
    for block in order:
        form = int(plan.forms[block])  # type: ignore[index]
        source, nbytes = int(plan.offsets[block]), encodings.payloads[form]
        moved[end : end + nbytes] = saved.pool.view(np.uint8)[source : source + nbytes]
        offsets[block], end = end, end + (-(-nbytes // UNIT) * UNIT)
    again = replace(saved, pool=moved.view(np.uint64), plan=plan._replace(offsets=offsets))
    assert again.intact(saved.expected, saved.table) == saved.all_own


@pytest.mark.parametrize("count", [2, 3, 16, 17])
def test_equal_parts_of_tensor_parallel_ranks(count: int) -> None:
    one = sizes_of([(BlockSizes(4 * UNIT, 2 * UNIT), (4 * UNIT, 2 * UNIT), (Codec.RAW, Codec.FP8))])
    parts = BlockParts([one] * count, count - 1)
    words = -(-count * WORD_BYTES // UNIT) * UNIT
    assert parts.sizes == (BlockSizes(4 * UNIT * count + words, 2 * UNIT * count + words),)
    assert parts.encodings.payloads == (4 * UNIT * count + 8 * count, 2 * UNIT * count + 8 * count)
    assert parts.place(plan_of([0, 0], [0, 1])).offsets.tolist() == [4 * UNIT * (count - 1), 2 * UNIT * (count - 1)]
