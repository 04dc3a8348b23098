"""Claims on blocks of the paged cache: saves share a block that they read, a load has a block to itself."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import InvalidBlockIdError
from kvortex.runtime.jit import njit
from kvortex.types import Direction

_WRITTEN = -1


class BlockClaims:
    """Grants each block to any number of saves, which read it, or to one load, which writes it.

    Args:
        num_blocks: size of the paged cache in blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self._holders = np.zeros(num_blocks, np.int32)  # readers of each block, or _WRITTEN
        nothing = np.empty(0, np.int32)  # compiles the functions, or loads them, before a transfer waits for them
        for direction in Direction:
            self.claim(direction, nothing)
            self.release(direction, nothing)

    def claim(self, direction: Direction, block_ids: NDArray[np.int32]) -> None:
        """Claim the blocks `block_ids`, `int32 [n]`, none twice: all of them, or none if it raises.

        Raises:
            InvalidBlockIdError: a load has claimed one of them; or a save has, and this is a load.
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
        """Release blocks that `claim` granted for the same direction."""
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
