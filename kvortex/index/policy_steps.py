"""The compiled steps of S3-FIFO and ARC, over arrays by slot; what they mean is said in `policy_adaptive.py`.

A held slot is in the first or the second queue; a ghost is a slot that was evicted and whose block the index still
knows; a parked one was busy when its turn came, and will be back.

All in one file, constants included: numba's cache notices changes only in the file that it compiles from.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvortex.index.policy import Slots

# Where a slot is. The first four are rings, coldest to hottest, and rows of `links` as well.
FIRST, SECOND, GHOST_FIRST, GHOST_SECOND, NOWHERE, PARKED_FIRST, PARKED_SECOND = range(7)
_RINGS = 4
_PARKED = PARKED_FIRST - FIRST  # from a queue to what is parked of it
_GHOST = GHOST_FIRST - FIRST

# Positions in `State.totals` beyond the bytes of each of the above.
HELD, CLOCK, _TARGET, _CAPACITY = range(7, 11)
_NUM_TOTALS = 11

_COLDER, _HOTTER = 0, 1
_IDLE, _SAVED, _LOADED = 0, 1, 2  # what the last request did to a slot

_MAX_USES = 3  # S3-FIFO's two bits
_SMALL_SHARE = 10  # S3-FIFO's small queue is a tenth


class State(NamedTuple):
    """All arrays of a policy, by slot where not said otherwise: 43 bytes a slot."""

    links: NDArray[np.int32]  # [4 + capacity, 2]; a ring's own row closes it
    place: NDArray[np.uint8]
    uses: NDArray[np.uint8]  # S3-FIFO: since it came into the second queue or was passed over there
    last: NDArray[np.uint8]  # _IDLE, _SAVED or _LOADED
    nbytes: NDArray[np.int64]
    parent: NDArray[np.int32]  # or -1; counts if it is still the one that was born then
    born: NDArray[np.int64]  # number of the arrival, 0 for a slot that is gone
    parent_born: NDArray[np.int64]
    children: NDArray[np.int32]  # held slots whose parent this is
    totals: NDArray[np.int64]


def new_state(capacity: int) -> State:
    links = np.zeros((_RINGS + capacity, 2), np.int32)
    links[:_RINGS] = np.arange(_RINGS)[:, None]
    return State(
        links=links,
        place=np.full(capacity, NOWHERE, np.uint8),
        uses=np.zeros(capacity, np.uint8),
        last=np.zeros(capacity, np.uint8),
        nbytes=np.zeros(capacity, np.int64),
        parent=np.full(capacity, -1, np.int32),
        born=np.zeros(capacity, np.int64),
        parent_born=np.zeros(capacity, np.int64),
        children=np.zeros(capacity, np.int32),
        totals=np.zeros(_NUM_TOTALS, np.int64),
    )


# Rings.


@njit(cache=True, forceinline=True)
def _link_hot(state: State, ring: int, slot: int) -> None:
    row = slot + _RINGS
    hottest = state.links[ring, _COLDER]
    state.links[row, _COLDER], state.links[row, _HOTTER] = hottest, ring
    state.links[hottest, _HOTTER] = row
    state.links[ring, _COLDER] = row


@njit(cache=True, forceinline=True)
def _link_cold(state: State, ring: int, slot: int) -> None:
    row = slot + _RINGS
    coldest = state.links[ring, _HOTTER]
    state.links[row, _COLDER], state.links[row, _HOTTER] = ring, coldest
    state.links[coldest, _COLDER] = row
    state.links[ring, _HOTTER] = row


@njit(cache=True, forceinline=True)
def _unlink(state: State, slot: int) -> None:
    colder, hotter = state.links[slot + _RINGS]
    state.links[colder, _HOTTER] = hotter
    state.links[hotter, _COLDER] = colder


@njit(cache=True, forceinline=True)
def _coldest(state: State, ring: int) -> Any:
    """A slot, or below 0."""
    return np.int64(state.links[ring, _HOTTER]) - _RINGS


@njit(cache=True, forceinline=True)
def _is_held(state: State, slot: int) -> Any:
    return state.place[slot] <= SECOND


@njit(cache=True, forceinline=True)
def _put(state: State, slot: int, place: int) -> None:
    """Account a slot in another place; its links are the caller's."""
    old = state.place[slot]
    state.totals[old] -= state.nbytes[slot]
    state.totals[place] += state.nbytes[slot]
    state.totals[HELD] += np.int64(place <= SECOND) - np.int64(old <= SECOND)
    state.place[slot] = place


@njit(cache=True, forceinline=True)
def _forget_ghost(state: State, slot: int) -> None:
    if state.place[slot] in (GHOST_FIRST, GHOST_SECOND):
        _unlink(state, slot)
    _put(state, slot, NOWHERE)
    state.totals[NOWHERE] = state.nbytes[slot] = 0


# Family.


@njit(cache=True, forceinline=True)
def _parent(state: State, slot: int) -> Any:
    """The slot in front if it is still the same block, or -1."""
    parent = np.int64(state.parent[slot])
    return parent if parent >= 0 and state.born[parent] == state.parent_born[slot] else np.int64(-1)


