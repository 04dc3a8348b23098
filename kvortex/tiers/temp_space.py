"""Where a process writes files before they get their names; and how those of dead processes are recognised.

A writer owns a directory `tmp/<id>` and the lock of a file `tmp/<id>.lock` for as long as it lives. The system drops
the lock with the process, however it ends, so whoever gets it may clear the directory. Unlike a pid this means the
same in all containers that share the directory, and is never used again.
"""

import contextlib
import itertools
import os
import threading
import uuid

from kvortex.tiers.os_calls import OsCalls

_LOCK_SUFFIX = ".lock"
_TEMP_SUFFIX = ".tmp"


def make_directories(calls: OsCalls, path: str) -> None:
    """Create a directory and those above it, mode 0700; existing ones stay as they are. Raises `OSError`."""
    try:
        calls.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directories(calls, os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another process was quicker
            calls.mkdir(path)


class TempSpace:
    """The temporary files of one process under `parent`. Thread-safe."""

    def __init__(self, parent: str, calls: OsCalls) -> None:
        self._parent = parent
        self._calls = calls
        self._numbers = itertools.count()
        self._mutex = threading.Lock()
        self._lock_fd: int | None = None
        self._id = ""

    def open(self) -> None:
        """Become a writer, or become one again if somebody removed the directory; raises `OSError`."""
        with self._mutex:
            if self._lock_fd is not None and self._is_intact():
                return
            self._release()
            make_directories(self._calls, self._parent)
            while self._lock_fd is None:
                self._try_own()

    def new_path(self) -> str:
        """A name that nobody else uses."""
        return f"{self._parent}/{self._id}/{next(self._numbers)}{_TEMP_SUFFIX}"

    def close(self) -> None:
        """Remove the directory if it is empty and give up the lock; idempotent."""
        with self._mutex:
            if self._lock_fd is not None:
                with contextlib.suppress(OSError):  # a hung write's file stays for the next sweep
                    self._calls.rmdir(f"{self._parent}/{self._id}")
                    self._calls.unlink(self._lock_path(self._id))
            self._release()

    def sweep(self) -> int:
        """Remove what dead writers left; returns the number of files. Raises `OSError`."""
        removed = 0
        entries = {entry.name for entry in self._calls.scandir(self._parent)}
        owners = {name.removesuffix(_LOCK_SUFFIX) for name in entries}
        for owner in owners - {self._id}:
            removed += self._sweep_owner(owner)
        return removed

    # -- inside ----------------------------------------------------------------------------------------

    def _lock_path(self, owner: str) -> str:
        return f"{self._parent}/{owner}{_LOCK_SUFFIX}"

    def _try_own(self) -> None:
        owner = uuid.uuid4().hex
        fd = self._calls.open(self._lock_path(owner), os.O_CREAT | os.O_EXCL | os.O_RDWR)
        # A sweep that came before the lock has removed the file by now, or is about to: then it has the lock.
        if self._calls.try_lock(fd) and self._is_file(self._lock_path(owner)):
            self._lock_fd, self._id = fd, owner
            self._calls.mkdir(f"{self._parent}/{owner}")
        else:
            self._calls.close(fd)

    def _is_intact(self) -> bool:
        return self._is_file(self._lock_path(self._id)) and self._is_file(f"{self._parent}/{self._id}")

    def _is_file(self, path: str) -> bool:
        try:
            self._calls.stat(path)
        except FileNotFoundError:
            return False
        return True

    def _release(self) -> None:
        if self._lock_fd is not None:
            self._calls.close(self._lock_fd)
            self._lock_fd = None

    def _sweep_owner(self, owner: str) -> int:
        try:
            fd = self._calls.open(self._lock_path(owner), os.O_CREAT | os.O_RDWR)
        except FileNotFoundError:
            return 0
        try:
            return self._clear(owner) if self._calls.try_lock(fd) else 0
        finally:
            self._calls.close(fd)

    def _clear(self, owner: str) -> int:
        """Under the owner's lock."""
        directory, removed = f"{self._parent}/{owner}", 0
        with contextlib.suppress(FileNotFoundError):  # another sweep was quicker
            for entry in self._calls.scandir(directory):
                self._calls.unlink(entry.path)
                removed += 1
            self._calls.rmdir(directory)
        with contextlib.suppress(FileNotFoundError):
            self._calls.unlink(self._lock_path(owner))
        return removed
