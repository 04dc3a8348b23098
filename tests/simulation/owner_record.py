"""The independent model: which bytes belong to which block, and which of them must never be seen again."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORD = 8
MAX_WORDS = 1 << 12
"""Words of a block, at most."""
_FIRST = 0x5EED << 44


class Identity(NamedTuple):
    """A block as clients mean it: its namespace, its key there, and how its client had forgotten things before."""

    namespace: int
    key: bytes
    token: int


@dataclass(slots=True, eq=False)
class Written:
    """What one save has written of one block.

    Attributes:
        identity: the block.
        pool_key: its key in the owner's index.
        begun: when the save was planned, in ticks.
        is_forgotten: the client has forgotten it while the save was in flight.
    """

    identity: Identity
    pool_key: bytes
    begun: int
    is_forgotten: bool = False


class Record:
    """Everything that was ever written, and what was forgotten since. A tick is a save or something forgotten."""

    def __init__(self) -> None:
        self._written: list[Written] = []
        self._ticks = 0
        self._forgotten: dict[Identity, int] = {}
        self._cleared: dict[int, int] = {}

    def tick(self) -> int:
        """A new time."""
        self._ticks += 1
        return self._ticks

    def write(self, identity: Identity, pool_key: bytes) -> int:
        """A save of a block begins; returns the number of its content."""
        self._written.append(Written(identity, pool_key, self.tick()))
        return len(self._written) - 1

    def __getitem__(self, number: int) -> Written:
        return self._written[number]

    def forget(self, identities: Iterable[Identity], begun: int) -> None:
        """What saves had begun to write before that time must not be seen any more."""
        self._forgotten.update((identity, max(begun, self._forgotten.get(identity, 0))) for identity in identities)

    def clear(self, namespace: int, begun: int) -> None:
        """The same for all blocks of a namespace."""
        self._cleared[namespace] = max(begun, self._cleared.get(namespace, 0))

    def least(self, identity: Identity) -> int:
        """What may be seen of a block was written by a save that began no earlier than this."""
        return max(self._forgotten.get(identity, 0), self._cleared.get(identity.namespace, 0))

    def is_stale(self, written: Written) -> bool:
        """Whether it must not be seen any more."""
        return written.is_forgotten or written.begun < self.least(written.identity)

    def written_in(self, payload: NDArray[np.uint8]) -> Written | None:
        """What a payload, `uint8 [n]`, holds; None if that is not one whole content."""
        first = int(payload[:WORD].view(np.uint64)[0]) - _FIRST
        number, rest = divmod(first, MAX_WORDS)
        if rest or not 0 <= number < len(self._written) or not np.array_equal(payload, content(number, payload.size)):
            return None
        return self._written[number]


def content(number: int, nbytes: int) -> NDArray[np.uint8]:
    """The bytes that a save writes, `uint8 [nbytes]`: no two words of any two contents are equal."""
    words = np.arange(nbytes // WORD, dtype=np.uint64) + np.uint64(_FIRST + number * MAX_WORDS)
    return words.view(np.uint8)
