"""Each block is the target of one load at a time."""

import numpy as np
import pytest

from kvortex.errors import InvalidBlockIdError
from kvortex.kernels.targets import Targets


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def test_a_block_is_claimed_once_until_it_is_given_back() -> None:
    targets = Targets(8)
    targets.claim(ids(5, 0))
    targets.claim(ids(7))
    with pytest.raises(InvalidBlockIdError, match="block id 0 is being written"):
        targets.claim(ids(3, 0))
    targets.release(ids(0))
    targets.claim(ids(0))


def test_a_claim_is_all_or_nothing() -> None:
    targets = Targets(4)
    targets.claim(ids(2))
    with pytest.raises(InvalidBlockIdError):
        targets.claim(ids(0, 1, 2))
    targets.claim(ids(0, 1))


def test_nothing_can_be_claimed_many_times() -> None:
    targets = Targets(1)
    for _ in range(2):
        targets.claim(ids())
    targets.release(ids())
