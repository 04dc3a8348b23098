"""The CPU twins against the NumPy references, and the tables that all kernels read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import InvalidBlockIdError
from kvortex.kernels import HostKernels, validate_block_ids
from kvortex.kernels.reference import gather_reference, scatter_reference
from kvortex.kernels.tables import TILE_LANES, segment_table, tile_table
from kvortex.layout import KVLayout

BLOCKS = 12
SHAPES = {
    "K and V apart": lambda: torch.randn(2, BLOCKS, 16, 2, 32),
    "K and V together": lambda: torch.randn(BLOCKS, 2, 16, 2, 32),
    "heads before tokens": lambda: torch.randn(2, BLOCKS, 2, 16, 32).transpose(2, 3),
    "latent": lambda: torch.randn(BLOCKS, 16, 576).to(torch.bfloat16),
    "fp8": lambda: torch.randn(BLOCKS, 16, 2, 24).to(torch.float8_e4m3fn),
}


def make(names: list[str]) -> tuple[KVLayout, dict[str, torch.Tensor]]:
    tensors = {f"layers.{i}": SHAPES[name]() for i, name in enumerate(names)}
    return KVLayout.from_tensors(tensors, 16, num_blocks=BLOCKS), tensors


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=3),
    ids=st.lists(st.integers(0, BLOCKS - 1), max_size=BLOCKS, unique=True),
    gap=st.sampled_from([0, 8, 128]),
)
def test_gather_and_scatter(names: list[str], ids: list[int], gap: int) -> None:
    layout, _tensors = make(names)
    size = layout.block_nbytes + gap
    pool = np.full(size * (BLOCKS + 1), 0xA5, dtype=np.uint8)
    offsets = np.array([size * (i + 1) for i in range(len(ids))], dtype=np.int64)[::-1].copy()
    kernels = HostKernels(layout, pool)
    block_ids = np.array(ids, dtype=np.int32)
    digests = kernels.gather(block_ids, offsets)
    payloads, expected = gather_reference(layout, ids)
    assert (digests == expected).all()
    touched = np.zeros(pool.size, dtype=bool)
    for payload, offset in zip(payloads, offsets.tolist(), strict=True):
        assert (pool[offset : offset + layout.block_nbytes] == payload).all()
        touched[offset : offset + layout.block_nbytes] = True
    assert (pool[~touched] == 0xA5).all()

    everywhere, _ = gather_reference(layout, range(BLOCKS))
    target = ids[::-1]
    assert (kernels.scatter(np.array(target, dtype=np.int32), offsets) == expected).all()
    everywhere[target] = payloads
    now, _ = gather_reference(layout, range(BLOCKS))
    assert (now == everywhere).all()


def test_the_reference_scatters_what_it_gathered() -> None:
    layout, _tensors = make(["latent", "K and V apart"])
    payloads, digests = gather_reference(layout, [1, 2])
    assert (scatter_reference(layout, [5, 6], payloads) == digests).all()
    again, _ = gather_reference(layout, [5, 6])
    assert (again == payloads).all()


def test_bad_calls_touch_nothing() -> None:
    layout, _tensors = make(["latent"])
    pool = np.zeros(4 * layout.block_nbytes, dtype=np.uint8)
    kernels = HostKernels(layout, pool)
    before, _ = gather_reference(layout, range(BLOCKS))
    one, two = np.array([1], dtype=np.int32), np.array([1, 1], dtype=np.int32)
    with pytest.raises(InvalidBlockIdError):
        kernels.gather(np.array([BLOCKS], dtype=np.int32), np.array([0]))
    with pytest.raises(InvalidBlockIdError, match="twice"):
        kernels.scatter(two, np.array([0, layout.block_nbytes]))
    for offsets in ([4], [-8], [3 * layout.block_nbytes + 8], [0, 0]):
        with pytest.raises(ValueError, match="offset"):
            kernels.gather(one, np.array(offsets))
        with pytest.raises(ValueError, match="offset"):
            kernels.scatter(one, np.array(offsets))
    assert not pool.any()
    after, _ = gather_reference(layout, range(BLOCKS))
    assert (after == before).all()
    kernels.gather(two, np.array([0, layout.block_nbytes]))


@pytest.mark.parametrize("width", [16, 48, 512, 4096, 4112, 9216, 65536])
def test_tiles_cover_each_segment_once_in_order(width: int) -> None:
    tensors = {f"layers.{i}": np.zeros((3, 1, width), dtype=np.uint8) for i in range(2)}
    layout = KVLayout.from_tensors(tensors, 1, num_blocks=3, block_dim=0)
    tiles = tile_table(layout)
    position = 0
    for _source, _stride, target, lanes in tiles.tolist():
        assert target == position
        assert 1 <= lanes <= TILE_LANES
        position += lanes
    assert position * 16 == layout.block_nbytes
    lengths = tiles[:, 3].reshape(2, -1)
    assert (lengths[0] == lengths[1]).all()
    assert (lengths[0, :-1] % 32 == 0).all()
    segments = segment_table(layout)
    assert (segments[:, 3] * 8 == width).all()
    assert (tiles[0, :2] * 2 == segments[0, :2]).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 5], "5 is not in"),
        ([-1], "-1 is not in"),
        ([2, 2], "2 is named twice"),
        ([0.5], "integers"),
        ([[1]], "flat"),
    ],
)
def test_ids_are_checked(ids: list[int], message: str) -> None:
    with pytest.raises(InvalidBlockIdError, match=message):
        validate_block_ids(ids, 5)


def test_good_ids_pass() -> None:
    assert validate_block_ids([], 5).size == 0
    assert validate_block_ids(range(5), 5).dtype == np.int32
    assert validate_block_ids(np.array([4, 0], dtype=np.uint64), 5).tolist() == [4, 0]
