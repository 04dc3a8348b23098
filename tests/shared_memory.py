"""Names in /dev/shm, where other programs of the machine come and go meanwhile."""

import os
import time
from pathlib import Path

SHM = "/dev/shm"


def mapped_by(process: str | int = "self") -> set[str]:
    """Names that a living process has mapped or open; none if it is gone, or somebody else's."""
    found: set[str] = set()
    try:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            found.update(_name_in(line.split(maxsplit=5)[-1]))
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            found.update(_name_in(os.readlink(descriptor)))
    except OSError:
        pass  # it has ended while it was looked at
    return found


def left_of(names: set[str], wait_s: float = 10.0) -> set[str]:
    """Those of the names that are still there, and that no living process uses."""
    due_s = time.monotonic() + wait_s
    while True:
        used = {name for process in os.listdir("/proc") if process.isdigit() for name in mapped_by(process)}
        left = {name for name in names - used if os.path.exists(f"{SHM}/{name}")}
        if not left or time.monotonic() > due_s:
            return left
        time.sleep(0.2)


def _name_in(path: str) -> set[str]:
    is_named = path.startswith(f"{SHM}/") and not path.endswith(" (deleted)")
    return {path.removeprefix(f"{SHM}/")} if is_named else set()
