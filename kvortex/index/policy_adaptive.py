"""S3-FIFO and ARC over prefix chains: two queues of slots, and what was lately evicted from them.

Both papers know single objects; these are chains, so three things are added.

- *Family.* A slot remembers the one in front of it in the first chain that names both. Nothing goes while something
  behind it is held: that could not be used any more. A parent is older than its child, so there are no circles,
  whatever callers name.
- *One use a request.* A server loads a chain and then saves it, and a chain that was planned in parts is touched
  once more at its end. None of that is reuse, and taking it for reuse would make every scan look popular. So a save
  after a load does not count, nor the first load or touch after a save. (The reference count of LRU-K knows this
  as the correlated reference period; O'Neil et al., SIGMOD 1993.)
- *Order of use.* What is true of a block holds for all in front of it: a slot moves to the second queue together
  with its ancestors.

Sizes count in bytes. A reserved block has none until it is committed (`weigh`).
"""

import numpy as np
from numpy.typing import NDArray

from kvortex.index import policy_steps as steps
from kvortex.index.policy import EvictionPolicy, Slots

_NONE_EVICTED = np.zeros(0, np.int64)


class _TwoQueues(EvictionPolicy):
    """What both policies have in common: the arrays."""

    def __init__(self) -> None:
        self._cells, self._totals = steps.new_cells(0), steps.new_totals()

    def resize(self, capacity: int) -> None:
        self._cells = steps.grown(self._cells, capacity)

    def weigh(self, slots: Slots, nbytes: NDArray[np.int64]) -> None:
        steps.weigh(self._cells, self._totals, slots, nbytes)

    def __len__(self) -> int:
        return int(self._totals[steps.HELD])


class S3FIFOPolicy(_TwoQueues):
    """S3-FIFO: new blocks pass through a small queue, and those used again live in a large one. 80 bytes a slot.

    After Yang, Zhang, Qiu, Yue and Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. The small
    queue holds a tenth of the bytes; what leaves it unused becomes a ghost, and a ghost that comes back goes to the
    main queue, a FIFO in which a block is passed over once for each of its last three uses. Ghosts are kept for
    as many bytes as were held when the last eviction began, or until the index forgets them (`ghost_entries`).

    Different from the paper, beside the chains: a block moves to the main queue when it is used again and not when
    it comes to the small queue's end (blocks in front of others stand in no queue, so nobody would look at them),
    and one further use is enough.

    Every operation is O(1) a slot; a pop pays for the passes that earlier uses have earned.
    """

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        steps.s3_insert(self._cells, self._totals, slots, _NONE_EVICTED if evicted is None else evicted)

    def access(self, slots: Slots) -> None:
        steps.s3_use(self._cells, self._totals, slots, self._totals[steps.CLOCK], True)

    def remove(self, slots: Slots) -> None:
        steps.s3_remove(self._cells, self._totals, slots)

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: Slots = steps.s3_pop(self._cells, self._totals, target_bytes, nbytes, pins)
        return popped


class ARCPolicy(_TwoQueues):
    """ARC: blocks used once and blocks used again, each by recency, and a line between them that learns. 80 bytes
    a slot.

    After Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. What comes back soon
    after it was evicted moves the line in favour of the queue that it was evicted from. The cache's size is what
    is held when an eviction begins; ghosts are kept for as many bytes, or until the index forgets them
    (`ghost_entries`).

    Different from the paper, beside the chains: room is made ahead of what comes in and for many blocks at once, so
    the tie for a block that comes from the second ghosts does not exist; and where the queue whose turn it is ends in
    a block that others depend on, the other queue gives instead: those others are in it, and colder.

    Every operation is O(1) a slot.
    """

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        steps.arc_insert(self._cells, self._totals, slots, _NONE_EVICTED if evicted is None else evicted)

    def access(self, slots: Slots) -> None:
        steps.arc_use(self._cells, self._totals, slots, self._totals[steps.CLOCK], True)

    def remove(self, slots: Slots) -> None:
        steps.arc_remove(self._cells, self._totals, slots)

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: Slots = steps.arc_pop(self._cells, self._totals, target_bytes, nbytes, pins)
        return popped
