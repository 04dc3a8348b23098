"""Scans the directory of the tier, one fan-out directory at a time; blocking, called on a thread."""

import stat
from collections.abc import Callable
from dataclasses import dataclass

from kvortex.tiers.disk.directories import directory, names_in
from kvortex.tiers.disk.layout import DiskLayout, is_fan_out_name, is_namespace_name, key_of
from kvortex.tiers.disk.os_calls import OsCalls
from kvortex.tiers.store_index import IndexedBlock


@dataclass(frozen=True, slots=True)
class ScanPart:
    """One fan-out directory: the names of its namespace and itself, and its path."""

    namespace: str
    fan_out: str
    path: str


def list_parts(
    layout: DiskLayout, calls: OsCalls, on_error: Callable[[str, OSError], None], namespace: str | None = None
) -> list[ScanPart]:
    """The fan-out directories of all namespaces, or of one.

    Args:
        layout: the paths.
        calls: the system calls.
        on_error: called with the name of each namespace that cannot be read, and the error.
        namespace: directory name of the namespace; None for all.

    Raises:
        OSError: the directory above the namespaces cannot be read.
    """
    names = [namespace] if namespace is not None else names_in(calls, layout.blocks)
    parts: list[ScanPart] = []
    for name in filter(is_namespace_name, names):
        path = f"{layout.blocks}/{name}"
        try:
            fan_outs = names_in(calls, path)
        except OSError as error:
            on_error(name, error)
            continue
        parts += [ScanPart(name, fan_out, f"{path}/{fan_out}") for fan_out in fan_outs if is_fan_out_name(fan_out)]
    return parts


def read_part(part: ScanPart, calls: OsCalls, on_error: Callable[[OSError], None]) -> list[tuple[bytes, IndexedBlock]]:
    """The blocks of one fan-out directory, with the timestamps of their files; none if it is a link or a file.

    Args:
        part: the directory.
        calls: the system calls.
        on_error: called with each error of a single file, which is left out.

    Raises:
        OSError: the directory cannot be read.
    """
    found: list[tuple[bytes, IndexedBlock]] = []
    try:
        with directory(calls, part.path) as fd:
            for name in calls.listdir(fd):
                if (key := key_of(name, part.fan_out)) is None:
                    continue
                try:
                    status = calls.stat(name, fd)
                except FileNotFoundError:  # removed since the directory was read
                    continue
                except OSError as error:
                    on_error(error)
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append((key, IndexedBlock(part.namespace, status.st_size, status.st_mtime, status.st_mtime)))
    except (FileNotFoundError, NotADirectoryError):
        return found
    return found
