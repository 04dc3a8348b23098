"""PagedCache: the layouts of a cache's groups, what tells caches apart, and which groups share memory."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvortex.errors import ConfigError, LayoutError
from kvortex.groups import GroupSet, KVGroup
from kvortex.layout import KVLayout, PagedCache, Segment, TensorView
from kvortex.layout.sharing import Sharing, sharing
from kvortex.layout.strides import find_overlap
from tests.engine_support import BLOCK_SIZE, make_cache
from tests.groups_support import GROUPS, STATE_TOKENS, apart, in_shared_pages


def paged(cache: Any, groups: Sequence[KVGroup] = GROUPS, hash_block_size: int = BLOCK_SIZE) -> PagedCache:
    return PagedCache.from_tensors(cache.tensors, hash_block_size, block_dim=cache.block_dims, groups=groups)


def test_each_group_has_the_layout_of_its_tensors_alone() -> None:
    cache = apart()
    made = paged(cache)
    for group, layout in zip(GROUPS, made.layouts, strict=True):
        own = {name: cache.tensors[name] for name in group.layers}
        dims = {name: cache.block_dims[name] for name in group.layers}
        assert layout == KVLayout.from_tensors(own, group.block_size, block_dim=dims)
    assert [layout.num_blocks for layout in made.layouts] == [48, 40, 24]
    assert [layout.block_size for layout in made.layouts] == [BLOCK_SIZE, BLOCK_SIZE, STATE_TOKENS]
    assert made.block_nbytes == tuple(len(cache.block(group.name, 0)) for group in GROUPS)
    assert made.block_size == BLOCK_SIZE
    assert made.dtypes == ("bfloat16", "float16", "float32")
    assert made.device == "cpu"


def test_without_groups_there_is_one_of_full_attention() -> None:
    tensors = make_cache()
    made = PagedCache.from_tensors(tensors, BLOCK_SIZE)
    layout = KVLayout.from_tensors(tensors, BLOCK_SIZE)
    assert made.layouts == (layout,)
    assert made.groups.groups == (KVGroup("full", tuple(tensors), BLOCK_SIZE),)
    assert (made.digest, made.describe(), made.block_spaces) == (layout.digest, layout.describe(), (0,))
    one_group = PagedCache.from_tensors(tensors, BLOCK_SIZE, groups=[KVGroup("a", tuple(tensors), BLOCK_SIZE)])
    assert one_group.digest == layout.digest, "who names the one group finds what was stored without a name"


def test_the_order_of_a_groups_layers_is_that_of_the_group() -> None:
    cache = apart((replace(GROUPS[0], layers=("full.1", "full.0")), *GROUPS[1:]))
    made = paged(cache, tuple(cache.groups.values()))
    assert [fmt.name for fmt in made.layouts[0].formats] == ["full.1", "full.0"]
    assert made.digest != paged(apart()).digest


def changed(number: int, **changes: Any) -> list[KVGroup]:
    return [replace(group, **changes) if n == number else group for n, group in enumerate(GROUPS)]


OTHER_GROUPS = {
    "another window": changed(1, reach=24),
    "a window as full attention": changed(1, kind="full", reach=0),
    "a window as a chunk": changed(1, kind="chunk"),
    "other blocks of a state": changed(2, block_size=2 * STATE_TOKENS),
    "in another order": [GROUPS[1], GROUPS[0], GROUPS[2]],
    "a group split in two": [
        KVGroup("full", ("full.0",), BLOCK_SIZE),
        KVGroup("more", ("full.1",), BLOCK_SIZE),
        *GROUPS[1:],
    ],
}


@pytest.mark.parametrize("what", OTHER_GROUPS)
def test_caches_with_other_groups_have_other_digests(what: str) -> None:
    assert paged(apart(), OTHER_GROUPS[what]).digest != paged(apart()).digest


def test_caches_with_another_length_of_hashed_blocks_have_other_digests() -> None:
    assert paged(apart(), hash_block_size=8).digest != paged(apart()).digest


def test_a_digest_is_that_of_the_payloads_and_not_of_the_place() -> None:
    renamed = [replace(group, name=f"my {group.name}") for group in GROUPS]
    larger = apart()
    larger.tensors["window.0"] = torch.zeros(99, BLOCK_SIZE, 2, 128, dtype=torch.float16)
    assert paged(apart()).digest == paged(apart()).digest == paged(larger).digest == paged(apart(), renamed).digest


WRONG: dict[str, tuple[list[KVGroup], type[Exception], str]] = {
    "no groups": ([], ConfigError, "1 to 128 groups"),
    "a tensor in no group": (list(GROUPS[:2]), LayoutError, "tensor 'conv' is in no group of layers: add it to one"),
    "a tensor that is missing": (changed(1, layers=("window.1",)), LayoutError, "the groups name 'window.1', which is"),
    "blocks of uneven hashes": (changed(1, block_size=24), ConfigError, "24 tokens.*hash smaller blocks"),
}


@pytest.mark.parametrize("what", WRONG)
def test_groups_that_do_not_fit_the_tensors(what: str) -> None:
    groups, error, says = WRONG[what]
    with pytest.raises(error, match=says):
        paged(apart(), groups)


def test_a_block_dim_of_a_tensor_that_is_missing() -> None:
    cache = apart()
    cache.block_dims["window.1"] = 0
    with pytest.raises(LayoutError, match=r"block_dim names 'window\.1', which is not among the tensors"):
        paged(cache)


def test_one_block_dim_for_all_tensors() -> None:
    cache = in_shared_pages()
    groups = PagedCache.from_tensors(cache.tensors, BLOCK_SIZE, block_dim=0, num_blocks=64, groups=GROUPS)
    assert groups.layouts == paged(cache).layouts


def test_groups_on_two_devices() -> None:
    views = {
        n: TensorView(n, 4096 * (i + 1), (4, 1024), (1024, 1), 1, f"cuda:{i}", "uint8") for i, n in enumerate("ab")
    }
    groups = [KVGroup(name, (name,), BLOCK_SIZE) for name in "ab"]
    with pytest.raises(LayoutError, match="the groups are on cuda:0 and cuda:1: register those of each device alone"):
        PagedCache.from_tensors(views, BLOCK_SIZE, block_dim=0, groups=groups)


def test_a_cache_describes_all_its_groups() -> None:
    assert repr(paged(apart())).startswith("<PagedCache: 3 groups; full: 48 blocks of 16 tokens")
    assert "; state: 24 blocks of 64 tokens" in repr(paged(apart()))


# -- shared memory -----------------------------------------------------------------------------------


def layout(num_blocks: int, *segments: tuple[int, int, int]) -> KVLayout:
    return KVLayout(BLOCK_SIZE, num_blocks, "cpu", tuple(Segment("t", *segment) for segment in segments))


def by_bytes(first: KVLayout, second: KVLayout) -> Sharing:
    """Which blocks of two layouts have a byte in common, told byte by byte."""

    def owners(one: KVLayout) -> dict[int, int]:
        return {
            segment.address + b * segment.block_stride + byte: b
            for segment in one.segments
            for b in range(one.num_blocks)
            for byte in range(segment.nbytes)
        }

    a, b = owners(first), owners(second)
    pairs = {(a[byte], b[byte]) for byte in a.keys() & b.keys()}
    if not pairs:
        return Sharing.NOTHING
    return Sharing.SAME_BLOCKS if all(one == other for one, other in pairs) else Sharing.OTHER_BLOCKS


@st.composite
def layouts(draw: Any) -> KVLayout:
    num_blocks = draw(st.integers(1, 5))
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        stride = draw(st.sampled_from([6, 8, 8, 8, 12]))
        segments.append((draw(st.integers(0, 60)), stride, draw(st.integers(1, min(stride, 5)))))
    made = np.array(segments, dtype=np.int64)
    assume(find_overlap(made[:, 0], made[:, 1], made[:, 2], num_blocks) is None)
    return layout(num_blocks, *segments)


@given(layouts(), layouts())
def test_sharing_is_exact(first: KVLayout, second: KVLayout) -> None:
    assert sharing(first, second) is sharing(second, first) is by_bytes(first, second)


def test_groups_that_are_interleaved_in_memory_share_nothing() -> None:
    pages = torch.zeros(8, 4, 1024, dtype=torch.uint8)
    tensors = {str(i): pages[:, i] for i in range(4)}
    groups = [KVGroup("even", ("0", "2"), BLOCK_SIZE), KVGroup("odd", ("1", "3"), BLOCK_SIZE)]
    assert PagedCache.from_tensors(tensors, BLOCK_SIZE, block_dim=0, groups=groups).block_spaces == (0, 1)


def test_groups_over_the_same_pages_share_block_ids() -> None:
    assert paged(apart()).block_spaces == (0, 1, 2)
    assert paged(in_shared_pages()).block_spaces == (0, 0, 0)


def test_groups_that_a_third_one_connects_share_block_ids() -> None:
    a, b = torch.zeros(8, 1024, dtype=torch.uint8), torch.zeros(8, 1024, dtype=torch.uint8)
    tensors = {"a": a, "b": b, "a too": a, "b too": b, "alone": torch.zeros(4, 1024, dtype=torch.uint8)}
    groups = [KVGroup(name, layers, BLOCK_SIZE) for name, layers in [("a", ("a",)), ("b", ("b",)), ("c", ("alone",))]]
    both = KVGroup("both", ("a too", "b too"), BLOCK_SIZE)
    for order in itertools.permutations([*groups, both]):
        spaces = PagedCache.from_tensors(tensors, BLOCK_SIZE, block_dim=0, groups=order).block_spaces
        by_name = {group.name: space for group, space in zip(order, spaces, strict=True)}
        assert by_name["a"] == by_name["b"] == by_name["both"] != by_name["c"]
        assert all(spaces[space] == space for space in spaces)


def test_groups_that_cut_the_same_memory_in_another_way_are_refused() -> None:
    memory = torch.zeros(16 * 1024, dtype=torch.uint8)
    tensors = {"small": memory.view(16, 1024), "large": memory.view(8, 2048)}
    groups = [KVGroup("a", ("small",), BLOCK_SIZE), KVGroup("b", ("large",), 2 * BLOCK_SIZE)]
    with pytest.raises(LayoutError, match="groups 'a' and 'b' share memory, but not block by block"):
        PagedCache.from_tensors(tensors, BLOCK_SIZE, block_dim=0, groups=groups)


def test_a_digest_does_not_depend_on_how_groups_share_memory() -> None:
    cache = in_shared_pages()
    copies = {name: tensor.clone() for name, tensor in cache.tensors.items()}
    alone = PagedCache.from_tensors(copies, BLOCK_SIZE, block_dim=cache.block_dims, groups=GROUPS)
    assert alone.digest == paged(cache).digest
    assert alone.block_spaces == (0, 1, 2)


def test_the_groups_are_those_of_a_set() -> None:
    made = paged(apart())
    assert isinstance(made.groups, GroupSet)
    assert made.groups.groups == GROUPS
    assert np.array_equal(made.groups.tags, GroupSet(GROUPS, BLOCK_SIZE).tags)
