"""The index's entries as arrays, and the compiled steps that read and change them.

An entry is a row number, its *slot*. Keys find their slots through open addressing with linear probing: a bucket
holds `32 key bits << 32 | slot + 1`, or 0. The key bits give the bucket's home as well, so rehashing and
backward-shift deletion (Knuth, TAOCP 3, 6.4, algorithm R) never touch the keys. Keys are SHA-256, hence uniform
already and not hashed again. There are twice as many buckets as slots: load stays at or below one half.

No kernel releases the GIL: each call is one atomic step for every thread. A table that has to grow is replaced by
a new one; a reader that still holds the old one sees the moment of the change.

All in one file, constants included: numba's cache notices changes only in the file that it compiles from.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvortex.types import MissReason

Keys = NDArray[np.uint64]
Slots = NDArray[np.int32]
Offsets = NDArray[np.int64]

# What a slot holds. A reservation counts as one pin, so that a slot is busy exactly while it has pins.
FREE = np.uint8(0)
PENDING = np.uint8(1)  # reserved, not yet visible
ORPHANED = np.uint8(2)  # reserved before a clear: will never become visible
COMMITTED = np.uint8(3)
DROPPED = np.uint8(4)  # not among the buckets any more, but pinned
GHOST = np.uint8(5)  # a key that is gone, kept for the reason

RESERVED, STORED, BUSY = 0, 1, 2
"""A reservation's states: the call owns the slot; committed before; reserved elsewhere or earlier in the call."""

MISS_REASONS = (
    MissReason.NEVER_STORED,
    MissReason.PENDING,
    MissReason.EVICTED,
    MissReason.CORRUPT,
    MissReason.TRANSFER_FAILED,
    MissReason.DEADLINE,
    MissReason.TOO_LOSSY,
)
"""Miss reasons by their number in arrays."""
_NEVER_STORED, _PENDING, _EVICTED = 0, 1, 2

# Positions in `Table.totals`.
COMMITTED_BLOCKS, COMMITTED_BYTES, PENDING_BLOCKS, EVICTED_BLOCKS, SLOTS_USED, SLOTS_FREED, _RING_NEXT = range(7)

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ONE = np.uint64(1)


class Table(NamedTuple):
    """All arrays of an index, by slot where not said otherwise: 71 bytes a slot, and 16 for its two buckets.

    Memory of slots that were never used is not touched, so the system does not provide it.
    """

    buckets: NDArray[np.uint64]  # [2 * capacity]
    keys: Keys  # [capacity, 4]
    state: NDArray[np.uint8]
    pins: NDArray[np.int32]
    offset: Offsets  # of committed and dropped blocks, as are nbytes and digest
    nbytes: NDArray[np.int64]
    digest: NDArray[np.uint64]
    parked: NDArray[np.uint8]  # busy when an eviction met it, so taken out of the order
    reason: NDArray[np.uint8]  # valid while ring_at is
    ring_at: NDArray[np.int32]  # where the ring names this slot, or -1
    freed: Slots  # stack of slots to use again
    ring: Slots  # [ghost_entries], oldest at _RING_NEXT; an entry counts if its slot's ring_at points back
    totals: NDArray[np.int64]  # [7]

    @property
    def capacity(self) -> int:
        return len(self.state)

    @property
    def room(self) -> int:
        """Slots that can be taken before the table has to grow."""
        return self.capacity - int(self.totals[SLOTS_USED]) + int(self.totals[SLOTS_FREED])


def new_table(capacity: int, ghost_entries: int) -> Table:
    """An empty table; `capacity` is rounded up to a power of two."""
    capacity = 1 << max(capacity - 1, 1).bit_length()
    return Table(
        buckets=np.full(2 * capacity, 0, np.uint64),
        keys=np.zeros((capacity, 4), np.uint64),
        state=np.zeros(capacity, np.uint8),
        pins=np.zeros(capacity, np.int32),
        offset=np.zeros(capacity, np.int64),
        nbytes=np.zeros(capacity, np.int64),
        digest=np.zeros(capacity, np.uint64),
        parked=np.zeros(capacity, np.uint8),
        reason=np.zeros(capacity, np.uint8),
        ring_at=np.zeros(capacity, np.int32),
        freed=np.zeros(capacity, np.int32),
        ring=np.full(ghost_entries, -1, np.int32),
        totals=np.zeros(7, np.int64),
    )


