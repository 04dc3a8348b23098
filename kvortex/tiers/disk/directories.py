"""Directories of a disk tier: they are made for this user alone, and refused if others can write to them."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from kvortex.errors import ConfigError
from kvortex.tiers.disk.os_calls import OsCalls

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def make_directories(calls: OsCalls, path: str) -> None:
    """Create a directory and those above it, mode 0700; existing ones stay as they are. Raises `OSError`."""
    try:
        calls.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directories(calls, os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another process has made it
            calls.mkdir(path)


@contextlib.contextmanager
def directory(calls: OsCalls, path: str, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory. A symbolic link is refused. Raises `OSError`."""
    fd = calls.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        calls.close(fd)


def names_in(calls: OsCalls, path: str) -> list[str]:
    """The names in a directory; none if it does not exist, or is a symbolic link or a file. Raises `OSError`."""
    try:
        with directory(calls, path) as fd:
            return calls.listdir(fd)
    except OSError as error:
        if error.errno in _NO_DIRECTORY:
            return []
        raise


def check_owned(calls: OsCalls, path: str) -> None:
    """Refuse a directory in which another user could replace blocks by other files or links.

    Raises:
        ConfigError: the directory belongs to another user, its mode lets others write, or it is a link or a file. The
            message says what to do.
        OSError: the directory cannot be opened.
    """
    try:
        with directory(calls, path) as fd:
            status = calls.fstat(fd)
    except NotADirectoryError as error:
        raise ConfigError(
            f"cannot keep blocks in {path}: it is a file or a symbolic link, and links are not followed there: "
            f"move it away, or name another directory"
        ) from error
    inside = f"or name a directory below it that does not exist yet ({path}/kvortex): it is made for this user alone"
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}, and blocks could be replaced: "
            f"change its owner, {inside}"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(
            f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):04o}), and blocks could be replaced: "
            f"run chmod go-w {path}, {inside}"
        )
