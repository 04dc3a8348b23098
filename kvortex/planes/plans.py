"""Plans of saves, loads and fetches, and what comes of their blocks. Plain data: an owner's plans are the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvortex.index import BUSY, MISS_REASONS, RESERVED, STORED, Pins
from kvortex.types import Direction, MissReason, SaveOutcome, TransferPlan

P = TypeVar("P")
NOT_PLANNED: Final = -1
"""The state of a block for which nobody could be asked."""

# Outcomes of a save's blocks that do not move. A reservation without room is aborted.
_NOT_MOVED = {
    RESERVED: SaveOutcome.NO_SPACE,
    STORED: SaveOutcome.ALREADY_STORED,
    BUSY: SaveOutcome.PENDING,
    NOT_PLANNED: SaveOutcome.FAILED,
}


class SavePlan(NamedTuple):
    """A save between reservation and commit. The call has `n` blocks; `m` of them move.

    Attributes:
        transfer: the transfer of the blocks that move.
        states: answers of the reservation, `int64 [n]`.
        slots: slots in the index of the blocks that move, `int64 [m]`.
        nbytes: sizes of their extents, `int64 [m]`, or one size for all, `int64 [1]`.
        placed: their positions in the call, `intp [m]`; None for the first `m` of the reserved blocks.
    """

    transfer: TransferPlan
    states: NDArray[np.int64]
    slots: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    placed: NDArray[np.intp] | None = None

    @property
    def positions(self) -> NDArray[np.intp]:
        """Positions in the call of the blocks that move, `intp [m]`.

        If there was not enough room for all, `plan_save` gave the reservations of the last ones up.
        """
        if self.placed is not None:
            return self.placed
        reserved = np.flatnonzero(self.states == RESERVED)
        return reserved[: len(self.slots)]


class LoadPlan(NamedTuple):
    """A load between pin and unpin. The hits move.

    Attributes:
        transfer: the transfer of the hits.
        pins: answers of the index for all blocks of the call.
    """

    transfer: TransferPlan
    pins: Pins

    @classmethod
    def of_pins(cls, pins: Pins, block_ids: NDArray[np.int32], has_forms: bool) -> Self:
        """The load of what is pinned.

        Args:
            pins: answers of the index for all `n` blocks of the call.
            block_ids: their ids in the paged cache, `int32 [n]`.
            has_forms: whether blocks can have another form than 0.
        """
        forms = pins.forms.astype(np.uint8) if has_forms else None
        plan = cls(TransferPlan(Direction.LOAD, block_ids, pins.offsets, forms), pins)
        if pins.num_hits < len(block_ids):
            plan = plan._replace(transfer=plan.transfer._replace(block_ids=block_ids[plan.positions]))
        return plan

    @property
    def positions(self) -> NDArray[np.intp]:
        """Positions in the call of the blocks that move, `intp [m]`."""
        return np.flatnonzero(self.pins.slots >= 0)


class Planned(Generic[P]):
    """A plan that somebody else may still be working out.

    Args:
        work: gives the plan; called once.
    """

    def __init__(self, work: Callable[[], P]) -> None:
        self._work: Callable[[], P] | None = work
        self._plan: P | None = None

    @classmethod
    def made(cls, plan: P) -> Self:
        """One that is there already."""
        planned = cls(lambda: plan)
        planned.result()
        return planned

    @property
    def is_made(self) -> bool:
        """True if `result` does not wait."""
        return self._work is None

    def result(self) -> P:
        """Wait for the plan."""
        if self._work is not None:
            self._plan, self._work = self._work(), None
        assert self._plan is not None
        return self._plan


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Blocks in flight from a lower tier: positions in the call, slots in the index, offsets of extents, forms."""

    positions: NDArray[np.intp]
    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]
    forms: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """Blocks that are not evicted until `release`: positions in the call, and their entries in the index."""

    positions: NDArray[np.intp]
    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digests: NDArray[np.uint64]
    forms: NDArray[np.int64]


def load_outcomes(
    plan: LoadPlan, intact: NDArray[np.bool_] | None = None, succeeded: NDArray[np.bool_] | None = None
) -> tuple[Sequence[MissReason | None], NDArray[np.bool_] | None]:
    """The outcomes of a load; arguments as in `ControlPlane.finish_load`.

    Returns:
        The outcomes of all `n` blocks of the call, None for a hit; and which of the `m` blocks that moved are corrupt,
        `bool [m]`, None if none is.
    """
    pins, intact, succeeded = plan.pins, unless_all(intact), unless_all(succeeded)
    if intact is None and succeeded is None and pins.num_hits == len(pins):
        return [None] * pins.num_hits, None
    everything = np.ones(pins.num_hits, dtype=np.bool_)
    intact, succeeded = everything if intact is None else intact, everything if succeeded is None else succeeded
    corrupt = succeeded & ~intact
    outcomes: list[MissReason | None] = [MISS_REASONS[reason] for reason in pins.reasons.tolist()]
    good = (succeeded & intact).tolist()
    for position, hit, damaged in zip(plan.positions.tolist(), good, corrupt.tolist(), strict=True):
        failure = MissReason.CORRUPT if damaged else MissReason.TRANSFER_FAILED
        outcomes[position] = None if hit else failure
    return outcomes, corrupt


def unless_all(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """The mask; None if it is true everywhere, and so says nothing."""
    return None if mask is None or np.count_nonzero(mask) == len(mask) else mask


def save_outcomes(
    plan: SavePlan, succeeded: NDArray[np.bool_] | None = None, too_lossy: NDArray[np.bool_] | None = None
) -> list[SaveOutcome]:
    """The outcomes of all `n` blocks of a save; arguments as in `ControlPlane.finish_save`."""
    if succeeded is None:
        if len(plan.slots) == len(plan.states):
            return [SaveOutcome.STORED] * len(plan.states)
        succeeded = np.ones(len(plan.slots), dtype=np.bool_)
    outcomes = [_NOT_MOVED[state] for state in plan.states.tolist()]
    lossy = np.zeros_like(succeeded) if too_lossy is None else too_lossy
    for position, stored, lost in zip(plan.positions.tolist(), succeeded.tolist(), lossy.tolist(), strict=True):
        failure = SaveOutcome.TOO_LOSSY if lost else SaveOutcome.FAILED
        outcomes[position] = SaveOutcome.STORED if stored else failure
    return outcomes
