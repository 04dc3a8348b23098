"""The compiled steps of S3-FIFO and ARC; their rules and papers are in `policy_adaptive.py`.

Both policies keep slots in lists, which have the names of the ARC paper here:

    list   ARC                                    S3-FIFO
    T1     blocks used once, by last use          small queue
    T2     blocks used again, by last use         main queue
    B1     ghosts of blocks evicted from T1       ghost queue
    B2     ghosts of blocks evicted from T2       not used

A slot is *held* while it is in T1 or T2. It is a *ghost* while it is in B1 or B2: its block was evicted, and the index
still knows the key. It is *parked* if an eviction met it while it was reserved or pinned: it is in no list, and the
next insert returns it to the list that it came from.

All steps and constants are in one file: numba's cache notices changes only in the file that it compiles from.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.index.policy import Slots
from kvortex.runtime.jit import njit

# A list is a ring that is closed by a sentinel cell: the sentinel's `hotter` is the coldest slot of the list, and its
# `colder` is the hottest. The sentinels are the last four cells. A list is named by the index of its sentinel, counted
# from the end, so the names stay valid when the array grows.
T1, T2, B1, B2 = -4, -3, -2, -1
SMALL, MAIN, GHOSTS = T1, T2, B1
NO_LIST = 0
_NUM_SENTINELS = 4

CELL = np.dtype(
    [
        ("nbytes", np.int64),  # of a slot: 0 until it is known; of a sentinel: bytes of all blocks in its list
        ("arrival", np.int64),  # running number of the block's arrival; 0 if the slot is neither held nor parked
        ("parent_arrival", np.int64),  # the parent's `arrival` when it became the parent
        ("colder", np.int32),  # neighbours in the list: slots or the sentinel
        ("hotter", np.int32),
        ("parent", np.int32),  # slot of the block in front in the chain, or -1
        ("children", np.int32),  # number of held slots that have this one as their parent
        ("list", np.int8),  # T1, T2, B1, B2 or NO_LIST
        ("parked_from", np.int8),  # T1 or T2 if the slot is parked, or else NO_LIST
        ("last_request", np.int8),  # _SAVED, _LOADED or _COMPLETE
        ("uses", np.int8),  # S3-FIFO's counter of a block in the main queue, 0 to 3
    ],
    align=True,
)
"""What a policy knows of a slot, 48 bytes. All zeros: it knows nothing of it."""

COUNTERS = np.dtype(
    [
        ("held", np.int64),  # number of held slots
        ("arrivals", np.int64),  # number of blocks that have ever arrived
        ("target_bytes", np.int64),  # ARC's p: how large T1 should be
        ("capacity_bytes", np.int64),  # ARC's c: bytes of T1 and T2 when the last eviction began
    ]
)

Cells = NDArray[np.void]  # [capacity + 4]
Counters = Any  # a scalar of COUNTERS, whose fields the steps change

# The last request of a slot decides whether the next one is a new use or a further step of the same use.
_COMPLETE = 0  # a save and the load or touch after it: the next request is a new use
_SAVED = 1  # a save: a load or touch that follows belongs to the same use
_LOADED = 2  # a load: a save that follows belongs to the same use

_MAX_USES = 3  # S3-FIFO's counter has two bits
_SMALL_SHARE = 10  # S3-FIFO's small queue is a tenth of the cache


def new_counters() -> Counters:
    """Make counters that are all 0."""
    return np.zeros(1, COUNTERS)[0]


def new_cells(capacity: int) -> Cells:
    """Make cells for `capacity` slots, of which nothing is known, and four empty lists."""
    cells = np.zeros(capacity + _NUM_SENTINELS, CELL)
    sentinels = np.arange(-_NUM_SENTINELS, 0)
    cells["colder"][capacity:] = cells["hotter"][capacity:] = sentinels
    return cells


def grown(cells: Cells, capacity: int) -> Cells:
    """Copy cells into an array with `capacity` slots, at least as many as before. Slots keep their numbers."""
    new = new_cells(capacity)
    new[: len(cells) - _NUM_SENTINELS] = cells[:-_NUM_SENTINELS]
    new[-_NUM_SENTINELS:] = cells[-_NUM_SENTINELS:]
    return new


# Lists.


@njit(cache=True, forceinline=True)
def _link_hottest(cells: Cells, list_: int, slot: int) -> None:
    hottest = cells[list_].colder
    cells[slot].colder = hottest
    cells[slot].hotter = list_
    cells[hottest].hotter = slot
    cells[list_].colder = slot


@njit(cache=True, forceinline=True)
def _link_coldest(cells: Cells, list_: int, slot: int) -> None:
    coldest = cells[list_].hotter
    cells[slot].colder = list_
    cells[slot].hotter = coldest
    cells[coldest].colder = slot
    cells[list_].hotter = slot


@njit(cache=True, forceinline=True)
def _unlink(cells: Cells, slot: int) -> None:
    colder, hotter = cells[slot].colder, cells[slot].hotter
    cells[colder].hotter = hotter
    cells[hotter].colder = colder


@njit(cache=True, forceinline=True)
def _coldest(cells: Cells, list_: int) -> Any:
    """Return the coldest slot of a list, or a negative number if no slot is linked in it."""
    return np.int64(cells[list_].hotter)


@njit(cache=True, forceinline=True)
def _is_held(cells: Cells, slot: int) -> Any:
    return cells[slot].list == T1 or cells[slot].list == T2


@njit(cache=True, forceinline=True)
def _is_ghost(cells: Cells, slot: int) -> Any:
    return cells[slot].list == B1 or cells[slot].list == B2


@njit(cache=True, forceinline=True)
def _is_parked(cells: Cells, slot: int) -> Any:
    return cells[slot].parked_from != NO_LIST


@njit(cache=True, forceinline=True)
def _assign(cells: Cells, counters: Counters, slot: int, list_: int) -> None:
    """Count a slot and its bytes in another list, or in none. The caller links and unlinks the slot."""
    if _is_held(cells, slot):
        counters.held -= 1
    if cells[slot].list != NO_LIST:
        cells[cells[slot].list].nbytes -= cells[slot].nbytes
    cells[slot].list = list_
    if list_ != NO_LIST:
        cells[list_].nbytes += cells[slot].nbytes
    if _is_held(cells, slot):
        counters.held += 1


@njit(cache=True, forceinline=True)
def _forget(cells: Cells, counters: Counters, slot: int) -> None:
    """Forget a slot that is not held: a ghost, a parked slot, or a slot of which nothing is known."""
    if _is_ghost(cells, slot):
        _unlink(cells, slot)
        _assign(cells, counters, slot, NO_LIST)
    cells[slot].parked_from = NO_LIST
    cells[slot].nbytes = 0


# Chains.


@njit(cache=True, forceinline=True)
def _parent(cells: Cells, slot: int) -> Any:
    """Return the slot of the block in front, or -1 if there is none or it was evicted or removed since."""
    parent = np.int64(cells[slot].parent)
    is_same_block = parent >= 0 and cells[parent].arrival == cells[slot].parent_arrival
    return parent if is_same_block else np.int64(-1)


@njit(cache=True, forceinline=True)
def _arrive(cells: Cells, counters: Counters, slot: int) -> None:
    """Note that a new block is in the slot."""
    counters.arrivals += 1
    cells[slot].arrival = counters.arrivals
    cells[slot].children = 0
    cells[slot].uses = 0
    cells[slot].last_request = _SAVED
    cells[slot].parent = -1


@njit(cache=True, forceinline=True)
def _adopt(cells: Cells, parent: int, slot: int) -> Any:
    """Make `parent` the parent of `slot`, if that is younger and has no parent. Both are held.

    Return True if `slot` is the first child of `parent`.
    """
    if cells[parent].arrival >= cells[slot].arrival or _parent(cells, slot) >= 0:
        return False
    cells[slot].parent = parent
    cells[slot].parent_arrival = cells[parent].arrival
    cells[parent].children += 1
    return cells[parent].children == 1


@njit(cache=True, forceinline=True)
def _counts_as_use(cells: Cells, slot: int, is_load: bool) -> Any:
    """Note a load or touch, or else a save. Return False if it belongs to the same use as the request before."""
    last = cells[slot].last_request
    if is_load:
        cells[slot].last_request = _COMPLETE if last == _SAVED else _LOADED
        return last != _SAVED
    cells[slot].last_request = _SAVED
    return last != _LOADED


# Sizes, for both policies.


@njit(cache=True)
def weigh(cells: Cells, slots: Slots, nbytes: NDArray[np.int64]) -> None:
    """Set the bytes of blocks. `nbytes` is `[n]`, or `[1]` if all blocks have the same size."""
    for i in range(len(slots)):
        slot, size = np.int64(slots[i]), nbytes[i if len(nbytes) > 1 else 0]
        if cells[slot].list != NO_LIST:
            cells[cells[slot].list].nbytes += size - cells[slot].nbytes
            cells[slot].nbytes = size
        elif _is_parked(cells, slot):
            cells[slot].nbytes = size


# S3-FIFO. Only slots without children are linked in the small and the main queue. A slot with children belongs to a
# queue and counts in its bytes, but it is not linked until its last child is gone.


@njit(cache=True, forceinline=True)
def _s3_hold(cells: Cells, counters: Counters, slot: int, queue: int) -> None:
    """Put a slot that is not held into the small or the main queue."""
    _assign(cells, counters, slot, queue)
    if not cells[slot].children:
        _link_hottest(cells, queue, slot)
    parent = _parent(cells, slot)
    if parent >= 0:
        if not cells[parent].children and _is_held(cells, parent):
            _unlink(cells, parent)
        cells[parent].children += 1


@njit(cache=True, forceinline=True)
def _s3_release(cells: Cells, counters: Counters, slot: int) -> None:
    """Take a held slot out of its queue. If it was its parent's last child, the parent may be evicted next."""
    if not cells[slot].children:
        _unlink(cells, slot)
    _assign(cells, counters, slot, NO_LIST)
    parent = _parent(cells, slot)
    if parent >= 0:
        cells[parent].children -= 1
        if not cells[parent].children and _is_held(cells, parent):
            _link_coldest(cells, cells[parent].list, parent)


