"""What a client that publishes KV events has to know of the pool: which blocks have left it, or reached the tier."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.tiering.keys import join_keys

MAX_EVENTS: Final = 1 << 20
"""Events that wait for a client. If it does not ask in time, it has to take all its blocks for gone."""

_NONE = np.empty(0, dtype=np.int64)


@dataclass(eq=False)
class Watcher:
    """The events of one client that it has not taken yet.

    Attributes:
        written, lost: blocks that the lower tier has stored, or could not give back, by the cache's own keys.
        is_overdue: True if events were dropped.
    """

    written: list[bytes] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)
    is_overdue: bool = False
    _removed: list[NDArray[np.int64]] = field(default_factory=list)
    _count: int = 0

    def add_removed(self, offsets: NDArray[np.int64]) -> None:
        """Blocks of any cache at these offsets, `int64 [n]`, have left the pool."""
        if self._has_room(len(offsets)):
            self._removed.append(offsets.copy())

    def add_written(self, key: bytes) -> None:
        """The tier has stored a block."""
        if self._has_room(1):
            self.written.append(key)

    def add_lost(self, key: bytes) -> None:
        """The tier could not give a block back."""
        if self._has_room(1):
            self.lost.append(key)

    def _has_room(self, count: int) -> bool:
        self._count += count
        if self._count > MAX_EVENTS:
            self.is_overdue = True
            self._removed.clear()
            self.written.clear()
            self.lost.clear()
        return not self.is_overdue

    def take_removed(self) -> NDArray[np.int64]:
        """Offsets since the last call, `int64 [n]`, in order."""
        removed, self._removed = self._removed, []
        found = np.concatenate(removed) if removed else _NONE
        self._count -= len(found)
        return found

    def take(self) -> tuple[bool, NDArray[np.uint64], NDArray[np.uint64]]:
        """Whether events were dropped, and the keys that were written and lost since the last call, `uint64 [n, 4]`."""
        was_overdue, written, lost = self.is_overdue, join_keys(self.written), join_keys(self.lost)
        self.written, self.lost, self.is_overdue = [], [], False
        self._count = sum(map(len, self._removed))
        return was_overdue, written, lost
