"""The index of a store: the blocks in it that this process knows of, and the order in which they are evicted.

It speaks of files, which may be objects as well.
"""

import contextlib
import heapq
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvortex.tiers.base import StoredBlock
from kvortex.tiers.uses import UseClock
from kvortex.types import BLOCK_HASH_BYTES


@dataclass(slots=True)
class IndexedBlock:
    """One file: its namespace's directory name, its length in bytes, and its last use, in seconds since the epoch."""

    namespace: str
    stored_bytes: int
    last_use_s: float
    touched_s: float = 0.0  # time of use that the file's own timestamp states
    scan: int = 0  # number of the last scan that saw it
    is_condemned: bool = False  # it takes room, but is no block: it is not offered, and written over


class Admission(Enum):
    """The answer of `StoreIndex.reserve`."""

    RESERVED = auto()
    STORED = auto()
    PENDING = auto()
    NO_SPACE = auto()


Victims = list[tuple[bytes, IndexedBlock]]

_STALE_FACTOR = 2
_STALE_SLACK = 64
"""The heap is built again when it has more entries than factor times the number of blocks, plus slack."""


class StoreIndex:
    """Key -> file, within `capacity_bytes`; evicts the least recently used. Thread-safe; look-ups take no lock.

    The writer of a block states the time at which it counts as used. The block evicts no blocks that were used after
    that time. So the head of a chain that is longer than the capacity stays.

    Blocks of other namespaces are in the index, too, because they share the capacity. Their keys have the digest of
    their namespace in front.

    A thread that changes a file owns its key during the change: from `reserve` to `commit` or `abort`; from `claim`, or
    from its choice as a victim, to `removed` or `put_back`. So index and directory agree, as far as this process is
    concerned. A file that was seen in the directory is added to the index a little later, when it may be gone again:
    `watching` collects the keys that were changed in between.

    Args:
        capacity_bytes: bytes that all files may take together.
        one_length: a file of another length than a block's own is written over: it cannot be that block.
    """

    def __init__(self, capacity_bytes: int, *, one_length: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self._one_length = one_length
        self.evicted_blocks = 0
        self._lock = threading.Lock()
        self._blocks: dict[bytes, IndexedBlock] = {}
        # Heap of (a time at or before the last use, tie-breaker, key, block). Entries of removed blocks are skipped.
        self._order: list[tuple[float, int, bytes, IndexedBlock]] = []
        self._numbers = itertools.count()
        self._uses = UseClock()
        self._owned: dict[bytes, int] = {}  # key -> bytes that are reserved for it
        self._written_s: dict[bytes, float] = {}  # reserved key -> time at which its block counts as used
        self._ignored: set[bytes] = set()
        self._watches: list[set[bytes]] = []
        self._used_bytes = 0
        self._scan = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> IndexedBlock | None:
        """The entry of a block, which may change; two calls that return the same object saw the same file."""
        return self._blocks.get(key)

    def blocks(self) -> list[tuple[bytes, IndexedBlock]]:
        """All known blocks, with their keys."""
        return list(self._blocks.items())

    @property
    def used_bytes(self) -> int:
        """Bytes of known files and of those that are being written."""
        return self._used_bytes

    def stored_bytes(self, keys: Sequence[bytes]) -> list[int]:
        """Length of each key's file in bytes, 0 if none is known that can be read."""
        if self._blocks.keys().isdisjoint(keys):
            return [0] * len(keys)
        found = map(self._blocks.get, keys)
        return [0 if block is None or block.is_condemned else block.stored_bytes for block in found]

    def coldest(self, nbytes: int) -> list[StoredBlock]:
        """The blocks that have to go before `nbytes` more have room, the least recently used first; all stay.

        Those of other namespaces are left out.
        """
        with self._lock:
            excess = self._used_bytes + nbytes - self.capacity_bytes
            found: Victims = []
            while excess > 0 and (oldest := self._oldest()) is not None:
                heapq.heappop(self._order)
                excess -= oldest[1].stored_bytes
                found.append(oldest)
            for key, block in found:
                heapq.heappush(self._order, (block.last_use_s, next(self._numbers), key, block))
        own = (item for item in found if len(item[0]) == BLOCK_HASH_BYTES)
        return [StoredBlock(key, block.stored_bytes, block.last_use_s) for key, block in own]

    # -- writing and removing --------------------------------------------------------------------------

    def reserve(self, key: bytes, nbytes: int, used_s: float | None = None) -> tuple[Admission, Victims]:
        """Reserve capacity for a new file.

        Args:
            key: the block's key.
            nbytes: length of the file.
            used_s: time at which it counts as used; None for now.

        Returns:
            The answer, and the victims whose files the caller has to remove.
        """
        with self._lock:
            used_s = self._uses.at(used_s)
            block = self._blocks.get(key)
            if block is not None and not self._is_written_over(block, nbytes):
                block.last_use_s = max(block.last_use_s, used_s)
                return Admission.STORED, []
            if key in self._owned:
                return Admission.PENDING, []
            if sum(self._owned.values()) + nbytes > self.capacity_bytes:
                return Admission.NO_SPACE, []
            self._pop(key)
            excess = self._used_bytes + nbytes - self.capacity_bytes
            victims = self._pop_oldest(excess, used_s)
            if victims is None:
                if block is not None:
                    self._put(key, block)
                return Admission.NO_SPACE, []
            self._owned[key] = nbytes
            self._written_s[key] = used_s
            self._used_bytes += nbytes
            return Admission.RESERVED, victims

    def last_use_of(self, key: bytes) -> float:
        """The time at which a file that is being written counts as used."""
        return self._written_s[key]

    def commit(self, key: bytes, namespace: str) -> None:
        """The reserved file is in its place."""
        with self._lock:
            nbytes, used_s = self._owned.pop(key), self._written_s.pop(key)
            self._used_bytes -= nbytes
            self._ignored.discard(key)
            self._tell_watches(key)
            self._put(key, IndexedBlock(namespace, nbytes, used_s, used_s))

    def abort(self, key: bytes) -> None:
        """The reserved file was not written."""
        with self._lock:
            self._used_bytes -= self._owned.pop(key)
            del self._written_s[key]

    def evict(self, nbytes: int, used_s: float | None = None) -> Victims:
        """Take out the least recently used blocks, of at least `nbytes` together, or all blocks.

        Args:
            nbytes: bytes to evict.
            used_s: if one of these blocks was used after this time, none is taken out.
        """
        with self._lock:
            return self._pop_oldest(nbytes, used_s) or []

    def claim(self, key: bytes) -> bool:
        """Own a key to remove its file, whether it is known or not; False while another thread owns it."""
        with self._lock:
            if key in self._owned:
                return False
            self._owned[key] = 0
            self._pop(key)
            return True

    def removed(self, key: bytes) -> None:
        """The file of an owned key is gone, or cannot be relied on."""
        with self._lock:
            del self._owned[key]
            self._tell_watches(key)

    def put_back(self, key: bytes, block: IndexedBlock, used_s: float | None = None) -> None:
        """A victim stays.

        Args:
            key: the block's key.
            block: its entry.
            used_s: time of its last use. None stands for now, so that a file that cannot be removed is not the next
                victim again.
        """
        with self._lock:
            del self._owned[key]
            self.evicted_blocks -= 1
            block.last_use_s = max(block.last_use_s, self._uses.now() if used_s is None else used_s)
            self._put(key, block)

    def discard(self, key: bytes, block: IndexedBlock | None) -> bool:
        """The file was not there: remove the entry `block`, unless the file has been written since. True if removed."""
        with self._lock:
            self._ignored.discard(key)
            if block is None or self._blocks.get(key) is not block:
                return False
            self._pop(key)
            return True

    def condemn(self, key: bytes, seen: IndexedBlock, changed: set[bytes]) -> None:
        """The file cannot be opened here: do not offer it, and have the next block of this key written over it.

        It stays in the order of eviction, because it takes room.

        Args:
            key: the block's key.
            seen: an entry for its file, in case that it is not known yet.
            changed: the set that `watching` collected around the read.
        """
        with self._lock:
            if key in self._owned or key in changed:
                return  # what was read is not there any more
            block = self._blocks.get(key)
            if block is None or block.stored_bytes != seen.stored_bytes:
                self._put(key, block := seen)
            block.is_condemned = True

    def ignore(self, key: bytes) -> None:
        """The file is not ours: do not index, count or evict it, even if a scan sees it."""
        with self._lock:
            self._ignored.add(key)
            self._pop(key)

    def ignores(self, key: bytes) -> bool:
        """Whether there is a file that is not ours, as far as is known."""
        return key in self._ignored

    def forget_beyond(self, count: int) -> None:
        """Forget the least recently used blocks if more than `count` are known; their files stay."""
        if len(self._blocks) <= count:
            return
        with self._lock:
            while len(self._blocks) > count and (oldest := self._oldest()) is not None:
                heapq.heappop(self._order)
                self._pop(oldest[0])

    # -- seeing ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[bytes]]:
        """Collect the keys whose files this process writes or removes inside the `with` block; for `use`, `merge` and
        `condemn`."""
        changed: set[bytes] = set()
        with self._lock:
            self._watches.append(changed)
        try:
            yield changed
        finally:
            with self._lock:
                # Compared by identity: two watches may hold equal sets.
                self._watches = [watch for watch in self._watches if watch is not changed]

    def use(
        self, key: bytes, seen: IndexedBlock, changed: set[bytes], touch_interval_s: float, used_s: float | None = None
    ) -> float | None:
        """A block was read.

        Args:
            key: the block's key.
            seen: an entry for its file, in case that it is not known yet.
            changed: the set that `watching` collected around the read.
            touch_interval_s: seconds between two updates of the file's timestamp, at least.
            used_s: time at which it counts as used; None for now.

        Returns:
            The new timestamp for its file; None if it needs no update.
        """
        with self._lock:
            used_s = self._uses.at(used_s)
            block = self._blocks.get(key)
            if block is None or block.is_condemned:  # another process has written over it
                if key in self._owned or key in changed:
                    return None
                block = seen
                self._put(key, block)
            return _touched(block, used_s, touch_interval_s)

    def touch(
        self, keys: Iterable[bytes], used_s: Iterable[float], touch_interval_s: float
    ) -> list[tuple[bytes, float]]:
        """Blocks were used above this tier, at these times. Returns keys and new timestamps of files to update."""
        due: list[tuple[bytes, float]] = []
        with self._lock:
            for key, time_s in zip(keys, used_s, strict=True):
                block, time_s = self._blocks.get(key), self._uses.at(time_s)
                if block is None or block.is_condemned:
                    continue
                if (file_s := _touched(block, time_s, touch_interval_s)) is not None:
                    due.append((key, file_s))
        return due

    # -- scanning --------------------------------------------------------------------------------------

    def begin_scan(self) -> None:
        """A scan of the whole directory begins. Files that are written from now on count as seen by it."""
        with self._lock:
            self._scan += 1

    def merge(self, found: Iterable[tuple[bytes, IndexedBlock]], changed: set[bytes]) -> None:
        """Add files that a scan has found; `changed` is from `watching`, around the look at the directory."""
        with self._lock:
            now_s = self._uses.now()
            for key, seen in found:
                seen.last_use_s = min(seen.last_use_s, now_s)  # a time in the future must not keep a block for ever
                block = self._blocks.get(key)
                if block is not None and block.stored_bytes == seen.stored_bytes:
                    block.scan = self._scan
                    # Another process may have used it since.
                    block.last_use_s = max(block.last_use_s, seen.last_use_s)
                elif key not in self._owned and key not in self._ignored and key not in changed:
                    self._put(key, seen)

    def end_scan(self, unread: Iterable[str] = ()) -> None:
        """The scan is complete: remove the entries that it has not seen.

        Args:
            unread: directory names of namespaces that could not be read in full; their entries stay.
        """
        kept = frozenset(unread)
        with self._lock:
            present = {
                key: block for key, block in self._blocks.items() if block.scan == self._scan or block.namespace in kept
            }
            self._blocks = present
            self._used_bytes = sum(block.stored_bytes for block in present.values()) + sum(self._owned.values())
            self._order_anew()

    # -- inside the lock -------------------------------------------------------------------------------

    def _tell_watches(self, key: bytes) -> None:
        for changed in self._watches:
            changed.add(key)

    def _is_written_over(self, block: IndexedBlock, nbytes: int) -> bool:
        return block.is_condemned or (self._one_length and block.stored_bytes != nbytes)

    def _put(self, key: bytes, block: IndexedBlock) -> None:
        self._pop(key)
        block.scan = self._scan
        self._blocks[key] = block
        self._used_bytes += block.stored_bytes
        heapq.heappush(self._order, (block.last_use_s, next(self._numbers), key, block))
        if len(self._order) > _STALE_FACTOR * len(self._blocks) + _STALE_SLACK:
            self._order_anew()

    def _pop(self, key: bytes) -> None:
        if (block := self._blocks.pop(key, None)) is not None:
            self._used_bytes -= block.stored_bytes

    def _order_anew(self) -> None:
        self._order = [(block.last_use_s, next(self._numbers), key, block) for key, block in self._blocks.items()]
        heapq.heapify(self._order)

    def _oldest(self) -> tuple[bytes, IndexedBlock] | None:
        """The least recently used block, which is the first of the heap then."""
        while self._order:
            time_s, _, key, block = self._order[0]
            if self._blocks.get(key) is not block:
                heapq.heappop(self._order)
            elif block.last_use_s > time_s:
                heapq.heapreplace(self._order, (block.last_use_s, next(self._numbers), key, block))
            else:
                return key, block
        return None

    def _pop_oldest(self, nbytes: int, used_s: float | None) -> Victims | None:
        """Pop the least recently used blocks. If one was used after `used_s`, pop none and return None."""
        victims: Victims = []
        while nbytes > 0 and (oldest := self._oldest()) is not None:
            key, block = oldest
            if used_s is not None and block.last_use_s > used_s:
                for kept in victims:
                    self._put(*kept)
                return None
            heapq.heappop(self._order)
            self._pop(key)
            nbytes -= block.stored_bytes
            victims.append(oldest)
        for key, _ in victims:
            self._owned[key] = 0
        self.evicted_blocks += len(victims)
        return victims


def _touched(block: IndexedBlock, used_s: float, touch_interval_s: float) -> float | None:
    block.last_use_s = max(block.last_use_s, used_s)
    if used_s - block.touched_s < touch_interval_s:
        return None
    block.touched_s = used_s
    return block.last_use_s
