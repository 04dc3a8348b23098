"""Reading and writing one block's file: blocking, called on the disk tier's threads."""

import contextlib
import errno
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, WriteOutcome, WriteRequest
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.direct import DirectIO, Scratch, read_fully, write_fully
from kvortex.tiers.disk_config import DiskTierConfig
from kvortex.tiers.disk_index import Admission, DiskIndex, IndexedBlock, Victims
from kvortex.tiers.disk_layout import DiskLayout
from kvortex.tiers.disk_scan import ScanPart, read_part
from kvortex.tiers.frame import (
    ALIGNMENT_BYTES,
    HEADER_BYTES,
    FrameHeader,
    decode_header,
    encode_header,
    frame_bytes,
    padded,
)
from kvortex.tiers.os_calls import OsCalls
from kvortex.tiers.payload import address_of, as_bytes, copy_payload, payload_digest
from kvortex.tiers.temp_space import TempSpace, make_directories
from kvortex.types import MissReason, SaveOutcome

_CAUSES: Final = {
    errno.ENOENT: Cause.ABSENT,
    errno.ENOTDIR: Cause.ABSENT,
    errno.ENOSPC: Cause.NO_SPACE,
    errno.EDQUOT: Cause.NO_SPACE,
    errno.EFBIG: Cause.NO_SPACE,
    errno.EMFILE: Cause.OPEN_FILES,
    errno.ENFILE: Cause.OPEN_FILES,
    errno.EACCES: Cause.PERMISSION,
    errno.EPERM: Cause.PERMISSION,
    errno.EROFS: Cause.READ_ONLY,
}
_STORED: Final = WriteOutcome(SaveOutcome.STORED)
_ALREADY_STORED: Final = WriteOutcome(SaveOutcome.ALREADY_STORED)


def cause_of(error: OSError) -> Cause:
    """The one table from the system's errors to ours."""
    return _CAUSES.get(error.errno or 0, Cause.IO_ERROR)