@njit(cache=True, forceinline=True)
def _s3_move_to_main(cells: Cells, counters: Counters, slot: int) -> None:
    if not cells[slot].children:
        _unlink(cells, slot)
        _link_hottest(cells, MAIN, slot)
    _assign(cells, counters, slot, MAIN)


@njit(cache=True)
def s3_use(cells: Cells, counters: Counters, slots: Slots, known: int, is_load: bool) -> None:
    """Count a use of the chain's held slots, except of new ones, which arrived after arrival `known`.

    A slot that is used again moves to the main queue, together with its ancestors.
    """
    parent = np.int64(-1)
    for slot in slots:
        if _is_held(cells, slot):
            if parent >= 0 and _adopt(cells, parent, slot):
                _unlink(cells, parent)
            parent = np.int64(slot)
    has_main_descendant = False
    for slot in slots[::-1]:
        if not _is_held(cells, slot):
            continue
        is_used = cells[slot].arrival <= known and _counts_as_use(cells, slot, is_load)
        if cells[slot].list == SMALL:
            if is_used or has_main_descendant:
                _s3_move_to_main(cells, counters, slot)
        elif is_used and cells[slot].uses < _MAX_USES:
            cells[slot].uses += 1
        has_main_descendant = has_main_descendant or cells[slot].list == MAIN


