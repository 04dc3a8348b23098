"""Records accesses to the pool's bytes and detects conflicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.index import FORM_0
from kvortex.planes.control import ControlPlane


@dataclass(eq=False, slots=True)
class Use:
    """Bytes that a transfer or a tier may touch now; `writes` tells which way."""

    who: str
    offset: int
    nbytes: int
    writes: bool


class Ledger:
    """Watches one control plane: what is freed or made visible must be in nobody's hands.

    `complain` is told what is wrong, `on_visible` the slots, offsets, forms and digests that become visible.
    """

    def __init__(self, control: ControlPlane, complain: Callable[[str], None], on_visible: Callable[..., None]) -> None:
        self.uses: set[Use] = set()
        self.changes = 0  # of anything that the invariants speak of
        self._complain = complain
        self._on_visible = on_visible
        self._allocator = control.allocator
        self._free_many, self._commit = control.allocator.free_many, control.index.commit
        control.allocator.free_many = self._watch_free  # type: ignore[method-assign]
        control.index.commit = self._watch_commit  # type: ignore[method-assign]

    def begin(self, who: str, offset: int, nbytes: int, *, writes: bool) -> Use:
        new = Use(who, offset, nbytes, writes)
        self.changes += 1
        if offset not in self._allocator._allocated:
            self._complain(f"{who} is given bytes at {offset} that nobody has allocated")
        for use in self.uses:
            if (writes or use.writes) and offset < use.offset + use.nbytes and use.offset < offset + nbytes:
                self._complain(f"{who} and {use.who} have the bytes at {offset} at the same time")
        self.uses.add(new)
        return new

    def end(self, use: Use) -> None:
        self.changes += 1
        self.uses.remove(use)

    def _watch_free(self, offsets: Sequence[int] | NDArray[np.int64]) -> None:
        self.changes += 1
        freed = set(np.asarray(offsets).tolist())
        for use in self.uses:
            if use.offset in freed:
                self._complain(f"the extent at {use.offset} is freed, and {use.who} still touches it")
        self._free_many(offsets)

    def _watch_commit(self, slots: Any, offsets: Any, nbytes: Any, digests: Any, forms: Any = FORM_0) -> Any:
        self.changes += 1
        for use in self.uses:
            if use.writes and use.offset in set(np.asarray(offsets).tolist()):
                self._complain(f"the block at {use.offset} becomes visible while {use.who} writes it")
        unseen = self._commit(slots, offsets, nbytes, digests, forms)
        self._on_visible(slots, offsets, forms, digests)
        return unseen
