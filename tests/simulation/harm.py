"""Records the faults injected per block: the allowed reasons of a miss."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Harm:
    """Block hashes to which faults have happened. A miss that blames a fault must find its block here."""

    failed: set[bytes] = field(default_factory=set)
    corrupted: set[bytes] = field(default_factory=set)
    late: set[bytes] = field(default_factory=set)
    hash_at: dict[int, bytes] = field(default_factory=dict)  # what a client has in a block of the cache, or wants there

    def fail(self, block_hashes: Iterable[bytes]) -> None:
        self.failed.update(block_hashes)

    def corrupt(self, block_hashes: Iterable[bytes]) -> None:
        self.corrupted.update(block_hashes)

    def be_late(self, block_hashes: Iterable[bytes]) -> None:
        self.late.update(block_hashes)

    def hashes_at(self, block_ids: Iterable[int]) -> list[bytes]:
        return [self.hash_at[b] for b in block_ids]