def grown(table: Table, capacity: int) -> Table:
    """A copy of the table with at least `capacity` slots; slots keep their numbers, totals are shared."""
    new = new_table(capacity, 0)._replace(ring=table.ring, totals=table.totals)
    for name in set(Table._fields) - {"buckets", "ring", "totals"}:
        getattr(new, name)[: table.capacity] = getattr(table, name)
    _rehash(table.buckets, new.buckets)
    return new


# Buckets and slots.


@njit(cache=True)
def _rehash(old: NDArray[np.uint64], new: NDArray[np.uint64]) -> None:
    mask = np.uint64(len(new) - 1)
    for bucket in old:
        if bucket:
            at = (bucket >> _HALF) & mask
            while new[at]:
                at = (at + _ONE) & mask
            new[at] = bucket


@njit(cache=True, forceinline=True)
def _find(buckets: NDArray[np.uint64], own: Keys, keys: Keys, i: int) -> Any:
    """Slot of `keys[i]`, or -1."""
    mask = np.uint64(len(buckets) - 1)
    tag = keys[i, 0] & _LOW
    at = tag & mask
    while buckets[at]:
        bucket = buckets[at]
        if bucket >> _HALF == tag:
            slot = np.int64(bucket & _LOW) - 1
            if (
                own[slot, 0] == keys[i, 0]
                and own[slot, 1] == keys[i, 1]
                and own[slot, 2] == keys[i, 2]
                and own[slot, 3] == keys[i, 3]
            ):
                return slot
        at = (at + _ONE) & mask
    return np.int64(-1)


@njit(cache=True, forceinline=True)
def _enter(table: Table, slot: int) -> None:
    mask = np.uint64(len(table.buckets) - 1)
    tag = table.keys[slot, 0] & _LOW
    at = tag & mask
    while table.buckets[at]:
        at = (at + _ONE) & mask
    table.buckets[at] = tag << _HALF | np.uint64(slot + 1)


@njit(cache=True, forceinline=True)
def _leave(table: Table, slot: int) -> None:
    buckets = table.buckets
    mask = np.uint64(len(buckets) - 1)
    tag = table.keys[slot, 0] & _LOW
    hole = tag & mask
    while buckets[hole] != tag << _HALF | np.uint64(slot + 1):
        hole = (hole + _ONE) & mask
    at = (hole + _ONE) & mask
    while buckets[at]:
        home = (buckets[at] >> _HALF) & mask
        if (at - home) & mask >= (at - hole) & mask:  # the hole lies on the way from its home
            buckets[hole] = buckets[at]
            hole = at
        at = (at + _ONE) & mask
    buckets[hole] = 0


@njit(cache=True, forceinline=True)
def _add(table: Table, keys: Keys, i: int) -> Any:
    """A slot for `keys[i]`, which has none; there must be room."""
    if table.totals[SLOTS_FREED]:
        table.totals[SLOTS_FREED] -= 1
        slot = np.int64(table.freed[table.totals[SLOTS_FREED]])
    else:
        slot = table.totals[SLOTS_USED]
        table.totals[SLOTS_USED] += 1
    table.keys[slot] = keys[i]
    table.ring_at[slot] = -1
    _enter(table, slot)
    return slot


@njit(cache=True, forceinline=True)
def _release(table: Table, slot: int) -> None:
    """Give a slot back that no bucket names."""
    table.state[slot] = FREE
    table.freed[table.totals[SLOTS_FREED]] = slot
    table.totals[SLOTS_FREED] += 1


@njit(cache=True, forceinline=True)
def _remove(table: Table, slot: int) -> None:
    _leave(table, slot)
    _release(table, slot)


@njit(cache=True, forceinline=True)
def _remember(table: Table, slot: int, reason: int) -> None:
    """Make a slot without pins a ghost; the ring's oldest makes way."""
    if len(table.ring) == 0:
        _remove(table, slot)
        return
    at = table.totals[_RING_NEXT]
    oldest = table.ring[at]
    if oldest >= 0 and table.ring_at[oldest] == at:
        table.ring_at[oldest] = -1
        if table.state[oldest] == GHOST:
            _remove(table, oldest)
    table.state[slot] = GHOST
    table.reason[slot] = reason
    table.ring_at[slot] = at
    table.ring[at] = slot
    table.totals[_RING_NEXT] = (at + 1) % len(table.ring)


@njit(cache=True, forceinline=True)
def _retire(table: Table, slot: int, reason: int) -> None:
    """A committed block is gone; what pins hold stays in its slot, and the key's ghost gets another one."""
    table.totals[COMMITTED_BLOCKS] -= 1
    table.totals[COMMITTED_BYTES] -= table.nbytes[slot]
    table.parked[slot] = 0
    if not table.pins[slot]:
        _remember(table, slot, reason)
        return
    table.state[slot] = DROPPED
    _leave(table, slot)
    if len(table.ring):
        _remember(table, _add(table, table.keys, slot), reason)


