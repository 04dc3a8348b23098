"""Who goes first when room is needed: eviction policies over the index's slots."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.runtime.jit import njit

Slots = NDArray[np.int64]


class EvictionPolicy(ABC):
    """An order over slots, coldest first. Not thread-safe: the index calls it under its lock.

    Slots are `int64 [n]`, from 0 up to the capacity last given to `resize`. The slots of one `insert` or
    `access` are a prefix chain, root first. A prefix cache can use a head without its tail but never a tail
    without its head, so after the call a slot must not be colder than one behind it.
    """

    @abstractmethod
    def resize(self, capacity: int) -> None:
        """Make room for slots below `capacity`; never smaller than before, and what is held stays."""

    @abstractmethod
    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        """Take in a chain; a slot that is held already counts as accessed.

        Slots that `pop_coldest` removed while they were busy come back through this as well, once they are idle.

        Args:
            slots: the chain.
            evicted: `[n]`, not 0 where a slot names the same block as when `pop_coldest` last removed it: the index
                still knows why it went. None: nowhere.
        """

    @abstractmethod
    def access(self, slots: Slots) -> None:
        """Note that a chain was used; slots that are not held are ignored."""

    def weigh(self, slots: Slots, nbytes: NDArray[np.int64]) -> None:  # noqa: B027 - not every policy counts bytes
        """Learn the sizes of blocks that were inserted before and have arrived: `nbytes` `[n]`, or `[1]` for all."""

    @abstractmethod
    def remove(self, slots: Slots) -> None:
        """Forget slots; those that are not held are ignored."""

    @abstractmethod
    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        """Remove the coldest slots until the idle ones among them hold `target_bytes`, or nothing is left.

        Args:
            target_bytes: none are removed if this is not above 0.
            nbytes: `[capacity]`, size of an idle slot's block.
            pins: `[capacity]`, above 0 for a busy slot. Busy slots are removed too, but do not count.

        Returns:
            The removed slots, coldest first, busy ones included.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of slots held."""


class LRUPolicy(EvictionPolicy):
    """Least recently used, over chains: a chain's tail is colder than its root. O(1) a slot, 8 bytes a slot."""

    def __init__(self) -> None:
        # A ring: row 0 closes it between hottest and coldest, row `slot + 1` is the slot's; zeros: not held.
        self._links = np.zeros((1, 2), np.int32)
        self._count = np.zeros(1, np.int64)

    def resize(self, capacity: int) -> None:
        links = np.zeros((capacity + 1, 2), np.int32)
        links[: len(self._links)] = self._links
        self._links = links

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        _touch(self._links, self._count, slots, True)

    def access(self, slots: Slots) -> None:
        _touch(self._links, self._count, slots, False)

    def remove(self, slots: Slots) -> None:
        _remove(self._links, self._count, slots)

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: Slots = _pop_coldest(self._links, self._count, target_bytes, nbytes, pins)
        return popped

    def __len__(self) -> int:
        return int(self._count[0])


_COLDER, _HOTTER = 0, 1


@njit(cache=True)
def _held(links: NDArray[np.int32], row: int) -> Any:
    # The coldest has the closing row 0 below it; it is held if that row says so.
    return links[row, _COLDER] != 0 or links[0, _HOTTER] == row


@njit(cache=True)
def _unlink(links: NDArray[np.int32], count: NDArray[np.int64], row: int) -> None:
    colder, hotter = links[row, _COLDER], links[row, _HOTTER]
    links[colder, _HOTTER] = hotter
    links[hotter, _COLDER] = colder
    links[row] = 0
    count[0] -= 1


@njit(cache=True)
def _touch(links: NDArray[np.int32], count: NDArray[np.int64], slots: Slots, insert: bool) -> None:
    for slot in slots[::-1]:
        row = slot + 1
        if _held(links, row):
            _unlink(links, count, row)
        elif not insert:
            continue
        hottest = links[0, _COLDER]
        links[row, _COLDER], links[row, _HOTTER] = hottest, 0
        links[hottest, _HOTTER] = row
        links[0, _COLDER] = row
        count[0] += 1


@njit(cache=True)
def _remove(links: NDArray[np.int32], count: NDArray[np.int64], slots: Slots) -> None:
    for slot in slots:
        if _held(links, slot + 1):
            _unlink(links, count, slot + 1)


@njit(cache=True)
def _pop_coldest(
    links: NDArray[np.int32],
    count: NDArray[np.int64],
    target_bytes: int,
    nbytes: NDArray[np.int64],
    pins: NDArray[np.int32],
) -> Slots:
    popped = np.empty(count[0], np.int64)
    length = idle_bytes = 0
    while idle_bytes < target_bytes and count[0]:
        row = links[0, _HOTTER]
        popped[length] = row - 1
        length += 1
        if not pins[row - 1]:
            idle_bytes += nbytes[row - 1]
        _unlink(links, count, row)
    return popped[:length].copy()