@njit(cache=True)
def s3_insert(cells: Cells, counters: Counters, slots: Slots, evicted: NDArray[np.int64]) -> None:
    known = counters.arrivals
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        if _is_parked(cells, slot):
            _s3_hold(cells, counters, slot, cells[slot].parked_from)
            cells[slot].parked_from = NO_LIST
            cells[slot].last_request = _LOADED  # so that the return does not count as a use
        elif not _is_held(cells, slot):
            returns = _is_ghost(cells, slot) and len(evicted) and evicted[i] != 0
            _forget(cells, counters, slot)
            _arrive(cells, counters, slot)
            _s3_hold(cells, counters, slot, MAIN if returns else SMALL)
    s3_use(cells, counters, slots, known, False)


@njit(cache=True)
def s3_append(cells: Cells, counters: Counters, slots: Slots) -> None:
    """Hold slots that are not held, as new blocks without parents."""
    for slot in slots:
        _forget(cells, counters, slot)
        _arrive(cells, counters, slot)
        _s3_hold(cells, counters, slot, SMALL)


@njit(cache=True)
def s3_remove(cells: Cells, counters: Counters, slots: Slots) -> None:
    for slot in slots:
        if _is_held(cells, slot):
            _s3_release(cells, counters, slot)
        _forget(cells, counters, slot)
        cells[slot].arrival = 0


