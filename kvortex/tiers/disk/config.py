"""Settings of the disk tier."""

import os
from dataclasses import dataclass

from kvortex.config.fields import conform, require


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTierConfig:
    """Sizes in bytes, times in seconds; checked when made.

    Args:
        path: directory of the tier, `~` being the user's home; created, mode 0700, if it is not there. Any number of
            processes may share it, and should then agree on the capacity.
        capacity_bytes: bytes that all files together may take, of all namespaces and processes.
        read_threads: reads in flight. About the queue depth at which the device reaches its rate.
        write_threads: writes in flight.
        direct: O_DIRECT: None uses it where a probe at start finds that it works, False never. The page cache would
            keep a second copy of what the pinned pool keeps already.
        fsync: bring a block to the device before it gets its name. Without it a crash of the machine (not of the
            process) may lose the last blocks; they are misses then, never wrong bytes.
        verify: check the payload's digest in every read. False leaves it to the caller, who gets the digest.
        touch_interval_s: a block's file gets the time of its last use at most this often, so that the order of
            eviction survives a restart with that error.
        rescan_interval_s: how often the directory is compared with what is known of it, since other processes write
            and delete there too. None: at start only.
        close_timeout_s: how long closing waits for I/O that is under way.
    """

    path: str | os.PathLike[str]
    capacity_bytes: int
    read_threads: int = 8
    write_threads: int = 8
    direct: bool | None = None
    fsync: bool = False
    verify: bool = True
    touch_interval_s: float = 60.0
    rescan_interval_s: float | None = 300.0
    close_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        conform(self, paths=("path",))
        for name in ("capacity_bytes", "read_threads", "write_threads"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("touch_interval_s", "close_timeout_s"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        interval_s = self.rescan_interval_s
        require(interval_s is None or interval_s > 0, f"rescan_interval_s must be positive or None, got {interval_s}")
        require(self.path != "", "path must name a directory")
