"""A transfer of one caller: its blocks, their extents in the pool, and its result."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvortex.cuda.driver import Event
from kvortex.types import Direction


@dataclass(slots=True, eq=False)
class TransferRequest:
    """Blocks to move between the paged cache and extents of the pool.

    Args:
        direction: SAVE reads the cache, LOAD writes it.
        block_ids: `int32 [n]`, the blocks of the cache.
        offsets: `int64 [n]`, byte offsets of the blocks' extents in the pool.
        block_nbytes: bytes of a raw block in the pool, padding included.
        after: CUDA event that must fire before the cache is touched; None when nothing is pending.
        on_settled: called once, on the loop, when the request is settled.
        on_source_released: called once, on the loop, when a save no longer needs the cache's blocks.
        more_follows: whether another request of the same call follows directly.
        packed: `bool [n]`, blocks that are packed in the pool; None if all are raw.
        packed_nbytes: bytes of a packed block in the pool.
        wants_source_released: report as soon as a save has read the cache; if False, when it has ended.

    `digests` (`uint64 [n]`), `succeeded` and `too_lossy` (`bool [n]`) tell which blocks have been moved. A request is
    *settled* when no batch can touch the cache or the extents any more, however the transfer ended.
    `source_released` is set, for a save, when the cache's blocks have been read and may be overwritten.
    """

    direction: Direction
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    block_nbytes: int
    after: Event | None = None
    on_settled: Callable[["TransferRequest"], None] | None = None
    on_source_released: Callable[[], None] | None = None
    more_follows: bool = False
    wants_source_released: bool = False
    packed: NDArray[np.bool_] | None = None
    packed_nbytes: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    source_released: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[Exception] = field(default_factory=list)
    cancelled: bool = False
    queued_at_s: float = 0.0
    next_block: int = 0  # first block that is in no batch yet
    blocks_in_flight: int = 0
    blocks_unread: int = field(init=False)
    _digests: NDArray[np.uint64] | None = None  # None: nothing has arrived
    _succeeded: NDArray[np.bool_] | None = None  # None: all blocks arrived in one batch, or none has
    _too_lossy: NDArray[np.bool_] | None = None  # None: no block

    def __post_init__(self) -> None:
        self.blocks_unread = len(self.block_ids)

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    @property
    def blocks_waiting(self) -> int:
        """Blocks that no batch has taken yet."""
        return self.num_blocks - self.next_block

    @property
    def waiting_nbytes(self) -> int:
        """Bytes that the waiting blocks take in the pool."""
        if self.packed is None:
            return self.blocks_waiting * self.block_nbytes
        packed = int(np.count_nonzero(self.packed[self.next_block : self.num_blocks]))
        return packed * self.packed_nbytes + (self.blocks_waiting - packed) * self.block_nbytes

    def next_alike(self) -> tuple[int, bool]:
        """Number of next blocks that are all packed or all raw, and whether they are packed."""
        if self.packed is None:
            return self.blocks_waiting, False
        waiting = self.packed[self.next_block : self.num_blocks]
        other = np.flatnonzero(waiting != waiting[0])
        return int(other[0]) if other.size else len(waiting), bool(waiting[0])

    def arrived(self, start: int, digests: NDArray[np.uint64], too_lossy: NDArray[np.bool_] | None) -> None:
        """Record the blocks `[start, start + len(digests))` that a batch has moved; the request keeps `digests`."""
        if too_lossy is not None and not np.count_nonzero(too_lossy):
            too_lossy = None
        size, stop = len(self.offsets), start + len(digests)
        if len(digests) == size and too_lossy is None:
            self._digests = digests
            return
        if self._digests is None:
            self._digests, self._succeeded = np.zeros(size, np.uint64), np.zeros(size, np.bool_)
        assert self._succeeded is not None
        self._digests[start:stop] = digests
        self._succeeded[start:stop] = True
        if too_lossy is not None:
            self._succeeded[start:stop] = ~too_lossy
            self._too_lossy = np.zeros(size, np.bool_) if self._too_lossy is None else self._too_lossy
            self._too_lossy[start:stop] = too_lossy

    @property
    def digests(self) -> NDArray[np.uint64]:
        """`uint64 [n]` digests, valid only for blocks that have arrived."""
        return np.zeros(len(self.offsets), np.uint64) if self._digests is None else self._digests

    @property
    def num_succeeded(self) -> int:
        if self._digests is None:
            return 0
        return len(self.offsets) if self._succeeded is None else int(np.count_nonzero(self._succeeded))

    @property
    def succeeded(self) -> NDArray[np.bool_]:
        """Blocks that have arrived and may be used."""
        return np.full(len(self.offsets), self._digests is not None) if self._succeeded is None else self._succeeded

    @property
    def too_lossy(self) -> NDArray[np.bool_]:
        """Blocks of a save that have arrived, but that packing changed too much."""
        return np.zeros(len(self.offsets), np.bool_) if self._too_lossy is None else self._too_lossy

    @property
    def num_tried(self) -> int:
        """Number of blocks, from the first, that `cancel` did not drop."""
        return self.num_blocks if self.cancelled else len(self.offsets)

    def cancel(self) -> None:
        """Drop the blocks that no batch has taken; no transfer of them was tried."""
        self.cancelled = True
        self._drop_waiting()

    def fail(self, error: Exception) -> None:
        """Drop the blocks that no batch has taken, because they cannot be moved."""
        self.errors.append(error)
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        self.blocks_unread -= self.blocks_waiting
        self.block_ids = self.block_ids[: self.next_block]
        self.settle_if_done()

    def source_read(self, num_blocks: int) -> None:
        """Record that a save has read `num_blocks` blocks of the cache."""
        self.blocks_unread -= num_blocks
        if self.blocks_unread == 0:
            self._release_source()

    def _release_source(self) -> None:
        if not self.source_released.is_set():
            self.source_released.set()
            if self.on_source_released is not None:
                self.on_source_released()

    def settle_if_done(self) -> None:
        """Settle if no block is waiting or in flight."""
        if self.blocks_unread == 0:
            self._release_source()
        if self.blocks_waiting == 0 and self.blocks_in_flight == 0 and not self.settled.is_set():
            self._release_source()
            self.settled.set()
            if self.on_settled is not None:
                self.on_settled(self)