class DiskFiles:
    """The files of one namespace. `read` and `write` return outcomes for every `OSError`."""

    def __init__(
        self,
        layout: DiskLayout,
        config: DiskTierConfig,
        direct: DirectIO,
        index: DiskIndex,
        temp: TempSpace,
        counters: TierCounters,
        calls: OsCalls,
    ) -> None:
        self._layout = layout
        self._config = config
        self._direct = direct
        self._index = index
        self._temp = temp
        self._counters = counters
        self._calls = calls
        self._scratch = Scratch()
        self._made: set[str] = set()

    # -- reading ---------------------------------------------------------------------------------------

    def read(self, request: ReadRequest) -> ReadOutcome:
        key = request.key
        try:
            outcome = self._read(key, as_bytes(request.buffer))
        except OSError as error:
            return self._failed_read(key, error)
        if outcome.cause is Cause.CORRUPT:
            self.remove_corrupt(key)
        elif outcome.cause is Cause.UNKNOWN_VERSION:
            self._index.forget(key)
        return outcome

    def _failed_read(self, key: bytes, error: OSError) -> ReadOutcome:
        cause, detail = cause_of(error), str(error)
        if cause is Cause.ABSENT:
            reason = MissReason.EVICTED if self._index.forget(key) else MissReason.NEVER_STORED
            return ReadOutcome(reason, cause=cause, detail=detail)
        if cause is Cause.IO_ERROR:
            self._index.forget(key)  # not asked for again before the next scan
        return ReadOutcome(MissReason.TRANSFER_FAILED, cause=cause, detail=detail)

    def _read(self, key: bytes, target: NDArray[np.uint8]) -> ReadOutcome:
        fd = self._calls.open(self._layout.path(key), os.O_RDONLY | self._direct.flags)
        try:
            outcome = self._read_frame(fd, key, target)
            if outcome.reason is None:
                stored_bytes = frame_bytes(outcome.payload_bytes)
                interval_s = self._config.touch_interval_s
                if self._index.use(key, self._layout.namespace_name, stored_bytes, interval_s):
                    self._touch(fd)
            return outcome
        finally:
            self._calls.close(fd)

    def _read_frame(self, fd: int, key: bytes, target: NDArray[np.uint8]) -> ReadOutcome:
        room = self._calls.file_bytes(fd) - HEADER_BYTES
        if room <= 0 or room % ALIGNMENT_BYTES:
            return _corrupt("the file's length is not that of a frame")
        if room - ALIGNMENT_BYTES >= target.size:  # even the shortest payload of such a file is longer
            return self._too_small(fd, key, target.size)
        if not self._suits(target):
            body = self._scratch.bounce(room)
            pieces = [body]
        else:
            body = target[:room] if target.size >= room else target[: room - ALIGNMENT_BYTES]
            pieces = [body] if body.size == room else [body, self._scratch.tail]
        header = self._fill(fd, key, pieces, room)
        if not isinstance(header, FrameHeader):
            return _flawed(header)
        if header.payload_bytes > target.size:
            return _buffer_too_small(header.payload_bytes, target.size)
        return self._finish(header, target, pieces)

    def _fill(self, fd: int, key: bytes, pieces: list[NDArray[np.uint8]], room: int) -> FrameHeader | Cause:
        if read_fully(self._calls, fd, [self._scratch.header, *pieces]) != HEADER_BYTES + room:
            return Cause.CORRUPT
        header = self._decode(key)
        if isinstance(header, FrameHeader) and padded(header.payload_bytes) != room:
            return Cause.CORRUPT
        return header

    def _finish(self, header: FrameHeader, target: NDArray[np.uint8], pieces: list[NDArray[np.uint8]]) -> ReadOutcome:
        """Bring what landed elsewhere into the target, and check it."""
        payload = target[: header.payload_bytes]
        first, last = pieces[0], pieces[-1]
        end = header.payload_bytes - (first.size if last is not first else 0)  # of the payload in the last piece
        if last[end:].any():
            return _corrupt("the padding is not zero")
        if not self._suits(target):
            digest = copy_payload(first[:end], payload)
        else:
            if last is not first:
                payload[first.size :] = last[:end]
            digest = payload_digest(payload) if self._config.verify else header.digest
        if self._config.verify and digest != header.digest:
            return _corrupt("the payload's digest differs")
        return ReadOutcome(
            None,
            payload_bytes=header.payload_bytes,
            raw_bytes=header.raw_bytes,
            codec=header.codec,
            digest=header.digest,
        )

    def _too_small(self, fd: int, key: bytes, nbytes: int) -> ReadOutcome:
        """A file too long for the buffer: a larger block, or a damaged one."""
        header = self._read_header(fd, key)
        if not isinstance(header, FrameHeader):
            return _flawed(header)
        if frame_bytes(header.payload_bytes) != self._calls.file_bytes(fd):
            return _corrupt("the file's length is not what its header says")
        return _buffer_too_small(header.payload_bytes, nbytes)

    def _read_header(self, fd: int, key: bytes) -> FrameHeader | Cause:
        if read_fully(self._calls, fd, [self._scratch.header]) != HEADER_BYTES:
            return Cause.CORRUPT
        return self._decode(key)

    def _decode(self, key: bytes) -> FrameHeader | Cause:
        return decode_header(self._scratch.header.data, self._layout.namespace, key)

    def _suits(self, array: NDArray[np.uint8]) -> bool:
        return address_of(array) % self._direct.memory_alignment == 0

    def _touch(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # a read-only or foreign file: its age stays what it is
            self._calls.touch(fd)

    def remove_corrupt(self, key: bytes) -> None:
        """Take a damaged file away. If that fails it is at least not known any more."""
        self._index.forget(key)
        try:
            self._calls.unlink(self._layout.path(key))
        except OSError as error:
            if (cause := cause_of(error)) is not Cause.ABSENT:
                self._counters.record_cause(cause)
        else:
            self._counters.record_removed_corrupt()

    # -- asking, removing, scanning --------------------------------------------------------------------

    def exists(self, key: bytes) -> bool:
        """Whether the file is there, as the file system says; False if it does not."""
        try:
            status = self._calls.stat(self._layout.path(key))
        except OSError as error:
            if (cause := cause_of(error)) is Cause.ABSENT:
                self._index.forget(key)
            else:
                self._counters.record_cause(cause)
            return False
        self._index.merge([(key, self._indexed(status.st_size, status.st_mtime))])
        return True

    def delete(self, key: bytes) -> bool:
        """Remove the file; True if it was there and is gone."""
        try:
            self._calls.unlink(self._layout.path(key))
        except OSError as error:
            if (cause := cause_of(error)) is Cause.ABSENT:
                self._index.forget(key)
            else:
                self._counters.record_cause(cause)
            return False
        self._index.forget(key)
        return True

    def merge(self, part: ScanPart) -> int:
        """Tell the index what lies in one directory; returns the number of blocks. Raises `OSError`."""
        found = read_part(part, self._calls)
        self._index.merge(found)
        return len(found)

    def evict_excess(self) -> None:
        """Evict what lies above the capacity: others wrote it, or the capacity became smaller. Raises `OSError`."""
        self.remove_victims(self._index.evict(self._index.used_bytes - self._index.capacity_bytes))

    def _indexed(self, stored_bytes: int, time_s: float) -> IndexedBlock:
        return IndexedBlock(self._layout.namespace_name, stored_bytes, time_s, time_s)

    # -- writing ---------------------------------------------------------------------------------------

    def write(self, request: WriteRequest) -> WriteOutcome:
        key, source = request.key, as_bytes(request.payload)
        try:
            if key not in self._index and (found := self._existing(key)) is not None:
                return found
        except OSError as error:
            return _failed_write(error)
        nbytes = frame_bytes(source.size)
        admission, victims = self._index.reserve(key, nbytes)
        if admission is not Admission.RESERVED:
            return _REFUSALS[admission]
        committed = False
        try:
            self.remove_victims(victims)
            self._place(key, self._frame(request, source), nbytes)
            self._index.commit(key, self._layout.namespace_name)
            committed = True
        except OSError as error:
            return _failed_write(error)
        finally:
            if not committed:
                self._index.abort(key)
        return _STORED

    def _existing(self, key: bytes) -> WriteOutcome | None:
        """What a file that this process does not know of means for a write: None if it may be written over."""
        try:
            fd = self._calls.open(self._layout.path(key), os.O_RDONLY | self._direct.flags)
        except FileNotFoundError:
            return None
        try:
            stored_bytes = self._calls.file_bytes(fd)
            header = self._read_header(fd, key)
        finally:
            self._calls.close(fd)
        if header is Cause.UNKNOWN_VERSION:
            return WriteOutcome(SaveOutcome.FAILED, cause=Cause.UNKNOWN_VERSION)
        if not isinstance(header, FrameHeader) or frame_bytes(header.payload_bytes) != stored_bytes:
            return None
        self._index.use(key, self._layout.namespace_name, stored_bytes, self._config.touch_interval_s)
        return _ALREADY_STORED

    def remove_victims(self, victims: Victims) -> None:
        """Remove evicted files.

        Raises:
            OSError: one cannot be removed; it and the rest are in the index again.
        """
        for number, (key, block) in enumerate(victims):
            try:
                self._calls.unlink(self._layout.path(key, block.namespace))
            except FileNotFoundError:
                continue  # another process was quicker
            except OSError:
                for kept in reversed(victims[number:]):
                    self._index.put_back(*kept)
                raise

    def _frame(self, request: WriteRequest, source: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """The frame's pieces, in memory that the file can be written from."""
        header = FrameHeader(
            self._layout.namespace, request.key, request.codec, source.size, request.raw_bytes, request.digest
        )
        head = self._scratch.header
        head[:] = np.frombuffer(encode_header(header), dtype=np.uint8)
        if not self._suits(source):
            body = self._scratch.bounce(padded(source.size))
            copy_payload(source, body[: source.size])
            body[source.size :] = 0
            return [head, body]
        whole = source.size // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if whole == source.size:
            return [head, source]
        tail = self._scratch.tail
        tail[: source.size - whole] = source[whole:]
        tail[source.size - whole :] = 0
        return [head, source[:whole], tail] if whole else [head, tail]

    def _place(self, key: bytes, pieces: list[NDArray[np.uint8]], nbytes: int) -> None:
        """Write, sync, rename; once more after making room, or the directories, if that was what was missing."""
        try:
            self._try_place(key, pieces, nbytes)
        except FileNotFoundError:
            self._made.clear()
            self._temp.open()
        except OSError as error:
            # The file system is smaller than the capacity: one block goes for the one that comes.
            if cause_of(error) is not Cause.NO_SPACE or not (victims := self._index.evict(nbytes)):
                raise
            self.remove_victims(victims)
        else:
            return
        self._try_place(key, pieces, nbytes)

    def _try_place(self, key: bytes, pieces: list[NDArray[np.uint8]], nbytes: int) -> None:
        self._make(self._layout.directory(key))
        path = self._temp.new_path()
        fd = self._calls.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | self._direct.flags)
        placed = False
        try:
            try:
                if write_fully(self._calls, fd, pieces) != nbytes:
                    raise OSError(errno.EIO, "the system took only a part of the file", path)
                if self._config.fsync:
                    self._calls.fdatasync(fd)
            finally:
                self._calls.close(fd)
            self._calls.replace(path, self._layout.path(key))
            placed = True
        finally:
            if not placed:
                with contextlib.suppress(OSError):  # the sweep of a later start takes it
                    self._calls.unlink(path)

    def _make(self, directory: str) -> None:
        if directory not in self._made:
            make_directories(self._calls, directory)
            self._made.add(directory)


_REFUSALS: Final = {
    Admission.STORED: _ALREADY_STORED,
    Admission.PENDING: WriteOutcome(SaveOutcome.PENDING),
    Admission.NO_SPACE: WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE),
}


def _failed_write(error: OSError) -> WriteOutcome:
    cause = cause_of(error)
    outcome = SaveOutcome.NO_SPACE if cause is Cause.NO_SPACE else SaveOutcome.FAILED
    return WriteOutcome(outcome, cause=cause, detail=str(error))


def _corrupt(detail: str) -> ReadOutcome:
    return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT, detail=detail)


def _flawed(cause: Cause) -> ReadOutcome:
    if cause is Cause.CORRUPT:
        return _corrupt("the header is damaged, another block's, or does not fit the file's length")
    return ReadOutcome(MissReason.NEVER_STORED, cause=cause)


def _buffer_too_small(payload_bytes: int, nbytes: int) -> ReadOutcome:
    return ReadOutcome(
        MissReason.TRANSFER_FAILED,
        cause=Cause.BUFFER_TOO_SMALL,
        detail=f"a payload of {payload_bytes} bytes does not fit a buffer of {nbytes}",
    )
