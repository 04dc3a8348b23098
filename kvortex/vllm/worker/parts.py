"""Blocks in the pool of an owner that several ranks fill together: one extent a block, with a part for each rank.

Ranks that hold the same KV have one part together. Where there are several parts, the digest of each stands behind them
in the extent, as a 64-bit word; the digest of the block is that of these words. So each rank checks what it loads, the
owner's index has one digest a block, and a lower tier has a block of all ranks or none.

    | part 0 | part 1 | ... | digest of part 0, of part 1, ... |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Codec, Encodings
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.kernels.digest import digests_of_rows
from kvortex.types import BlockSizes, TransferPlan

WORD_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class PartSizes:
    """What one rank stores of a block.

    Args:
        sizes: bytes of it in an extent, for each group of layers; 0 for a group of which the rank has no layer.
        payloads: bytes of its payload, by form.
        codecs: its codec, by form.
    """

    sizes: tuple[BlockSizes, ...]
    payloads: tuple[int, ...]
    codecs: tuple[Codec, ...]

    @classmethod
    def of_groups(
        cls, encodings: Encodings, sizes: Sequence[BlockSizes], here: Sequence[int], count: int
    ) -> "PartSizes":
        """Those of a rank that has layers of some groups.

        Args:
            encodings: how its blocks are encoded, by its own forms.
            sizes: bytes of an extent for each of its own groups.
            here: the number of each of its own groups.
            count: groups that there are.
        """
        all_sizes, payloads, codecs = [BlockSizes(0, 0)] * count, [0] * 2 * count, [Codec.RAW] * 2 * count
        for own, number in enumerate(here):
            all_sizes[number] = sizes[own]
            for form in range(2):
                payloads[2 * number + form] = encodings.payloads[2 * own + form]
                codecs[2 * number + form] = encodings.codecs[2 * own + form]
        return cls(tuple(all_sizes), tuple(payloads), tuple(codecs))


class BlockParts:
    """The extents of blocks, and this rank's part of them.

    Args:
        parts: what the rank of each part stores.
        own: number of this rank's part.
    """

    def __init__(self, parts: Sequence[PartSizes], own: int) -> None:
        self.number = own
        self.count = len(parts)
        self._mine = parts[own]
        nbytes = np.array([[n for s in part.sizes for n in (s.raw, s.packed)] for part in parts], dtype=np.int64)
        self._has = nbytes > 0  # [parts, forms]
        ends = nbytes.cumsum(axis=0)
        self._starts = ends[own] - nbytes[own]
        self._tails = ends[-1]
        if self.count == 1:
            payloads, extents = np.array(parts[0].payloads), nbytes[0]
        else:
            payloads = self._tails + self.count * WORD_BYTES
            extents = -(-payloads // EXTENT_ALIGNMENT_BYTES) * EXTENT_ALIGNMENT_BYTES
        of_forms = zip(*(part.codecs for part in parts), strict=True)
        codecs = (next((c for c in of_form if c is not Codec.RAW), Codec.RAW) for of_form in of_forms)
        self.encodings = Encodings(payloads.tolist(), codecs)
        """How whole blocks are encoded, by form."""
        self.sizes = tuple(BlockSizes(*pair) for pair in extents.reshape(-1, 2).tolist())
        """Bytes of an extent, for each group."""

    @property
    def planned(self) -> tuple[BlockSizes, ...]:
        """The sizes that the scheduler half plans with."""
        return self.sizes

    def offset(self, form: int) -> int:
        """Bytes from the beginning of a block's payload to this rank's part."""
        return int(self._starts[form])

    @property
    def smallest(self) -> int:
        """Bytes of the smallest extent."""
        return min(size.packed for size in self.sizes)

    def place(self, plan: TransferPlan) -> TransferPlan:
        """A plan with the offsets of this rank's part; see `Places.place`."""
        if self.count == 1:
            return plan
        forms = _forms(plan)
        own = forms
        if plan.forms is not None:  # a rank whose blocks of a group cannot be packed stores them raw
            packs = np.array([size.packs for size in self._mine.sizes])
            own = np.where(packs[forms // 2], forms, forms // 2 * 2).astype(np.uint8)
        return plan._replace(offsets=plan.offsets + self._starts[forms], forms=None if plan.forms is None else own)

    def planned_bytes(self, pool_bytes: int) -> int:
        """See `Places.planned_bytes`: here all ranks have the whole pool."""
        return pool_bytes

    # -- digests -----------------------------------------------------------------------------------

    def write_digests(self, pool: NDArray[np.uint64], plan: TransferPlan, digests: NDArray[np.uint64]) -> None:
        """This rank has saved its part of blocks: put their digests behind the parts.

        Args:
            pool: the pool as words, `uint64 [n]`.
            plan: the blocks, with the offsets of their extents.
            digests: of this rank's part of them, `uint64 [n]`.
        """
        if self.count == 1:
            return
        forms = _forms(plan)
        words = self._tail_words(plan, forms)
        pool[words + self.number] = digests
        # No rank saves the part of a stage that has no layer of a group: its word is zero.
        first = self._has.argmax(axis=0) == self.number
        for part in range(self.count):
            lacking = first[forms] & ~self._has[part][forms]
            pool[words[lacking] + part] = 0

    def are_intact(
        self,
        pool: NDArray[np.uint64],
        plan: TransferPlan,
        expected: NDArray[np.uint64],
        digests: NDArray[np.uint64],
    ) -> NDArray[np.bool_]:
        """Which blocks this rank has loaded as they were saved, `bool [n]`.

        Args:
            pool: the pool as words, `uint64 [n]`.
            plan: the blocks, with the offsets of their extents.
            expected: digests of the whole blocks, `uint64 [n]`.
            digests: of what was loaded, `uint64 [n]`.
        """
        if self.count == 1:
            intact: NDArray[np.bool_] = digests == expected
            return intact
        rows = pool[self._tail_words(plan, _forms(plan))[:, None] + np.arange(self.count)]
        good: NDArray[np.bool_] = (digests_of_rows(rows) == expected) & (rows[:, self.number] == digests)
        return good

    def _tail_words(self, plan: TransferPlan, forms: NDArray[np.uint8]) -> NDArray[np.int64]:
        words: NDArray[np.int64] = (plan.offsets + self._tails[forms]) // WORD_BYTES
        return words


def _forms(plan: TransferPlan) -> NDArray[np.uint8]:
    return np.zeros(plan.num_blocks, dtype=np.uint8) if plan.forms is None else plan.forms
