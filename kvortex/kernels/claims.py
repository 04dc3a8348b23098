"""Claims on blocks of the paged cache, so that no transfer writes a block that another reads or writes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import InvalidBlockIdError
from kvortex.runtime.jit import njit
from kvortex.types import Direction

_WRITTEN = -1


class BlockClaims:
    """Lets any number of saves read a block, or one load write it.

    Args:
        num_blocks: size of the paged cache in blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self._holders = np.zeros(num_blocks, np.int32)  # readers of each block, or _WRITTEN
        nothing = np.empty(0, np.int32)  # compile it, or read it from numba's cache, before the first call
        for direction in Direction:
            self.claim(direction, nothing)
            self.release(direction, nothing)

    def claim(self, direction: Direction, block_ids: NDArray[np.int32]) -> None:
        """Claim blocks `int32 [n]` without duplicates; all of them or none.

        Raises:
            InvalidBlockIdError: a load has claimed one of them, or `direction` is LOAD and a save has.
        """
        loads = direction is Direction.LOAD
        position = _claim(self._holders, block_ids, loads)
        if position < 0:
            return
        block_id = block_ids[position]
        if self._holders[block_id] == _WRITTEN:
            other = "another load" if loads else "a load"
            raise InvalidBlockIdError(f"block id {block_id} is being written by {other}: wait until that load is over")
        raise InvalidBlockIdError(f"block id {block_id} is being read by a save: wait until that save is over")

    def release(self, direction: Direction, block_ids: NDArray[np.int32]) -> None:
        """Release claimed blocks; with the same arguments as `claim`."""
        _release(self._holders, block_ids, direction is Direction.LOAD)


@njit(cache=True)
def _claim(holders: NDArray[np.int32], block_ids: NDArray[np.int32], writes: bool) -> Any:
    for i in range(len(block_ids)):
        held = holders[block_ids[i]]
        if held < 0 or (writes and held):
            return i
    for block_id in block_ids:
        holders[block_id] = _WRITTEN if writes else holders[block_id] + 1
    return -1


@njit(cache=True)
def _release(holders: NDArray[np.int32], block_ids: NDArray[np.int32], writes: bool) -> None:
    for block_id in block_ids:
        holders[block_id] = 0 if writes else holders[block_id] - 1