@njit(cache=True, forceinline=True)
def _s3_victim(cells: Cells) -> Any:
    """Return the next slot to evict.

    A block at the end of the main queue that has uses left gives up one of them and is reinserted.
    """
    while True:
        small, main = _coldest(cells, SMALL), _coldest(cells, MAIN)
        small_is_full = cells[SMALL].nbytes * _SMALL_SHARE >= cells[SMALL].nbytes + cells[MAIN].nbytes
        if small >= 0 and (main < 0 or small_is_full):
            return small
        if not cells[main].uses:
            return main
        cells[main].uses -= 1
        _unlink(cells, main)
        _link_hottest(cells, MAIN, main)


@njit(cache=True)
def s3_pop(
    cells: Cells, counters: Counters, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]
) -> Slots:
    popped = np.empty(counters.held, np.int64)
    length = idle_bytes = 0
    capacity_bytes = cells[SMALL].nbytes + cells[MAIN].nbytes
    while idle_bytes < target_bytes and counters.held:
        slot = _s3_victim(cells)
        queue = cells[slot].list
        popped[length] = slot
        length += 1
        _s3_release(cells, counters, slot)
        if pins[slot]:
            cells[slot].parked_from = queue
            continue
        idle_bytes += nbytes[slot]
        cells[slot].arrival = 0
        if queue == SMALL:
            _assign(cells, counters, slot, GHOSTS)
            _link_hottest(cells, GHOSTS, slot)
        else:
            _forget(cells, counters, slot)
    while cells[GHOSTS].nbytes > capacity_bytes and _coldest(cells, GHOSTS) >= 0:
        _forget(cells, counters, _coldest(cells, GHOSTS))
    return popped[:length].copy()


# ARC. All held slots are linked in T1 or T2, in the order of their last use.


@njit(cache=True, forceinline=True)
def _arc_hold(cells: Cells, counters: Counters, slot: int, list_: int) -> None:
    """Put a slot that is not held into T1 or T2."""
    _assign(cells, counters, slot, list_)
    _link_hottest(cells, list_, slot)
    parent = _parent(cells, slot)
    if parent >= 0:
        cells[parent].children += 1


@njit(cache=True, forceinline=True)
def _arc_release(cells: Cells, counters: Counters, slot: int) -> None:
    """Take a held slot out of T1 or T2."""
    _unlink(cells, slot)
    _assign(cells, counters, slot, NO_LIST)
    parent = _parent(cells, slot)
    if parent >= 0:
        cells[parent].children -= 1


@njit(cache=True, forceinline=True)
def _arc_adapt(cells: Cells, counters: Counters, ghost: int) -> None:
    """The paper's adaptation of p: a hit in B1 makes T1's target larger, a hit in B2 makes it smaller."""
    b1_bytes, b2_bytes = cells[B1].nbytes, cells[B2].nbytes
    target = float(counters.target_bytes)
    if cells[ghost].list == B1:
        target += cells[ghost].nbytes * max(1.0, b2_bytes / max(b1_bytes, 1))
    else:
        target -= cells[ghost].nbytes * max(1.0, b1_bytes / max(b2_bytes, 1))
    counters.target_bytes = np.int64(min(max(target, 0.0), float(counters.capacity_bytes)))


