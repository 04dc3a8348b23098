"""Plain data that all modules share: hashes, ids, extents, plans, outcomes.

Private: it may change in any release; docs/api.md lists what is public.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, NamedTuple, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

BlockHash = NewType("BlockHash", bytes)
"""Hash of a block, 32 bytes: SHA-256 over the parent's hash, the token ids and the extra keys."""

BLOCK_HASH_BYTES = 32
PAGE_BYTES = 4096

BlockId = int
"""A block's number in the paged device cache; slot = block_id * block_size + offset."""


class Direction(Enum):
    """Direction of a transfer: SAVE from the paged cache to the pool, LOAD back."""

    SAVE = "save"
    LOAD = "load"

    __hash__ = object.__hash__  # members are singletons; an enum's own hash is a slower Python function


class SaveOutcome(StrEnum):
    """Outcome of one block of a save."""

    STORED = "stored"
    ALREADY_STORED = "already_stored"
    PENDING = "pending"  # another save of the same block is in flight
    NO_SPACE = "no_space"  # pool or quota are full of blocks that are pinned, in flight, or before it in its chain
    GONE = "gone"  # it was stored, and then evicted or cleared before the call ended
    TOO_LOSSY = "too_lossy"  # packing would lose more than allowed, and it could not be stored raw
    FAILED = "failed"  # the transfer failed; the log has the cause

    @property
    def is_stored(self) -> bool:
        """True if the block can be loaded now."""
        return self in (SaveOutcome.STORED, SaveOutcome.ALREADY_STORED)


class MissReason(StrEnum):
    """Why a block was not served. A hit is `None`."""

    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    PENDING = "pending"  # its save has not been committed yet
    CORRUPT = "corrupt"  # the digest did not match; the entry is dropped
    AUTH = "auth"  # a tier has it, but not sealed by a key that is known here
    TRANSFER_FAILED = "transfer_failed"
    TOO_LOSSY = "too_lossy"  # packing would have lost more than allowed
    DEADLINE = "deadline"  # a tier did not deliver it in time
    INVALIDATED = "invalidated"  # the caller has asked to forget it
    OWNER_LOST = "owner_lost"  # the owner of the shared pool does not answer
    NOT_FETCHED = "not_fetched"  # a tier has it, but the pool has no room, or the use of the tier is paused


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range `[offset, offset + nbytes)` of a memory pool."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Bytes that a block takes in the pool, padding included, raw and packed; equal if the codec does not pack."""

    raw: int
    packed: int

    @property
    def packs(self) -> bool:
        return self.packed != self.raw


Forms: TypeAlias = NDArray[np.uint8]
"""Forms of blocks, `uint8 [n]`. A form is a number that says how a block lies in the pool: `2 * group + packed`, with
the number of the group whose pages it holds. Blocks of one form have one size."""

MAX_GROUPS: Final = 128
"""Groups of layers that a cache can have: a form fits a byte."""


def form_of(group: int, packed: bool) -> int:
    """The form of a block of a group, packed or raw."""
    return 2 * group + packed


class TransferPlan(NamedTuple):
    """A transfer of `n` blocks, as a data plane needs it.

    Attributes:
        direction: direction of the transfer.
        block_ids: ids of the blocks in the paged cache, `int32 [n]`.
        offsets: byte offsets of the blocks in the pool, `int64 [n]`.
        forms: the form of each block, `uint8 [n]`, see `forms_of`; None if all have form 0.
    """

    direction: Direction
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    forms: NDArray[np.uint8] | None = None

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    def part(self, positions: NDArray[np.intp]) -> "TransferPlan":
        """The plan for the blocks at `positions`, `intp [m]`."""
        forms = None if self.forms is None else self.forms[positions]
        return TransferPlan(self.direction, self.block_ids[positions], self.offsets[positions], forms)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """Per-block outcomes of a save, in the order of the call."""

    outcomes: tuple[SaveOutcome, ...]
    groups: tuple[str, ...] = ()
    """The name of each block's group; empty for a cache with one group."""

    @property
    def num_stored(self) -> int:
        """Blocks that this call stored."""
        return self.outcomes.count(SaveOutcome.STORED)

    @property
    def ok(self) -> bool:
        """True if every block can be loaded now."""
        return all(outcome.is_stored for outcome in self.outcomes)

    def counts(self) -> dict[SaveOutcome, int]:
        """Outcome -> number of blocks."""
        return dict(Counter(self.outcomes))

    def __repr__(self) -> str:
        return f"<SaveResult of {len(self.outcomes)} blocks{_listed(self.counts())}>"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Per-block outcomes of a load, in the order of the call: `None` for a loaded block, or the reason of a miss.

    After a miss the block's bytes in the device cache are undefined: do not use them.
    """

    block_ids: tuple[BlockId, ...]
    outcomes: tuple[MissReason | None, ...]
    groups: tuple[str, ...] = ()
    """The name of each block's group; empty for a cache with one group."""

    @property
    def num_loaded(self) -> int:
        return self.outcomes.count(None)

    @property
    def num_prefix_loaded(self) -> int:
        """Blocks before the first miss: the part that a prefix cache can use."""
        for position, reason in enumerate(self.outcomes):
            if reason is not None:
                return position
        return len(self.outcomes)

    @property
    def ok(self) -> bool:
        """True if every block was loaded."""
        return self.num_loaded == len(self.outcomes)

    @property
    def missed_block_ids(self) -> tuple[BlockId, ...]:
        """Ids of the blocks that were missed, and have to be computed."""
        return tuple(b for b, reason in zip(self.block_ids, self.outcomes, strict=True) if reason is not None)

    def miss_counts(self) -> dict[MissReason, int]:
        """Reason -> number of blocks."""
        return dict(Counter(reason for reason in self.outcomes if reason is not None))

    def __repr__(self) -> str:
        return (
            f"<LoadResult of {len(self.outcomes)} blocks: {self.num_loaded} loaded{_listed(self.miss_counts(), ', ')}>"
        )


def _listed(counts: Mapping[SaveOutcome, int] | Mapping[MissReason, int], begin: str = ": ") -> str:
    return begin + ", ".join(f"{count} {kind.value}" for kind, count in counts.items()) if counts else ""
