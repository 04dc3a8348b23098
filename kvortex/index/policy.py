"""The contract of eviction policies, which choose the blocks to evict, and the LRU policy."""

import copy
import sys
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvortex.runtime.jit import njit

Slots = NDArray[np.int64]


class EvictionPolicy(ABC):
    """An order over the index's slots, from the coldest (evicted first) to the hottest.

    Not thread-safe: the index calls it under its lock.

    Slots are `int64 [n]`, from 0 up to the capacity that was last passed to `resize`. The slots of one `insert` or
    `access` are a prefix chain, root first. A prefix cache can use a chain's head without its tail but not the tail
    without the head, so after the call no slot may be colder than one behind it in the chain.

    A slot is *held* from its insert until `remove` or `pop_coldest` takes it out of the order.
    """

    @abstractmethod
    def resize(self, capacity: int) -> None:
        """Allow slots below `capacity`, which is never less than before. Held slots stay in their order."""

    @abstractmethod
    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        """Add a chain to the order. A slot that is held already counts as accessed.

        A slot that `pop_coldest` removed while it was busy is inserted again once it is idle.

        Args:
            slots: slots of the chain, `int64 [n]`.
            evicted: `[n]`, not 0 where the slot still names the block that `pop_coldest` last evicted from it. None:
                no slot does.
        """

    def append(self, slots: Slots) -> None:
        """Add slots that are not held, the coldest first. They are no chain, and hotter than all that are held."""
        for at in range(len(slots)):
            self.insert(slots[at : at + 1])

    @abstractmethod
    def access(self, slots: Slots) -> None:
        """Note that a chain was used. Slots that are not held are ignored."""

    def weigh(self, slots: Slots, nbytes: NDArray[np.int64]) -> None:  # noqa: B027 - not every policy counts bytes
        """Set the sizes of blocks that were inserted before and are committed now.

        Args:
            slots: slots of the blocks, `int64 [n]`.
            nbytes: bytes of each block, `int64 [n]`, or `int64 [1]` if all have the same size.
        """

    @abstractmethod
    def remove(self, slots: Slots) -> None:
        """Take slots out of the order and forget them. Slots that are not held are ignored."""

    @abstractmethod
    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        """Remove the coldest slots until the idle ones among them hold `target_bytes`, or no slot is left.

        Args:
            target_bytes: bytes to free; nothing is removed if this is 0 or less.
            nbytes: bytes of each slot's block, `int64 [capacity]`; only those of idle slots are read.
            pins: number of pins of each slot, `int32 [capacity]`. A slot with pins is busy: it is removed as well, but
                its bytes do not count.

        Returns:
            The removed slots, busy ones included, coldest first.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of held slots."""

    def another(self) -> Self:
        """An empty policy of the same kind."""
        return type(self)()

    def in_order(self, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        """All held slots, coldest first, as they would be evicted now; arguments as of `pop_coldest`. They stay."""
        return copy.deepcopy(self).pop_coldest(sys.maxsize, nbytes, pins)


class LRUPolicy(EvictionPolicy):
    """Least recently used, over chains: a chain's tail is colder than its root. O(1) and 8 bytes per slot."""

    def __init__(self) -> None:
        self._links = np.zeros(1, _LINKS)
        self._count = np.zeros(1, np.int64)

    def resize(self, capacity: int) -> None:
        links = np.zeros(capacity + 1, _LINKS)
        links[: len(self._links)] = self._links
        self._links = links

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        _touch(self._links, self._count, slots, True)

    def append(self, slots: Slots) -> None:
        _touch(self._links, self._count, slots[::-1].copy(), True)

    def access(self, slots: Slots) -> None:
        _touch(self._links, self._count, slots, False)

    def remove(self, slots: Slots) -> None:
        _remove(self._links, self._count, slots)

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: Slots = _pop_coldest(self._links, self._count, target_bytes, nbytes, pins)
        return popped

    def __len__(self) -> int:
        return int(self._count[0])


# The order is a ring of nodes that the sentinel closes: the sentinel's `hotter` is the coldest node, its `colder` the
# hottest. Node `slot + 1` belongs to a slot; it is all zeros while the slot is not held.
_LINKS = np.dtype([("colder", np.int32), ("hotter", np.int32)])
_SENTINEL = 0

Links = NDArray[np.void]  # [capacity + 1]
Count = NDArray[np.int64]  # [1], number of held slots


@njit(cache=True)
def _is_held(links: Links, node: int) -> Any:
    # The coldest node's `colder` is the sentinel, that is 0, as is that of a node that is not held.
    return links[node].colder != _SENTINEL or links[_SENTINEL].hotter == node


@njit(cache=True)
def _unlink(links: Links, count: Count, node: int) -> None:
    colder, hotter = links[node].colder, links[node].hotter
    links[colder].hotter = hotter
    links[hotter].colder = colder
    links[node].colder = 0
    links[node].hotter = 0
    count[0] -= 1


@njit(cache=True)
def _link_hottest(links: Links, count: Count, node: int) -> None:
    hottest = links[_SENTINEL].colder
    links[node].colder = hottest
    links[node].hotter = _SENTINEL
    links[hottest].hotter = node
    links[_SENTINEL].colder = node
    count[0] += 1


@njit(cache=True)
def _touch(links: Links, count: Count, slots: Slots, insert: bool) -> None:
    """Make a chain's slots the hottest, its root the hottest of all; `insert` says whether to take in new ones."""
    for slot in slots[::-1]:
        node = slot + 1
        was_held = _is_held(links, node)
        if was_held:
            _unlink(links, count, node)
        if was_held or insert:
            _link_hottest(links, count, node)


@njit(cache=True)
def _remove(links: Links, count: Count, slots: Slots) -> None:
    for slot in slots:
        if _is_held(links, slot + 1):
            _unlink(links, count, slot + 1)


@njit(cache=True)
def _pop_coldest(
    links: Links, count: Count, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]
) -> Slots:
    popped = np.empty(count[0], np.int64)
    length = idle_bytes = 0
    while idle_bytes < target_bytes and count[0]:
        node = np.int64(links[_SENTINEL].hotter)
        slot = node - 1
        _unlink(links, count, node)
        popped[length] = slot
        length += 1
        if not pins[slot]:
            idle_bytes += nbytes[slot]
    return popped[:length].copy()
