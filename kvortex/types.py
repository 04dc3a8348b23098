"""The nouns that cross module borders: hashes, ids, extents, outcomes. Plain data, nothing else."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple, NewType

import numpy as np
from numpy.typing import NDArray

BlockHash = NewType("BlockHash", bytes)
"""32 bytes of SHA-256, chained over the parent's hash, the token ids and the extra keys."""

BLOCK_HASH_BYTES = 32
PAGE_BYTES = 4096

BlockId = int
"""A block's number in the paged device cache; slot = block_id * block_size + offset."""


class Direction(Enum):
    """Which way a transfer goes."""

    SAVE = "save"
    LOAD = "load"

    __hash__ = object.__hash__  # members are singletons, and an enum's own hash is a call into Python


class SaveOutcome(StrEnum):
    """What became of one block of a save."""

    STORED = "stored"
    ALREADY_STORED = "already_stored"
    PENDING = "pending"  # another save of the same block is under way
    NO_SPACE = "no_space"  # the pool is full of pinned or in-flight blocks, or of those in front of it
    GONE = "gone"  # it was stored, and evicted or cleared before the call was over
    TOO_LOSSY = "too_lossy"  # packing would lose more than allowed, and it could not be kept as it is
    FAILED = "failed"  # the transfer failed; the log has the cause

    @property
    def is_stored(self) -> bool:
        """True when the block can be loaded now."""
        return self in (SaveOutcome.STORED, SaveOutcome.ALREADY_STORED)


class MissReason(StrEnum):
    """Why a block was not served. A hit is `None`."""

    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    PENDING = "pending"  # its save has not been committed yet
    CORRUPT = "corrupt"  # the digest did not match; the entry is dropped
    TRANSFER_FAILED = "transfer_failed"
    TOO_LOSSY = "too_lossy"  # packing would have lost more than allowed
    DEADLINE = "deadline"  # a tier did not deliver in time
    NOT_FETCHED = "not_fetched"  # a tier has it, and the pool no room for it, or the tier is left alone for a while


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
    """Bytes that a block takes in the pool, padding included: as it is, and packed; equal where nothing is packed."""

    raw: int
    packed: int

    @property
    def packs(self) -> bool:
        return self.packed != self.raw


class TransferPlan(NamedTuple):
    """What a data plane needs to know: blocks `int32 [n]` and their byte offsets in the pool, `int64 [n]`."""

    direction: Direction
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    packed: NDArray[np.bool_] | None = None
    """Which blocks rest packed, `bool [n]`; None when none does."""

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)

    def part(self, positions: NDArray[np.intp]) -> "TransferPlan":
        """The plan of some of its blocks."""
        packed = None if self.packed is None else self.packed[positions]
        return TransferPlan(self.direction, self.block_ids[positions], self.offsets[positions], packed)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """Per-block outcomes of a save, in the order of the call."""

    outcomes: tuple[SaveOutcome, ...]

    @property
    def num_stored(self) -> int:
        """Blocks that this call stored."""
        return self.outcomes.count(SaveOutcome.STORED)

    @property
    def ok(self) -> bool:
        """True when every block can be loaded now."""
        return all(outcome.is_stored for outcome in self.outcomes)

    def counts(self) -> dict[SaveOutcome, int]:
        """Outcome -> number of blocks."""
        return dict(Counter(self.outcomes))

    def __repr__(self) -> str:
        return f"<SaveResult of {len(self.outcomes)} blocks{_listed(self.counts())}>"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Per-block outcomes of a load, in the order of the call: `None` for a block that is in place, else why not.

    A block with a reason holds no KV that may be used: its bytes in the device cache are undefined.
    """

    block_ids: tuple[BlockId, ...]
    outcomes: tuple[MissReason | None, ...]

    @property
    def num_loaded(self) -> int:
        return self.outcomes.count(None)

    @property
    def num_prefix_loaded(self) -> int:
        """Blocks loaded before the first miss: what a prefix cache can use."""
        for position, reason in enumerate(self.outcomes):
            if reason is not None:
                return position
        return len(self.outcomes)

    @property
    def ok(self) -> bool:
        """True when every block is in place."""
        return self.num_loaded == len(self.outcomes)

    @property
    def missed_block_ids(self) -> tuple[BlockId, ...]:
        """Block ids that hold no KV and have to be computed."""
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
