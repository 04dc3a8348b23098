"""Writes the file of one block; blocking, called on the disk tier's threads."""

import contextlib
import errno
import os
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers.base import Cause, ReadOutcome, WriteOutcome, WriteRequest, as_bytes
from kvortex.tiers.causes import cause_of
from kvortex.tiers.disk.direct import write_fully
from kvortex.tiers.disk.directories import directory, make_directories
from kvortex.tiers.disk.files import DiskFiles
from kvortex.tiers.disk.temp_space import TempSpace
from kvortex.tiers.frame import ALIGNMENT_BYTES, frame_bytes, padded
from kvortex.tiers.store_index import Admission, Victims
from kvortex.types import SaveOutcome

_STORED: Final = WriteOutcome(SaveOutcome.STORED)
_ALREADY_STORED: Final = WriteOutcome(SaveOutcome.ALREADY_STORED)
_REFUSALS: Final = {
    Admission.STORED: _ALREADY_STORED,
    Admission.PENDING: WriteOutcome(SaveOutcome.PENDING),
    Admission.NO_SPACE: WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE),
}


class DiskWriter:
    """Writes blocks of one namespace, and evicts others to make room.

    Args:
        files: the files of the tier.
        temp: gives paths for files without a name yet.
    """

    def __init__(self, files: DiskFiles, temp: TempSpace) -> None:
        self._files = files
        self._temp = temp
        self._made: set[str] = set()

    def write(self, request: WriteRequest) -> WriteOutcome:
        """Write one block. Every `OSError` becomes an outcome, and leaves no file behind."""
        key, source, index = request.key, as_bytes(request.payload), self._files.index
        try:
            if index.get(key) is None and (found := self._existing(request)) is not None:
                return found
        except OSError as error:
            return _failed(error)
        nbytes = frame_bytes(source.size)
        admission, victims = index.reserve(key, nbytes, request.used_s)
        if admission is not Admission.RESERVED:
            return _REFUSALS[admission]
        committed = False
        try:
            self._files.remove_victims(victims, index.last_use_of(key))
            self._place(key, self._frame(request, source), nbytes)
            index.commit(key, self._files.layout.namespace_name)
            committed = True
        except OSError as error:
            return _failed(error)
        finally:
            if not committed:
                index.abort(key)
        return _STORED

    def _existing(self, request: WriteRequest) -> WriteOutcome | None:
        """The outcome if a file is there that the index does not know yet; None if the block has to be written."""
        files, key = self._files, request.key
        with files.index.watching() as changed:
            try:
                fd = files.open(key)
            except FileNotFoundError:
                return None
            try:
                stored_bytes = files.calls.file_bytes(fd)
                header = files.read_header(fd, key)
            finally:
                files.calls.close(fd)
            if isinstance(header, ReadOutcome) and header.cause is Cause.UNKNOWN_VERSION:
                files.index.ignore(key)
                return WriteOutcome(SaveOutcome.FAILED, cause=Cause.UNKNOWN_VERSION)
            if isinstance(header, ReadOutcome) or frame_bytes(header.payload_bytes) != stored_bytes:
                return None
            seen = files.seen(stored_bytes, time.time())
            due_s = files.index.use(key, seen, changed, files.config.touch_interval_s, request.used_s)
            if due_s is not None:
                files.touch(files.layout.path(key), due_s)
            return _ALREADY_STORED

    def _frame(self, request: WriteRequest, source: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """The pieces of the frame, in memory that is aligned for the write."""
        head = self._files.scratch.header
        body = None if self._files.suits(source) else self._files.scratch.bounce(padded(source.size))
        header, _ = self._files.framing.encode(request, None if body is None else body[: source.size])
        head[:] = np.frombuffer(header, dtype=np.uint8)
        if body is not None:
            body[source.size :] = 0
            return [head, body]
        whole = source.size // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if whole == source.size:
            return [head, source]
        tail = self._files.scratch.tail
        tail[: source.size - whole] = source[whole:]
        tail[source.size - whole :] = 0
        return [head, source[:whole], tail] if whole else [head, tail]

    def _place(self, key: bytes, pieces: list[NDArray[np.uint8]], nbytes: int) -> None:
        """Write, sync, rename. If room or a directory was missing, make it and try once more."""
        try:
            self._try_place(key, pieces, nbytes)
        except FileNotFoundError:
            self._made.clear()
            self._temp.open()
        except OSError as error:
            # The file system is smaller than the capacity: evict a block for each that is written.
            if cause_of(error) is not Cause.NO_SPACE or not (victims := self._evict_for(key, nbytes)):
                raise
            self._files.remove_victims(victims, self._files.index.last_use_of(key))
        else:
            return
        self._try_place(key, pieces, nbytes)

    def _evict_for(self, key: bytes, nbytes: int) -> Victims:
        return self._files.index.evict(nbytes, self._files.index.last_use_of(key))

    def _try_place(self, key: bytes, pieces: list[NDArray[np.uint8]], nbytes: int) -> None:
        self._make(self._files.layout.directory(key))
        path = self._temp.new_path()
        fd = self._files.calls.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | self._files.direct.flags)
        placed = False
        try:
            try:
                if write_fully(self._files.calls, fd, pieces) != nbytes:
                    raise OSError(errno.EIO, "the system wrote only a part of the file", path)
                self._files.touch(fd, self._files.index.last_use_of(key))
                if self._files.config.fsync:
                    self._files.calls.fdatasync(fd)
            finally:
                self._files.calls.close(fd)
            self._files.calls.replace(path, self._files.layout.path(key))
            placed = True
        finally:
            if not placed:
                with contextlib.suppress(OSError):  # the sweep of a later start removes it
                    self._files.calls.unlink(path)

    def _make(self, path: str) -> None:
        if path not in self._made:
            make_directories(self._files.calls, path)
            with directory(self._files.calls, path):  # it is no symbolic link
                self._made.add(path)


def _failed(error: OSError) -> WriteOutcome:
    cause = cause_of(error)
    outcome = SaveOutcome.NO_SPACE if cause is Cause.NO_SPACE else SaveOutcome.FAILED
    return WriteOutcome(outcome, cause=cause, detail=str(error))
