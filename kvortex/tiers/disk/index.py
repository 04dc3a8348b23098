"""What lies in the directory, as far as this process knows, in the order of use."""

import contextlib
import heapq
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvortex.tiers.uses import UseClock


@dataclass(slots=True)
class IndexedBlock:
    """One file: its namespace's directory name, its length, and when it was last used, in seconds since the epoch."""

    namespace: str
    stored_bytes: int
    last_use_s: float
    touched_s: float = 0.0  # when the file's own time was last brought up to date
    scan: int = 0  # the pass that saw it last


class Admission(Enum):
    """What `DiskIndex.reserve` says."""

    RESERVED = auto()
    STORED = auto()
    PENDING = auto()
    NO_SPACE = auto()


Victims = list[tuple[bytes, IndexedBlock]]

_STALE_FACTOR = 2
_STALE_SLACK = 64
"""The heap is made anew when it has more entries than this many times the blocks, and some."""


class DiskIndex:
    """Key -> file, within `capacity_bytes`; what was used longest ago goes first. Thread-safe; look-ups take no lock.

    What is written counts as used when its writer says, and drives out nothing that has been used since. So a chain
    that is longer than the device keeps its head.

    Blocks of other namespaces are in it, since they share the capacity, under their namespace's digest and key.

    A thread that changes a file owns its key meanwhile: from `reserve` to `commit` or `abort`, from `claim` or as a
    victim to `removed` or `put_back`. So index and directory agree as far as this process goes. What was seen in the
    directory is told to the index later, when it may have gone again: `watching` says what went.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.evicted_blocks = 0
        self._lock = threading.Lock()
        self._blocks: dict[bytes, IndexedBlock] = {}
        # (a time at or before its last use, tie-breaker, key, block); blocks that are gone or others are passed over.
        self._order: list[tuple[float, int, bytes, IndexedBlock]] = []
        self._numbers = itertools.count()
        self._uses = UseClock()
        self._owned: dict[bytes, int] = {}  # key -> bytes that are reserved for it
        self._written_s: dict[bytes, float] = {}  # of what is reserved: when it counts as used
        self._ignored: set[bytes] = set()
        self._watches: list[set[bytes]] = []
        self._used_bytes = 0
        self._scan = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> IndexedBlock | None:
        """What is known of a block; a snapshot only by identity."""
        return self._blocks.get(key)

    @property
    def used_bytes(self) -> int:
        """Bytes of known files and of those being written."""
        return self._used_bytes

    def stored_bytes(self, keys: Sequence[bytes]) -> list[int]:
        """Length of each key's file, 0 where none is known."""
        if self._blocks.keys().isdisjoint(keys):
            return [0] * len(keys)
        get = self._blocks.get
        return [block.stored_bytes if (block := get(key)) is not None else 0 for key in keys]

    # -- writing and removing --------------------------------------------------------------------------

    def reserve(self, key: bytes, nbytes: int, used_s: float | None = None) -> tuple[Admission, Victims]:
        """Room for a new file that counts as used at `used_s`, or now; the caller removes the victims' files."""
        with self._lock:
            used_s = self._uses.at(used_s)
            if (block := self._blocks.get(key)) is not None:
                block.last_use_s = max(block.last_use_s, used_s)
                return Admission.STORED, []
            if key in self._owned:
                return Admission.PENDING, []
            if sum(self._owned.values()) + nbytes > self.capacity_bytes:
                return Admission.NO_SPACE, []
            excess = self._used_bytes + nbytes - self.capacity_bytes
            victims = self._pop_oldest(excess, used_s)
            if victims is None:
                return Admission.NO_SPACE, []
            self._owned[key] = nbytes
            self._written_s[key] = used_s
            self._used_bytes += nbytes
            return Admission.RESERVED, victims

    def last_use_of(self, key: bytes) -> float:
        """When a file that is being written counts as used."""
        return self._written_s[key]

    def commit(self, key: bytes, namespace: str) -> None:
        """The reserved file is in place."""
        with self._lock:
            nbytes, used_s = self._owned.pop(key), self._written_s.pop(key)
            self._used_bytes -= nbytes
            self._ignored.discard(key)
            self._put(key, IndexedBlock(namespace, nbytes, used_s, used_s))

    def abort(self, key: bytes) -> None:
        """The reserved file will not come."""
        with self._lock:
            self._used_bytes -= self._owned.pop(key)
            del self._written_s[key]

    def evict(self, nbytes: int, used_s: float | None = None) -> Victims:
        """The least recently used blocks of at least `nbytes` together, or all; none if one was used after `used_s`."""
        with self._lock:
            return self._pop_oldest(nbytes, used_s) or []

    def claim(self, key: bytes) -> bool:
        """Own a key to remove its file, known or not; False while another thread owns it."""
        with self._lock:
            if key in self._owned:
                return False
            self._owned[key] = 0
            self._pop(key)
            return True

    def removed(self, key: bytes) -> None:
        """The file of an owned key is gone, or at least nothing to rely on."""
        with self._lock:
            del self._owned[key]
            for removed in self._watches:
                removed.add(key)

    def put_back(self, key: bytes, block: IndexedBlock, used_s: float | None = None) -> None:
        """A victim that stays, used at `used_s`; or now, so that a file that cannot be removed does not stop others."""
        with self._lock:
            del self._owned[key]
            self.evicted_blocks -= 1
            block.last_use_s = max(block.last_use_s, self._uses.now() if used_s is None else used_s)
            self._put(key, block)

    def discard(self, key: bytes, block: IndexedBlock | None) -> bool:
        """The file was not there: forget what was known of it before, unless it has been written since."""
        with self._lock:
            if block is None or self._blocks.get(key) is not block:
                return False
            self._pop(key)
            return True

    def ignore(self, key: bytes) -> None:
        """The file is somebody else's: not known, not counted, not evicted, whatever a scan says of it."""
        with self._lock:
            self._ignored.add(key)
            self._pop(key)

    # -- seeing ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[bytes]]:
        """Collects the keys whose files this process removes meanwhile; for `use` and `merge`."""
        removed: set[bytes] = set()
        with self._lock:
            self._watches.append(removed)
        try:
            yield removed
        finally:
            with self._lock:
                # By identity: equal sets are equal.
                self._watches = [watch for watch in self._watches if watch is not removed]

    def use(
        self, key: bytes, seen: IndexedBlock, removed: set[bytes], touch_interval_s: float, used_s: float | None = None
    ) -> float | None:
        """A block was read, and counts as used at `used_s`, or now.

        Returns:
            The time that its file should get, at most once an interval; None if it is up to date.
        """
        with self._lock:
            used_s = self._uses.at(used_s)
            block = self._blocks.get(key)
            if block is None:
                if key in self._owned or key in removed:
                    return None
                block = seen
                self._put(key, block)
            return _touched(block, used_s, touch_interval_s)

    def touch(
        self, keys: Iterable[bytes], used_s: Iterable[float], touch_interval_s: float
    ) -> list[tuple[bytes, float]]:
        """Blocks were used above this tier; those whose files should get another time, and which."""
        due: list[tuple[bytes, float]] = []
        with self._lock:
            for key, time_s in zip(keys, used_s, strict=True):
                block, time_s = self._blocks.get(key), self._uses.at(time_s)
                if block is not None and (file_s := _touched(block, time_s, touch_interval_s)) is not None:
                    due.append((key, file_s))
        return due

    # -- scanning --------------------------------------------------------------------------------------

    def begin_scan(self) -> None:
        """A pass over the whole directory begins; what is written from now on counts as seen by it."""
        with self._lock:
            self._scan += 1

    def merge(self, found: Iterable[tuple[bytes, IndexedBlock]], removed: set[bytes]) -> None:
        """Files that a pass has found."""
        with self._lock:
            now_s = self._uses.now()
            for key, seen in found:
                seen.last_use_s = min(seen.last_use_s, now_s)  # a clock that was wrong must not keep a block for ever
                block = self._blocks.get(key)
                if block is not None and block.stored_bytes == seen.stored_bytes:
                    block.scan = self._scan
                    # Another process may have used it since.
                    block.last_use_s = max(block.last_use_s, seen.last_use_s)
                elif key not in self._owned and key not in self._ignored and key not in removed:
                    self._put(key, seen)

    def end_scan(self, unread: Iterable[str] = ()) -> None:
        """The pass is over: what it has not seen is gone.

        `unread` are namespaces that could not be read in full; their blocks stay.
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
        """The block that was used longest ago, which is then the first of the heap."""
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
        """None, and nothing is popped, if one of these blocks was used after `used_s`."""
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
