"""The compiled steps of S3-FIFO and ARC, over arrays by slot; what they mean is said in `policy_adaptive.py`.

A held slot is in the first or the second queue; a ghost is a slot that was evicted and whose block the index still
knows; a parked one was busy when its turn came, and will be back.

All in one file, constants included: numba's cache notices changes only in the file that it compiles from.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.index.policy import Slots
from kvortex.runtime.jit import njit

# One array, so that nothing is counted up and down while the steps run: references to many would be. A slot is a
# row of `cells`, with these columns. The last four rows close the four rings, and ring r is named r - 4.
Cells = NDArray[np.int64]
_COLDER, _HOTTER = 0, 1  # neighbours in the slot's ring
_PLACE = 2
_NBYTES = 3  # 0 while it is not known
_LAST = 4  # what the last request did: _IDLE, _SAVED or _LOADED
_USES = 5  # S3-FIFO: since the slot came into the second queue, less those it was passed over for
_BORN = 6  # number of the arrival, 0 for a slot that is gone
_PARENT, _PARENT_BORN = 7, 8  # or -1; a parent counts if it is still the one that was born then
_CHILDREN = 9  # held slots whose parent this is
_COLUMNS = 10

# Where a slot is; the first four are rings, coldest to hottest.
FIRST, SECOND, GHOST_FIRST, GHOST_SECOND, NOWHERE, PARKED_FIRST, PARKED_SECOND = range(7)
_RINGS = 4
_PARKED = PARKED_FIRST - FIRST  # from a queue to what is parked of it
_GHOST = GHOST_FIRST - FIRST

# Positions in `totals` beyond the bytes of each of the above.
HELD, CLOCK, _TARGET, _CAPACITY = range(7, 11)
_NUM_TOTALS = 11
Totals = NDArray[np.int64]

_IDLE, _SAVED, _LOADED = 0, 1, 2

_MAX_USES = 3  # S3-FIFO's two bits
_SMALL_SHARE = 10  # S3-FIFO's small queue is a tenth


def new_totals() -> Totals:
    return np.zeros(_NUM_TOTALS, np.int64)


def new_cells(capacity: int) -> Cells:
    cells = np.zeros((capacity + _RINGS, _COLUMNS), np.int64)
    cells[:, _PLACE] = NOWHERE
    cells[capacity:, _COLDER] = cells[capacity:, _HOTTER] = np.arange(-_RINGS, 0)
    return cells


def grown(cells: Cells, capacity: int) -> Cells:
    """A copy with at least `capacity` slots; slots keep their numbers."""
    new = new_cells(capacity)
    new[: len(cells) - _RINGS] = cells[:-_RINGS]
    new[-_RINGS:] = cells[-_RINGS:]
    return new


# Rings.


@njit(cache=True, forceinline=True)
def _link_hot(cells: Cells, place: int, slot: int) -> None:
    ring = np.int64(place - _RINGS)
    hottest = cells[ring, _COLDER]
    cells[slot, _COLDER], cells[slot, _HOTTER] = hottest, ring
    cells[hottest, _HOTTER] = cells[ring, _COLDER] = slot


@njit(cache=True, forceinline=True)
def _link_cold(cells: Cells, place: int, slot: int) -> None:
    ring = np.int64(place - _RINGS)
    coldest = cells[ring, _HOTTER]
    cells[slot, _COLDER], cells[slot, _HOTTER] = ring, coldest
    cells[coldest, _COLDER] = cells[ring, _HOTTER] = slot


@njit(cache=True, forceinline=True)
def _unlink(cells: Cells, slot: int) -> None:
    colder, hotter = cells[slot, _COLDER], cells[slot, _HOTTER]
    cells[colder, _HOTTER] = hotter
    cells[hotter, _COLDER] = colder


@njit(cache=True, forceinline=True)
def _coldest(cells: Cells, place: int) -> Any:
    """A slot, or below 0."""
    return cells[np.int64(place - _RINGS), _HOTTER]


@njit(cache=True, forceinline=True)
def _is_held(cells: Cells, slot: int) -> Any:
    return cells[slot, _PLACE] <= SECOND


@njit(cache=True, forceinline=True)
def _put(cells: Cells, totals: Totals, slot: int, place: int) -> None:
    """Account a slot in another place; its links are the caller's."""
    old = cells[slot, _PLACE]
    totals[old] -= cells[slot, _NBYTES]
    totals[place] += cells[slot, _NBYTES]
    totals[HELD] += np.int64(place <= SECOND) - np.int64(old <= SECOND)
    cells[slot, _PLACE] = place


