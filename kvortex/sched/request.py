"""The transfer of one call: its blocks, their extents in the pool, and the outcome."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvortex.cuda.driver import Event
from kvortex.types import Direction

T = TypeVar("T", bound=np.generic)


@dataclass(slots=True, eq=False)
class TransferRequest:
    """Blocks to move between the paged cache and extents of the pool.

    Args:
        direction: SAVE reads the cache, LOAD writes it.
        block_ids: ids of the blocks in the paged cache, `int32 [n]`.
        offsets: byte offsets of the blocks' extents in the pool, `int64 [n]`.
        extents: bytes of an extent, padding included, by form.
        after: CUDA event that must fire before the cache is touched; None if there is nothing to wait for.
        on_settled: called once, on the loop, when the request is settled.
        on_source_released: called once, on the loop, when a save has read the cache or has given up.
        more_follows: True if another request of the same call follows, so that this is not the end of a transfer.
        forms: the form of each block, `uint8 [n]`; None if all have form 0.
        wants_source_released: True to report `source_released` as soon as a save has read the cache; otherwise it is
            reported when the save ends.

    Blocks move form by form, because a batch holds blocks of one form, and within a form in the order of their extents,
    because neighbours in the pool are one copy: `block_ids`, `offsets` and `forms` are in this order. What comes back
    is in the order in which the blocks were named: `digests` (`uint64 [n]`), `succeeded`, `too_lossy` and `tried`
    (`bool [n]`) say what batches have moved. A request is *settled* when no batch can touch the cache or the extents
    any more, however the transfer ended.
    `source_released` is set, for a save, when the cache's blocks have been read and may be overwritten.
    """

    direction: Direction
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    extents: Sequence[int]
    after: Event | None = None
    on_settled: Callable[["TransferRequest"], None] | None = None
    on_source_released: Callable[[], None] | None = None
    more_follows: bool = False
    wants_source_released: bool = False
    forms: NDArray[np.uint8] | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    source_released: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[Exception] = field(default_factory=list)
    cancelled: bool = False
    queued_at_s: float = 0.0
    next_block: int = 0  # first block that is in no batch yet
    blocks_in_flight: int = 0
    blocks_unread: int = field(init=False)
    _order: NDArray[np.intp] | None = None  # the block that moves first, and so on; None: they move as they were named
    _digests: NDArray[np.uint64] | None = None  # None: no block has arrived
    _succeeded: NDArray[np.bool_] | None = None  # None: all blocks have arrived in one batch, or none has
    _too_lossy: NDArray[np.bool_] | None = None  # None: no block is too lossy

    def __post_init__(self) -> None:
        self.blocks_unread = len(self.block_ids)
        forms, offsets = self.forms, self.offsets
        if forms is not None:
            falls = (forms[1:] < forms[:-1]) | ((forms[1:] == forms[:-1]) & (offsets[1:] < offsets[:-1]))
        else:
            falls = offsets[1:] < offsets[:-1]
        if falls.any():
            order = self._order = np.argsort(offsets) if forms is None else np.lexsort((offsets, forms))
            self.block_ids, self.offsets = self.block_ids[order], offsets[order]
            self.forms = None if forms is None else forms[order]

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    @property
    def blocks_waiting(self) -> int:
        """Blocks that no batch has taken yet."""
        return self.num_blocks - self.next_block

    @property
    def waiting_nbytes(self) -> int:
        """Bytes of the extents of those blocks."""
        if self.forms is None:
            return self.blocks_waiting * self.extents[0]
        counts = np.bincount(self.forms[self.next_block : self.num_blocks])
        return sum(count * nbytes for count, nbytes in zip(counts.tolist(), self.extents, strict=False))

    def next_alike(self) -> tuple[int, int]:
        """How many of the next blocks have the same form, and that form."""
        if self.forms is None:
            return self.blocks_waiting, 0
        waiting = self.forms[self.next_block : self.num_blocks]
        other = np.flatnonzero(waiting != waiting[0])
        return int(other[0]) if other.size else len(waiting), int(waiting[0])

    def arrived(self, start: int, digests: NDArray[np.uint64], too_lossy: NDArray[np.bool_] | None) -> None:
        """Note that a batch has moved the blocks from `start` on, one for each digest. `digests` may be kept."""
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
        """Digests, `uint64 [n]`; those of blocks that have not arrived mean nothing."""
        return np.zeros(len(self.offsets), np.uint64) if self._digests is None else self._as_named(self._digests)

    @property
    def num_succeeded(self) -> int:
        if self._digests is None:
            return 0
        return len(self.offsets) if self._succeeded is None else int(np.count_nonzero(self._succeeded))

    @property
    def succeeded(self) -> NDArray[np.bool_]:
        """Blocks that have arrived and may be used."""
        return self._as_named(self._succeeded_as_moved)

    @property
    def succeeded_forms(self) -> NDArray[np.uint8] | None:
        """The form of each block that has arrived and may be used, in any order; None if all have form 0."""
        return None if self.forms is None else self.forms[self._succeeded_as_moved]

    @property
    def _succeeded_as_moved(self) -> NDArray[np.bool_]:
        return np.full(len(self.offsets), self._digests is not None) if self._succeeded is None else self._succeeded

    @property
    def too_lossy(self) -> NDArray[np.bool_]:
        """Blocks of a save that have arrived, but lose too much by being packed."""
        return np.zeros(len(self.offsets), np.bool_) if self._too_lossy is None else self._as_named(self._too_lossy)

    @property
    def num_tried(self) -> int:
        """How many blocks were not given up by `cancel`."""
        return self.num_blocks if self.cancelled else len(self.offsets)

    @property
    def tried(self) -> NDArray[np.bool_]:
        """Blocks that were not given up by `cancel`."""
        return self._as_named(np.arange(len(self.offsets)) < self.num_tried)

    def _as_named(self, moved: NDArray[T]) -> NDArray[T]:
        """What is known of each block, from the order in which they move to that in which they were named."""
        if self._order is None:
            return moved
        named = np.empty_like(moved)
        named[self._order] = moved
        return named

    def cancel(self) -> None:
        """The caller gives up: drop the blocks that no batch has taken. They count as not tried."""
        self.cancelled = True
        self._drop_waiting()

    def fail(self, error: Exception) -> None:
        """The transfer failed: drop the blocks that no batch has taken. They cannot be moved."""
        self.errors.append(error)
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        self.blocks_unread -= self.blocks_waiting
        self.block_ids = self.block_ids[: self.next_block]
        self.settle_if_done()

    def source_read(self, num_blocks: int) -> None:
        """Note that blocks of the cache have been read."""
        self.blocks_unread -= num_blocks
        if self.blocks_unread == 0:
            self._release_source()

    def _release_source(self) -> None:
        if not self.source_released.is_set():
            self.source_released.set()
            if self.on_source_released is not None:
                self.on_source_released()

    def settle_if_done(self) -> None:
        """Settle if no block is queued or in flight."""
        if self.blocks_unread == 0:
            self._release_source()
        if self.blocks_waiting == 0 and self.blocks_in_flight == 0 and not self.settled.is_set():
            self._release_source()
            self.settled.set()
            if self.on_settled is not None:
                self.on_settled(self)
