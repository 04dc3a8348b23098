"""Temporary files: a process writes a file here before it gets its name. Those of dead processes are removed.

A writer owns a directory `tmp/<id>` and the lock of a file `tmp/<id>.lock` as long as it lives. The system releases the
lock when the process ends, in whatever way, so a process that gets the lock may clear the directory. Unlike a process
id, this works in all containers that share the directory, and an id is never used again.

Only files that a writer has certainly made are removed: an id has 32 hexadecimal digits, its lock is a file that begins
with `LOCK_CONTENT`, its directory is no symbolic link, and the files in it have names that writers give. Everything
else in `tmp` is not ours, and stays.
"""

import contextlib
import itertools
import os
import re
import stat
import threading
import uuid
from collections.abc import Callable
from typing import Final

from kvortex.tiers.disk.directories import directory, make_directories, names_in
from kvortex.tiers.disk.os_calls import OsCalls

LOCK_CONTENT: Final = b"kvortex writer\n"
_LOCK_SUFFIX = ".lock"
_TEMP_SUFFIX = ".tmp"
_LOCK_NAME = re.compile(r"([0-9a-f]{32})\.lock")
_TEMP_NAME = re.compile(r"[0-9]+\.tmp")


class TempSpace:
    """The temporary files of one process. Thread-safe.

    Args:
        parent: the directory `tmp` of the tier.
        calls: the system calls.
    """

    def __init__(self, parent: str, calls: OsCalls) -> None:
        self._parent = parent
        self._calls = calls
        self._numbers = itertools.count()
        self._mutex = threading.Lock()
        self._lock_fd: int | None = None
        self._id = ""

    def open(self) -> None:
        """Become a writer, or become one again if the directory was removed. Raises `OSError`."""
        with self._mutex:
            if self._lock_fd is not None and self._is_intact():
                return
            self._release()
            make_directories(self._calls, self._parent)
            while self._lock_fd is None:
                self._try_own()

    def new_path(self) -> str:
        """A path that no other file has had."""
        return f"{self._parent}/{self._id}/{next(self._numbers)}{_TEMP_SUFFIX}"

    def close(self) -> None:
        """Remove the directory if it is empty, and release the lock; idempotent."""
        with self._mutex:
            if self._lock_fd is not None:
                with contextlib.suppress(OSError):  # a hung write's file stays for the next sweep
                    self._calls.rmdir(f"{self._parent}/{self._id}")
                    self._calls.unlink(self._lock_path(self._id))
            self._release()

    def sweep(self, on_error: Callable[[OSError], None]) -> int:
        """Remove the files of dead writers.

        Args:
            on_error: called with each error; the sweep goes on after it.

        Returns:
            The number of removed files.
        """
        removed = 0
        try:
            owners = [found[1] for name in names_in(self._calls, self._parent) if (found := _LOCK_NAME.fullmatch(name))]
        except OSError as error:
            on_error(error)
            return 0
        for owner in owners:
            if owner != self._id:
                try:
                    removed += self._sweep_owner(owner)
                except FileNotFoundError:  # another sweep has removed it
                    continue
                except OSError as error:
                    on_error(error)
        return removed

    # -- inside ----------------------------------------------------------------------------------------

    def _lock_path(self, owner: str) -> str:
        return f"{self._parent}/{owner}{_LOCK_SUFFIX}"

    def _try_own(self) -> None:
        owner = uuid.uuid4().hex
        fd = self._calls.open(self._lock_path(owner), os.O_CREAT | os.O_EXCL | os.O_RDWR)
        owned = False
        try:
            # A sweep may come between the creation and the lock. Then it has the lock, or has removed the file.
            if self._calls.try_lock(fd) and self._is_there(self._lock_path(owner)):
                with contextlib.suppress(OSError):  # a full disk can still be read; then a sweep leaves the files
                    self._calls.pwritev(fd, [memoryview(LOCK_CONTENT)], 0)
                self._calls.mkdir(f"{self._parent}/{owner}")
                self._lock_fd, self._id = fd, owner
                owned = True
        finally:
            if not owned:
                self._calls.close(fd)

    def _is_intact(self) -> bool:
        return self._is_there(self._lock_path(self._id)) and self._is_there(f"{self._parent}/{self._id}")

    def _is_there(self, path: str) -> bool:
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
        with directory(self._calls, self._parent) as parent_fd:
            # Non-blocking, because a file with the name of a lock may be a pipe.
            fd = self._calls.open(f"{owner}{_LOCK_SUFFIX}", os.O_RDONLY | os.O_NONBLOCK, dir_fd=parent_fd)
            try:
                content = self._lock_content(fd)
                # An empty lock belongs to a writer that died before it had made its directory.
                if content not in (LOCK_CONTENT, b"") or not self._calls.try_lock(fd):
                    return 0
                return self._clear(parent_fd, owner, with_files=content == LOCK_CONTENT)
            finally:
                self._calls.close(fd)

    def _lock_content(self, fd: int) -> bytes | None:
        """The content of a lock; None if it is no regular file."""
        if not stat.S_ISREG(self._calls.fstat(fd).st_mode):
            return None
        content = bytearray(len(LOCK_CONTENT) + 1)
        count = self._calls.preadv(fd, [memoryview(content)], 0)
        return bytes(content[:count])

    def _clear(self, parent_fd: int, owner: str, *, with_files: bool) -> int:
        """Clear an owner's directory under its lock. The file of the lock goes last: it stays if anything is left."""
        removed = 0
        with contextlib.suppress(FileNotFoundError):  # the writer died before it had made its directory
            if with_files:
                with directory(self._calls, owner, parent_fd) as fd:
                    removed = self._remove_files(fd)
            self._calls.rmdir(owner, parent_fd)
        self._calls.unlink(f"{owner}{_LOCK_SUFFIX}", parent_fd)
        return removed

    def _remove_files(self, fd: int) -> int:
        removed = 0
        for name in filter(_TEMP_NAME.fullmatch, self._calls.listdir(fd)):
            if stat.S_ISREG(self._calls.stat(name, fd).st_mode):
                self._calls.unlink(name, fd)
                removed += 1
        return removed