@njit(cache=True, forceinline=True)
def _forget_ghost(cells: Cells, totals: Totals, slot: int) -> None:
    if cells[slot, _PLACE] in (GHOST_FIRST, GHOST_SECOND):
        _unlink(cells, slot)
    _put(cells, totals, slot, NOWHERE)
    totals[NOWHERE] = cells[slot, _NBYTES] = 0


# Family.


@njit(cache=True, forceinline=True)
def _parent(cells: Cells, slot: int) -> Any:
    """The slot in front if it is still the same block, or -1."""
    parent = cells[slot, _PARENT]
    return parent if parent >= 0 and cells[parent, _BORN] == cells[slot, _PARENT_BORN] else np.int64(-1)


@njit(cache=True, forceinline=True)
def _give_birth(cells: Cells, totals: Totals, slot: int) -> None:
    totals[CLOCK] += 1
    cells[slot, _BORN] = totals[CLOCK]
    cells[slot, _CHILDREN] = cells[slot, _USES] = 0
    cells[slot, _LAST] = _SAVED
    cells[slot, _PARENT] = -1


@njit(cache=True, forceinline=True)
def _adopt(cells: Cells, parent: int, slot: int) -> Any:
    """Make one held slot the parent of another that has none and is younger. True if it was childless."""
    if cells[parent, _BORN] >= cells[slot, _BORN] or _parent(cells, slot) >= 0:
        return False
    cells[slot, _PARENT], cells[slot, _PARENT_BORN] = parent, cells[parent, _BORN]
    cells[parent, _CHILDREN] += 1
    return cells[parent, _CHILDREN] == 1


@njit(cache=True, forceinline=True)
def _counts_as_use(cells: Cells, slot: int, load: bool) -> Any:
    last = cells[slot, _LAST]
    if load:
        cells[slot, _LAST] = _IDLE if last == _SAVED else _LOADED
        return last != _SAVED
    cells[slot, _LAST] = _SAVED
    return last != _LOADED


# Both policies: sizes.


@njit(cache=True)
def weigh(cells: Cells, totals: Totals, slots: Slots, nbytes: NDArray[np.int64]) -> None:
    for i in range(len(slots)):
        slot, size = slots[i], nbytes[i if len(nbytes) > 1 else 0]
        if cells[slot, _PLACE] != NOWHERE:
            totals[cells[slot, _PLACE]] += size - cells[slot, _NBYTES]
            cells[slot, _NBYTES] = size


# S3-FIFO. Only slots with nothing behind them stand in the first two rings; the others wait for that.


@njit(cache=True, forceinline=True)
def _s3_join(cells: Cells, totals: Totals, slot: int, place: int) -> None:
    """Hold a slot that was not held."""
    _put(cells, totals, slot, place)
    if not cells[slot, _CHILDREN]:
        _link_hot(cells, place, slot)
    parent = _parent(cells, slot)
    if parent >= 0:
        if not cells[parent, _CHILDREN] and _is_held(cells, parent):
            _unlink(cells, parent)
        cells[parent, _CHILDREN] += 1


@njit(cache=True, forceinline=True)
def _s3_part(cells: Cells, totals: Totals, slot: int, place: int) -> None:
    """Hold a slot no more; what is in front of it may be the next to go."""
    if not cells[slot, _CHILDREN]:
        _unlink(cells, slot)
    _put(cells, totals, slot, place)
    parent = _parent(cells, slot)
    if parent >= 0:
        cells[parent, _CHILDREN] -= 1
        if not cells[parent, _CHILDREN] and _is_held(cells, parent):
            _link_cold(cells, cells[parent, _PLACE], parent)


@njit(cache=True, forceinline=True)
def _s3_promote(cells: Cells, totals: Totals, slot: int) -> None:
    if not cells[slot, _CHILDREN]:
        _unlink(cells, slot)
        _link_hot(cells, SECOND, slot)
    _put(cells, totals, slot, SECOND)


