"""What is cached and where: entries by block hash, from reservation to eviction."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError, EngineStateError, InvalidHashError
from kvortex.index import table as steps
from kvortex.index.keys import WORDS, as_packed, pack_keys
from kvortex.index.policy import EvictionPolicy
from kvortex.index.table import MISS_REASONS
from kvortex.types import MissReason

Keys = NDArray[np.uint64]
Slots = NDArray[np.int64]
Offsets = NDArray[np.int64]

_EVICTED = MISS_REASONS.index(MissReason.EVICTED)
_NO_OFFSETS = np.empty(0, np.int64)


class Reservation:
    """The outcome of a `reserve` of `n` keys.

    A state is RESERVED (the call must `commit` or `abort` the slot), STORED (committed already) or BUSY (reserved
    by someone else, or at an earlier position of the call).
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
        """RESERVED, STORED or BUSY for each key, `int64 [n]`."""
        states: NDArray[np.int64] = self._results[steps.RESERVE_STATES]
        return states

    @property
    def owned(self) -> Slots:
        """Slots `int64 [num_owned]` that the call owns, in order."""
        slots: Slots = self._results[steps.RESERVE_OWNED, : self.num_owned]
        return slots


class Pins:
    """The outcome of a `pin` of `n` keys, of which `k` are hits. Everything is in the order of the keys."""

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
        """Why each key is a miss, `int64 [n]`, as positions in MISS_REASONS; without meaning for hits."""
        reasons: NDArray[np.int64] = self._results[steps.PIN_REASONS]
        return reasons

    @property
    def hits(self) -> Slots:
        """Slots of the hits, `int64 [k]`."""
        slots: Slots = self._results[steps.PIN_HITS, : self.num_hits]
        return slots

    @property
    def offsets(self) -> Offsets:
        """Where the blocks of the hits lie, `int64 [k]`."""
        return self._results[steps.PIN_OFFSETS, : self.num_hits]

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """Bytes of the hits' extents, `int64 [k]`."""
        return self._results[steps.PIN_NBYTES, : self.num_hits]

    @property
    def digests(self) -> NDArray[np.uint64]:
        """64-bit checksums of the hits, `uint64 [k]`."""
        return self._results[steps.PIN_DIGESTS, : self.num_hits].view(np.uint64)


class Evicted(NamedTuple):
    """Blocks that are gone: offsets `int64 [n]`, keys `uint64 [n, 4]`, sizes `int64 [n]`, digests `uint64 [n]`."""

    offsets: Offsets
    keys: Keys
    nbytes: NDArray[np.int64]
    digests: NDArray[np.uint64]


