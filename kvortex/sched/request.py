"""One caller's transfer: which blocks, which bytes of the pool, and what came of it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvortex.driver import Event
from kvortex.types import Direction


@dataclass(slots=True, eq=False)
class TransferRequest:
    """Blocks to move between the paged cache and extents of the pool.

    Args:
        direction: SAVE reads the cache, LOAD writes it.
        block_ids: `int32 [n]`.
        offsets: `int64 [n]`, byte offsets of the blocks' extents in the pool.
        block_nbytes: what a block takes in the pool as it is, padding included.
        after: CUDA event that must fire before the cache is touched; None when nothing is pending.
        on_settled: called once, on the loop, when it is settled.
        more_follows: another request of the same call comes right behind: this is not the end of a transfer.
        packed: `bool [n]`, which blocks rest packed; None when none does.
        packed_nbytes: what a packed block takes in the pool.
        wants_source_released: report as soon as a save has read the cache; otherwise with its end.

    `digests` (`uint64 [n]`), `succeeded` and `too_lossy` (`bool [n]`) are filled as batches finish. A request is
    *settled* when no batch can touch the cache or the extents any more, however the transfer ended.
    `source_released` is set, for a save, when the cache's blocks have been read and may be overwritten.
    """

    direction: Direction
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    block_nbytes: int
    after: Event | None = None
    on_settled: Callable[["TransferRequest"], None] | None = None
    more_follows: bool = False
    wants_source_released: bool = False
    packed: NDArray[np.bool_] | None = None
    packed_nbytes: int = 0
    digests: NDArray[np.uint64] = field(init=False)
    succeeded: NDArray[np.bool_] = field(init=False)
    too_lossy: NDArray[np.bool_] = field(init=False)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    source_released: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[Exception] = field(default_factory=list)
    cancelled: bool = False
    queued_at_s: float = 0.0
    next_block: int = 0  # first block that is in no batch yet
    blocks_in_flight: int = 0
    blocks_unread: int = 0

    def __post_init__(self) -> None:
        self.digests = np.zeros(len(self.block_ids), dtype=np.uint64)
        self.succeeded = np.zeros(len(self.block_ids), dtype=np.bool_)
        self.too_lossy = np.zeros(len(self.block_ids), dtype=np.bool_)
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
        """Bytes of the pool that those blocks take."""
        if self.packed is None:
            return self.blocks_waiting * self.block_nbytes
        packed = int(np.count_nonzero(self.packed[self.next_block : self.num_blocks]))
        return packed * self.packed_nbytes + (self.blocks_waiting - packed) * self.block_nbytes

    @property
    def next_is_packed(self) -> bool:
        """Whether the next block that a batch takes rests packed."""
        return self.packed is not None and bool(self.packed[self.next_block])

    @property
    def next_nbytes(self) -> int:
        """What the next block takes in the pool."""
        return self.packed_nbytes if self.next_is_packed else self.block_nbytes

    @property
    def blocks_alike(self) -> int:
        """Waiting blocks before the first that rests in another way than the next one."""
        if self.packed is None:
            return self.blocks_waiting
        waiting = self.packed[self.next_block : self.num_blocks]
        other = np.flatnonzero(waiting != waiting[0])
        return int(other[0]) if other.size else len(waiting)

    def drop_waiting(self) -> None:
        """Give up the blocks that no batch has taken; they stay not succeeded."""
        self.cancelled = True
        self.blocks_unread -= self.blocks_waiting
        self.block_ids = self.block_ids[: self.next_block]
        self.settle_if_done()

    def settle_if_done(self) -> None:
        """Settle once nothing waits and nothing is under way."""
        if self.blocks_unread == 0:
            self.source_released.set()
        if self.blocks_waiting == 0 and self.blocks_in_flight == 0 and not self.settled.is_set():
            self.source_released.set()
            self.settled.set()
            if self.on_settled is not None:
                self.on_settled(self)
