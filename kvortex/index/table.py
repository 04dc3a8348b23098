"""The index's entries as arrays, and the compiled steps that read and change them.

An entry is a row of the table; the number of the row is the *slot*.

A hash table with open addressing and linear probing maps keys to slots. A bucket holds `32 key bits << 32 | slot + 1`,
or 0 if it is empty. The same key bits give the bucket's home position, so rehashing and backward-shift deletion (Knuth,
TAOCP 3, 6.4, algorithm R) do not read the keys. Keys are SHA-256 digests, so their bits are uniform already and are not
hashed again. There are twice as many buckets as slots, so the load factor is at most one half.

No step releases the GIL, so each call is atomic for all threads. A table that is full is replaced by a larger copy; a
reader that still holds the old table sees the state at the moment of the replacement.

All steps and constants are in one file: numba's cache notices changes only in the file that it compiles from.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.runtime.jit import njit
from kvortex.types import MissReason

Keys = NDArray[np.uint64]
Slots = NDArray[np.int64]
Offsets = NDArray[np.int64]

# States of a slot. A reservation counts as one pin, so a slot is busy exactly while it has pins.
FREE = np.uint8(0)
PENDING = np.uint8(1)  # reserved: not visible yet
ORPHANED = np.uint8(2)  # reserved before a `clear` or `orphan`: will never become visible
COMMITTED = np.uint8(3)
DROPPED = np.uint8(4)  # removed from the buckets, but still pinned
GHOST = np.uint8(5)  # the block is gone; the slot keeps the key and the reason

RESERVED, STORED, BUSY = 0, 1, 2
"""Results of a reservation: the call owns the slot; the block is committed already; the block is reserved by another
call, or at an earlier position of the same call."""

MISS_REASONS = (
    MissReason.NEVER_STORED,
    MissReason.PENDING,
    MissReason.EVICTED,
    MissReason.CORRUPT,
    MissReason.TRANSFER_FAILED,
    MissReason.DEADLINE,
    MissReason.TOO_LOSSY,
    MissReason.NOT_FETCHED,
    MissReason.INVALIDATED,
    MissReason.OWNER_LOST,
    MissReason.AUTH,
)
"""The miss reasons; arrays hold positions in this tuple."""
_NEVER_STORED, _PENDING, _EVICTED = 0, 1, 2

# Positions in `Table.totals`.
COMMITTED_BLOCKS, COMMITTED_BYTES, PENDING_BLOCKS, EVICTED_BLOCKS = range(4)
SLOTS_USED, SLOTS_FREED, REMOVED_BLOCKS, _RING_NEXT = range(4, 8)

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ONE = np.uint64(1)


ROW = np.dtype(
    [
        ("key", np.uint64, 4),
        ("offset", np.int64),  # set for committed and dropped blocks, as is `digest`
        ("nbytes", np.int64),  # 0 for a reservation
        ("digest", np.uint64),
        ("pins", np.int32),
        ("ring_at", np.int32),  # position in the ring that names this slot, or -1
        ("freed", np.int32),  # row i stores item i of the stack of freed slots
        ("state", np.uint8),
        ("parked", np.uint8),  # 1 if an eviction met the slot while it was busy and took it out of the eviction order
        ("reason", np.uint8),  # position in MISS_REASONS, valid while `ring_at` is not -1
        ("form", np.uint8),  # what the block's bytes are; of a reservation, a form of the same cache
    ],
    align=True,
)
"""All data of a slot, 72 bytes. They are in one row so that a step touches one or two cache lines per slot."""

Rows = NDArray[np.void]
Buckets = NDArray[np.uint64]
Totals = NDArray[np.int64]
Results = NDArray[np.int64]  # [k, n]; each step says what its rows are


class Table(NamedTuple):
    """All arrays of an index, in the order in which the steps take them.

    Slots that were never used take no resident memory: nothing has written to their pages.
    """

    rows: Rows  # [capacity]
    buckets: Buckets  # [2 * capacity]
    ring: NDArray[np.int32]  # [ghost_entries] slots, oldest at _RING_NEXT; valid if the slot's `ring_at` points back
    totals: Totals  # [8]

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @property
    def room(self) -> int:
        """Number of slots that can be taken before the table has to grow."""
        return self.capacity - int(self.totals[SLOTS_USED]) + int(self.totals[SLOTS_FREED])


def new_table(capacity: int, ghost_entries: int) -> Table:
    """Make an empty table; `capacity` (slots) is rounded up to a power of two."""
    capacity = 1 << max(capacity - 1, 1).bit_length()
    return Table(
        rows=np.zeros(capacity, ROW),
        buckets=np.full(2 * capacity, 0, np.uint64),
        ring=np.full(ghost_entries, -1, np.int32),
        totals=np.zeros(8, np.int64),
    )


def grown(table: Table, capacity: int) -> Table:
    """Copy the table into one with at least `capacity` slots. Slots keep their numbers; both tables share the ring."""
    new = new_table(capacity, 0)._replace(ring=table.ring, totals=table.totals)
    new.rows[: table.capacity] = table.rows
    _rehash(table.buckets, new.buckets)
    return new


# Buckets and slots.


@njit(cache=True)
def _rehash(old: Buckets, new: Buckets) -> None:
    mask = np.uint64(len(new) - 1)
    for bucket in old:
        if bucket:
            at = (bucket >> _HALF) & mask
            while new[at]:
                at = (at + _ONE) & mask
            new[at] = bucket


@njit(cache=True, forceinline=True)
def _find(rows: Rows, buckets: Buckets, keys: Keys, i: int) -> Any:
    """Return the slot of `keys[i]`, or -1."""
    mask = np.uint64(len(buckets) - 1)
    tag = keys[i, 0] & _LOW
    at = tag & mask
    while buckets[at]:
        bucket = buckets[at]
        if bucket >> _HALF == tag:
            slot = np.int64(bucket & _LOW) - 1
            key = rows[slot].key
            if key[0] == keys[i, 0] and key[1] == keys[i, 1] and key[2] == keys[i, 2] and key[3] == keys[i, 3]:
                return slot
        at = (at + _ONE) & mask
    return np.int64(-1)


@njit(cache=True, forceinline=True)
def _enter(rows: Rows, buckets: Buckets, slot: int) -> None:
    mask = np.uint64(len(buckets) - 1)
    tag = rows[slot].key[0] & _LOW
    at = tag & mask
    while buckets[at]:
        at = (at + _ONE) & mask
    buckets[at] = tag << _HALF | np.uint64(slot + 1)


@njit(cache=True, forceinline=True)
def _leave(rows: Rows, buckets: Buckets, slot: int) -> None:
    mask = np.uint64(len(buckets) - 1)
    tag = rows[slot].key[0] & _LOW
    hole = tag & mask
    while buckets[hole] != tag << _HALF | np.uint64(slot + 1):
        hole = (hole + _ONE) & mask
    at = (hole + _ONE) & mask
    while buckets[at]:
        home = (buckets[at] >> _HALF) & mask
        if (at - home) & mask >= (at - hole) & mask:  # the hole lies between the bucket's home and the bucket
            buckets[hole] = buckets[at]
            hole = at
        at = (at + _ONE) & mask
    buckets[hole] = 0


@njit(cache=True, forceinline=True)
def _take(rows: Rows, totals: Totals) -> Any:
    """Take an unused slot; the table must have room."""
    if totals[SLOTS_FREED]:
        totals[SLOTS_FREED] -= 1
        slot = np.int64(rows[totals[SLOTS_FREED]].freed)
    else:
        slot = totals[SLOTS_USED]
        totals[SLOTS_USED] += 1
    rows[slot].ring_at = -1
    return slot


@njit(cache=True, forceinline=True)
def _add(rows: Rows, buckets: Buckets, totals: Totals, keys: Keys, i: int) -> Any:
    """Take a slot for `keys[i]`, which must not have one; the table must have room."""
    slot = _take(rows, totals)
    for word in range(4):
        rows[slot].key[word] = keys[i, word]
    _enter(rows, buckets, slot)
    return slot


@njit(cache=True, forceinline=True)
def _release(rows: Rows, totals: Totals, slot: int) -> None:
    """Free a slot that no bucket names."""
    rows[slot].state = FREE
    rows[totals[SLOTS_FREED]].freed = slot
    totals[SLOTS_FREED] += 1


@njit(cache=True, forceinline=True)
def _remove(rows: Rows, buckets: Buckets, totals: Totals, slot: int) -> None:
    _leave(rows, buckets, slot)
    _release(rows, totals, slot)


@njit(cache=True, forceinline=True)
def _remember(rows: Rows, buckets: Buckets, ring: NDArray[np.int32], totals: Totals, slot: int, reason: int) -> None:
    """Turn a slot without pins into a ghost. If the ring is full, the oldest ghost is removed."""
    if len(ring) == 0:
        _remove(rows, buckets, totals, slot)
        return
    at = totals[_RING_NEXT]
    oldest = np.int64(ring[at])
    if oldest >= 0 and rows[oldest].ring_at == at:
        rows[oldest].ring_at = -1
        if rows[oldest].state == GHOST:
            _remove(rows, buckets, totals, oldest)
    rows[slot].state = GHOST
    rows[slot].reason = reason
    rows[slot].ring_at = at
    ring[at] = slot
    totals[_RING_NEXT] = (at + 1) % len(ring)


@njit(cache=True, forceinline=True)
def _retire(rows: Rows, buckets: Buckets, ring: NDArray[np.int32], totals: Totals, slot: int, reason: int) -> None:
    """Remove a committed block. If it is pinned, it stays in its slot as dropped and its ghost takes another slot."""
    totals[COMMITTED_BLOCKS] -= 1
    totals[COMMITTED_BYTES] -= rows[slot].nbytes
    totals[REMOVED_BLOCKS] += 1
    rows[slot].parked = 0
    if not rows[slot].pins:
        _remember(rows, buckets, ring, totals, slot, reason)
        return
    rows[slot].state = DROPPED
    _leave(rows, buckets, slot)
    if len(ring):
        ghost = _take(rows, totals)
        for word in range(4):
            rows[ghost].key[word] = rows[slot].key[word]
        _enter(rows, buckets, ghost)
        _remember(rows, buckets, ring, totals, ghost, reason)


@njit(cache=True, forceinline=True)
def _release_pins(rows: Rows, slots: Slots, reserved: bool) -> int:
    """Remove one pin from a slot for each time it is named, or none from any if one of them has too few.

    `reserved` says whether all must be reservations or none may be one. Returns -1, or the position in `slots` of the
    first one that has no such pin or does not exist.
    """
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        exists = 0 <= slot < len(rows)
        if not exists or not rows[slot].pins or (rows[slot].state in (PENDING, ORPHANED)) != reserved:
            for unpinned in slots[:i]:
                rows[unpinned].pins += 1
            return i
        rows[slot].pins -= 1
    return -1


@njit(cache=True, forceinline=True)
def _copy_extent(rows: Rows, slot: int, results: Results, i: int) -> None:
    results[0, i], results[1, i], results[2, i] = rows[slot].offset, rows[slot].nbytes, np.int64(rows[slot].digest)
    results[3, i] = rows[slot].form


# Reads.


@njit(cache=True)
def prefix_length(rows: Rows, buckets: Buckets, keys: Keys) -> int:
    for i in range(len(keys)):
        slot = _find(rows, buckets, keys, i)
        if slot < 0 or rows[slot].state != COMMITTED:
            return i
    return len(keys)


@njit(cache=True)
def contains_mask(rows: Rows, buckets: Buckets, keys: Keys) -> NDArray[np.bool_]:
    mask = np.empty(len(keys), np.bool_)
    for i in range(len(keys)):
        slot = _find(rows, buckets, keys, i)
        mask[i] = slot >= 0 and rows[slot].state == COMMITTED
    return mask


@njit(cache=True)
def states(rows: Rows, buckets: Buckets, keys: Keys) -> NDArray[np.uint8]:
    """For each key COMMITTED, PENDING, or 0 if it is neither."""
    found = np.zeros(len(keys), np.uint8)
    for i in range(len(keys)):
        slot = _find(rows, buckets, keys, i)
        if slot >= 0 and (rows[slot].state == COMMITTED or rows[slot].state == PENDING):
            found[i] = rows[slot].state
    return found


@njit(cache=True)
def miss_reason(rows: Rows, buckets: Buckets, keys: Keys, i: int) -> Any:
    slot = _find(rows, buckets, keys, i)
    if slot < 0:
        return _NEVER_STORED
    return np.int64(rows[slot].reason) if rows[slot].state == GHOST else _PENDING


@njit(cache=True)
def committed_slots(rows: Rows, buckets: Buckets, keys: Keys) -> Slots:
    """Return the slots of the committed blocks among `keys`, in the order of the keys."""
    slots = np.empty(len(keys), np.int64)
    length = 0
    for i in range(len(keys)):
        slot = _find(rows, buckets, keys, i)
        if slot >= 0 and rows[slot].state == COMMITTED:
            slots[length] = slot
            length += 1
    return slots[:length]


# Changes. A step writes its results into the rows of an array that the caller made, with one column per key or slot:
# this is cheaper than returning several arrays from compiled code. Idle slots are slots that were parked and have no
# reservation or pin any more: the caller puts them back into the eviction order.

RESERVE_SLOTS, RESERVE_STATES, RESERVE_OWNED, RESERVE_CHAIN, RESERVE_EVICTED = range(5)
PIN_SLOTS, PIN_REASONS, PIN_HITS, PIN_OFFSETS, PIN_NBYTES, PIN_DIGESTS, PIN_FORMS = range(7)


@njit(cache=True)
def reserve(
    rows: Rows, buckets: Buckets, ring: NDArray[np.int32], totals: Totals, keys: Keys, form: int, results: Results
) -> tuple[int, int]:
    """Reserve the blocks that are neither committed nor reserved. Their form is `form`, until `commit` says it.

    A ghost becomes a reservation in the same slot, so a policy recognises a block that it evicted by its slot.

    Writes, by row of `results`:
        RESERVE_SLOTS: for each key the slot that the call owns, or -1.
        RESERVE_STATES: for each key RESERVED, STORED or BUSY.
        RESERVE_OWNED: the slots that the call owns.
        RESERVE_CHAIN: the slots to insert into the eviction order.
        RESERVE_EVICTED: 1 where a slot of RESERVE_CHAIN was the ghost of an evicted block, else 0.

    Returns the number of slots that the call owns, and the length of the chain.
    """
    owned = length = 0
    for i in range(len(keys)):  # a loop of look-ups alone, so that the memory accesses of many keys overlap
        results[RESERVE_SLOTS, i] = _find(rows, buckets, keys, i)
    for i in range(len(keys)):
        slot = results[RESERVE_SLOTS, i]
        results[RESERVE_SLOTS, i] = -1
        if slot < 0:
            slot = _find(rows, buckets, keys, i)  # once more: an earlier position may have added the same key
        if slot < 0:
            slot = _add(rows, buckets, totals, keys, i)
        state = rows[slot].state
        if state == COMMITTED:
            results[RESERVE_STATES, i] = STORED
        elif state in (PENDING, ORPHANED):
            results[RESERVE_STATES, i] = BUSY
        else:
            results[RESERVE_STATES, i] = RESERVED
            results[RESERVE_SLOTS, i] = results[RESERVE_OWNED, owned] = slot
            owned += 1
            rows[slot].state, rows[slot].pins = PENDING, 1
            rows[slot].form, rows[slot].nbytes = form, 0
            totals[PENDING_BLOCKS] += 1
        if state != ORPHANED and not rows[slot].parked:
            results[RESERVE_CHAIN, length] = slot
            results[RESERVE_EVICTED, length] = state == GHOST and rows[slot].reason == _EVICTED
            length += 1
    return owned, length


@njit(cache=True)
def commit(
    rows: Rows,
    buckets: Buckets,
    ring: NDArray[np.int32],
    totals: Totals,
    slots: Slots,
    offsets: Offsets,
    nbytes: NDArray[np.int64],
    digests: NDArray[np.uint64],
    forms: NDArray[np.uint8],
    results: Results,
) -> tuple[int, int, int]:
    """Make reserved blocks visible. `nbytes` and `forms` are `[n]`, or `[1]` if all blocks have the same.

    Writes, by row of `results`: offsets of orphaned reservations, idle slots.

    Returns the position of a slot that is not reserved or -1, the number of offsets, the number of idle slots.
    """
    failed = _release_pins(rows, slots, True)
    num_orphaned = num_idle = 0
    for i in range(len(slots) if failed < 0 else 0):
        slot = np.int64(slots[i])
        totals[PENDING_BLOCKS] -= 1
        if rows[slot].state == ORPHANED:
            results[0, num_orphaned] = offsets[i]
            num_orphaned += 1
            _remove(rows, buckets, totals, slot)
            continue
        rows[slot].state, rows[slot].ring_at = COMMITTED, -1
        rows[slot].offset, rows[slot].digest = offsets[i], digests[i]
        rows[slot].nbytes = nbytes[i if len(nbytes) > 1 else 0]
        rows[slot].form = forms[i if len(forms) > 1 else 0]
        totals[COMMITTED_BLOCKS] += 1
        totals[COMMITTED_BYTES] += rows[slot].nbytes
        if rows[slot].parked:
            rows[slot].parked = 0
            results[1, num_idle] = slot
            num_idle += 1
    return failed, num_orphaned, num_idle


@njit(cache=True)
def abort(rows: Rows, buckets: Buckets, ring: NDArray[np.int32], totals: Totals, slots: Slots, reason: int) -> Any:
    """Give reservations up. `reason` is a position in MISS_REASONS, or -1 to keep the reason of an earlier ghost.

    Returns the position of a slot that is not reserved, or -1.
    """
    failed = _release_pins(rows, slots, True)
    for i in range(len(slots) if failed < 0 else 0):
        slot = np.int64(slots[i])
        totals[PENDING_BLOCKS] -= 1
        rows[slot].parked = 0
        if rows[slot].state == PENDING and reason >= 0:
            _remember(rows, buckets, ring, totals, slot, reason)
        elif rows[slot].state == PENDING and rows[slot].ring_at >= 0:
            rows[slot].state = GHOST
        else:
            _remove(rows, buckets, totals, slot)
    return failed


@njit(cache=True)
def pin(rows: Rows, buckets: Buckets, keys: Keys, results: Results) -> int:
    """Pin the committed blocks.

    Writes, by row of `results`:
        PIN_SLOTS: for each key its slot, or -1 for a miss.
        PIN_REASONS: for each key why it is a miss, as a position in MISS_REASONS.
        PIN_HITS, PIN_OFFSETS, PIN_NBYTES, PIN_DIGESTS, PIN_FORMS: slot, offset, size, digest and form of each hit.

    Returns the number of hits.
    """
    hits = 0
    for i in range(len(keys)):
        slot = _find(rows, buckets, keys, i)
        results[PIN_SLOTS, i], results[PIN_REASONS, i] = -1, _NEVER_STORED
        if slot >= 0 and rows[slot].state == COMMITTED:
            rows[slot].pins += 1
            results[PIN_SLOTS, i] = results[PIN_HITS, hits] = slot
            _copy_extent(rows, slot, results[PIN_OFFSETS:], hits)
            hits += 1
        elif slot >= 0:
            results[PIN_REASONS, i] = rows[slot].reason if rows[slot].state == GHOST else _PENDING
    return hits


@njit(cache=True)
def unpin(rows: Rows, totals: Totals, slots: Slots, results: Results) -> tuple[int, int, int]:
    """Remove one pin from a slot for each time it is named.

    Writes, by row of `results`: offsets that are free now, idle slots.

    Returns the position of a slot that has no pin left or -1, the number of offsets, the number of idle slots.
    """
    failed = _release_pins(rows, slots, False)
    num_freed = num_idle = 0
    for i in range(len(slots) if failed < 0 else 0):
        slot = np.int64(slots[i])
        if rows[slot].pins:
            continue
        if rows[slot].state == DROPPED:
            results[0, num_freed] = rows[slot].offset
            num_freed += 1
            _release(rows, totals, slot)
        elif rows[slot].parked:
            rows[slot].parked = 0
            results[1, num_idle] = slot
            num_idle += 1
    return failed, num_freed, num_idle


@njit(cache=True)
def drop(
    rows: Rows, buckets: Buckets, ring: NDArray[np.int32], totals: Totals, slots: Slots, reason: int
) -> tuple[Offsets, Slots]:
    """Remove committed blocks. Returns the offsets that are free now, and the slots to take out of the eviction order.

    Slots that hold no committed block are ignored.
    """
    offsets, gone = np.empty(len(slots), np.int64), np.empty(len(slots), np.int64)
    num_offsets = num_gone = 0
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        if rows[slot].state != COMMITTED:
            continue
        gone[num_gone] = slot
        num_gone += 1
        if not rows[slot].pins:
            offsets[num_offsets] = rows[slot].offset
            num_offsets += 1
        _retire(rows, buckets, ring, totals, slot, reason)
    return offsets[:num_offsets], gone[:num_gone]


@njit(cache=True)
def orphan(rows: Rows, buckets: Buckets, totals: Totals, keys: Keys) -> Slots:
    """Orphan the reservations of these keys. Returns their slots, to take out of the eviction order."""
    slots = np.empty(len(keys), np.int64)
    length = 0
    for i in range(len(keys)):
        slot = np.int64(_find(rows, buckets, keys, i))
        if slot < 0 or rows[slot].state != PENDING:
            continue
        rows[slot].state = ORPHANED
        rows[slot].ring_at = -1
        rows[slot].parked = 0
        totals[REMOVED_BLOCKS] += 1
        slots[length] = slot
        length += 1
    return slots[:length]


@njit(cache=True)
def evict(
    rows: Rows,
    buckets: Buckets,
    ring: NDArray[np.int32],
    totals: Totals,
    slots: Slots,
    reason: int,
    results: Results,
    keys: Keys,
) -> int:
    """Remove the idle blocks among `slots`, and park the busy ones.

    Writes offset, size, digest and form of each removed block into the rows of `results`, and its key into `keys`.

    Returns the number of removed blocks.
    """
    length = 0
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        if rows[slot].pins:
            rows[slot].parked = 1
            continue
        _copy_extent(rows, slot, results, length)
        for word in range(4):
            keys[length, word] = rows[slot].key[word]
        length += 1
        _retire(rows, buckets, ring, totals, slot, reason)
    totals[EVICTED_BLOCKS] += length
    return length


@njit(cache=True)
def clear(rows: Rows, buckets: Buckets, totals: Totals) -> Offsets:
    """Remove all blocks and ghosts, and orphan all reservations. Returns the offsets that are free now."""
    offsets = np.empty(totals[COMMITTED_BLOCKS], np.int64)
    num_offsets = 0
    totals[REMOVED_BLOCKS] += totals[COMMITTED_BLOCKS] + totals[PENDING_BLOCKS]
    totals[COMMITTED_BLOCKS] = totals[COMMITTED_BYTES] = 0
    buckets[:] = 0
    for slot in range(totals[SLOTS_USED]):
        state = rows[slot].state
        rows[slot].ring_at = -1
        rows[slot].parked = 0
        if state in (PENDING, ORPHANED):
            rows[slot].state = ORPHANED
            _enter(rows, buckets, slot)
        elif state == COMMITTED and rows[slot].pins:
            rows[slot].state = DROPPED
        elif state in (COMMITTED, GHOST):
            if state == COMMITTED:
                offsets[num_offsets] = rows[slot].offset
                num_offsets += 1
            _release(rows, totals, slot)
    return offsets[:num_offsets]
