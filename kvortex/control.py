"""The control plane: decides what is saved, where to, and what can be loaded. Synchronous, no I/O, no GPU.

It knows the index, the extents and the eviction pace, and it speaks in plans. A plan's `transfer` is plain data
that a data plane carries out, here or in another process; its outcome comes back through `finish_save` or
`finish_load`. Not thread-safe except for the index's own reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.index import CacheIndex, Entry, EvictionPacer
from kvortex.memory import ExtentAllocator
from kvortex.types import BlockHash, Direction, Extent, MissReason, SaveOutcome


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What a data plane needs to know: blocks `int32 [n]` and their byte offsets in the pool, `int64 [n]`."""

    direction: Direction
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids)


@dataclass(frozen=True, slots=True)
class SavePlan:
    """A save between reservation and commit. `positions` are those of the call's blocks that move."""

    transfer: TransferPlan
    outcomes: list[SaveOutcome]
    positions: tuple[int, ...]
    keys: tuple[BlockHash, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A load between pin and unpin. `positions` are those of the call's blocks that move."""

    transfer: TransferPlan
    outcomes: list[MissReason | None]
    positions: tuple[int, ...]
    entries: tuple[Entry[Extent], ...]


class ControlPlane:
    """Plans saves and loads over one index and one range of extents.

    Args:
        index: of one namespace.
        allocator: of the pool that extents lie in.
        pacer: how much to evict as the pool fills.
        block_nbytes: of a block's payload, as stored.
    """

    def __init__(
        self, index: CacheIndex[Extent], allocator: ExtentAllocator, pacer: EvictionPacer, block_nbytes: int
    ) -> None:
        self.index = index
        self.allocator = allocator
        self._pacer = pacer
        self._block_nbytes = block_nbytes

    # -- save --------------------------------------------------------------------------------------

    def plan_save(self, hashes: Sequence[BlockHash], block_ids: NDArray[np.int32], owner: str) -> SavePlan:
        """Reserve what is not there yet and find room for it, the chain's head first.

        Args:
            hashes: a prefix chain, root first.
            block_ids: `int32 [len(hashes)]`.
            owner: who is accounted for the extents until they are committed.
        """
        reserved = self.index.reserve(hashes)
        wanted = [i for i, outcome in enumerate(reserved) if outcome is None]
        extents = self._make_room(len(wanted), owner)
        positions = wanted[: len(extents)]
        self.index.abort([hashes[i] for i in wanted[len(extents) :]], None)
        outcomes = [outcome or SaveOutcome.NO_SPACE for outcome in reserved]
        for i in positions:
            outcomes[i] = SaveOutcome.FAILED  # until its bytes have arrived
        return SavePlan(
            transfer=_transfer(Direction.SAVE, block_ids, positions, extents),
            outcomes=outcomes,
            positions=tuple(positions),
            keys=tuple(hashes[i] for i in positions),
            extents=tuple(extents),
        )

    def finish_save(
        self, plan: SavePlan, digests: NDArray[np.uint64], succeeded: NDArray[np.bool_]
    ) -> tuple[SaveOutcome, ...]:
        """Commit what arrived (`succeeded`, `bool [n]`), give back the rest; returns the call's outcomes."""
        arrived = np.flatnonzero(succeeded).tolist()
        lost = np.flatnonzero(~succeeded).tolist()
        unseen = self.index.commit(
            [plan.keys[i] for i in arrived],
            [plan.extents[i] for i in arrived],
            [plan.extents[i].nbytes for i in arrived],
            digests[succeeded].tolist(),
        )
        self.index.abort([plan.keys[i] for i in lost], MissReason.TRANSFER_FAILED)
        self.allocator.free_many([*unseen, *(plan.extents[i] for i in lost)])
        for i in arrived:
            plan.outcomes[plan.positions[i]] = SaveOutcome.STORED
        return tuple(plan.outcomes)

    def _make_room(self, count: int, owner: str) -> list[Extent]:
        allocator, nbytes = self.allocator, self._block_nbytes
        self._evict(self._pacer.step(allocator.allocated_bytes, count * nbytes))
        extents = allocator.allocate_many(count, nbytes, owner)
        while len(extents) < count and self._evict((count - len(extents)) * nbytes):
            extents += allocator.allocate_many(count - len(extents), nbytes, owner)
        return extents

    def _evict(self, nbytes: int) -> int:
        freed = self.index.evict(nbytes) if nbytes > 0 else []
        self.allocator.free_many(freed)
        return len(freed)

    # -- load --------------------------------------------------------------------------------------

    def plan_load(self, hashes: Sequence[BlockHash], block_ids: NDArray[np.int32]) -> LoadPlan:
        """Pin what is there; blocks that are not get their reason at once.

        Args:
            hashes: a prefix chain, root first.
            block_ids: `int32 [len(hashes)]`.
        """
        outcomes: list[MissReason | None] = []
        positions: list[int] = []
        entries: list[Entry[Extent]] = []
        for i, found in enumerate(self.index.pin(hashes)):
            if isinstance(found, Entry):
                positions.append(i)
                entries.append(found)
                outcomes.append(MissReason.TRANSFER_FAILED)  # until its bytes have arrived
            else:
                outcomes.append(found)
        extents = [entry.location for entry in entries]
        return LoadPlan(
            transfer=_transfer(Direction.LOAD, block_ids, positions, extents),
            outcomes=outcomes,
            positions=tuple(positions),
            entries=tuple(entries),
        )

    def finish_load(
        self, plan: LoadPlan, digests: NDArray[np.uint64], succeeded: NDArray[np.bool_]
    ) -> tuple[MissReason | None, ...]:
        """Compare digests, drop what is corrupt, unpin; returns the call's outcomes, `None` for a hit."""
        expected = np.fromiter((entry.digest for entry in plan.entries), dtype=np.uint64, count=len(plan.entries))
        intact = digests == expected
        for i in np.flatnonzero(succeeded & intact).tolist():
            plan.outcomes[plan.positions[i]] = None
        for i in np.flatnonzero(succeeded & ~intact).tolist():
            entry = plan.entries[i]
            self.index.drop(entry.key, MissReason.CORRUPT, expected=entry)
            plan.outcomes[plan.positions[i]] = MissReason.CORRUPT
        self.allocator.free_many(self.index.unpin(plan.entries))
        return tuple(plan.outcomes)

    # -- all ---------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every block; extents that are pinned or in flight come back when their transfers end."""
        self.allocator.free_many(self.index.clear())


def _transfer(
    direction: Direction, block_ids: NDArray[np.int32], positions: Sequence[int], extents: Sequence[Extent]
) -> TransferPlan:
    moved = block_ids if len(positions) == len(block_ids) else block_ids[np.array(positions, dtype=np.intp)]
    offsets = np.fromiter((extent.offset for extent in extents), dtype=np.int64, count=len(extents))
    return TransferPlan(direction, moved, offsets)
