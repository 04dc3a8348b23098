"""What is cached and where: entries by block hash, from reservation to eviction."""

import operator
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic

import numpy as np
import numpy.typing as npt

from kvortex.errors import ConfigError, EngineStateError, InvalidHashError
from kvortex.index.entry import Entry, L, release_pins
from kvortex.index.policy import EvictionPolicy
from kvortex.types import BLOCK_HASH_BYTES, MissReason, SaveOutcome


class CacheIndex(Generic[L]):
    """Entries of one namespace by 32-byte block hash: reserved -> committed -> gone, or reserved -> aborted.

    Reads (`prefix_length`, `contains_mask`, `miss_reason`, `len`, figures) take no lock and are safe from any
    thread: they are plain look-ups in a dict that holds committed entries only. All else takes one lock.
    Methods that take several keys expect a prefix chain, root first, and do all of it or nothing.

    Whoever gets a location back (from `commit`, `unpin`, `drop`, `evict`, `clear`) owns it and frees it; each
    location comes back exactly once.

    A chain's place in the eviction order is set when it is reserved, not when its batches are committed one
    by one: otherwise a long save would leave its tail more recent than its head. The policy therefore also
    holds reserved keys. An eviction that meets a reserved or pinned key takes it out of the order until it is
    idle again, so each is met once per use and not at every eviction.

    Args:
        policy: eviction order; the index becomes its only user.
        ghost_entries: how many gone keys to remember the reason of.

    Raises:
        ConfigError: `ghost_entries` is negative.
    """

    def __init__(self, policy: EvictionPolicy, ghost_entries: int = 65536) -> None:
        if ghost_entries < 0:
            raise ConfigError(f"ghost_entries must be at least 0, not {ghost_entries}")
        self._policy = policy
        self._ghost_entries = ghost_entries
        self._lock = threading.Lock()
        self._committed: dict[bytes, Entry[L]] = {}
        self._pending: dict[bytes, bool] = {}  # reserved key -> orphaned by clear()
        self._parked: set[bytes] = set()  # reserved or pinned keys that an eviction took out of the order
        self._ghosts: OrderedDict[bytes, MissReason] = OrderedDict()
        self._committed_bytes = 0
        self._evicted_blocks = 0

    # Reads. No lock: each touches a dict once per key, and no dict is ever replaced.

    def __len__(self) -> int:
        """Number of committed blocks."""
        return len(self._committed)

    @property
    def num_pending(self) -> int:
        """Reservations that are neither committed nor aborted, orphaned ones included."""
        return len(self._pending)

    @property
    def committed_bytes(self) -> int:
        """Bytes of all committed blocks; a dropped block no longer counts, even while it is pinned."""
        return self._committed_bytes

    @property
    def evicted_blocks(self) -> int:
        """Blocks that `evict` has removed since the start."""
        return self._evicted_blocks

    def prefix_length(self, keys: Sequence[bytes]) -> int:
        """Number of committed blocks before the first that is not."""
        try:
            return operator.indexOf(map(self._committed.__contains__, keys), False)
        except ValueError:
            return len(keys)

    def contains_mask(self, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """`[len(keys)]` bool: True where the block is committed."""
        return np.fromiter(map(self._committed.__contains__, keys), dtype=np.bool_, count=len(keys))

    def miss_reason(self, key: bytes) -> MissReason:
        """Why a look-up of `key` missed. PENDING if it was committed in the meantime."""
        if key in self._pending or key in self._committed:
            return MissReason.PENDING
        return self._ghosts.get(key, MissReason.NEVER_STORED)

    def reserve(self, keys: Sequence[bytes]) -> list[SaveOutcome | None]:
        """Claim the blocks that are not there yet. All keys count as accessed.

        Returns:
            Per key: `None` if this call now owns the reservation and must `commit` or `abort` it,
            ALREADY_STORED, or PENDING (someone else, or an earlier position of this call, owns it).

        Raises:
            InvalidHashError: a key is not 32 bytes.
        """
        _check_keys(keys)
        committed, pending = self._committed, self._pending
        outcomes: list[SaveOutcome | None] = []
        with self._lock:
            for key in keys:
                if key in committed:
                    outcomes.append(SaveOutcome.ALREADY_STORED)
                elif key in pending:
                    outcomes.append(SaveOutcome.PENDING)
                else:
                    pending[key] = False
                    outcomes.append(None)
            self._policy.insert([key for key in keys if self._belongs_in_order(key)])
        return outcomes

    def commit(
        self, keys: Sequence[bytes], locations: Sequence[L], nbytes: Sequence[int], digests: Sequence[int]
    ) -> list[L]:
        """Make reserved blocks visible.

        Returns:
            Locations that did not become visible because `clear` came in between; usually empty.

        Raises:
            EngineStateError: a key is not reserved, or named twice; nothing is committed.
            InvalidHashError: the lists differ in length; nothing is committed.
        """
        if not len(keys) == len(locations) == len(nbytes) == len(digests):
            raise InvalidHashError("keys, locations, nbytes and digests differ in length")
        unused: list[L] = []
        with self._lock:
            self._check_reserved(keys)
            for key, location, size, digest in zip(keys, locations, nbytes, digests, strict=True):
                if self._pending[key]:
                    unused.append(location)
                else:
                    self._ghosts.pop(key, None)
                    self._committed[key] = Entry(key, location, size, digest)
                    self._committed_bytes += size
                del self._pending[key]  # after the entry: a reader finds the key in one of the two
            self._unpark(keys)
        return unused

    def abort(self, keys: Sequence[bytes], reason: MissReason | None) -> None:
        """Give reservations up, remembering `reason` (if any) for later misses.

        Raises:
            EngineStateError: a key is not reserved, or named twice; nothing is aborted.
        """
        with self._lock:
            self._check_reserved(keys)
            for key in keys:
                orphaned = self._pending[key]
                if reason is not None and not orphaned:
                    self._remember(key, reason)
                self._forget_order(key)
                del self._pending[key]

    def pin(self, keys: Sequence[bytes]) -> list[Entry[L] | MissReason]:
        """Hold committed blocks in place; hits count as accessed. A key named twice is pinned twice.

        Returns:
            Per key: the pinned entry, to be given to `unpin` once, or why there is none.
        """
        with self._lock:
            found: list[Entry[L] | MissReason] = []
            hits: list[bytes] = []
            for key in keys:
                entry = self._committed.get(key)
                if entry is None:
                    found.append(self.miss_reason(key))
                else:
                    entry.pins += 1
                    hits.append(key)
                    found.append(entry)
            self._policy.access(hits)
            return found

    def unpin(self, entries: Sequence[Entry[L]]) -> list[L]:
        """Let pinned entries go, one pin per time named.

        Returns:
            Locations that are free now: of entries that were dropped while pinned.

        Raises:
            EngineStateError: an entry has no pin left; no pin is taken from any.
        """
        with self._lock:
            idle = release_pins(entries)
            self._unpark([entry.key for entry in idle if not entry.dropped])
            return [entry.location for entry in idle if entry.dropped]

    def drop(self, key: bytes, reason: MissReason, expected: Entry[L] | None = None) -> L | None:
        """Remove a committed block from view at once, whether pinned or not.

        Args:
            key: block hash; nothing happens if it is not committed.
            reason: what later misses are told.
            expected: drop only if this very entry is still the current one, not one stored since.

        Returns:
            The location if it is free now; `None` if nothing was dropped, or if the entry is pinned and its
            location comes back through the last `unpin`.
        """
        with self._lock:
            entry = self._committed.get(key)
            if entry is None or (expected is not None and entry is not expected):
                return None
            self._remove(entry, reason)
            return None if entry.pins else entry.location

    def evict(self, nbytes: int) -> list[L]:
        """Remove the coldest blocks that are not pinned until `nbytes` are free, or none is left.

        Returns:
            Their locations, coldest first. Amortised O(1) per block, however many are pinned.
        """
        with self._lock:
            victims, busy = self._choose_victims(nbytes)
            for key in busy:
                self._policy.remove(key)
            self._parked.update(busy)
            for entry in victims:
                self._remove(entry, MissReason.EVICTED)
            self._evicted_blocks += len(victims)
            return [entry.location for entry in victims]

    def clear(self) -> list[L]:
        """Forget every block, and every reason for a miss.

        Blocks that are pinned come back through `unpin`. Reservations become orphans: their owners commit or
        abort them as usual, but a commit hands the location back instead of making it visible, and until then
        the key stays PENDING.

        Returns:
            Locations that are free now.
        """
        with self._lock:
            entries = list(self._committed.values())
            self._committed.clear()
            self._committed_bytes = 0
            for entry in entries:
                entry.dropped = True
                self._forget_order(entry.key)
            for key in self._pending:
                self._pending[key] = True
                self._forget_order(key)
            self._ghosts.clear()
            return [entry.location for entry in entries if not entry.pins]

    # Below: the lock is held.

    def _choose_victims(self, nbytes: int) -> tuple[list[Entry[L]], list[bytes]]:
        """Coldest idle entries of at least `nbytes` together, and the busy keys met on the way."""
        victims: list[Entry[L]] = []
        busy: list[bytes] = []
        freed = 0
        order = self._policy.victims()
        while freed < nbytes and (key := next(order, None)) is not None:
            entry = self._committed.get(key)
            if entry is None or entry.pins:
                busy.append(key)
            else:
                victims.append(entry)
                freed += entry.nbytes
        return victims, busy

    def _remove(self, entry: Entry[L], reason: MissReason) -> None:
        self._remember(entry.key, reason)  # before the entry goes: a reader never finds neither
        del self._committed[entry.key]
        self._committed_bytes -= entry.nbytes
        entry.dropped = True
        self._forget_order(entry.key)

    def _remember(self, key: bytes, reason: MissReason) -> None:
        ghosts = self._ghosts
        ghosts[key] = reason
        ghosts.move_to_end(key)
        while len(ghosts) > self._ghost_entries:
            ghosts.popitem(last=False)

    def _belongs_in_order(self, key: bytes) -> bool:
        return key not in self._parked and not self._pending.get(key, False)

    def _forget_order(self, key: bytes) -> None:
        self._policy.remove(key)
        self._parked.discard(key)

    def _unpark(self, keys: Iterable[bytes]) -> None:
        """Put keys that have become idle back into the order."""
        if self._parked:
            back = [key for key in keys if key in self._parked]
            self._parked.difference_update(back)
            self._policy.insert(back)

    def _check_reserved(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if key not in self._pending:
                raise EngineStateError(f"block {key.hex()[:12]} is not reserved")
        if len(set(keys)) != len(keys):
            raise EngineStateError("a block is named twice in one call")


def _check_keys(keys: Sequence[bytes]) -> None:
    if set(map(type, keys)) - {bytes} or set(map(len, keys)) - {BLOCK_HASH_BYTES}:
        raise InvalidHashError(f"every key must be {BLOCK_HASH_BYTES} bytes")