@njit(cache=True)
def s3_use(cells: Cells, totals: Totals, slots: Slots, clock: int, load: bool) -> None:
    """Count uses of held slots that came before `clock`; what is in the second queue takes its ancestors along."""
    parent = np.int64(-1)
    for slot in slots:
        if _is_held(cells, slot):
            if parent >= 0 and _adopt(cells, parent, slot):
                _unlink(cells, parent)
            parent = np.int64(slot)
    behind = False
    for slot in slots[::-1]:
        if not _is_held(cells, slot):
            continue
        used = cells[slot, _BORN] <= clock and _counts_as_use(cells, slot, load)
        if cells[slot, _PLACE] == FIRST:
            if used or behind:
                _s3_promote(cells, totals, slot)
        elif used and cells[slot, _USES] < _MAX_USES:
            cells[slot, _USES] += 1
        behind = behind or cells[slot, _PLACE] == SECOND


@njit(cache=True)
def s3_insert(cells: Cells, totals: Totals, slots: Slots, evicted: NDArray[np.int64]) -> None:
    clock = totals[CLOCK]
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        place = cells[slot, _PLACE]
        if place >= PARKED_FIRST:
            _s3_join(cells, totals, slot, place - _PARKED)
            cells[slot, _LAST] = _LOADED  # not a use
        elif place > SECOND:
            known = place == GHOST_FIRST and len(evicted) and evicted[i] != 0
            _forget_ghost(cells, totals, slot)
            _give_birth(cells, totals, slot)
            _s3_join(cells, totals, slot, SECOND if known else FIRST)
    s3_use(cells, totals, slots, clock, False)


@njit(cache=True)
def s3_remove(cells: Cells, totals: Totals, slots: Slots) -> None:
    for slot in slots:
        if _is_held(cells, slot):
            _s3_part(cells, totals, slot, NOWHERE)
        _forget_ghost(cells, totals, slot)
        cells[slot, _BORN] = 0


@njit(cache=True)
def s3_pop(
    cells: Cells, totals: Totals, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]
) -> Slots:
    popped = np.empty(totals[HELD], np.int64)
    length = idle_bytes = 0
    capacity = totals[FIRST] + totals[SECOND]
    while idle_bytes < target_bytes and totals[HELD]:
        small, main = _coldest(cells, FIRST), _coldest(cells, SECOND)
        from_small = small >= 0 and (main < 0 or totals[FIRST] * _SMALL_SHARE >= totals[FIRST] + totals[SECOND])
        slot = small if from_small else main
        if not from_small and cells[slot, _USES]:
            cells[slot, _USES] -= 1
            _unlink(cells, slot)
            _link_hot(cells, SECOND, slot)
            continue
        popped[length] = slot
        length += 1
        if pins[slot]:
            _s3_part(cells, totals, slot, PARKED_FIRST if from_small else PARKED_SECOND)
            continue
        idle_bytes += nbytes[slot]
        _s3_part(cells, totals, slot, GHOST_FIRST if from_small else NOWHERE)
        cells[slot, _BORN] = 0
        if from_small:
            _link_hot(cells, GHOST_FIRST, slot)
        else:
            _forget_ghost(cells, totals, slot)
    while totals[GHOST_FIRST] > capacity and _coldest(cells, GHOST_FIRST) >= 0:
        _forget_ghost(cells, totals, _coldest(cells, GHOST_FIRST))
    return popped[:length].copy()


# ARC. All held slots stand in the rings, in order of last use.


@njit(cache=True, forceinline=True)
def _arc_join(cells: Cells, totals: Totals, slot: int, place: int) -> None:
    _put(cells, totals, slot, place)
    parent = _parent(cells, slot)
    if parent >= 0:
        cells[parent, _CHILDREN] += 1


@njit(cache=True, forceinline=True)
def _arc_part(cells: Cells, totals: Totals, slot: int, place: int) -> None:
    _unlink(cells, slot)
    _put(cells, totals, slot, place)
    parent = _parent(cells, slot)
    if parent >= 0:
        cells[parent, _CHILDREN] -= 1


