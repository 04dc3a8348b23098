"""The files of one disk tier: operations that reading, writing and scanning share."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.config import DiskTierConfig
from kvortex.tiers.base import Cause, ReadOutcome
from kvortex.tiers.causes import cause_of
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.disk.direct import DirectIO, Scratch, read_fully
from kvortex.tiers.disk.directories import directory
from kvortex.tiers.disk.layout import DiskLayout, name_of
from kvortex.tiers.disk.os_calls import OsCalls
from kvortex.tiers.disk.scan import ScanPart, read_part
from kvortex.tiers.frame import HEADER_BYTES, FrameHeader
from kvortex.tiers.payload import address_of
from kvortex.tiers.sealing import Framing
from kvortex.tiers.store_index import IndexedBlock, StoreIndex, Victims
from kvortex.types import BLOCK_HASH_BYTES

_EVICTION_ATTEMPTS: Final = 8
_USED_ELSEWHERE_S: Final = 1.0  # coarser than the timestamps of every file system


@dataclass(frozen=True, slots=True)
class DiskFiles:
    """The files of one tier. Every method blocks, and may be called on any thread.

    Args:
        layout: the paths.
        config: the settings of the tier.
        framing: how blocks are stored.
        direct: how files are opened.
        index: the known files.
        counters: the tier's counters.
        calls: the system calls.
        scratch: aligned memory of each thread.
    """

    layout: DiskLayout
    config: DiskTierConfig
    framing: Framing
    direct: DirectIO
    index: StoreIndex
    counters: TierCounters
    calls: OsCalls
    scratch: Scratch = field(default_factory=Scratch)

    def suits(self, array: NDArray[np.uint8]) -> bool:
        """True if payloads are stored as they are, and the alignment of this memory allows to read files into it, and
        to write them from it."""
        return not self.framing.is_sealed and address_of(array) % self.direct.memory_alignment == 0

    def seen(self, stored_bytes: int, time_s: float) -> IndexedBlock:
        """An index entry for a file of this namespace: its length, and `time_s` of its last use."""
        return IndexedBlock(self.layout.namespace_name, stored_bytes, time_s, time_s)

    def read_header(self, fd: int, key: bytes) -> FrameHeader | ReadOutcome:
        """Read and decode the header only; a miss if it is not valid. Raises `OSError`."""
        if read_fully(self.calls, fd, [self.scratch.header]) != HEADER_BYTES:
            return self.framing.flawed("the file is shorter than a header")
        return self.decode(key)

    def decode(self, key: bytes) -> FrameHeader | ReadOutcome:
        """Decode the header in this thread's scratch memory."""
        return self.framing.decode(self.scratch.header.data, key)

    def count(self, error: OSError) -> None:
        """Count an error of the system, for the statistics."""
        self.counters.record_cause(cause_of(error))

    # -- one file --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def directory_of(self, key: bytes, namespace: str | None = None) -> Iterator[int]:
        """A descriptor of the directory of a block's file. No symbolic link is followed. Raises `OSError`."""
        above, fan_out = os.path.split(self.layout.directory(key, namespace))
        with directory(self.calls, above) as above_fd, directory(self.calls, fan_out, above_fd) as fd:
            yield fd

    def open(self, key: bytes) -> int:
        """A descriptor to read a block's file from. Raises `OSError`."""
        with self.directory_of(key) as fd:
            return self.calls.open(name_of(key), os.O_RDONLY | self.direct.flags, dir_fd=fd)

    def look_for(self, key: bytes) -> int:
        """The length of a file in bytes; updates the index. 0 also on an error, which is counted."""
        known = self.index.get(key)
        with self.index.watching() as changed:
            try:
                with self.directory_of(key) as fd:
                    status = self.calls.stat(name_of(key), fd)
            except OSError as error:
                if (cause := cause_of(error)) is Cause.ABSENT:
                    self.index.discard(key, known)
                else:
                    self.counters.record_cause(cause)
                return 0
            self.index.merge([(key, self.seen(status.st_size, status.st_mtime))], changed)
            return int(status.st_size)

    def delete(self, key: bytes) -> bool:
        """Remove the file; True if it was there and is gone. A block that is being written is not there yet."""
        if not self.index.claim(key):
            return False
        try:
            with self.directory_of(key) as fd:
                self.calls.unlink(name_of(key), fd)
        except OSError as error:
            if (cause := cause_of(error)) is not Cause.ABSENT:
                self.counters.record_cause(cause)
            return False
        finally:
            self.index.removed(key)
        return True

    def remove_corrupt(self, key: bytes) -> None:
        """Remove a damaged file. If that fails, it is at least removed from the index."""
        if self.delete(key):
            self.counters.record_removed_corrupt()

    def touch(self, file: int | str, time_s: float) -> None:
        """Store the time at which a file was used in its timestamps, for later processes."""
        with contextlib.suppress(OSError):  # a read-only file, one of another user, or none: it keeps its time
            self.calls.touch(file, time_s)

    # -- many ------------------------------------------------------------------------------------------

    def remove_victims(self, victims: Victims, used_s: float | None = None) -> None:
        """Remove the files of eviction victims.

        If a file cannot be removed, or another process has used it since the last scan, it stays, and the next victims
        are taken instead.

        Args:
            victims: blocks that were taken out of the index.
            used_s: blocks that were used after this time are not evicted.

        Raises:
            OSError: too few files could be removed; those that stay are in the index again.
        """
        for attempts_left in reversed(range(_EVICTION_ATTEMPTS)):
            lacking_bytes, reason = self._try_remove(victims)
            if reason is None:
                return
            victims = self.index.evict(lacking_bytes, used_s) if attempts_left else []
            if not victims:
                raise reason

    def _try_remove(self, victims: Victims) -> tuple[int, OSError | None]:
        """Try each victim; returns the bytes of those that stay, and the reason for the last of them."""
        lacking_bytes, reason = 0, None
        for key, block in victims:
            try:
                with self.directory_of(key[-BLOCK_HASH_BYTES:], block.namespace) as fd:
                    name = name_of(key[-BLOCK_HASH_BYTES:])
                    file_s = self.calls.stat(name, fd).st_mtime
                    if block.last_use_s + _USED_ELSEWHERE_S < file_s <= time.time():
                        reason = OSError(errno.ENOSPC, "other processes have used every block that could be evicted")
                        lacking_bytes += block.stored_bytes
                        self.index.put_back(key, block, file_s)
                        continue
                    self.calls.unlink(name, fd)
            except (FileNotFoundError, NotADirectoryError):
                pass  # another process has removed it
            except OSError as error:
                reason = error
                lacking_bytes += block.stored_bytes
                self.index.put_back(key, block)
                continue
            self.index.removed(key)
        return lacking_bytes, reason

    def touch_many(self, keys: Sequence[bytes], used_s: Sequence[float]) -> None:
        """Count blocks as used at these times, in seconds since the epoch, although they were not read."""
        for key, time_s in self.index.touch(keys, used_s, self.config.touch_interval_s):
            self.touch(self.layout.path(key), time_s)

    def evict_excess(self) -> None:
        """Evict blocks until the capacity is kept: other processes wrote some, or it was lowered. Raises `OSError`."""
        self.remove_victims(self.index.evict(self.index.used_bytes - self.index.capacity_bytes))

    def merge(self, part: ScanPart) -> int:
        """Add the blocks of one directory to the index; returns their number. Raises `OSError`."""
        # Blocks of other namespaces take capacity and can be evicted, but a look-up must not find them.
        prefix = b"" if part.namespace == self.layout.namespace_name else bytes.fromhex(part.namespace)
        with self.index.watching() as changed:
            found = read_part(part, self.calls, self.count)
            self.index.merge([(prefix + key, block) for key, block in found], changed)
        return len(found)
