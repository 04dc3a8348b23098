"""Memory that several processes of a machine share. It has no name, and is gone when the last process ends."""

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
    """All that another process needs to map the memory.

    Args:
        process_id: the process that has created it.
        descriptor: number of its file descriptor in that process.
        label: random name of the memory, to check that the descriptor is the right one.
        nbytes: size in bytes.
    """

    process_id: int
    descriptor: int
    label: str
    nbytes: int


class SharedMemory:
    """Zeroed memory, shared through a descriptor of `memfd_create`.

    No file system holds it: `/dev/shm` does not limit its size, and nothing is left behind when a process is killed.
    One process calls `create` and sends its `ticket` to the others; they call `attach` while the first has it open.
    """

    def __init__(self, descriptor: int, ticket: SharedTicket) -> None:
        self.ticket = ticket
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, nbytes: int) -> Self:
        """Create memory of `nbytes`, rounded up to whole pages.

        Raises:
            ConfigError: the system refuses that much memory.
        """
        label = f"kvortex-{secrets.token_hex(8)}"
        size = align_up(nbytes, mmap.PAGESIZE)
        try:
            descriptor = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ConfigError(f"cannot create shared memory: {error}") from error
        try:
            os.ftruncate(descriptor, size)
            # Without these a process that truncates it would kill all others at their next access.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except (OSError, OverflowError) as error:
            os.close(descriptor)
            raise ConfigError(f"cannot share {nbytes} bytes: {error}") from error
        return cls(descriptor, SharedTicket(os.getpid(), descriptor, label, size))

    @classmethod
    def attach(cls, ticket: SharedTicket) -> Self | None:
        """Open the memory of a ticket; None if it belongs to another machine, container or user."""
        path = Path(f"/proc/{ticket.process_id}/fd/{ticket.descriptor}")
        try:
            # The process with this number may be another one, with a pipe under that descriptor.
            if os.readlink(path) != f"/memfd:{ticket.label} (deleted)":
                return None
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), ticket)
        except OSError:
            return None

    @classmethod
    def received(cls, descriptor: int, label: str, nbytes: int) -> Self:
        """The memory behind a descriptor that another process has sent; it is closed with this object.

        Raises:
            ConfigError: the memory is smaller, or may shrink while it is used.
        """
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or os.fstat(descriptor).st_size < nbytes:
                raise ConfigError(f"the memory is not sealed, or has less than {nbytes} bytes")
        except (ConfigError, OSError) as error:
            os.close(descriptor)
            raise ConfigError(f"the shared memory that was received cannot be used: {error}") from error
        return cls(descriptor, SharedTicket(os.getpid(), descriptor, label, nbytes))

    @property
    def descriptor(self) -> int:
        """The file descriptor, to send it to another process; `ConfigError` if it was closed."""
        return self._open_descriptor()

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """Map a part of the memory. The mapping stays valid after `close`.

        Args:
            offset: start of the part in bytes, a multiple of the page size.
            nbytes: its size in bytes.

        Raises:
            ConfigError: there is no address space for it, or the memory was closed.
        """
        try:
            return mmap.mmap(self._open_descriptor(), nbytes, flags=mmap.MAP_SHARED, offset=offset)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot map {nbytes} bytes of shared memory: {error}") from error

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude the other processes that use this, too. The kernel ends it if the process dies."""
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
        """Close the descriptor; mappings stay valid. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