class CacheIndex:
    """Entries of one namespace by 32-byte block hash: reserved -> committed -> gone, or reserved -> aborted.

    An entry has a *slot*, a number that names it while it is reserved or pinned; after that the slot may be used
    for another key. Keys come as `uint64 [n, 4]` (see `pack_keys`), or as `bytes` where that is said, slots as
    `int64 [n]`. An offset says where a block lies; the index only hands it back.

    Reads (`prefix_length`, `contains_mask`, `miss_reason`, `len`, figures) take no lock and are safe from any
    thread: each is one compiled step under the GIL. All else takes one lock. Methods that take several keys expect
    a prefix chain, root first, and do all of it or nothing.

    A slot's states, and the methods that change them:

        free      --reserve-->       pending
        pending   --commit-->        committed
        pending   --abort-->         ghost, if a reason is given or the slot was one before; else free
        pending   --clear-->         orphaned   --commit, abort-->  free
        committed --pin, unpin-->    committed, with a count of pins
        committed --evict, drop-->   ghost, if it is not pinned
        committed --drop, clear-->   dropped, if it is   --last unpin-->  free; the ghost is in another slot
        ghost     --reserve-->       pending, in the same slot
        ghost     --ring is full-->  free

    A *ghost* is no block any more: the slot remembers the key and why it went. A *dropped* block cannot be found, and
    its memory is still being read. An *orphaned* reservation was cleared before its commit, which then gives the offset
    back.

    The caller that gets an offset back (from `commit`, `unpin`, `drop`, `evict` or `clear`) owns it and must free it;
    each offset comes back exactly once.

    A chain's place in the eviction order is set when it is reserved, not when its batches are committed one by
    one: otherwise a long save would leave its tail more recent than its head. The policy therefore also holds
    reserved slots. An eviction that meets a reserved or pinned slot takes it out of the order until it is idle
    again, so each is met once per use and not at every eviction.

    An entry costs about 90 to 120 bytes of resident memory, the LRU order included; the other policies take 40 more.

    Args:
        policy: eviction order; the index becomes its only user.
        ghost_entries: how many of the last removals to remember the reason of.
        expected_entries: how many blocks and remembered reasons to make room for now; the index grows beyond, by
            doubling.

    Raises:
        ConfigError: `ghost_entries` is negative, or `expected_entries` is below 1.
    """

    def __init__(self, policy: EvictionPolicy, *, ghost_entries: int = 65536, expected_entries: int = 1024) -> None:
        if ghost_entries < 0:
            raise ConfigError(f"ghost_entries must be at least 0, not {ghost_entries}")
        if expected_entries < 1:
            raise ConfigError(f"expected_entries must be at least 1, not {expected_entries}")
        self._policy = policy
        self._lock = threading.Lock()
        self._table = steps.new_table(expected_entries, ghost_entries)
        self._results = np.empty((2, 64), np.int64)
        policy.resize(self._table.capacity)

    # Reads. No lock: each takes one look at `self._table`, and a table that was replaced no longer changes.

    def __len__(self) -> int:
        """Number of committed blocks."""
        return int(self._table.totals[steps.COMMITTED_BLOCKS])

    @property
    def num_pending(self) -> int:
        """Reservations that are neither committed nor aborted, orphaned ones included."""
        return int(self._table.totals[steps.PENDING_BLOCKS])

    @property
    def committed_bytes(self) -> int:
        """Bytes of all committed blocks; a dropped block no longer counts, even while it is pinned."""
        return int(self._table.totals[steps.COMMITTED_BYTES])

    @property
    def evicted_blocks(self) -> int:
        """Blocks that `evict` has removed since the start."""
        return int(self._table.totals[steps.EVICTED_BLOCKS])

    @property
    def removed_blocks(self) -> int:
        """Blocks that are gone since the start, for whatever reason; after a `clear` also what was reserved."""
        return int(self._table.totals[steps.REMOVED_BLOCKS])

    def prefix_length(self, keys: Sequence[bytes] | Keys) -> int:
        """Number of committed blocks before the first that is not. Keys may be `bytes`.

        Raises:
            InvalidHashError: a key is not 32 bytes.
        """
        return int(steps.prefix_length(*self._table[:2], as_packed(keys)))

    def contains_mask(self, keys: Sequence[bytes] | Keys) -> NDArray[np.bool_]:
        """`[len(keys)]` bool: True where the block is committed. Keys may be `bytes`.

        Raises:
            InvalidHashError: a key is not 32 bytes.
        """
        mask: NDArray[np.bool_] = steps.contains_mask(*self._table[:2], as_packed(keys))
        return mask

    def miss_reason(self, key: bytes) -> MissReason:
        """Why a look-up of `key` missed. PENDING if it was committed in the meantime.

        Raises:
            InvalidHashError: the key is not 32 bytes.
        """
        return MISS_REASONS[steps.miss_reason(*self._table[:2], pack_keys([key]), 0)]

    # Changes.

    def reserve(self, keys: Keys) -> Reservation:
        """Claim the blocks that are not there yet. All keys count as accessed.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is reserved.
        """
        keys = as_packed(keys)
        results = np.empty((5, len(keys)), np.int64)
        with self._lock:
            self._make_room(len(keys))
            owned, length = steps.reserve(*self._table, keys, results)
            self._policy.insert(results[steps.RESERVE_CHAIN, :length], results[steps.RESERVE_EVICTED, :length])
        return Reservation(results, owned)

    def commit(
        self, slots: Slots, offsets: Offsets, nbytes: int | NDArray[np.int64], digests: NDArray[np.uint64]
    ) -> Offsets:
        """Make reserved blocks visible.

        Args:
            slots: reservations that the caller owns, `int64 [n]`.
            offsets: `[n]`, where the blocks lie.
            nbytes: `[n]`, or one size for all.
            digests: `[n]` 64-bit checksums.

        Returns:
            Offsets that did not become visible because `clear` came in between; usually empty.

        Raises:
            EngineStateError: a slot is not reserved, or named twice; nothing is committed.
            InvalidHashError: the lists differ in length; nothing is committed.
        """
        sizes = nbytes if isinstance(nbytes, np.ndarray) else np.array([nbytes])
        if not len(slots) == len(offsets) == len(digests) or len(sizes) not in (1, len(slots)):
            raise InvalidHashError("slots, offsets, nbytes and digests differ in length")
        with self._lock:
            results = self._scratch(len(slots))
            failed, unseen, idle = steps.commit(*self._table, slots, offsets, sizes, digests, results)
            _raise_if(failed, slots, "is not reserved, or named twice")
            self._policy.weigh(slots, sizes)
            return self._freed(unseen, idle)

    def abort(self, slots: Slots, reason: MissReason | None) -> None:
        """Give reservations up, remembering `reason` (if any) for later misses.

        Raises:
            EngineStateError: a slot is not reserved, or named twice; nothing is aborted.
        """
        with self._lock:
            failed = steps.abort(*self._table, slots, -1 if reason is None else MISS_REASONS.index(reason))
            _raise_if(failed, slots, "is not reserved, or named twice")
            self._policy.remove(slots)

    def pin(self, keys: Keys) -> Pins:
        """Hold committed blocks in place; hits count as accessed. A key named twice is pinned twice.

        Returns:
            Slots to be given to `unpin` once per hit, and why the others missed.

        Raises:
            InvalidHashError: the keys are not `uint64 [n, 4]`; nothing is pinned.
        """
        keys = as_packed(keys)
        with self._lock:
            pins = self._pin(keys)
            self._policy.access(pins.hits)
        return pins

    def hold(self, keys: Keys) -> Pins:
        """`pin` for the cache's own purposes: it does not count as an access.

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
        """Let pinned blocks go, one pin per time named.

        Returns:
            Offsets that are free now: of blocks that were dropped while pinned.

        Raises:
            EngineStateError: a slot has no pin left; no pin is taken from any.
        """
        with self._lock:
            failed, freed, idle = steps.unpin(self._table.rows, self._table.totals, slots, self._scratch(len(slots)))
            _raise_if(failed, slots, "is not pinned")
            return self._freed(freed, idle)

    def drop(self, slots: Slots, reason: MissReason) -> Offsets:
        """Remove committed blocks from view at once, whether pinned or not; slots that hold none are ignored.

        Args:
            slots: blocks that the caller has pinned: only then do they still name the same blocks.
            reason: what later misses are told.

        Returns:
            Offsets that are free now; those of pinned blocks come back through their last `unpin`.
        """
        with self._lock:
            return self._drop(slots, reason)

    def drop_key(self, key: bytes, reason: MissReason) -> Offsets:
        """`drop` for one key; nothing happens if it is not committed.

        Raises:
            InvalidHashError: the key is not 32 bytes.
        """
        keys = pack_keys([key])
        with self._lock:
            return self._drop(steps.committed_slots(*self._table[:2], keys), reason)

    def drop_beyond(self, end: int, reason: MissReason) -> Offsets:
        """`drop` every committed block whose extent does not end at or before offset `end`."""
        with self._lock:
            rows = self._table.rows[: self._table.totals[steps.SLOTS_USED]]
            beyond = (rows["state"] == steps.COMMITTED) & (rows["offset"] + rows["nbytes"] > end)
            return self._drop(np.flatnonzero(beyond), reason)

    def evict(self, nbytes: int) -> Evicted:
        """Remove the coldest blocks that are not pinned until `nbytes` are free, or none is left.

        Returns:
            What they were, coldest first. Amortised O(1) per block, however many are pinned.
        """
        with self._lock:
            rows = self._table.rows
            coldest = self._policy.pop_coldest(nbytes, rows["nbytes"], rows["pins"])
            results, keys = np.empty((3, len(coldest)), np.int64), np.empty((len(coldest), WORDS), np.uint64)
            count = steps.evict(*self._table, coldest, _EVICTED, results, keys)
        offsets, sizes, digests = results[:, :count]
        return Evicted(offsets, keys[:count], sizes, digests.view(np.uint64))

    def clear(self) -> Offsets:
        """Forget every block, and every reason for a miss.

        Blocks that are pinned come back through `unpin`. Reservations become orphans: their owners commit or
        abort them as usual, but a commit hands the offset back instead of making it visible, and until then the
        key stays PENDING.

        Returns:
            Offsets that are free now.
        """
        with self._lock:
            self._policy.remove(np.arange(self._table.totals[steps.SLOTS_USED], dtype=np.int64))
            freed: Offsets = steps.clear(self._table.rows, self._table.buckets, self._table.totals)
        return freed

    # Below: the lock is held.

    def _pin(self, keys: Keys) -> Pins:
        results = np.empty((6, len(keys)), np.int64)
        return Pins(results, steps.pin(*self._table[:2], keys, results))

    def _scratch(self, count: int) -> steps.Results:
        """Two rows for offsets and slots, of which there seldom are any."""
        if count > self._results.shape[1]:
            self._results = np.empty((2, 2 * count), np.int64)
        return self._results

    def _freed(self, num_offsets: int, num_idle: int) -> Offsets:
        """Put idle slots back into the order; the offsets beside them in the scratch."""
        if num_idle:
            self._policy.insert(self._results[1, :num_idle])
        return self._results[0, :num_offsets].copy() if num_offsets else _NO_OFFSETS

    def _drop(self, slots: Slots, reason: MissReason) -> Offsets:
        # A pinned block keeps its slot, so that its ghost takes another.
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
