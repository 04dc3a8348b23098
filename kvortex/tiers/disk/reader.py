"""Reads the file of one block into its buffer; blocking, called on the disk tier's threads."""

import time

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, as_bytes
from kvortex.tiers.causes import cause_of
from kvortex.tiers.disk.direct import read_fully
from kvortex.tiers.disk.files import DiskFiles
from kvortex.tiers.frame import ALIGNMENT_BYTES, HEADER_BYTES, FrameHeader, frame_bytes, padded
from kvortex.tiers.store_index import IndexedBlock
from kvortex.types import MissReason


class DiskReader:
    """Reads blocks of one namespace."""

    def __init__(self, files: DiskFiles) -> None:
        self._files = files

    def read(self, request: ReadRequest) -> ReadOutcome:
        """Read one block, straight into its buffer if its alignment allows it. Every `OSError` becomes an outcome."""
        key = request.key
        known = self._files.index.get(key)
        try:
            outcome = self._read(key, as_bytes(request.buffer), request.used_s)
        except OSError as error:
            return self._failed(key, known, error)
        if outcome.cause is Cause.CORRUPT:
            self._files.remove_corrupt(key)
        elif outcome.cause is Cause.UNKNOWN_VERSION:
            self._files.index.ignore(key)
        return outcome

    def _failed(self, key: bytes, known: IndexedBlock | None, error: OSError) -> ReadOutcome:
        cause, detail = cause_of(error), str(error)
        if cause is Cause.ABSENT:
            self._files.index.discard(key, known)
            reason = MissReason.NEVER_STORED if known is None else MissReason.EVICTED
            return ReadOutcome(reason, cause=cause, detail=detail)
        if cause is Cause.IO_ERROR:
            self._files.index.discard(key, known)  # `lookup` does not find it before the next scan
        return ReadOutcome(MissReason.TRANSFER_FAILED, cause=cause, detail=detail)

    def _read(self, key: bytes, target: NDArray[np.uint8], used_s: float | None) -> ReadOutcome:
        files = self._files
        with files.index.watching() as changed:
            fd = files.open(key)
            try:
                outcome = self._read_frame(fd, key, target)
                if outcome.reason is None:
                    stored_bytes = frame_bytes(outcome.payload_bytes)
                    seen = IndexedBlock(files.layout.namespace_name, stored_bytes, time.time())
                    due_s = files.index.use(key, seen, changed, files.config.touch_interval_s, used_s)
                    if due_s is not None:
                        files.touch(fd, due_s)
                elif outcome.reason is MissReason.AUTH:
                    seen = files.seen(files.calls.file_bytes(fd), time.time())
                    files.index.condemn(key, seen, changed)
                return outcome
            finally:
                files.calls.close(fd)

    def _read_frame(self, fd: int, key: bytes, target: NDArray[np.uint8]) -> ReadOutcome:
        room = self._files.calls.file_bytes(fd) - HEADER_BYTES
        if room <= 0 or room % ALIGNMENT_BYTES:
            return self._files.framing.flawed("the file's length is not that of a frame")
        if room - ALIGNMENT_BYTES >= target.size:  # even the shortest payload of a file of this length is longer
            return self._too_small(fd, key, target.size)
        if not self._files.suits(target):
            body = self._files.scratch.bounce(room)
            pieces = [body]
        else:
            body = target[:room] if target.size >= room else target[: room - ALIGNMENT_BYTES]
            pieces = [body] if body.size == room else [body, self._files.scratch.tail]
        header = self._fill(fd, key, pieces, room)
        if isinstance(header, ReadOutcome):
            return header
        if header.payload_bytes > target.size:
            return _buffer_too_small(header.payload_bytes, target.size)
        return self._finish(header, target, pieces)

    def _fill(self, fd: int, key: bytes, pieces: list[NDArray[np.uint8]], room: int) -> FrameHeader | ReadOutcome:
        if read_fully(self._files.calls, fd, [self._files.scratch.header, *pieces]) != HEADER_BYTES + room:
            return self._files.framing.flawed("the file became shorter while it was read")
        header = self._files.decode(key)
        if isinstance(header, FrameHeader) and padded(header.payload_bytes) != room:
            return self._files.framing.flawed("the file's length is not what its header says")
        return header

    def _finish(self, header: FrameHeader, target: NDArray[np.uint8], pieces: list[NDArray[np.uint8]]) -> ReadOutcome:
        """Copy parts of the payload that were read into scratch memory into the target, and check the digest."""
        payload = target[: header.payload_bytes]
        first, last = pieces[0], pieces[-1]
        end = header.payload_bytes - (first.size if last is not first else 0)  # of the payload in the last piece
        if last[end:].any():
            return self._files.framing.flawed("the padding is not zero")
        stored = first[:end]
        if self._files.suits(target):
            if last is not first:
                payload[first.size :] = last[:end]
            stored = payload
        return self._files.framing.open(header, stored, payload, verify=self._files.config.verify)

    def _too_small(self, fd: int, key: bytes, nbytes: int) -> ReadOutcome:
        """The file is too long for the buffer: it holds a larger block, or is damaged."""
        header = self._files.read_header(fd, key)
        if isinstance(header, ReadOutcome):
            return header
        if frame_bytes(header.payload_bytes) != self._files.calls.file_bytes(fd):
            return self._files.framing.flawed("the file's length is not what its header says")
        return _buffer_too_small(header.payload_bytes, nbytes)


def _buffer_too_small(payload_bytes: int, nbytes: int) -> ReadOutcome:
    return ReadOutcome(
        MissReason.TRANSFER_FAILED,
        cause=Cause.BUFFER_TOO_SMALL,
        detail=f"a payload of {payload_bytes} bytes does not fit a buffer of {nbytes}",
    )
