"""What a client reads of the owner's index and allocator, asked over the socket.

If the owner is lost, nothing is found, and the figures are zero.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvortex.index import MISS_REASONS, as_packed, pack_keys
from kvortex.owner.client import OwnerClient, OwnerLost
from kvortex.owner.protocol import Kind, PoolNumbers
from kvortex.planes.control import CPU_TIER
from kvortex.stats import PoolFigures
from kvortex.types import MissReason

_CHANGES_BOUND: Final = 1 << 40
"""More changes than one owner counts."""


class AsksOwner(Protocol):
    """What is needed of the remote control plane."""

    client: OwnerClient

    def own(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Keys in the owner's index from those of this cache, `uint64 [n, 4]`."""
        ...

    def figures(self) -> PoolNumbers:
        """The figures of the pool; zeros if the owner is lost."""
        ...


class RemoteIndex:
    """What `CacheIndex` answers without a change, asked of the owner. From any thread.

    Args:
        control: the remote control plane.
    """

    def __init__(self, control: AsksOwner) -> None:
        self._control = control

    def contains_mask(self, keys: Sequence[bytes] | NDArray[np.uint64]) -> NDArray[np.bool_]:
        """See `CacheIndex.contains_mask`."""
        own = self._control.own(as_packed(keys))
        try:
            (found,) = self._control.client.ask(Kind.CONTAINS, own)
        except OwnerLost:
            return np.zeros(len(own), dtype=np.bool_)
        return found.astype(np.bool_)

    def prefix_length(self, keys: Sequence[bytes] | NDArray[np.uint64]) -> int:
        """See `CacheIndex.prefix_length`."""
        return self.leading(as_packed(keys))[0]

    def leading(self, keys: NDArray[np.uint64]) -> tuple[int, MissReason | None]:
        """See `CacheIndex.leading`."""
        try:
            (found,) = self._control.client.ask(Kind.PREFIX, self._control.own(as_packed(keys)))
        except OwnerLost:
            return 0, MissReason.OWNER_LOST
        length, reason = found[:2].tolist()
        return length, MISS_REASONS[reason] if reason >= 0 else None

    def states(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """See `CacheIndex.states`."""
        own = self._control.own(as_packed(keys))
        try:
            (found,) = self._control.client.ask(Kind.STATES, own)
        except OwnerLost:
            return np.zeros(len(own), dtype=np.uint8)
        return found

    def miss_reason(self, key: bytes) -> MissReason:
        """See `CacheIndex.miss_reason`."""
        try:
            (reason,) = self._control.client.ask(Kind.MISS_REASON, self._control.own(pack_keys([key])))
        except OwnerLost:
            return MissReason.OWNER_LOST
        return MISS_REASONS[int(reason[0])]

    @property
    def evicted_blocks(self) -> int:
        """Blocks of all caches of the pool that were evicted; 0 if the owner is lost."""
        return self._control.figures().evicted_blocks

    @property
    def removed_blocks(self) -> int:
        """Changes when a block may have gone, as all have when another owner is asked."""
        generation = self._control.client.generation
        return self._control.figures().changes + generation * _CHANGES_BOUND


class RemoteAllocator:
    """The figures of the owner's allocator.

    Args:
        control: the remote control plane.
        capacity_bytes: size of the pool.
    """

    def __init__(self, control: AsksOwner, capacity_bytes: int) -> None:
        self._control = control
        self.capacity_bytes = capacity_bytes

    def figures(self, *, pinned_bytes: int = 0) -> PoolFigures:
        """Occupancy of the whole pool, all its engines together; zeros if the owner is lost."""
        found = self._control.figures()
        return PoolFigures(
            name=CPU_TIER,
            capacity_bytes=found.capacity_bytes,
            allocated_bytes=found.allocated_bytes,
            largest_free_bytes=found.largest_free_bytes,
            fragmentation=found.fragmentation_ppb / 1e9,
            num_extents=found.num_extents,
            pinned_bytes=pinned_bytes,
            priority=found.priority,
            quota_bytes=found.quota_bytes,
            quota_used_bytes=found.quota_used_bytes,
        )