@njit(cache=True, forceinline=True)
def _give_birth(state: State, slot: int) -> None:
    state.totals[CLOCK] += 1
    state.born[slot] = state.totals[CLOCK]
    state.children[slot] = state.uses[slot] = 0
    state.last[slot] = _SAVED
    state.parent[slot] = -1


@njit(cache=True, forceinline=True)
def _adopt(state: State, parent: int, slot: int) -> Any:
    """Make one held slot the parent of another that has none and is younger. True if it was childless."""
    if state.born[parent] >= state.born[slot] or _parent(state, slot) >= 0:
        return False
    state.parent[slot], state.parent_born[slot] = parent, state.born[parent]
    state.children[parent] += 1
    return state.children[parent] == 1


@njit(cache=True, forceinline=True)
def _counts_as_use(state: State, slot: int, load: bool) -> Any:
    last = state.last[slot]
    if load:
        state.last[slot] = _IDLE if last == _SAVED else _LOADED
        return last != _SAVED
    state.last[slot] = _SAVED
    return last != _LOADED


# Both policies: sizes.


@njit(cache=True)
def weigh(state: State, slots: Slots, nbytes: NDArray[np.int64]) -> None:
    for i in range(len(slots)):
        slot = slots[i]
        if state.place[slot] != NOWHERE:
            state.totals[state.place[slot]] += nbytes[i] - state.nbytes[slot]
            state.nbytes[slot] = nbytes[i]


# S3-FIFO. Only slots with nothing behind them stand in the first two rings; the others wait for that.


@njit(cache=True, forceinline=True)
def _s3_join(state: State, slot: int, place: int) -> None:
    """Hold a slot that was not held."""
    _put(state, slot, place)
    if not state.children[slot]:
        _link_hot(state, place, slot)
    parent = _parent(state, slot)
    if parent >= 0:
        if not state.children[parent] and _is_held(state, parent):
            _unlink(state, parent)
        state.children[parent] += 1


@njit(cache=True, forceinline=True)
def _s3_part(state: State, slot: int, place: int) -> None:
    """Hold a slot no more; what is in front of it may be the next to go."""
    if not state.children[slot]:
        _unlink(state, slot)
    _put(state, slot, place)
    parent = _parent(state, slot)
    if parent >= 0:
        state.children[parent] -= 1
        if not state.children[parent] and _is_held(state, parent):
            _link_cold(state, np.int64(state.place[parent]), parent)


@njit(cache=True, forceinline=True)
def _s3_promote(state: State, slot: int) -> None:
    if not state.children[slot]:
        _unlink(state, slot)
        _link_hot(state, SECOND, slot)
    _put(state, slot, SECOND)


@njit(cache=True)
def s3_use(state: State, slots: Slots, clock: int, load: bool) -> None:
    """Count uses of held slots that came before `clock`; what is in the second queue takes its ancestors along."""
    parent = np.int64(-1)
    for slot in slots:
        if _is_held(state, slot):
            if parent >= 0 and _adopt(state, parent, slot):
                _unlink(state, parent)
            parent = np.int64(slot)
    behind = False
    for slot in slots[::-1]:
        if not _is_held(state, slot):
            continue
        used = state.born[slot] <= clock and _counts_as_use(state, slot, load)
        if state.place[slot] == FIRST:
            if used or behind:
                _s3_promote(state, slot)
        elif used and state.uses[slot] < _MAX_USES:
            state.uses[slot] += 1
        behind = behind or state.place[slot] == SECOND


@njit(cache=True)
def s3_insert(state: State, slots: Slots, evicted: NDArray[np.bool_]) -> None:
    clock = state.totals[CLOCK]
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        place = state.place[slot]
        if place >= PARKED_FIRST:
            _s3_join(state, slot, place - _PARKED)
            state.last[slot] = _LOADED  # not a use
        elif place > SECOND:
            known = place == GHOST_FIRST and len(evicted) and evicted[i]
            _forget_ghost(state, slot)
            _give_birth(state, slot)
            _s3_join(state, slot, SECOND if known else FIRST)
    s3_use(state, slots, clock, False)


@njit(cache=True)
def s3_remove(state: State, slots: Slots) -> None:
    for slot in slots:
        if _is_held(state, slot):
            _s3_part(state, slot, NOWHERE)
        _forget_ghost(state, slot)
        state.born[slot] = 0


