"""Blocks of the cache that loads may be writing."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvortex.errors import InvalidBlockIdError


class Targets:
    """Gives each block to one load at a time.

    Args:
        num_blocks: of the cache.
    """

    def __init__(self, num_blocks: int) -> None:
        self._taken = np.zeros(num_blocks, np.bool_)
        nothing = np.empty(0, np.int32)  # compiled, or read from numba's cache, before somebody waits for it
        self.claim(nothing)
        self.release(nothing)

    def claim(self, block_ids: NDArray[np.int32]) -> None:
        """Take blocks `int32 [n]`, all or none.

        Raises:
            InvalidBlockIdError: another load has one of them.
        """
        position = _claim(self._taken, block_ids)
        if position >= 0:
            raise InvalidBlockIdError(f"block id {block_ids[position]} is being written by another load")

    def release(self, block_ids: NDArray[np.int32]) -> None:
        """Give blocks back."""
        _release(self._taken, block_ids)


@njit(cache=True)
def _claim(taken: NDArray[np.bool_], block_ids: NDArray[np.int32]) -> Any:
    for i in range(len(block_ids)):
        if taken[block_ids[i]]:
            return i
    for block_id in block_ids:
        taken[block_id] = True
    return -1


@njit(cache=True)
def _release(taken: NDArray[np.bool_], block_ids: NDArray[np.int32]) -> None:
    for block_id in block_ids:
        taken[block_id] = False
