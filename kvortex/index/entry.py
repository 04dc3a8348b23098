"""A committed block, and the pins that hold it in place."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from kvortex.errors import EngineStateError

L = TypeVar("L")
"""Where a block lies: an extent, a file, ... The index only hands it back."""


class Entry(Generic[L]):
    """A committed block. Read-only for callers; stays valid while they hold a pin, even when dropped."""

    __slots__ = ("digest", "dropped", "key", "location", "nbytes", "pins")

    def __init__(self, key: bytes, location: L, nbytes: int, digest: int) -> None:
        self.key = key
        self.location = location
        self.nbytes = nbytes
        self.digest = digest
        self.pins = 0
        self.dropped = False

    def __repr__(self) -> str:
        state = f"pins={self.pins}{', dropped' if self.dropped else ''}"
        return f"Entry({self.key.hex()[:12]}, {self.location!r}, nbytes={self.nbytes}, {state})"


def release_pins(entries: Sequence[Entry[L]]) -> list[Entry[L]]:
    """Take one pin per time named, all or none; the entries that have none left."""
    idle: list[Entry[L]] = []
    for position, entry in enumerate(entries):
        if entry.pins <= 0:
            for released in entries[:position]:
                released.pins += 1
            raise EngineStateError(f"block {entry.key.hex()[:12]} is not pinned")
        entry.pins -= 1
        if not entry.pins:
            idle.append(entry)
    return idle
