"""What tiers have in common that know in memory what their store has."""

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

from kvortex.errors import EngineStateError
from kvortex.tiers.base import ScanProgress, StoredBlock, Tier, TierStats, check_keys
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.sealing import Framing
from kvortex.tiers.store_index import StoreIndex

UNBOUNDED: Final = 1 << 62
"""Capacity of a tier whose store bounds itself."""


class IndexedTier(Tier):
    """Look-ups and figures from a `StoreIndex`.

    Args:
        capacity_bytes: bytes that the blocks may take in the store; None leaves that to the store.
        framing: how blocks are stored.
        one_length: see `StoreIndex`; by default of sealed blocks. What is there from a time without keys, or was put
            there, is no block of a sealed store, and its length may tell.
    """

    def __init__(self, capacity_bytes: int | None, framing: Framing, *, one_length: bool | None = None) -> None:
        self._framing = framing
        one_length = framing.is_sealed if one_length is None else one_length
        self._index = StoreIndex(UNBOUNDED if capacity_bytes is None else capacity_bytes, one_length=one_length)
        self._counters = TierCounters()
        self._progress = ScanProgress(0, 1, 0, complete=False)
        self._scanned = asyncio.Event()
        self._opening = asyncio.Lock()
        self._is_open = self._is_closed = False

    async def scanned(self) -> None:
        await self._scanned.wait()

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        stored = self._index.stored_bytes(keys)
        return self._rooms_for(stored) if any(stored) else stored

    def coldest(self, payloads: Sequence[int]) -> list[StoredBlock]:
        return self._index.coldest(sum(map(self._stored_bytes, payloads)))

    def _stored_bytes(self, payload_bytes: int) -> int:
        """Bytes that a payload takes in the store."""
        return self._framing.header_bytes + payload_bytes

    def _rooms_for(self, stored: Sequence[int]) -> list[int]:
        """Bytes of buffers that are large enough for blocks that take so many in the store; 0 where there is none."""
        return [max(nbytes - self._framing.header_bytes, 0) for nbytes in stored]

    @property
    def capacity_bytes(self) -> int:
        return self._index.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._index.used_bytes

    def stats(self) -> TierStats:
        return self._counters.snapshot(
            self.name,
            evicted_blocks=self._index.evicted_blocks,
            num_blocks=len(self._index),
            used_bytes=self.used_bytes,
            capacity_bytes=self.capacity_bytes,
            unsettled=self._num_unsettled,
            scan=self._progress,
        )

    @property
    @abstractmethod
    def _num_unsettled(self) -> int:
        """Blocks whose memory it owns."""

    def _check(self, keys: Sequence[bytes]) -> None:
        if not self._is_open or self._is_closed:
            raise EngineStateError(f"the {self.name} tier is not open; use it between open() and aclose()")
        check_keys(keys)