@njit(cache=True, forceinline=True)
def _take_pins(table: Table, slots: Slots, reserved: bool) -> int:
    """Take a pin each time a slot is named, from reservations or from stored blocks, all or none.

    Returns -1, or the position that had none.
    """
    for i in range(len(slots)):
        state = table.state[slots[i]]
        if not table.pins[slots[i]] or (state in (PENDING, ORPHANED)) != reserved:
            for taken in slots[:i]:
                table.pins[taken] += 1
            return i
        table.pins[slots[i]] -= 1
    return -1


# Reads.


@njit(cache=True)
def prefix_length(table: Table, keys: Keys) -> int:
    for i in range(len(keys)):
        slot = _find(table.buckets, table.keys, keys, i)
        if slot < 0 or table.state[slot] != COMMITTED:
            return i
    return len(keys)


@njit(cache=True)
def contains_mask(table: Table, keys: Keys) -> NDArray[np.bool_]:
    mask = np.empty(len(keys), np.bool_)
    for i in range(len(keys)):
        slot = _find(table.buckets, table.keys, keys, i)
        mask[i] = slot >= 0 and table.state[slot] == COMMITTED
    return mask


@njit(cache=True)
def miss_reason(table: Table, keys: Keys, i: int) -> Any:
    slot = _find(table.buckets, table.keys, keys, i)
    if slot < 0:
        return _NEVER_STORED
    return np.int64(table.reason[slot]) if table.state[slot] == GHOST else _PENDING


@njit(cache=True)
def committed_slot(table: Table, keys: Keys) -> int:
    """Slot of the one key, or -1."""
    slot = _find(table.buckets, table.keys, keys, 0)
    return slot if slot >= 0 and table.state[slot] == COMMITTED else -1


# Changes. `idle` are slots to put back into the eviction order.


@njit(cache=True)
def reserve(table: Table, keys: Keys) -> tuple[Slots, NDArray[np.uint8], Slots, NDArray[np.bool_]]:
    """Slots that the call owns or -1, states, the chain to put into the eviction order, which of it were evicted.

    A ghost keeps the slot that it had, so a policy that remembers what it evicted finds it by its number.
    """
    slots, chain = np.empty(len(keys), np.int32), np.empty(len(keys), np.int32)
    states, evicted = np.empty(len(keys), np.uint8), np.empty(len(keys), np.bool_)
    length = 0
    for i in range(len(keys)):  # alone in its loop, so that the memory accesses of many keys overlap
        slots[i] = _find(table.buckets, table.keys, keys, i)
    for i in range(len(keys)):
        slot = np.int64(slots[i])
        slots[i] = -1
        if slot < 0:
            slot = _find(table.buckets, table.keys, keys, i)  # again: an earlier position may name it too
        if slot < 0:
            slot = _add(table, keys, i)
        state = table.state[slot]
        if state == COMMITTED:
            states[i] = STORED
        elif state in (PENDING, ORPHANED):
            states[i] = BUSY
        else:
            states[i], slots[i] = RESERVED, slot
            table.state[slot], table.pins[slot] = PENDING, 1
            table.totals[PENDING_BLOCKS] += 1
        if state != ORPHANED and not table.parked[slot]:
            chain[length] = slot
            evicted[length] = state == GHOST and table.reason[slot] == _EVICTED
            length += 1
    return slots, states, chain[:length], evicted[:length]


@njit(cache=True)
def commit(
    table: Table, slots: Slots, offsets: Offsets, nbytes: NDArray[np.int64], digests: NDArray[np.uint64]
) -> tuple[int, Offsets, Slots]:
    """Position of a slot that is not reserved or -1, orphaned offsets, idle slots."""
    failed = _take_pins(table, slots, True)
    unseen, idle = np.empty(len(slots), np.int64), np.empty(len(slots), np.int32)
    num_unseen = num_idle = 0
    for i in range(len(slots) if failed < 0 else 0):
        slot = slots[i]
        table.totals[PENDING_BLOCKS] -= 1
        if table.state[slot] == ORPHANED:
            unseen[num_unseen] = offsets[i]
            num_unseen += 1
            _remove(table, slot)
            continue
        table.state[slot], table.ring_at[slot] = COMMITTED, -1
        table.offset[slot], table.nbytes[slot], table.digest[slot] = offsets[i], nbytes[i], digests[i]
        table.totals[COMMITTED_BLOCKS] += 1
        table.totals[COMMITTED_BYTES] += nbytes[i]
        if table.parked[slot]:
            table.parked[slot] = 0
            idle[num_idle] = slot
            num_idle += 1
    return failed, unseen[:num_unseen], idle[:num_idle]


