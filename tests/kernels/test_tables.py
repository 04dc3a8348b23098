"""The tables on which kernels rely without looking: where everything lies, cut into what a warp moves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import InvalidBlockIdError
from kvortex.kernels.tables import (
    LANE_BYTES,
    TILE_LANES,
    arena_base,
    arena_nbytes,
    array_at,
    segment_table,
    tile_table,
    validate_block_ids,
)
from kvortex.layout import KVLayout, Segment

BASE = 1 << 30


def layout_of(*segments: tuple[int, int, int], num_blocks: int = 3) -> KVLayout:
    """Segments as `(offset from BASE, block stride, bytes)`; no memory is behind them."""
    return KVLayout(16, num_blocks, "cpu", tuple(Segment("layers.0", BASE + a, s, n) for a, s, n in segments))


def test_the_arena_spans_from_the_lowest_segment_to_the_end_of_the_highest() -> None:
    layout = layout_of((4096, 512, 256), (64, 1024, 128), (1024, 2048, 16), num_blocks=4)
    assert arena_base(layout) == BASE + 64
    assert arena_nbytes(layout) == 1024 + 3 * 2048 + 16 - 64
    assert arena_nbytes(layout_of((0, 512, 256), num_blocks=1)) == 256


def test_a_segment_table_counts_words() -> None:
    layout = layout_of((4096, 512, 256), (64, 1024, 128))
    assert segment_table(layout).tolist() == [[(4096 - 64) // 8, 64, 0, 32], [0, 128, 32, 16]]


def test_a_tile_table_counts_lanes() -> None:
    layout = layout_of((32768, 65536, 9216), (64, 65536, 48))
    first = (32768 - 64) // 16
    assert tile_table(layout).tolist() == [
        [first, 4096, 0, 192],
        [first + 192, 4096, 192, 192],
        [first + 384, 4096, 384, 192],
        [0, 4096, 576, 3],
    ]


def test_a_full_tile_is_eight_accesses_of_a_warp() -> None:
    assert (LANE_BYTES, TILE_LANES) == (16, 8 * 32)


@pytest.mark.parametrize(
    ("lanes", "tiles"),
    [
        (1, [1]),
        (32, [32]),
        (255, [255]),
        (256, [256]),
        (257, [160, 97]),
        (288, [160, 128]),
        (512, [256, 256]),
        (576, [192, 192, 192]),
        (600, [224, 224, 152]),
    ],
)
def test_tiles_are_even(lanes: int, tiles: list[int]) -> None:
    assert tile_table(layout_of((0, 1 << 20, 16 * lanes)))[:, 3].tolist() == tiles


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6), st.integers(0, 3))
def test_tiles_cover_every_segment_once_in_order(lengths: list[int], gap: int) -> None:
    starts = [0, *np.cumsum([n + gap for n in lengths]).tolist()]
    layout = layout_of(*((16 * start, 1 << 24, 16 * n) for start, n in zip(starts, lengths, strict=False)))
    tiles = iter(tile_table(layout).tolist())
    payload = 0
    for start, length in zip(starts, lengths, strict=False):
        done = 0
        while done < length:
            source, stride, target, lanes = next(tiles)
            assert (source, stride, target) == (start + done, (1 << 24) // 16, payload + done)
            assert 1 <= lanes <= TILE_LANES
            done += lanes
            assert lanes % 32 == 0 or done == length
        assert done == length
        payload += length
    assert next(tiles, None) is None


def test_an_array_at_an_address_is_that_memory() -> None:
    memory = np.arange(6, dtype=np.uint64)
    words = array_at(memory.ctypes.data + 8, 32)
    assert words.tolist() == [1, 2, 3, 4]
    words[0] = 99
    assert memory[1] == 99


@given(st.lists(st.integers(-2, 12), max_size=8), st.integers(1, 10), st.booleans())
def test_block_ids_are_what_they_say_or_refused(ids: list[int], num_blocks: int, allow_duplicates: bool) -> None:
    good = all(0 <= i < num_blocks for i in ids) and (allow_duplicates or len(set(ids)) == len(ids))
    for given_ids in (ids, tuple(ids), np.array(ids, dtype=np.int64)):
        if good:
            checked = validate_block_ids(given_ids, num_blocks, allow_duplicates=allow_duplicates)
            assert checked.dtype == np.int32
            assert checked.tolist() == ids
        else:
            with pytest.raises(InvalidBlockIdError):
                validate_block_ids(given_ids, num_blocks, allow_duplicates=allow_duplicates)


@pytest.mark.parametrize("ids", [[True, False], ["1"], [2**64], [2**32], np.zeros((0, 2), dtype=np.int32), 3])
def test_what_is_no_list_of_ids_is_refused(ids: object) -> None:
    with pytest.raises(InvalidBlockIdError):
        validate_block_ids(ids, 8)


def test_ids_of_the_right_type_are_not_copied() -> None:
    ids = np.array([3, 1], dtype=np.int32)
    assert validate_block_ids(ids, 4) is ids
