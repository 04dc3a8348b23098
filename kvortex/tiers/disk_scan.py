"""Finding out what lies in the directory, one fan-out directory at a time: blocking, called on a thread."""

import stat
from dataclasses import dataclass

from kvortex.tiers.disk_index import IndexedBlock
from kvortex.tiers.disk_layout import DiskLayout, is_namespace_name, key_of
from kvortex.tiers.os_calls import OsCalls

_FAN_OUT_LENGTH = 2


@dataclass(frozen=True, slots=True)
class ScanPart:
    """One fan-out directory."""

    namespace: str
    fan_out: str
    path: str


def list_parts(layout: DiskLayout, calls: OsCalls, namespace: str | None = None) -> list[ScanPart]:
    """The fan-out directories of all namespaces, or of one. Raises `OSError` unless a directory is just not there."""
    names = [namespace] if namespace is not None else _names(calls, layout.blocks)
    parts: list[ScanPart] = []
    for name in filter(is_namespace_name, names):
        directory = f"{layout.blocks}/{name}"
        parts += [
            ScanPart(name, fan_out, f"{directory}/{fan_out}")
            for fan_out in _names(calls, directory)
            if len(fan_out) == _FAN_OUT_LENGTH
        ]
    return parts


def read_part(part: ScanPart, calls: OsCalls) -> list[tuple[bytes, IndexedBlock]]:
    """The blocks of one directory, with the times of their files. Raises `OSError` if it cannot be read."""
    found: list[tuple[bytes, IndexedBlock]] = []
    try:
        entries = calls.scandir(part.path)
    except FileNotFoundError:
        return found
    for entry in entries:
        if (key := key_of(entry.name, part.fan_out)) is None:
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # removed since the directory was read
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((key, IndexedBlock(part.namespace, status.st_size, status.st_mtime, status.st_mtime)))
    return found


def _names(calls: OsCalls, path: str) -> list[str]:
    try:
        return [entry.name for entry in calls.scandir(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