@njit(cache=True)
def arc_use(cells: Cells, counters: Counters, slots: Slots, known: int, is_load: bool) -> None:
    """Make the chain's held slots the hottest. A slot that is used again moves to T2, together with its ancestors.

    Slots that arrived after arrival `known` are new, so this is not a further use of them.
    """
    parent = np.int64(-1)
    for slot in slots:
        if _is_held(cells, slot):
            if parent >= 0:
                _adopt(cells, parent, slot)
            parent = np.int64(slot)
    has_t2_descendant = False
    for slot in slots[::-1]:
        if not _is_held(cells, slot):
            continue
        is_used = cells[slot].arrival <= known and _counts_as_use(cells, slot, is_load)
        if is_used or has_t2_descendant:
            _assign(cells, counters, slot, T2)
        has_t2_descendant = has_t2_descendant or cells[slot].list == T2
        _unlink(cells, slot)
        _link_hottest(cells, cells[slot].list, slot)


@njit(cache=True)
def arc_insert(cells: Cells, counters: Counters, slots: Slots, evicted: NDArray[np.int64]) -> None:
    known = counters.arrivals
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        if _is_parked(cells, slot):
            _arc_hold(cells, counters, slot, cells[slot].parked_from)
            cells[slot].parked_from = NO_LIST
            cells[slot].last_request = _LOADED  # so that the return does not count as a use
        elif not _is_held(cells, slot):
            returns = _is_ghost(cells, slot) and len(evicted) and evicted[i] != 0
            if returns:
                _arc_adapt(cells, counters, slot)
            _forget(cells, counters, slot)
            _arrive(cells, counters, slot)
            _arc_hold(cells, counters, slot, T2 if returns else T1)
    arc_use(cells, counters, slots, known, False)


@njit(cache=True)
def arc_append(cells: Cells, counters: Counters, slots: Slots) -> None:
    """Hold slots that are not held, as new blocks without parents."""
    for slot in slots:
        _forget(cells, counters, slot)
        _arrive(cells, counters, slot)
        _arc_hold(cells, counters, slot, T1)


@njit(cache=True)
def arc_remove(cells: Cells, counters: Counters, slots: Slots) -> None:
    for slot in slots:
        if _is_held(cells, slot):
            _arc_release(cells, counters, slot)
        _forget(cells, counters, slot)
        cells[slot].arrival = 0


@njit(cache=True, forceinline=True)
def _arc_victim(cells: Cells, counters: Counters) -> Any:
    """Return the next slot to evict: the paper's REPLACE, but a block with children only if both lists end in one."""
    t1, t2 = _coldest(cells, T1), _coldest(cells, T2)
    if t1 < 0 or t2 < 0:
        return max(t1, t2)
    in_turn, other = (t1, t2) if cells[T1].nbytes > counters.target_bytes else (t2, t1)
    return other if cells[in_turn].children and not cells[other].children else in_turn


@njit(cache=True)
def arc_pop(
    cells: Cells, counters: Counters, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]
) -> Slots:
    popped = np.empty(counters.held, np.int64)
    length = idle_bytes = 0
    capacity_bytes = cells[T1].nbytes + cells[T2].nbytes
    counters.capacity_bytes = capacity_bytes
    while idle_bytes < target_bytes and counters.held:
        slot = _arc_victim(cells, counters)
        list_ = cells[slot].list
        popped[length] = slot
        length += 1
        _arc_release(cells, counters, slot)
        if pins[slot]:
            cells[slot].parked_from = list_
            continue
        idle_bytes += nbytes[slot]
        cells[slot].arrival = 0
        ghosts = B1 if list_ == T1 else B2
        _assign(cells, counters, slot, ghosts)
        _link_hottest(cells, ghosts, slot)
    while cells[T1].nbytes + cells[B1].nbytes > capacity_bytes and _coldest(cells, B1) >= 0:
        _forget(cells, counters, _coldest(cells, B1))
    while cells[B1].nbytes + cells[B2].nbytes > capacity_bytes and _coldest(cells, B2) >= 0:
        _forget(cells, counters, _coldest(cells, B2))
    return popped[:length].copy()