@njit(cache=True, forceinline=True)
def _arc_learn(cells: Cells, totals: Totals, ghost: int) -> None:
    """A ghost of one queue was asked for: that queue should have been larger."""
    own, other = np.int64(cells[ghost, _PLACE]), np.int64(GHOST_FIRST + GHOST_SECOND - cells[ghost, _PLACE])
    step = cells[ghost, _NBYTES] * max(1.0, totals[other] / max(totals[own], 1))
    target = totals[_TARGET] + (step if own == GHOST_FIRST else -step)
    totals[_TARGET] = np.int64(min(max(target, 0.0), float(totals[_CAPACITY])))


@njit(cache=True)
def arc_use(cells: Cells, totals: Totals, slots: Slots, clock: int, load: bool) -> None:
    """Make held slots the hottest; those used again, and their ancestors, in the second queue."""
    parent = np.int64(-1)
    for slot in slots:
        if _is_held(cells, slot):
            if parent >= 0:
                _adopt(cells, parent, slot)
            parent = np.int64(slot)
    behind = False
    for slot in slots[::-1]:
        if not _is_held(cells, slot):
            continue
        used = cells[slot, _BORN] <= clock and _counts_as_use(cells, slot, load)
        if used or behind:
            _put(cells, totals, slot, SECOND)
        behind = behind or cells[slot, _PLACE] == SECOND
        _unlink(cells, slot)
        _link_hot(cells, cells[slot, _PLACE], slot)


@njit(cache=True)
def arc_insert(cells: Cells, totals: Totals, slots: Slots, evicted: NDArray[np.int64]) -> None:
    clock = totals[CLOCK]
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        place = cells[slot, _PLACE]
        if place >= PARKED_FIRST:
            _arc_join(cells, totals, slot, place - _PARKED)
            _link_hot(cells, place - _PARKED, slot)
            cells[slot, _LAST] = _LOADED  # not a use
        elif place > SECOND:
            known = place != NOWHERE and len(evicted) and evicted[i] != 0
            if known:
                _arc_learn(cells, totals, slot)
            _forget_ghost(cells, totals, slot)
            _give_birth(cells, totals, slot)
            _arc_join(cells, totals, slot, SECOND if known else FIRST)
            _link_hot(cells, cells[slot, _PLACE], slot)
    arc_use(cells, totals, slots, clock, False)


@njit(cache=True)
def arc_remove(cells: Cells, totals: Totals, slots: Slots) -> None:
    for slot in slots:
        if _is_held(cells, slot):
            _arc_part(cells, totals, slot, NOWHERE)
        _forget_ghost(cells, totals, slot)
        cells[slot, _BORN] = 0


@njit(cache=True, forceinline=True)
def _arc_victim(cells: Cells, totals: Totals) -> Any:
    first, second = _coldest(cells, FIRST), _coldest(cells, SECOND)
    if first < 0 or second < 0:
        return max(first, second)
    wanted, other = (first, second) if totals[FIRST] > totals[_TARGET] else (second, first)
    return other if cells[wanted, _CHILDREN] and not cells[other, _CHILDREN] else wanted


@njit(cache=True)
def arc_pop(
    cells: Cells, totals: Totals, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]
) -> Slots:
    popped = np.empty(totals[HELD], np.int64)
    length = idle_bytes = 0
    capacity = totals[_CAPACITY] = totals[FIRST] + totals[SECOND]
    while idle_bytes < target_bytes and totals[HELD]:
        slot = _arc_victim(cells, totals)
        popped[length] = slot
        length += 1
        place = cells[slot, _PLACE]
        if pins[slot]:
            _arc_part(cells, totals, slot, place + _PARKED)
            continue
        idle_bytes += nbytes[slot]
        _arc_part(cells, totals, slot, place + _GHOST)
        _link_hot(cells, place + _GHOST, slot)
        cells[slot, _BORN] = 0
    while totals[FIRST] + totals[GHOST_FIRST] > capacity and _coldest(cells, GHOST_FIRST) >= 0:
        _forget_ghost(cells, totals, _coldest(cells, GHOST_FIRST))
    while totals[GHOST_FIRST] + totals[GHOST_SECOND] > capacity and _coldest(cells, GHOST_SECOND) >= 0:
        _forget_ghost(cells, totals, _coldest(cells, GHOST_SECOND))
    return popped[:length].copy()
