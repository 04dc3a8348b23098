"""The system calls of the disk tier, one method each. Tests replace them to make a disk fail."""

import fcntl
import os
from collections.abc import Sequence
from typing import TypeAlias

IoVector: TypeAlias = Sequence[memoryview]


class OsCalls:
    """Passes every call on; every method raises `OSError` as the system call does. Blocking; from any thread."""

    def open(self, path: str, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
        """A file descriptor that children do not inherit. A symbolic link is refused."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def file_bytes(self, fd: int) -> int:
        """Length of an open file in bytes."""
        return os.fstat(fd).st_size

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, path: str, dir_fd: int | None = None) -> os.stat_result:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def preadv(self, fd: int, buffers: IoVector, offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: IoVector, offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def touch(self, file: int | str, time_s: float) -> None:
        """Set the timestamps of an open file or of a path, in seconds since the epoch; no symbolic link is followed."""
        times = (int(time_s * 1e9), int(time_s * 1e9))
        if isinstance(file, int):
            os.utime(file, ns=times)
        else:
            os.utime(file, ns=times, follow_symlinks=False)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str, dir_fd: int | None = None) -> None:
        os.unlink(path, dir_fd=dir_fd)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def rmdir(self, path: str, dir_fd: int | None = None) -> None:
        os.rmdir(path, dir_fd=dir_fd)

    def listdir(self, fd: int) -> list[str]:
        """Names in an open directory."""
        return os.listdir(fd)

    def try_lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file; False if another process or descriptor has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
