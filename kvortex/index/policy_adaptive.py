"""S3-FIFO and ARC over prefix chains. Both keep two queues of slots, and ghosts: keys that were evicted lately.

The papers treat blocks as independent; here they form prefix chains. So three rules are added:

- *Parents.* The parent of a slot is the slot in front of it in the first chain that names both. A block that has a
  child is not evicted before it: without its parent the child could not be used. A parent is always older than its
  child, so parents never form a cycle, whatever chains the caller names.
- *One use per request.* A server loads a chain and then saves it; if it saves in parts, it also touches the chain at
  the end. These steps are one use, or else every scan would look popular. So neither a save after a load nor the first
  load or touch after a save counts as a use. (LRU-K calls this the correlated reference period; O'Neil et al.,
  SIGMOD 1993.)
- *Order of use.* Whoever uses a block also uses its ancestors, so a slot moves to the second queue together with its
  ancestors.

Sizes count in bytes. A reserved block counts 0 bytes until it is committed (`weigh`).
"""

import numpy as np
from numpy.typing import NDArray

from kvortex.index import policy_steps as steps
from kvortex.index.policy import EvictionPolicy, Slots

_NONE_EVICTED = np.zeros(0, np.int64)


class _TwoQueues(EvictionPolicy):
    """The arrays that both policies use in the same way."""

    def __init__(self) -> None:
        self._cells, self._counters = steps.new_cells(0), steps.new_counters()

    def resize(self, capacity: int) -> None:
        self._cells = steps.grown(self._cells, capacity)

    def weigh(self, slots: Slots, nbytes: NDArray[np.int64]) -> None:
        steps.weigh(self._cells, slots, nbytes)

    def __len__(self) -> int:
        return int(self._counters["held"])


class S3FIFOPolicy(_TwoQueues):
    """S3-FIFO: new blocks enter a small queue; blocks that are used again move to a main queue. 48 bytes per slot.

    Source: Yang, Zhang, Qiu, Yue and Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.

    The small queue holds a tenth of the bytes. A block that leaves it without a further use becomes a ghost, and a
    ghost that is saved again enters the main queue. The main queue is a FIFO whose oldest block is reinserted instead
    of evicted, once for each of its last three uses. The ghosts take up to as many bytes as were held when the last
    eviction began; the index forgets them earlier if it runs out of `ghost_entries`.

    Besides the chains, there are two differences from the paper. A block moves to the main queue when it is used again,
    not when it reaches the end of the small queue: a block with children is not linked in a queue, so it would never
    reach the end. And one further use is enough for the move.

    Every operation is O(1) per slot; a pop also pays for the reinsertions that earlier uses have earned.
    """

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        steps.s3_insert(self._cells, self._counters, slots, _NONE_EVICTED if evicted is None else evicted)

    def append(self, slots: Slots) -> None:
        steps.s3_append(self._cells, self._counters, slots)

    def access(self, slots: Slots) -> None:
        steps.s3_use(self._cells, self._counters, slots, self._counters["arrivals"], True)

    def remove(self, slots: Slots) -> None:
        steps.s3_remove(self._cells, self._counters, slots)

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: Slots = steps.s3_pop(self._cells, self._counters, target_bytes, nbytes, pins)
        return popped


class ARCPolicy(_TwoQueues):
    """ARC: one list by recency for blocks used once (T1), one for blocks used again (T2). 48 bytes per slot.

    Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.

    B1 and B2 keep the ghosts of blocks that were evicted from T1 and T2. If a ghost of B1 is saved again, the target
    size p of T1 grows; if a ghost of B2 is, it shrinks. The cache size c is the number of bytes that are held when an
    eviction begins. The ghosts take up to as many bytes; the index forgets them earlier if it runs out of
    `ghost_entries`.

    Besides the chains, there are two differences from the paper. Room is made before blocks come in and for many blocks
    at once, so the paper's special case for a hit in B2 while T1 has exactly its target size does not arise. And if
    the list whose turn it is ends in a block with children, the other list loses its coldest block instead: the
    children are there, and they are colder.

    Every operation is O(1) per slot.
    """

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        steps.arc_insert(self._cells, self._counters, slots, _NONE_EVICTED if evicted is None else evicted)

    def append(self, slots: Slots) -> None:
        steps.arc_append(self._cells, self._counters, slots)

    def access(self, slots: Slots) -> None:
        steps.arc_use(self._cells, self._counters, slots, self._counters["arrivals"], True)

    def remove(self, slots: Slots) -> None:
        steps.arc_remove(self._cells, self._counters, slots)

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: Slots = steps.arc_pop(self._cells, self._counters, target_bytes, nbytes, pins)
        return popped
