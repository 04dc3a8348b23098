"""A block is read by any number of saves, or written by one load."""

import numpy as np
import pytest

from kvortex.errors import InvalidBlockIdError
from kvortex.kernels.claims import BlockClaims
from kvortex.types import Direction

SAVE, LOAD = Direction.SAVE, Direction.LOAD


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def test_a_block_is_written_by_one_load_until_it_is_given_back() -> None:
    claims = BlockClaims(8)
    claims.claim(LOAD, ids(5, 0))
    claims.claim(LOAD, ids(7))
    with pytest.raises(InvalidBlockIdError, match="block id 0 is being written by another load: wait"):
        claims.claim(LOAD, ids(3, 0))
    claims.release(LOAD, ids(0))
    claims.claim(LOAD, ids(0))


def test_a_block_that_is_written_is_not_read_and_the_other_way_round() -> None:
    claims = BlockClaims(8)
    claims.claim(LOAD, ids(5))
    with pytest.raises(InvalidBlockIdError, match="block id 5 is being written by a load: wait"):
        claims.claim(SAVE, ids(4, 5))
    claims.claim(SAVE, ids(4))
    with pytest.raises(InvalidBlockIdError, match="block id 4 is being read by a save: wait"):
        claims.claim(LOAD, ids(3, 4))


def test_many_saves_read_a_block_and_the_last_of_them_gives_it_back() -> None:
    claims = BlockClaims(4)
    for _ in range(3):
        claims.claim(SAVE, ids(1, 2))
    for _ in range(2):
        claims.release(SAVE, ids(1, 2))
    with pytest.raises(InvalidBlockIdError, match="being read"):
        claims.claim(LOAD, ids(2))
    claims.release(SAVE, ids(1, 2))
    claims.claim(LOAD, ids(1, 2))


@pytest.mark.parametrize("direction", list(Direction))
def test_a_claim_is_all_or_nothing(direction: Direction) -> None:
    claims = BlockClaims(4)
    claims.claim(LOAD, ids(2))
    with pytest.raises(InvalidBlockIdError):
        claims.claim(direction, ids(0, 1, 2))
    claims.claim(LOAD, ids(0, 1))


def test_nothing_can_be_claimed_many_times() -> None:
    claims = BlockClaims(1)
    for _ in range(2):
        claims.claim(LOAD, ids())
    claims.release(LOAD, ids())
