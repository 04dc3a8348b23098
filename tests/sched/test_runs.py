"""Which blocks of a batch one copy moves: neighbours in one piece of the pool."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvortex.sched.native import run_length


def runs_of(offsets: NDArray[np.int64], piece_nbytes: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    while (first := sum(count for _, count in runs)) < len(offsets):
        runs.append((first, run_length(offsets, first, 128, piece_nbytes)))
    return runs


@pytest.mark.parametrize(
    ("offsets", "runs"),
    [
        ([0], [(0, 1)]),
        ([0, 128, 256], [(0, 3)]),
        ([256, 128, 0], [(0, 1), (1, 1), (2, 1)]),
        ([0, 256], [(0, 1), (1, 1)]),
        ([768, 896, 1024, 1152], [(0, 2), (2, 2)]),
        ([1024, 1152, 0, 128], [(0, 2), (2, 2)]),
    ],
)
def test_runs_end_at_gaps_and_at_the_borders_of_pieces(offsets: list[int], runs: list[tuple[int, int]]) -> None:
    assert runs_of(np.array(offsets, dtype=np.int64), 1024) == runs


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30, unique=True), st.integers(1, 12))
def test_runs(places: list[int], piece_blocks: int) -> None:
    offsets = np.array(places, dtype=np.int64) * 128
    piece = piece_blocks * 128
    expected: list[tuple[int, int]] = []
    for i, offset in enumerate(offsets.tolist()):
        if i and offset == offsets[i - 1] + 128 and offset // piece == offsets[i - 1] // piece:
            expected[-1] = (expected[-1][0], expected[-1][1] + 1)
        else:
            expected.append((i, 1))
    assert runs_of(offsets, piece) == expected
