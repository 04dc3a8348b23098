"""Direct I/O: a probe of the alignment that a file system needs, and memory that is aligned for it."""

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers.disk.os_calls import IoVector, OsCalls
from kvortex.tiers.frame import ALIGNMENT_BYTES, HEADER_BYTES
from kvortex.tiers.payload import address_of

_HUGE_PAGE_BYTES = 2 << 20
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

MEMORY_ALIGNMENTS = (128, 512, 4096)
"""Bytes, tried in this order. Extents of the pinned pool are aligned to 128; most devices need 512 or less."""


@dataclass(frozen=True, slots=True)
class DirectIO:
    """How files are opened: `flags` is O_DIRECT or 0; buffers must be aligned to `memory_alignment` bytes."""

    flags: int
    memory_alignment: int

    @property
    def is_direct(self) -> bool:
        return self.flags != 0


BUFFERED = DirectIO(0, 1)


def probe(path: str, calls: OsCalls) -> DirectIO:
    """Write two pages to a file with O_DIRECT, and read them back.

    Args:
        path: path for the file; it is removed again.
        calls: the system calls.

    Returns:
        The smallest alignment of memory with which this works; `BUFFERED` if none does.

    Raises:
        OSError: not even an ordinary file can be made there.
    """
    calls.close(calls.open(path, os.O_CREAT | os.O_RDWR))
    try:
        return next((DirectIO(os.O_DIRECT, a) for a in MEMORY_ALIGNMENTS if _round_trip(path, a, calls)), BUFFERED)
    finally:
        calls.unlink(path)


def _round_trip(path: str, alignment: int, calls: OsCalls) -> bool:
    nbytes = 2 * ALIGNMENT_BYTES
    memory = aligned_memory(nbytes + ALIGNMENT_BYTES)
    buffer = memory[alignment % ALIGNMENT_BYTES :][:nbytes]
    pattern = np.arange(nbytes, dtype=np.uint32).astype(np.uint8)
    buffer[:] = pattern
    try:
        fd = calls.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:  # the file system has no direct I/O
        return False
    try:
        if write_fully(calls, fd, [buffer]) != nbytes:
            return False
        buffer[:] = 0
        return read_fully(calls, fd, [buffer]) == nbytes and bool((buffer == pattern).all())
    except OSError:  # not with memory of this alignment
        return False
    finally:
        calls.close(fd)


def aligned_memory(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed memory, `uint8 [nbytes]`, that starts on a page; on a huge page if it is at least as long as one.

    The kernel splits direct I/O into small pages into many requests, which halves the rate.
    """
    if nbytes < _HUGE_PAGE_BYTES:
        return np.frombuffer(mmap.mmap(-1, nbytes, flags=_PRIVATE), dtype=np.uint8)
    length = -(-nbytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    mapping = mmap.mmap(-1, length + _HUGE_PAGE_BYTES, flags=_PRIVATE)
    with contextlib.suppress(OSError):  # a kernel built without transparent huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    start = -address_of(memory) % _HUGE_PAGE_BYTES
    return memory[start : start + nbytes]


def read_fully(calls: OsCalls, fd: int, buffers: Sequence[NDArray[np.uint8]]) -> int:
    """Fill the buffers from the start of a file; returns the bytes read, fewer only if the file is shorter."""
    return _move_fully(calls.preadv, fd, buffers)


def write_fully(calls: OsCalls, fd: int, buffers: Sequence[NDArray[np.uint8]]) -> int:
    """Write the buffers to the start of a file; returns the bytes written, fewer if the system accepts no more."""
    return _move_fully(calls.pwritev, fd, buffers)


def _move_fully(move: Callable[[int, IoVector, int], int], fd: int, buffers: Sequence[NDArray[np.uint8]]) -> int:
    left, done = [buffer.data for buffer in buffers if buffer.size], 0
    while left:
        count = move(fd, left, done)
        if count <= 0:
            break
        done += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    return done


class Scratch(threading.local):
    """Aligned memory of one thread: a header, the last page of a payload, and a bounce buffer for payloads whose own
    memory is not aligned for direct I/O."""

    def __init__(self) -> None:
        pages = aligned_memory(HEADER_BYTES + ALIGNMENT_BYTES)
        self.header, self.tail = pages[:HEADER_BYTES], pages[HEADER_BYTES:]
        self._bounce = pages[:0]

    def bounce(self, nbytes: int) -> NDArray[np.uint8]:
        """The bounce buffer, `uint8 [nbytes]`, valid until the next call of this thread."""
        if self._bounce.size < nbytes:
            self._bounce = aligned_memory(nbytes)
        return self._bounce[:nbytes]