@njit(cache=True)
def s3_pop(state: State, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
    totals = state.totals
    popped = np.empty(totals[HELD], np.int32)
    length = idle_bytes = 0
    capacity = totals[FIRST] + totals[SECOND]
    while idle_bytes < target_bytes and totals[HELD]:
        small, main = _coldest(state, FIRST), _coldest(state, SECOND)
        from_small = small >= 0 and (main < 0 or totals[FIRST] * _SMALL_SHARE >= totals[FIRST] + totals[SECOND])
        slot = small if from_small else main
        if not from_small and state.uses[slot]:
            state.uses[slot] -= 1
            _unlink(state, slot)
            _link_hot(state, SECOND, slot)
            continue
        popped[length] = slot
        length += 1
        if pins[slot]:
            _s3_part(state, slot, PARKED_FIRST if from_small else PARKED_SECOND)
            continue
        idle_bytes += nbytes[slot]
        _s3_part(state, slot, GHOST_FIRST if from_small else NOWHERE)
        state.born[slot] = 0
        if from_small:
            _link_hot(state, GHOST_FIRST, slot)
        else:
            _forget_ghost(state, slot)
    while totals[GHOST_FIRST] > capacity and _coldest(state, GHOST_FIRST) >= 0:
        _forget_ghost(state, _coldest(state, GHOST_FIRST))
    return popped[:length].copy()


# ARC. All held slots stand in the rings, in order of last use.


@njit(cache=True, forceinline=True)
def _arc_join(state: State, slot: int, place: int) -> None:
    _put(state, slot, place)
    parent = _parent(state, slot)
    if parent >= 0:
        state.children[parent] += 1


@njit(cache=True, forceinline=True)
def _arc_part(state: State, slot: int, place: int) -> None:
    _unlink(state, slot)
    _put(state, slot, place)
    parent = _parent(state, slot)
    if parent >= 0:
        state.children[parent] -= 1


@njit(cache=True, forceinline=True)
def _arc_learn(state: State, ghost: int) -> None:
    """A ghost of one queue was asked for: that queue should have been larger."""
    own, other = np.int64(state.place[ghost]), np.int64(GHOST_FIRST + GHOST_SECOND - state.place[ghost])
    totals = state.totals
    step = state.nbytes[ghost] * max(1.0, totals[other] / max(totals[own], 1))
    target = totals[_TARGET] + (step if own == GHOST_FIRST else -step)
    totals[_TARGET] = np.int64(min(max(target, 0.0), float(totals[_CAPACITY])))


@njit(cache=True)
def arc_use(state: State, slots: Slots, clock: int, load: bool) -> None:
    """Make held slots the hottest; those used again, and their ancestors, in the second queue."""
    parent = np.int64(-1)
    for slot in slots:
        if _is_held(state, slot):
            if parent >= 0:
                _adopt(state, parent, slot)
            parent = np.int64(slot)
    behind = False
    for slot in slots[::-1]:
        if not _is_held(state, slot):
            continue
        used = state.born[slot] <= clock and _counts_as_use(state, slot, load)
        if used or behind:
            _put(state, slot, SECOND)
        behind = behind or state.place[slot] == SECOND
        _unlink(state, slot)
        _link_hot(state, np.int64(state.place[slot]), slot)


@njit(cache=True)
def arc_insert(state: State, slots: Slots, evicted: NDArray[np.bool_]) -> None:
    clock = state.totals[CLOCK]
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        place = state.place[slot]
        if place >= PARKED_FIRST:
            _arc_join(state, slot, place - _PARKED)
            _link_hot(state, place - _PARKED, slot)
            state.last[slot] = _LOADED  # not a use
        elif place > SECOND:
            known = place != NOWHERE and len(evicted) and evicted[i]
            if known:
                _arc_learn(state, slot)
            _forget_ghost(state, slot)
            _give_birth(state, slot)
            _arc_join(state, slot, SECOND if known else FIRST)
            _link_hot(state, np.int64(state.place[slot]), slot)
    arc_use(state, slots, clock, False)


@njit(cache=True)
def arc_remove(state: State, slots: Slots) -> None:
    for slot in slots:
        if _is_held(state, slot):
            _arc_part(state, slot, NOWHERE)
        _forget_ghost(state, slot)
        state.born[slot] = 0


@njit(cache=True, forceinline=True)
def _arc_victim(state: State) -> Any:
    first, second = _coldest(state, FIRST), _coldest(state, SECOND)
    if first < 0 or second < 0:
        return max(first, second)
    wanted, other = (first, second) if state.totals[FIRST] > state.totals[_TARGET] else (second, first)
    return other if state.children[wanted] and not state.children[other] else wanted


@njit(cache=True)
def arc_pop(state: State, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
    totals = state.totals
    popped = np.empty(totals[HELD], np.int32)
    length = idle_bytes = 0
    capacity = totals[_CAPACITY] = totals[FIRST] + totals[SECOND]
    totals[_TARGET] = min(totals[_TARGET], capacity)
    while idle_bytes < target_bytes and totals[HELD]:
        slot = _arc_victim(state)
        popped[length] = slot
        length += 1
        place = np.int64(state.place[slot])
        if pins[slot]:
            _arc_part(state, slot, place + _PARKED)
            continue
        idle_bytes += nbytes[slot]
        _arc_part(state, slot, place + _GHOST)
        _link_hot(state, place + _GHOST, slot)
        state.born[slot] = 0
    while totals[FIRST] + totals[GHOST_FIRST] > capacity and _coldest(state, GHOST_FIRST) >= 0:
        _forget_ghost(state, _coldest(state, GHOST_FIRST))
    while totals[GHOST_FIRST] + totals[GHOST_SECOND] > capacity and _coldest(state, GHOST_SECOND) >= 0:
        _forget_ghost(state, _coldest(state, GHOST_SECOND))
    return popped[:length].copy()
