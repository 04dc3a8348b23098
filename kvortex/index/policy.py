"""Who goes first when room is needed: eviction policies over the index's slots."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvortex.errors import ConfigError

Slots = NDArray[np.int32]


class EvictionPolicy(ABC):
    """An order over slots, coldest first. Not thread-safe: the index calls it under its lock.

    Slots are `int32 [n]`, from 0 up to the capacity last given to `resize`. The slots of one `insert` or
    `access` are a prefix chain, root first. A prefix cache can use a head without its tail but never a tail
    without its head, so after the call a slot must not be colder than one behind it.
    """

    @abstractmethod
    def resize(self, capacity: int) -> None:
        """Make room for slots below `capacity`; never smaller than before, and what is held stays."""

    @abstractmethod
    def insert(self, slots: Slots) -> None:
        """Take in a chain; a slot that is held already counts as accessed."""

    @abstractmethod
    def access(self, slots: Slots) -> None:
        """Note that a chain was used; slots that are not held are ignored."""

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

    def insert(self, slots: Slots) -> None:
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
    popped = np.empty(count[0], np.int32)
    length = idle_bytes = 0
    while idle_bytes < target_bytes and count[0]:
        row = links[0, _HOTTER]
        popped[length] = row - 1
        length += 1
        if not pins[row - 1]:
            idle_bytes += nbytes[row - 1]
        _unlink(links, count, row)
    return popped[:length].copy()


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRUPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """A new, empty policy by its name.

    Raises:
        ConfigError: no policy has that name; the message lists those that exist.
    """
    if name not in _POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
