"""Settings of the disk tier."""

import os
from dataclasses import dataclass

from kvortex.config.fields import conform, require


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTierConfig:
    """Sizes in bytes, times in seconds. Values are checked on construction.

    Args:
        path: directory of the tier; `~` is the user's home. If it does not exist it is created with mode 0700. Any
            number of processes may share it, and should then have the same capacity.
        capacity_bytes: bytes that the files of all namespaces and processes may take together.
        read_threads: reads in flight. Choose the queue depth at which the device reaches its full rate.
        write_threads: writes in flight.
        direct: whether to use O_DIRECT. None uses it if a probe at start finds that it works; True requires it; False
            never uses it. Without it the page cache holds a second copy of blocks that are in the pinned pool.
        fsync: flush a block to the device before its file gets its name. Without it a crash of the machine (not of the
            process) may lose the last blocks; they are misses then, never wrong bytes.
        verify: check the payload's digest in every read. If False, the caller, who gets the digest, has to check it.
        touch_interval_s: seconds between two updates of a file's time of use, at least. After a restart the order of
            eviction is wrong by this much.
        rescan_interval_s: seconds between two scans of the directory, in which other processes write and delete too.
            None scans at start only.
        close_timeout_s: seconds that closing waits for I/O in progress.

    Raises:
        ConfigError: a value is out of range or has the wrong type.
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
