"""The cache index: which blocks are cached, by block hash, and where their bytes are."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError, EngineStateError, InvalidHashError
from kvortex.index import table as steps
from kvortex.index.keys import WORDS, as_packed, pack_keys
from kvortex.index.orders import EvictionOrders
from kvortex.index.policy import EvictionPolicy
from kvortex.index.table import MISS_REASONS
from kvortex.types import Forms, MissReason

Keys = NDArray[np.uint64]
Slots = NDArray[np.int64]
Offsets = NDArray[np.int64]

_EVICTED = MISS_REASONS.index(MissReason.EVICTED)
_NO_OFFSETS = np.empty(0, np.int64)
FORM_0 = np.zeros(1, np.uint8)


class Reservation:
    """The result of `reserve` for `n` keys.

    The state of a key is RESERVED (the caller must `commit` or `abort` the slot), STORED (the block is committed
    already) or BUSY (the block is reserved by another call, or at an earlier position of the same call).
    """

    __slots__ = ("_results", "num_owned")

    def __init__(self, results: steps.Results, num_owned: int) -> None:
        self._results = results
        self.num_owned = num_owned

    @property
    def slots(self) -> Slots:
        """Slot of each key, `int64 [n]`; -1 where the call does not own one."""
        slots: Slots = self._results[steps.RESERVE_SLOTS]
        return slots

    @property
    def states(self) -> NDArray[np.int64]:
        """State of each key, `int64 [n]`: RESERVED, STORED or BUSY."""
        states: NDArray[np.int64] = self._results[steps.RESERVE_STATES]
        return states

    @property
    def owned(self) -> Slots:
        """Slots that the call owns, `int64 [num_owned]`, in the order of the keys."""
        slots: Slots = self._results[steps.RESERVE_OWNED, : self.num_owned]
        return slots


class Pins:
    """The result of `pin` for `n` keys, of which `k` are hits. All arrays are in the order of the keys."""

    __slots__ = ("_results", "num_hits")

    def __init__(self, results: steps.Results, num_hits: int) -> None:
        self._results = results
        self.num_hits = num_hits

    def __len__(self) -> int:
        """Number of keys, `n`."""
        return len(self._results[0])

    @property
    def slots(self) -> Slots:
        """Slot of each key, `int64 [n]`; -1 for a miss."""
        slots: Slots = self._results[steps.PIN_SLOTS]
        return slots

    @property
    def reasons(self) -> NDArray[np.int64]:
        """Why each key is a miss, `int64 [n]`, as a position in MISS_REASONS; undefined for hits."""
        reasons: NDArray[np.int64] = self._results[steps.PIN_REASONS]
        return reasons

    @property
    def hits(self) -> Slots:
        """Slots of the hits, `int64 [k]`."""
        slots: Slots = self._results[steps.PIN_HITS, : self.num_hits]
        return slots

    @property
    def offsets(self) -> Offsets:
        """Offset of each hit's extent, `int64 [k]`."""
        return self._results[steps.PIN_OFFSETS, : self.num_hits]

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """Bytes of each hit's extent, `int64 [k]`."""
        return self._results[steps.PIN_NBYTES, : self.num_hits]

    @property
    def digests(self) -> NDArray[np.uint64]:
        """64-bit checksum of each hit, `uint64 [k]`."""
        return self._results[steps.PIN_DIGESTS, : self.num_hits].view(np.uint64)

    @property
    def forms(self) -> NDArray[np.int64]:
        """Form of each hit, `int64 [k]`."""
        return self._results[steps.PIN_FORMS, : self.num_hits]


class Evicted(NamedTuple):
    """The `n` blocks that an eviction has removed, coldest first."""

    offsets: Offsets  # int64 [n]
    keys: Keys  # uint64 [n, 4]
    nbytes: NDArray[np.int64]  # int64 [n], bytes of each extent
    digests: NDArray[np.uint64]  # uint64 [n], 64-bit checksums
    forms: NDArray[np.int64]  # int64 [n]