@njit(cache=True)
def abort(table: Table, slots: Slots, reason: int) -> Any:
    """Position of a slot that is not reserved or -1. `reason` -1 leaves the older one."""
    failed = _take_pins(table, slots, True)
    for slot in slots if failed < 0 else slots[:0]:
        table.totals[PENDING_BLOCKS] -= 1
        table.parked[slot] = 0
        if table.state[slot] == PENDING and reason >= 0:
            _remember(table, slot, reason)
        elif table.state[slot] == PENDING and table.ring_at[slot] >= 0:
            table.state[slot] = GHOST
        else:
            _remove(table, slot)
    return failed


@njit(cache=True)
def pin(table: Table, keys: Keys) -> tuple[Slots, NDArray[np.uint8], Slots]:
    """Slots or -1, miss reasons, and the slots of the hits alone."""
    slots, hits = np.full(len(keys), -1, np.int32), np.empty(len(keys), np.int32)
    reasons = np.zeros(len(keys), np.uint8)
    num_hits = 0
    for i in range(len(keys)):
        slot = _find(table.buckets, table.keys, keys, i)
        if slot >= 0 and table.state[slot] == COMMITTED:
            table.pins[slot] += 1
            slots[i] = hits[num_hits] = slot
            num_hits += 1
        elif slot >= 0:
            reasons[i] = table.reason[slot] if table.state[slot] == GHOST else _PENDING
    return slots, reasons, hits[:num_hits]


@njit(cache=True)
def unpin(table: Table, slots: Slots) -> tuple[int, Offsets, Slots]:
    """Position of a slot that has no pin left or -1, offsets that are free now, idle slots."""
    failed = _take_pins(table, slots, False)
    offsets, idle = np.empty(len(slots), np.int64), np.empty(len(slots), np.int32)
    num_offsets = num_idle = 0
    for slot in slots if failed < 0 else slots[:0]:
        if table.pins[slot]:
            continue
        if table.state[slot] == DROPPED:
            offsets[num_offsets] = table.offset[slot]
            num_offsets += 1
            _release(table, slot)
        elif table.parked[slot]:
            table.parked[slot] = 0
            idle[num_idle] = slot
            num_idle += 1
    return failed, offsets[:num_offsets], idle[:num_idle]


@njit(cache=True)
def drop(table: Table, slots: Slots, reason: int) -> tuple[Offsets, Slots]:
    """Offsets that are free now, and the slots to take out of the eviction order."""
    offsets, gone = np.empty(len(slots), np.int64), np.empty(len(slots), np.int32)
    num_offsets = num_gone = 0
    for slot in slots:
        if table.state[slot] != COMMITTED:
            continue
        gone[num_gone] = slot
        num_gone += 1
        if not table.pins[slot]:
            offsets[num_offsets] = table.offset[slot]
            num_offsets += 1
        _retire(table, slot, reason)
    return offsets[:num_offsets], gone[:num_gone]


@njit(cache=True)
def evict(table: Table, slots: Slots, reason: int) -> Offsets:
    """Offsets of the idle ones; the busy ones are parked."""
    offsets = np.empty(len(slots), np.int64)
    num_offsets = 0
    for slot in slots:
        if table.pins[slot]:
            table.parked[slot] = 1
            continue
        offsets[num_offsets] = table.offset[slot]
        num_offsets += 1
        _retire(table, slot, reason)
    table.totals[EVICTED_BLOCKS] += num_offsets
    return offsets[:num_offsets]


@njit(cache=True)
def clear(table: Table) -> Offsets:
    """Offsets that are free now."""
    offsets = np.empty(table.totals[COMMITTED_BLOCKS], np.int64)
    num_offsets = 0
    table.totals[COMMITTED_BLOCKS] = table.totals[COMMITTED_BYTES] = 0
    table.buckets[:] = 0
    for slot in range(table.totals[SLOTS_USED]):
        state = table.state[slot]
        table.ring_at[slot] = -1
        table.parked[slot] = 0
        if state in (PENDING, ORPHANED):
            table.state[slot] = ORPHANED
            _enter(table, slot)
        elif state == COMMITTED and table.pins[slot]:
            table.state[slot] = DROPPED
        elif state in (COMMITTED, GHOST):
            if state == COMMITTED:
                offsets[num_offsets] = table.offset[slot]
                num_offsets += 1
            _release(table, slot)
    return offsets[:num_offsets]
