"""What lies in the directory, as far as this process knows, in the order of use."""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto


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


class DiskIndex:
    """Key -> file, least recently used first, within `capacity_bytes`. Thread-safe; look-ups take no lock.

    Blocks of other namespaces are in it, since they share the capacity, under their namespace's digest and key.

    A thread that changes a file owns its key meanwhile: from `reserve` to `commit` or `abort`, from `claim` or as a
    victim to `removed` or `put_back`. So index and directory agree as far as this process goes. What was seen in the
    directory is told to the index later, when it may have gone again: `watching` says what went.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.evicted_blocks = 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[bytes, IndexedBlock] = OrderedDict()
        self._owned: dict[bytes, int] = {}  # key -> bytes that are reserved for it
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

    def stored_bytes(self, keys: Iterable[bytes]) -> list[int]:
        """Length of each key's file, 0 where none is known."""
        get = self._blocks.get
        return [block.stored_bytes if (block := get(key)) is not None else 0 for key in keys]

    # -- writing and removing --------------------------------------------------------------------------

    def reserve(self, key: bytes, nbytes: int) -> tuple[Admission, Victims]:
        """Room for a new file; the caller removes the victims' files."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return Admission.STORED, []
            if key in self._owned:
                return Admission.PENDING, []
            if sum(self._owned.values()) + nbytes > self.capacity_bytes:
                return Admission.NO_SPACE, []
            victims = self._pop_oldest(self._used_bytes + nbytes - self.capacity_bytes)
            self._owned[key] = nbytes
            self._used_bytes += nbytes
            return Admission.RESERVED, victims

    def commit(self, key: bytes, namespace: str) -> None:
        """The reserved file is in place."""
        with self._lock:
            nbytes = self._owned.pop(key)
            self._used_bytes -= nbytes
            now = time.time()
            self._ignored.discard(key)
            self._put(key, IndexedBlock(namespace, nbytes, now, now))

    def abort(self, key: bytes) -> None:
        """The reserved file will not come."""
        with self._lock:
            self._used_bytes -= self._owned.pop(key)

    def evict(self, nbytes: int) -> Victims:
        """The least recently used blocks of at least `nbytes` together, or all."""
        with self._lock:
            return self._pop_oldest(nbytes)

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

    def put_back(self, key: bytes, block: IndexedBlock) -> None:
        """A victim whose file could not be removed: again the first in line."""
        with self._lock:
            del self._owned[key]
            self.evicted_blocks -= 1
            self._put(key, block)
            self._blocks.move_to_end(key, last=False)

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

    def use(self, key: bytes, seen: IndexedBlock, removed: set[bytes], touch_interval_s: float) -> bool:
        """A block was read; True when its file's time should be brought up to date, at most once an interval."""
        now = time.time()
        with self._lock:
            block = self._blocks.get(key)
            if block is None:
                if key in self._owned or key in removed:
                    return False
                block = seen
                self._put(key, block)
            self._blocks.move_to_end(key)
            block.last_use_s = now
            if now - block.touched_s < touch_interval_s:
                return False
            block.touched_s = now
            return True

    # -- scanning --------------------------------------------------------------------------------------

    def begin_scan(self) -> None:
        """A pass over the whole directory begins; what is written from now on counts as seen by it."""
        with self._lock:
            self._scan += 1

    def merge(self, found: Iterable[tuple[bytes, IndexedBlock]], removed: set[bytes]) -> None:
        """Files that a pass has found: new ones come before all others in the order until `end_scan` sorts."""
        with self._lock:
            for key, seen in found:
                block = self._blocks.get(key)
                if block is not None and block.stored_bytes == seen.stored_bytes:
                    block.scan = self._scan
                    # Another process may have used it since.
                    block.last_use_s = max(block.last_use_s, seen.last_use_s)
                elif key not in self._owned and key not in self._ignored and key not in removed:
                    self._put(key, seen)
                    self._blocks.move_to_end(key, last=False)

    def end_scan(self, unread: Iterable[str] = ()) -> None:
        """The pass is over: what it has not seen is gone, and the order is that of last use.

        `unread` are namespaces that could not be read in full; their blocks stay.
        """
        kept = frozenset(unread)
        with self._lock:
            present = [
                (key, block)
                for key, block in self._blocks.items()
                if block.scan == self._scan or block.namespace in kept
            ]
            present.sort(key=lambda item: item[1].last_use_s)
            self._blocks = OrderedDict(present)
            self._used_bytes = sum(block.stored_bytes for _, block in present) + sum(self._owned.values())

    # -- inside the lock -------------------------------------------------------------------------------

    def _put(self, key: bytes, block: IndexedBlock) -> None:
        self._pop(key)
        block.scan = self._scan
        self._blocks[key] = block
        self._used_bytes += block.stored_bytes

    def _pop(self, key: bytes) -> None:
        if (block := self._blocks.pop(key, None)) is not None:
            self._used_bytes -= block.stored_bytes

    def _pop_oldest(self, nbytes: int) -> Victims:
        victims: Victims = []
        while nbytes > 0 and self._blocks:
            key, block = self._blocks.popitem(last=False)
            self._used_bytes -= block.stored_bytes
            nbytes -= block.stored_bytes
            self._owned[key] = 0
            victims.append((key, block))
        self.evicted_blocks += len(victims)
        return victims