class CacheIndex:
    """The blocks of one namespace, by 32-byte block hash.

    A caller reserves a block, stores its bytes, and commits or aborts the reservation. A committed block is visible
    until it is evicted or dropped.

    An entry has a *slot*, a number that names it while it is reserved or pinned; later the slot may be used for
    another key. Keys are `uint64 [n, 4]` (see `pack_keys`), or `bytes` where a method says so. Slots are `int64 [n]`.
    An offset says where the block's bytes are; the index stores it and returns it, and never reads it.

    Methods that only read (`prefix_length`, `contains_mask`, `miss_reason`, `len` and the counters) take no lock and
    are safe from any thread: each is one compiled step under the GIL. All other methods take one lock. Methods that
    take several keys expect a prefix chain, root first. If such a method raises, it has changed nothing.

    A slot's states, and the methods that change them:

        free      --reserve-->       pending
        pending   --commit-->        committed
        pending   --abort-->         ghost if a reason is given or the slot was a ghost before, else free
        pending   --clear, invalidate-->  orphaned   --commit, abort-->  free
        committed --pin, unpin-->    committed, with a count of pins
        committed --evict, drop, invalidate-->  ghost, if it is not pinned
        committed --clear-->         free, if it is not pinned
        committed --drop, clear-->   dropped, if it is pinned; `drop` puts a ghost in another slot
        dropped   --last unpin-->    free
        ghost     --reserve-->       pending, in the same slot
        ghost     --ring is full, clear-->  free

    A *ghost* is not a block any more: the slot keeps the key and the reason why the block is gone. A *dropped* block
    cannot be found, but a reader still has it pinned. An *orphaned* reservation was made before a `clear`, or before
    its block was invalidated: its commit does not make the block visible and returns the offset.

    The methods `commit`, `unpin`, `drop`, `invalidate`, `evict` and `clear` return offsets. The caller then owns the
    extents at these offsets and must free them. Each offset is returned exactly once.

    A chain gets its place in the eviction order when it is reserved, not when its batches are committed one by one:
    otherwise the tail of a long save would be more recent than its head. So the policy holds reserved slots too. If an
    eviction meets a reserved or pinned slot, the slot is taken out of the order until it is idle again; so an eviction
    meets each busy slot once per use, not again and again.

    An entry takes about 90 to 120 bytes of resident memory with the LRU policy, and 40 more with the others.

    Args:
        policy: an empty policy, which gives the eviction order. Only the index may use it from now on.
        ghost_entries: maximum number of ghosts, that is of removed blocks whose reason is kept.
        expected_entries: number of blocks and ghosts to allocate for; the index doubles when it is full.

    Raises:
        ConfigError: `ghost_entries` is negative, or `expected_entries` is below 1.
    """

    def __init__(self, policy: EvictionPolicy, *, ghost_entries: int = 65536, expected_entries: int = 1024) -> None:
        if ghost_entries < 0:
            raise ConfigError(f"ghost_entries must be at least 0, not {ghost_entries}")
        if expected_entries < 1:
            raise ConfigError(f"expected_entries must be at least 1, not {expected_entries}")
        self._policy = policy
        self._orders: EvictionOrders | None = None  # is the policy from the first `rank` on
        self._lock = threading.Lock()
        self._table = steps.new_table(expected_entries, ghost_entries)
        self._results = np.empty((2, 64), np.int64)
        policy.resize(self._table.capacity)

    # Reads. They need no lock: each reads `self._table` once, and a table that was replaced does not change any more.

    def __len__(self) -> int:
        """Number of committed blocks."""
        return int(self._table.totals[steps.COMMITTED_BLOCKS])

    @property
    def num_pending(self) -> int:
        """Number of reservations that are neither committed nor aborted, orphaned ones included."""
        return int(self._table.totals[steps.PENDING_BLOCKS])

    @property
    def committed_bytes(self) -> int:
        """Bytes of all committed blocks. A dropped block does not count, even while it is pinned."""
        return int(self._table.totals[steps.COMMITTED_BYTES])

    @property
    def evicted_blocks(self) -> int:
        """Number of blocks that `evict` has removed since the index was made."""
        return int(self._table.totals[steps.EVICTED_BLOCKS])

    @property
    def removed_blocks(self) -> int:
        """Number of blocks removed since the index was made, for any reason. A `clear` counts reservations as well."""
        return int(self._table.totals[steps.REMOVED_BLOCKS])

    def prefix_length(self, keys: Sequence[bytes] | Keys) -> int:
        """Count the committed blocks before the first block that is not committed.

        Args:
            keys: keys of a chain, root first: `uint64 [n, 4]` or a sequence of `bytes`.

        Raises:
            InvalidHashError: a key is not 32 bytes.
        """
        return int(steps.prefix_length(*self._table[:2], as_packed(keys)))

    def leading(self, keys: Keys) -> tuple[int, MissReason | None]:
        """`prefix_length`, and why the block behind it is a miss; None if there is none behind it.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`.
        """
        length = self.prefix_length(keys)
        return length, self.miss_reason(keys[length].tobytes()) if length < len(keys) else None

    def contains_mask(self, keys: Sequence[bytes] | Keys) -> NDArray[np.bool_]:
        """Return `bool [n]`, True where the block is committed.

        Args:
            keys: `uint64 [n, 4]` or a sequence of `bytes`.

        Raises:
            InvalidHashError: a key is not 32 bytes.
        """
        mask: NDArray[np.bool_] = steps.contains_mask(*self._table[:2], as_packed(keys))
        return mask

    def states(self, keys: Keys) -> NDArray[np.uint8]:
        """For each key COMMITTED if it can be loaded, PENDING if it is being stored, or 0, `uint8 [n]`.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`.
        """
        found: NDArray[np.uint8] = steps.states(*self._table[:2], as_packed(keys))
        return found

    def keys_of(self, slots: Slots) -> Keys:
        """Keys of blocks that are stored, reserved or pinned, `uint64 [n, 4]`, from their slots, `int64 [n]`."""
        keys: Keys = self._table.rows["key"][slots]
        return keys

    def miss_reason(self, key: bytes) -> MissReason:
        """Return why a look-up of `key` missed. PENDING if the block was committed in the meantime.

        Raises:
            InvalidHashError: the key is not 32 bytes.
        """
        return MISS_REASONS[steps.miss_reason(*self._table[:2], pack_keys([key]), 0)]

    # Changes.

    def reserve(self, keys: Keys, form: int = 0) -> Reservation:
        """Reserve the blocks that are neither committed nor reserved. All blocks count as accessed.

        Args:
            keys: keys of a chain, `uint64 [n, 4]`.
            form: a form of the cache that the blocks belong to; it tells their priority, see `rank`.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is reserved.
        """
        keys = as_packed(keys)
        results = np.empty((5, len(keys)), np.int64)
        with self._lock:
            self._make_room(len(keys))
            owned, length = steps.reserve(*self._table, keys, form, results)
            if self._orders is not None:
                self._orders.assign(results[steps.RESERVE_OWNED, :owned], form)
            self._policy.insert(results[steps.RESERVE_CHAIN, :length], results[steps.RESERVE_EVICTED, :length])
        return Reservation(results, owned)

    def commit(
        self,
        slots: Slots,
        offsets: Offsets,
        nbytes: int | NDArray[np.int64],
        digests: NDArray[np.uint64],
        forms: Forms = FORM_0,
    ) -> Offsets:
        """Make reserved blocks visible.

        Args:
            slots: reserved slots that the caller owns, `int64 [n]`.
            offsets: offset of each block's extent, `int64 [n]`.
            nbytes: bytes of each extent, `int64 [n]`, or one size for all.
            digests: 64-bit checksum of each block, `uint64 [n]`.
            forms: what the bytes of each block are, `uint8 [n]`, or one form for all, `uint8 [1]`. The index stores the
                numbers and returns them.

        Returns:
            Offsets of the blocks that did not become visible because of a `clear` or `invalidate` after their
            reservation; usually none.

        Raises:
            EngineStateError: a slot is not reserved, or is named twice; nothing is committed.
            InvalidHashError: the arrays differ in length; nothing is committed.
        """
        sizes = nbytes if isinstance(nbytes, np.ndarray) else np.array([nbytes])
        count = len(slots)
        if not (count == len(offsets) == len(digests) and len(sizes) in (1, count) and len(forms) in (1, count)):
            lengths = [len(column) for column in (slots, offsets, sizes, digests, forms)]
            raise InvalidHashError(f"slots, offsets, nbytes, digests and forms differ in length: {lengths}")
        with self._lock:
            results = self._scratch(count)
            failed, orphaned, idle = steps.commit(*self._table, slots, offsets, sizes, digests, forms, results)
            _raise_if(failed, slots, "is not reserved, or named twice")
            self._policy.weigh(slots, sizes)
            return self._freed(orphaned, idle)

    def abort(self, slots: Slots, reason: MissReason | None) -> None:
        """Give reservations up.

        Args:
            slots: reserved slots that the caller owns, `int64 [n]`.
            reason: reason of later misses of these blocks; None keeps the reason from before the reservation.

        Raises:
            EngineStateError: a slot is not reserved, or is named twice; nothing is aborted.
        """
        with self._lock:
            failed = steps.abort(*self._table, slots, -1 if reason is None else MISS_REASONS.index(reason))
            _raise_if(failed, slots, "is not reserved, or named twice")
            self._policy.remove(slots)

    def pin(self, keys: Keys) -> Pins:
        """Pin committed blocks, so that their bytes stay in place. Hits count as accessed.

        A key that is named twice is pinned twice.

        Returns:
            The pinned slots, each of which needs one `unpin`, and the reasons of the misses.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is pinned.
        """
        keys = as_packed(keys)
        with self._lock:
            pins = self._pin(keys)
            self._policy.access(pins.hits)
        return pins

    def hold(self, keys: Keys) -> Pins:
        """Pin committed blocks like `pin`, but without counting an access: for the cache's own reads.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is pinned.
        """
        with self._lock:
            return self._pin(as_packed(keys))

    def touch(self, keys: Keys) -> None:
        """Count committed blocks as accessed.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`.
        """
        keys = as_packed(keys)
        with self._lock:
            self._policy.access(steps.committed_slots(*self._table[:2], keys))

    def unpin(self, slots: Slots) -> Offsets:
        """Remove one pin from a slot for each time it is named.

        Returns:
            Offsets that are free now: of dropped blocks that lost their last pin.

        Raises:
            EngineStateError: a slot has no pin left; no pin is removed.
        """
        with self._lock:
            failed, freed, idle = steps.unpin(self._table.rows, self._table.totals, slots, self._scratch(len(slots)))
            _raise_if(failed, slots, "is not pinned")
            return self._freed(freed, idle)

    def drop(self, slots: Slots, reason: MissReason) -> Offsets:
        """Remove committed blocks at once, pinned or not. Slots that hold no committed block are ignored.

        Args:
            slots: slots that the caller has pinned, `int64 [n]`. Without a pin a slot may name another block by now.
            reason: reason of later misses of these blocks.

        Returns:
            Offsets that are free now. The last `unpin` of a pinned block returns its offset.
        """
        with self._lock:
            return self._drop(slots, reason)

    def drop_keys(self, keys: Keys, reason: MissReason) -> Offsets:
        """Remove blocks by their keys, like `drop`. Keys that are not committed are ignored.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is removed.
        """
        keys = as_packed(keys)
        with self._lock:
            return self._drop(steps.committed_slots(*self._table[:2], keys), reason)

    def invalidate(self, keys: Keys) -> Offsets:
        """Remove blocks by their keys, and orphan their reservations, so that what is being stored is not seen either.

        Returns:
            Offsets that are free now. The last `unpin` of a pinned block returns its offset, and the commit of an
            orphaned reservation the one that it was given.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is removed.
        """
        keys = as_packed(keys)
        with self._lock:
            self._policy.remove(steps.orphan(self._table.rows, self._table.buckets, self._table.totals, keys))
            return self._drop(steps.committed_slots(*self._table[:2], keys), MissReason.INVALIDATED)

    def drop_beyond(self, end: int, reason: MissReason) -> Offsets:
        """Remove every committed block whose extent ends after offset `end`, like `drop`."""
        with self._lock:
            rows = self._table.rows[: self._table.totals[steps.SLOTS_USED]]
            beyond = (rows["state"] == steps.COMMITTED) & (rows["offset"] + rows["nbytes"] > end)
            return self._drop(np.flatnonzero(beyond), reason)

    def drop_forms(self, first: int, stop: int, reason: MissReason) -> Offsets:
        """Remove every committed block whose form is in `[first, stop)`, like `drop`."""
        with self._lock:
            rows = self._table.rows[: self._table.totals[steps.SLOTS_USED]]
            meant = (rows["state"] == steps.COMMITTED) & (rows["form"] >= first) & (rows["form"] < stop)
            return self._drop(np.flatnonzero(meant), reason)

    def rank(self, forms: range, *, priority: int, is_bounded: bool) -> None:
        """Rank the blocks of a cache: those that are there, and those that come.

        Args:
            forms: the forms of its blocks.
            priority: blocks of a lower priority are evicted first; 0 for all caches of which nothing was said.
            is_bounded: whether `evict_of` may be asked for its blocks. Once true it stays so.
        """
        with self._lock:
            if self._orders is None:
                self._policy = self._orders = EvictionOrders(self._policy, self._table.capacity)
            rows = self._table.rows
            used = rows[: self._table.totals[steps.SLOTS_USED]]
            is_live = (used["state"] == steps.COMMITTED) | (used["state"] == steps.PENDING)
            live = np.flatnonzero(is_live & (used["form"] >= forms.start) & (used["form"] < forms.stop))
            self._orders.rank(forms, live, rows["nbytes"], rows["pins"], priority=priority, is_bounded=is_bounded)

    def evict(self, nbytes: int) -> Evicted:
        """Remove the coldest idle blocks until `nbytes` are free, or no idle block is left.

        As long as there are idle blocks of a lower priority, none of a higher one is removed. The cost is amortised
        O(1) per removed block, however many blocks are pinned.
        """
        with self._lock:
            rows = self._table.rows
            return self._evict(self._policy.pop_coldest(nbytes, rows["nbytes"], rows["pins"]))

    def evict_of(self, form: int, nbytes: int) -> Evicted:
        """`evict`, of the blocks of one cache, which `rank` has called bounded. `form` is one of theirs."""
        assert self._orders is not None
        with self._lock:
            rows = self._table.rows
            return self._evict(self._orders.pop_coldest_of(form, nbytes, rows["nbytes"], rows["pins"]))

    def _evict(self, coldest: Slots) -> Evicted:
        results, keys = np.empty((4, len(coldest)), np.int64), np.empty((len(coldest), WORDS), np.uint64)
        count = steps.evict(*self._table, coldest, _EVICTED, results, keys)
        offsets, sizes, digests, forms = results[:, :count]
        return Evicted(offsets, keys[:count], sizes, digests.view(np.uint64), forms)

    def clear(self) -> Offsets:
        """Remove every block and every ghost.

        The last `unpin` of a pinned block returns its offset. Reservations become orphaned: their owners commit or
        abort them as usual, but `commit` returns the offset and does not make the block visible. Until then the key
        stays PENDING.

        Returns:
            Offsets that are free now.
        """
        with self._lock:
            self._policy.remove(np.arange(self._table.totals[steps.SLOTS_USED], dtype=np.int64))
            freed: Offsets = steps.clear(self._table.rows, self._table.buckets, self._table.totals)
        return freed

    # The caller of the methods below holds the lock.

    def _pin(self, keys: Keys) -> Pins:
        results = np.empty((7, len(keys)), np.int64)
        return Pins(results, steps.pin(*self._table[:2], keys, results))

    def _scratch(self, count: int) -> steps.Results:
        """Return an array for offsets and idle slots, `[2, >= count]`; it is reused, since most calls have none."""
        if count > self._results.shape[1]:
            self._results = np.empty((2, 2 * count), np.int64)
        return self._results

    def _freed(self, num_offsets: int, num_idle: int) -> Offsets:
        """Insert the idle slots of the scratch array into the eviction order, and return its offsets."""
        if num_idle:
            idle = self._results[1, :num_idle]
            self._policy.insert(idle)
            if self._orders is not None:  # an order to which their cache has moved meanwhile does not know their sizes
                self._orders.weigh(idle, self._table.rows["nbytes"][idle])
        return self._results[0, :num_offsets].copy() if num_offsets else _NO_OFFSETS

    def _drop(self, slots: Slots, reason: MissReason) -> Offsets:
        # A pinned block keeps its slot, so its ghost needs another one.
        self._make_room(int(np.count_nonzero(self._table.rows["pins"][slots])))
        freed: Offsets
        freed, gone = steps.drop(*self._table, slots, MISS_REASONS.index(reason))
        self._policy.remove(gone)
        return freed

    def _make_room(self, count: int) -> None:
        if self._table.room < count:
            self._table = steps.grown(self._table, self._table.capacity - self._table.room + count)
            self._policy.resize(self._table.capacity)


def _raise_if(failed: int, slots: Slots, what: str) -> None:
    if failed >= 0:
        raise EngineStateError(f"slot {slots[failed]} {what}")
