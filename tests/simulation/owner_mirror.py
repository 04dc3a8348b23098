"""What a client that publishes events believes of the pool."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.owner.control import RemoteControl


class Mirror:
    """Where blocks are, from what the owner tells. A connection that is lost takes all of it away.

    Args:
        control: the client's; it is watched from now on.
        complain: is told what is wrong.

    Raises:
        OwnerError: the owner is lost.
    """

    def __init__(self, control: RemoteControl, complain: Callable[[str], None]) -> None:
        self._control = control
        self._complain = complain
        self._at: set[int] = set()
        self._connection = self._present
        control.watch(self._removed)

    @property
    def _present(self) -> tuple[str, int]:
        return self._control.client.label, self._control.client.generation

    def _removed(self, offsets: NDArray[np.int64]) -> None:
        self._at.difference_update(offsets.tolist())

    def _forget_if_lost(self) -> None:
        if self._connection != self._present:
            self._connection = self._present
            self._at.clear()

    def planned(self, offsets: Sequence[int]) -> None:
        """The client gets these extents: it must have been told that what was there has gone."""
        self._forget_if_lost()
        if not self._at.isdisjoint(offsets):
            self._complain(f"a client gets extents at {offsets}, and was not told that what was there has gone")

    def saved(self, keys: NDArray[np.uint64]) -> None:
        """A save has ended: ask where its blocks are."""
        offsets = self._control.places(keys)
        self._forget_if_lost()
        self._at.update(offsets[offsets >= 0].tolist())
        self._control.take_events()
