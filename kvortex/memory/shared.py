"""Memory that several processes of one machine map, without a name: when the last of them ends, it is gone."""

import contextlib
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvortex.arithmetic import align_up
from kvortex.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SharedTicket:
    """What another process needs to map the memory: whose descriptor to open, and what must be behind it."""

    process_id: int
    descriptor: int
    label: str
    nbytes: int


class SharedMemory:
    """`nbytes` of zeroed memory, shared through a descriptor of `memfd_create`.

    No file system holds it: its size is not bounded by `/dev/shm`, and nothing stays behind when a process is
    killed. One process calls `create` and hands its `ticket` to the others, which call `attach` while the first
    still has it open.
    """

    def __init__(self, descriptor: int, ticket: SharedTicket) -> None:
        self.ticket = ticket
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, nbytes: int) -> Self:
        """New memory, rounded up to whole pages.

        Raises:
            ConfigError: the machine cannot give that much.
        """
        label = f"kvortex-{secrets.token_hex(8)}"
        size = align_up(nbytes, mmap.PAGESIZE)
        try:
            descriptor = os.memfd_create(label)
        except OSError as error:
            raise ConfigError(f"cannot create shared memory: {error}") from error
        try:
            os.ftruncate(descriptor, size)
        except (OSError, OverflowError) as error:
            os.close(descriptor)
            raise ConfigError(f"cannot share {nbytes} bytes: {error}") from error
        return cls(descriptor, SharedTicket(os.getpid(), descriptor, label, size))

    @classmethod
    def attach(cls, ticket: SharedTicket) -> Self | None:
        """The memory of a ticket; None if this process cannot reach it: another machine, container or user."""
        path = Path(f"/proc/{ticket.process_id}/fd/{ticket.descriptor}")
        try:
            # A process of that number on this machine may be quite another one, with a pipe under that descriptor.
            if os.readlink(path) != f"/memfd:{ticket.label} (deleted)":
                return None
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), ticket)
        except OSError:
            return None

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """A mapping of `nbytes` from `offset`, a multiple of the page size; it outlives `close`.

        Raises:
            ConfigError: no address space for it, or closed.
        """
        try:
            return mmap.mmap(self._open_descriptor(), nbytes, flags=mmap.MAP_SHARED, offset=offset)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot map {nbytes} bytes of shared memory: {error}") from error

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the others off that ask for the same; the kernel gives it back for a process that dies."""
        descriptor = self._open_descriptor()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ConfigError("the shared memory was closed")
        return self._descriptor

    def close(self) -> None:
        """Give the descriptor up; mappings stay. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
