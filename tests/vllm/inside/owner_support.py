"""An owner of a shared pool in the process of a test."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvortex.config import KVortexConfig
from kvortex.owner import Owner
from kvortex.runtime.loop_thread import LoopThread


class ServingOwner:
    """An owner on a thread of this process, with a pool of 64 MiB.

    Args:
        path: of its socket.
        changes: other settings.
    """

    def __init__(self, path: Path, **changes: Any) -> None:
        self.path = path
        self._config = KVortexConfig(**{"pool": "64MiB", **changes})
        self.thread = LoopThread()
        self.begin()

    def begin(self) -> None:
        """Start an owner, the first or another one."""
        self.owner = self.thread.run(self._start())

    async def _start(self) -> Owner:
        owner = Owner(self._config, self.path)
        owner.start()
        return owner

    @property
    def num_blocks(self) -> int:
        return len(self.owner.control.index)

    @property
    def allocated_bytes(self) -> int:
        return self.owner.control.allocator.allocated_bytes

    def flush(self) -> None:
        """Have everything written that waits for a lower tier."""
        self.thread.run(self.owner.flush(30.0))

    def end(self) -> None:
        self.thread.run(self.owner.aclose())


@contextlib.contextmanager
def serving(path: Path, **changes: Any) -> Iterator[ServingOwner]:
    """An owner that listens at a path, and ends."""
    owner = ServingOwner(path, **changes)
    try:
        yield owner
    finally:
        owner.end()
        owner.thread.stop()
