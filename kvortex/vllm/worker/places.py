"""Where a rank's blocks lie in its pool, when ranks keep blocks of different sizes.

The scheduler half plans for all ranks at once: one extent a block, as large as the largest rank's. A rank with smaller
blocks (fewer layers on its pipeline stage, say) has a smaller pool in the same proportion, and finds its own place for
each that was planned. Nothing is wasted and no plan is larger for it.
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
    """The proportion between what is planned and what one rank keeps.

    Args:
        planned_piece: bytes of a piece of the pool, as planned; no extent crosses one.
        planned: bytes of the extents that are planned.
        own: bytes of this rank's, none larger than the planned one.
    """

    planned_piece: int
    planned: BlockSizes
    own: BlockSizes

    @property
    def are_planned(self) -> bool:
        """True where this rank's blocks are as large as the largest: every offset is as planned."""
        return self.own == self.planned

    @property
    def _fraction(self) -> tuple[int, int]:
        # The larger of both encodings' proportions: neither encoding then overlaps its neighbour.
        raw, packed = (self.own.raw, self.planned.raw), (self.own.packed, self.planned.packed)
        return max(raw, packed, key=lambda pair: pair[0] / pair[1])

    def _scaled(self, nbytes: int) -> int:
        own, planned = self._fraction
        return align_up(-(-nbytes * own // planned), EXTENT_ALIGNMENT_BYTES)

    @property
    def piece(self) -> int:
        """Bytes of a piece of this rank's pool."""
        return self.planned_piece if self.are_planned else align_up(self._scaled(self.planned_piece), PAGE_BYTES)

    def config(self, config: KVortexConfig) -> KVortexConfig:
        """The settings of this rank's pool."""
        if self.are_planned:
            return config
        pieces, rest = divmod(config.pool.bytes, self.planned_piece)
        nbytes = pieces * self.piece + self._scaled(rest)
        nbytes = max(nbytes, self.own.raw, PAGE_BYTES)
        return config.replace(pool={"bytes": nbytes, "pin_piece_bytes": self.piece})

    def place(self, plan: TransferPlan) -> TransferPlan:
        """A plan with this rank's offsets."""
        if self.are_planned:
            return plan
        packed = plan.packed if self.own.packs else None
        return plan._replace(offsets=self.offsets(plan.offsets), packed=packed)

    def offsets(self, planned: NDArray[np.int64]) -> NDArray[np.int64]:
        """This rank's offsets, `int64 [n]`, for those that were planned."""
        own, whole = self._fraction
        piece, within = np.divmod(planned, self.planned_piece)
        unit = EXTENT_ALIGNMENT_BYTES
        return np.asarray(piece * self.piece + within * own // whole // unit * unit, dtype=np.int64)

    def planned_bytes(self, own_bytes: int) -> int:
        """How much of what is planned lies in the first `own_bytes` of this rank's pool."""
        if self.are_planned:
            return own_bytes
        own, whole = self._fraction
        pieces, rest = divmod(own_bytes, self.piece)
        within = max(rest - EXTENT_ALIGNMENT_BYTES, 0) * whole // own
        return pieces * self.planned_piece + min(within, self.planned_piece)


def largest(sizes: "list[BlockSizes]") -> BlockSizes:
    """The sizes that hold every rank's blocks."""
    return BlockSizes(max(s.raw for s in sizes), max(s.packed for s in sizes))
