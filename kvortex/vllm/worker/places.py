"""The offsets of one rank's blocks in its pool, when ranks have blocks of different sizes.

The scheduler half plans once for all ranks: one extent a block, as large as the blocks of the largest rank. A rank with
smaller blocks (with fewer layers on its pipeline stage, say) has a pool that is smaller by the same factor, and scales
each planned offset by it. So no memory is wasted, and a plan does not grow with the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config import KVortexConfig
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.types import PAGE_BYTES, BlockSizes, TransferPlan

if TYPE_CHECKING:
    from kvortex.vllm.worker.owned import OwnedPool
    from kvortex.vllm.worker.parts import BlockParts
    from kvortex.vllm.worker.ranks import PoolShare


@dataclass(frozen=True, slots=True)
class Places:
    """Scales planned offsets to those of one rank.

    Args:
        planned_piece: bytes of a piece of the planned pool; no extent crosses from one piece into the next.
        planned: for each group of layers bytes of a planned extent, in each encoding.
        own: bytes of this rank's extents, none larger than the planned one; 0 for a group of which it has no layer.
    """

    planned_piece: int
    planned: tuple[BlockSizes, ...]
    own: tuple[BlockSizes, ...]

    @property
    def is_unscaled(self) -> bool:
        """True if this rank's blocks are as large as the largest: then its offsets are the planned ones."""
        return self.own == self.planned

    @property
    def _fraction(self) -> tuple[int, int]:
        # The largest factor of all groups and encodings: then no block overlaps its neighbour.
        pairs = [
            pair
            for own, planned in zip(self.own, self.planned, strict=True)
            for pair in ((own.raw, planned.raw), (own.packed, planned.packed))
            if pair[1]
        ]
        return max(pairs, key=lambda pair: pair[0] / pair[1])

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
        nbytes = max(nbytes, sum(own.raw for own in self.own), PAGE_BYTES)
        return config.replace(pool={"bytes": nbytes, "pin_piece_bytes": self.piece})

    def place(self, plan: TransferPlan) -> TransferPlan:
        """A plan with this rank's offsets."""
        if self.is_unscaled:
            return plan
        forms = plan.forms
        if forms is not None:  # a rank whose blocks of a group cannot be packed stores them raw
            packs = np.array([own.packs for own in self.own])
            forms = np.where(packs[forms // 2], forms, forms // 2 * 2).astype(np.uint8)
        return plan._replace(offsets=self.offsets(plan.offsets), forms=forms)

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


class RankPlaces:
    """What one rank moves of planned transfers: the blocks of its layers, with its own offsets and group numbers.

    Args:
        places: says where this rank's bytes of a block are.
        share: says which blocks this rank saves.
        here: for each of the rank's own groups, in order, its number in plans. A pipeline stage may lack some.
    """

    def __init__(self, places: "Places | BlockParts", share: "PoolShare | OwnedPool", here: Sequence[int]) -> None:
        self._places = places
        self._share = share
        self._own_number = np.full(len(places.planned), -1, dtype=np.int64)
        self._own_number[list(here)] = np.arange(len(here))
        self._has_all = len(here) == len(places.planned)

    def whole(self, plan: TransferPlan) -> tuple[TransferPlan, NDArray[np.intp]]:
        """The part of a transfer that concerns this rank's layers, and the positions of its blocks, `intp [n]`."""
        placed = self._places.place(plan)
        if self._has_all or plan.forms is None:
            return placed, np.arange(plan.num_blocks)
        forms = plan.forms if placed.forms is None else placed.forms
        numbers = self._own_number[forms // 2]
        positions = np.flatnonzero(numbers >= 0)
        own_forms = (2 * numbers + forms % 2)[positions].astype(np.uint8)
        return placed.part(positions)._replace(forms=own_forms), positions

    def part_of(self, plan: TransferPlan) -> tuple[TransferPlan, NDArray[np.intp]]:
        """The same for what this rank saves, or fetches, of it."""
        mine, positions = self.whole(plan)
        part = self._share.part_of(plan.part(positions), mine)
        return mine.part(part), positions[part]


def largest(sizes: "list[tuple[BlockSizes, ...]]") -> tuple[BlockSizes, ...]:
    """For each group the sizes that are large enough for the blocks of every rank."""
    return tuple(
        BlockSizes(max(s.raw for s in of_group), max(s.packed for s in of_group))
        for of_group in zip(*sizes, strict=True)
    )
