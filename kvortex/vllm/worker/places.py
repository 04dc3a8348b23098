"""The offsets of one rank's blocks in its pool, when ranks have blocks of different sizes.

The scheduler half plans once for all ranks: one extent a block, as large as the blocks of the largest rank. A rank with
smaller blocks (with fewer layers on its pipeline stage, say) has a pool that is smaller by the same factor, and scales
each planned offset by it. So no memory is wasted, and a plan does not grow with the number of ranks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config import KVortexConfig
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.types import PAGE_BYTES, BlockSizes, TransferPlan


@dataclass(frozen=True, slots=True)
class Places:
    """Scales planned offsets to those of one rank.

    Args:
        planned_piece: bytes of a piece of the planned pool; no extent crosses from one piece into the next.
        planned: bytes of a planned extent, in each encoding.
        own: bytes of this rank's extents, none larger than the planned one.
    """

    planned_piece: int
    planned: BlockSizes
    own: BlockSizes

    @property
    def is_unscaled(self) -> bool:
        """True if this rank's blocks are as large as the largest: then its offsets are the planned ones."""
        return self.own == self.planned

    @property
    def _fraction(self) -> tuple[int, int]:
        # The larger factor of the two encodings: then blocks of neither encoding overlap their neighbours.
        raw, packed = (self.own.raw, self.planned.raw), (self.own.packed, self.planned.packed)
        return max(raw, packed, key=lambda pair: pair[0] / pair[1])

    def _scaled(self, nbytes: int) -> int:
        own, planned = self._fraction
        return align_up(-(-nbytes * own // planned), EXTENT_ALIGNMENT_BYTES)

    @property
    def piece(self) -> int:
        """Bytes of a piece of this rank's pool."""
        return self.planned_piece if self.is_unscaled else align_up(self._scaled(self.planned_piece), PAGE_BYTES)

    def config(self, config: KVortexConfig) -> KVortexConfig:
        """The engine's settings with the size of this rank's pool and of its pieces."""
        if self.is_unscaled:
            return config
        pieces, left = divmod(config.pool.bytes, self.planned_piece)
        nbytes = pieces * self.piece + self._scaled(left)
        nbytes = max(nbytes, self.own.raw, PAGE_BYTES)
        return config.replace(pool={"bytes": nbytes, "pin_piece_bytes": self.piece})

    def place(self, plan: TransferPlan) -> TransferPlan:
        """A plan with this rank's offsets."""
        if self.is_unscaled:
            return plan
        packed = plan.packed if self.own.packs else None
        return plan._replace(offsets=self.offsets(plan.offsets), packed=packed)

    def offsets(self, planned: NDArray[np.int64]) -> NDArray[np.int64]:
        """This rank's offsets, `int64 [n]`, from the planned ones, `int64 [n]`, in bytes."""
        own, whole = self._fraction
        piece, within = np.divmod(planned, self.planned_piece)
        unit = EXTENT_ALIGNMENT_BYTES
        return np.asarray(piece * self.piece + within * own // whole // unit * unit, dtype=np.int64)

    def planned_bytes(self, own_bytes: int) -> int:
        """The size of the planned pool, in bytes, that corresponds to the first `own_bytes` of this rank's pool."""
        if self.is_unscaled:
            return own_bytes
        own, whole = self._fraction
        pieces, left = divmod(own_bytes, self.piece)
        within = max(left - EXTENT_ALIGNMENT_BYTES, 0) * whole // own
        return pieces * self.planned_piece + min(within, self.planned_piece)


def largest(sizes: "list[BlockSizes]") -> BlockSizes:
    """The sizes that are large enough for the blocks of every rank."""
    return BlockSizes(max(s.raw for s in sizes), max(s.packed for s in sizes))
