"""How much memory this process may still take: a pool that is larger is killed without a message while it is pinned."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvortex.config import MIB, format_bytes
from kvortex.errors import ConfigError

logger = logging.getLogger(__name__)

_TIGHT_SHARE = 0.05  # of what is available: what a pool should leave to the process itself, at least
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # counted as used, given back when needed
_RECLAIMABLE_V1 = ("total_inactive_file", "total_active_file")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One bound on this process's memory.

    Args:
        source: the file that sets it.
        limit_bytes: in all.
        available_bytes: that are left of it; caches that the kernel gives back when needed count as left.
    """

    source: str
    limit_bytes: int
    available_bytes: int


def check_memory(demand_bytes: int, *, ranks: int = 1, root: Path = Path("/")) -> None:
    """Refuse a pool that neither the machine nor the container can hold.

    To be called before any of the ranks has taken its pool: what one has taken is missing from what is available.

    Args:
        demand_bytes: the pool of one rank.
        ranks: processes of this machine and container that take as much each; 1 where they share the pool.
        root: where `proc` and the control groups are looked for.

    Raises:
        ConfigError: it does not fit; the message names limit, demand, ranks and what would fit.
    """
    limits = memory_limits(root)
    if not limits:
        return
    tightest = min(limits, key=lambda limit: limit.available_bytes)
    total_bytes = demand_bytes * ranks
    wanted = f"a pool of {format_bytes(demand_bytes)}"
    if ranks > 1:
        wanted = f"{wanted} for each of {ranks} ranks, {format_bytes(total_bytes)} in all,"
    given = (
        f"{format_bytes(tightest.available_bytes)} are available, of {format_bytes(tightest.limit_bytes)} "
        f"by {tightest.source}"
    )
    if total_bytes > tightest.available_bytes:
        fits = tightest.available_bytes // ranks // MIB
        raise ConfigError(
            f"{wanted} does not fit: {given}; "
            f"set pool.bytes to less than {fits}MiB, or allow the container or machine more memory"
        )
    if total_bytes > tightest.available_bytes * (1 - _TIGHT_SHARE):
        logger.warning("%s leaves next to nothing for all else: %s", wanted, given)


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """What bounds this process: the machine, and every control group that it is in, of either version."""
    return [*_of_machine(root), *_of_groups(root)]


def _of_machine(root: Path) -> Iterator[MemoryLimit]:
    figures = _figures(root / "proc/meminfo", unit=1024)
    if "MemTotal" in figures and "MemAvailable" in figures:
        yield MemoryLimit("/proc/meminfo", figures["MemTotal"], figures["MemAvailable"])


def _of_groups(root: Path) -> Iterator[MemoryLimit]:
    for mount in _mounts(root):
        for folder in mount.folders(root):
            if mount.is_unified:
                limit = _of_group(folder, "memory.max", "memory.current", _RECLAIMABLE)
            else:
                limit = _of_group(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", _RECLAIMABLE_V1)
            if limit is not None:
                yield limit


def _of_group(folder: Path, limit_name: str, usage_name: str, reclaimable: tuple[str, ...]) -> MemoryLimit | None:
    limit_bytes, used_bytes = _number(folder / limit_name), _number(folder / usage_name)
    if limit_bytes is None or used_bytes is None:
        return None  # the root of the hierarchy, no limit ("max"), or a group without the memory controller
    figures = _figures(folder / "memory.stat")
    held_bytes = used_bytes - sum(figures.get(name, 0) for name in reclaimable)
    return MemoryLimit(str(folder / limit_name), limit_bytes, max(0, limit_bytes - max(0, held_bytes)))


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy that counts memory, and where this process is in it."""

    is_unified: bool
    top: str  # the group that is mounted
    point: str
    group: str  # this process's

    def folders(self, root: Path) -> Iterator[Path]:
        """This process's group and those above it, as far as they can be seen."""
        point = root / self.point.lstrip("/")
        top = self.top.rstrip("/")
        # In a container without a namespace of its own for groups, paths are the machine's and the mount is not.
        inside = self.group[len(top) :] if f"{self.group}/".startswith(f"{top}/") else ""
        folder = point / inside.strip("/")
        while folder != point:
            yield folder
            folder = folder.parent
        yield point


def _mounts(root: Path) -> Iterator[_Mount]:
    """Raises nothing: a machine without control groups has no such limits."""
    groups = _own_groups(root)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ")[:3] if after.count(" ") >= 2 else ("", "", "")
        is_unified = kind == "cgroup2"
        if not is_unified and not (kind == "cgroup" and "memory" in options.split(",")):
            continue
        top, point = (_unescape(text) for text in before.split(" ")[3:5])
        group = groups.get("" if is_unified else "memory")
        if group is not None and ".." not in f"{group}{top}":
            yield _Mount(is_unified, top, point, group)
        else:  # outside of what this process can see: the mounted group itself bounds it, if any does
            yield _Mount(is_unified, top, point, top)


def _own_groups(root: Path) -> dict[str, str]:
    """This process's group by controller; `""` is the unified hierarchy."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not there, or not for us to read: then it sets no limit that could be named
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _figures(path: Path, unit: int = 1) -> dict[str, int]:
    """`name value` or `name: value kB` a line."""
    words = [line.replace(":", " ").split() for line in _lines(path)]
    return {parts[0]: int(parts[1]) * unit for parts in words if len(parts) >= 2 and parts[1].isdigit()}
