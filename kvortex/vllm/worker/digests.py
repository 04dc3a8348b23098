"""Where the digests of saved blocks are: with the workers, or with the owner of the pool."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvortex.types import TransferPlan
from kvortex.vllm.worker.parts import BlockParts
from kvortex.vllm.worker.ranks import PoolShare


class Digests(Protocol):
    """Remembers digests of what a rank saves, and checks what it loads. Both get two plans of the same blocks.

    `planned` has the offsets of the extents, `placed` those of this rank's bytes.
    """

    def release(self) -> None:
        """Let go of the pool's memory."""
        ...

    def saved(
        self, planned: TransferPlan, placed: TransferPlan, digests: NDArray[np.uint64]
    ) -> NDArray[np.uint64] | None:
        """Blocks were saved; returns the digests that the scheduler half has to know, or None."""
        ...

    def are_intact(
        self,
        planned: TransferPlan,
        placed: TransferPlan,
        expected: NDArray[np.uint64] | None,
        digests: NDArray[np.uint64],
    ) -> NDArray[np.bool_]:
        """Which blocks were loaded as they were saved, `bool [n]`. `expected` is what the scheduler half knows."""
        ...


class WorkersDigests:
    """Digests that stay with the workers: each rank compares what it loads with what it, or its group, has saved.

    Args:
        share: has the digests of the blocks in this rank's pool.
    """

    def __init__(self, share: PoolShare) -> None:
        self._share = share

    def release(self) -> None:
        """Do nothing: the digests are not in the pool."""

    def saved(
        self, planned: TransferPlan, placed: TransferPlan, digests: NDArray[np.uint64]
    ) -> NDArray[np.uint64] | None:
        self._share.digests[self._share.places(placed)] = digests
        return None

    def are_intact(
        self,
        planned: TransferPlan,
        placed: TransferPlan,
        expected: NDArray[np.uint64] | None,
        digests: NDArray[np.uint64],
    ) -> NDArray[np.bool_]:
        intact: NDArray[np.bool_] = digests == self._share.digests[self._share.places(placed)]
        return intact


class OwnersDigests:
    """Digests in the owner's index, and behind the parts of blocks.

    Args:
        parts: this rank's part of the blocks.
        pool: the pool, `uint8 [n]`.
    """

    def __init__(self, parts: BlockParts, pool: NDArray[np.uint8]) -> None:
        self._parts = parts
        self._pool = pool.view(np.uint64)

    def release(self) -> None:
        """Let go of the pool's memory."""
        self._pool = self._pool[:0].copy()

    def saved(
        self, planned: TransferPlan, placed: TransferPlan, digests: NDArray[np.uint64]
    ) -> NDArray[np.uint64] | None:
        self._parts.write_digests(self._pool, planned, digests)
        return digests

    def are_intact(
        self,
        planned: TransferPlan,
        placed: TransferPlan,
        expected: NDArray[np.uint64] | None,
        digests: NDArray[np.uint64],
    ) -> NDArray[np.bool_]:
        assert expected is not None
        return self._parts.are_intact(self._pool, planned, expected, digests)
