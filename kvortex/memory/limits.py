"""Memory limits of this process. The kernel kills a process without a message if it pins a pool beyond its limit."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvortex.config import MIB, format_bytes
from kvortex.errors import ConfigError

logger = logging.getLogger(__name__)

_TIGHT_SHARE = 0.05  # share of the available memory that a pool should leave to the process itself
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # used, but the kernel reclaims it when needed
_RECLAIMABLE_V1 = ("total_inactive_file", "total_active_file")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One limit on the memory of this process.

    Args:
        source: the file that states it.
        limit_bytes: bytes that may be used in all.
        available_bytes: bytes of these that are free, or used by caches that the kernel reclaims when needed.
    """

    source: str
    limit_bytes: int
    available_bytes: int


def check_memory(demand_bytes: int, *, ranks: int = 1, root: Path = Path("/")) -> None:
    """Refuse a pool that does not fit the memory of the machine or of the container.

    Call this before any of the ranks has allocated its pool, because a pool that was allocated is not available.

    Args:
        demand_bytes: bytes of one rank's pool.
        ranks: number of such pools in this machine and container; 1 if the ranks share one.
        root: directory in which `proc` and the control groups are mounted.

    Raises:
        ConfigError: it does not fit; the message names limit, demand, ranks and the size that would fit.
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
        logger.warning("%s leaves next to nothing for the rest of the process: %s", wanted, given)


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The memory limits of this process: of the machine, and of every control group (v1 or v2) that it is in."""
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
    """A mounted hierarchy of control groups that counts memory, and the group of this process in it."""

    is_unified: bool
    top: str  # the group that is mounted
    point: str
    group: str  # this process's

    def folders(self, root: Path) -> Iterator[Path]:
        """The folders of this process's group and of those above it, as far as they are mounted."""
        point = root / self.point.lstrip("/")
        top = self.top.rstrip("/")
        # In a container without a control-group namespace, paths are those of the machine, but the mount is not.
        inside = self.group[len(top) :] if f"{self.group}/".startswith(f"{top}/") else ""
        folder = point / inside.strip("/")
        while folder != point:
            yield folder
            folder = folder.parent
        yield point


def _mounts(root: Path) -> Iterator[_Mount]:
    """The mounted hierarchies that count memory; none on a machine without control groups."""
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
        else:  # this process's group is not mounted here: only the mounted group itself can limit it
            yield _Mount(is_unified, top, point, top)


def _own_groups(root: Path) -> dict[str, str]:
    """The group of this process by controller; `""` is the unified hierarchy."""
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
    except OSError:  # it does not exist, or cannot be read: then it states no limit
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _figures(path: Path, unit: int = 1) -> dict[str, int]:
    """Parse lines `name value` or `name: value kB`; values are multiplied by `unit`."""
    words = [line.replace(":", " ").split() for line in _lines(path)]
    return {parts[0]: int(parts[1]) * unit for parts in words if len(parts) >= 2 and parts[1].isdigit()}
