"""Which blocks of a paged cache the calls under way use."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.kernels.claims import BlockClaims
from kvortex.layout import PagedCache
from kvortex.types import Direction


class Claim:
    """Blocks of the paged cache that one save or load uses. `DataPlane.claim` creates it."""

    def __init__(self, parts: Sequence[tuple[BlockClaims, NDArray[np.int32]]], direction: Direction) -> None:
        self._parts: list[tuple[BlockClaims, NDArray[np.int32]]] = []
        self._direction = direction
        try:
            for claims, block_ids in parts:
                claims.claim(direction, block_ids)
                self._parts.append((claims, block_ids))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the blocks; idempotent."""
        parts, self._parts = self._parts, []
        for claims, block_ids in parts:
            claims.release(self._direction, block_ids)


def claims_of(cache: PagedCache) -> list[BlockClaims]:
    """The claims for each group; groups that share memory share them, too."""
    sizes = [layout.num_blocks for layout in cache.layouts]
    claims = {
        space: BlockClaims(max(n for n, s in zip(sizes, cache.block_spaces, strict=True) if s == space))
        for space in set(cache.block_spaces)
    }
    return [claims[space] for space in cache.block_spaces]
