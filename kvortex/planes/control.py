"""The control plane: decides what is saved, where to, and what can be loaded. Synchronous, no I/O, no GPU.

It knows the index, the extents and the eviction pace, and it speaks in plans. A plan's `transfer` is plain data
that a data plane carries out, here or in another process; its outcome comes back through `finish_save` or
`finish_load`. Not thread-safe except for the index's own reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.index import (
    BUSY,
    MISS_REASONS,
    RESERVED,
    STORED,
    CacheIndex,
    Evicted,
    EvictionPacer,
    Pins,
    make_policy,
    warm_up,
)
from kvortex.memory import ExtentAllocator
from kvortex.types import BlockSizes, Direction, MissReason, SaveOutcome, TransferPlan

CPU_TIER: Final = "cpu"

MAX_EVICTIONS_A_PLAN: Final = 4
"""Rounds of eviction that one plan may ask for: with blocks of two sizes, what is freed need not fit what comes."""

# What becomes of a block of a save that does not move; a reservation without room is given up.
_NOT_MOVED = {RESERVED: SaveOutcome.NO_SPACE, STORED: SaveOutcome.ALREADY_STORED, BUSY: SaveOutcome.PENDING}


class SavePlan(NamedTuple):
    """A save between reservation and commit.

    `states` are the reservation's, `int64 [call]`; `slots` the places in the index of the blocks that move, `nbytes`
    the size of their extents.
    """

    transfer: TransferPlan
    states: NDArray[np.int64]
    slots: NDArray[np.int64]
    nbytes: int

    @property
    def positions(self) -> NDArray[np.intp]:
        """Those of the call's blocks that move."""
        return np.flatnonzero(self.states == RESERVED)[: len(self.slots)]


class LoadPlan(NamedTuple):
    """A load between pin and unpin: the hits move."""

    transfer: TransferPlan
    pins: Pins

    @property
    def positions(self) -> NDArray[np.intp]:
        """Those of the call's blocks that move."""
        return np.flatnonzero(self.pins.slots >= 0)


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Blocks on their way from a lower tier: their positions in the call, slots, offsets and sizes in the pool."""

    positions: NDArray[np.intp]
    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """Blocks that stay where they are until `release`: positions in the call, and what the index knows of them."""

    positions: NDArray[np.intp]
    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digests: NDArray[np.uint64]


class ControlPlane:
    """Plans saves and loads over one index and one range of extents.

    Args:
        index: the blocks of one namespace.
        allocator: hands out extents of the pool.
        pacer: how much to evict as the pool fills.
        sizes: bytes that a block takes in the pool.

    `on_removed` is told the offsets of blocks that were visible and have left the pool. `on_evicted` is shown what is
    evicted to keep the pool below its watermark, coldest first, and answers how many of the first blocks it takes over:
    it frees their extents with `free` when it has written them elsewhere.
    """

    def __init__(self, index: CacheIndex, allocator: ExtentAllocator, pacer: EvictionPacer, sizes: BlockSizes) -> None:
        self.index = index
        self.allocator = allocator
        self.on_removed: Callable[[NDArray[np.int64]], None] | None = None
        self.on_evicted: Callable[[Evicted], int] | None = None
        self._pacer = pacer
        self._sizes = sizes
        self._shrunk = False

    @classmethod
    def from_config(cls, config: KVortexConfig, capacity_bytes: int, sizes: BlockSizes) -> Self:
        """A control plane over an empty pool of `capacity_bytes`.

        Raises:
            ConfigError: a block does not fit the pool or a piece of it, or the eviction policy is unknown.
        """
        check_block_fits(sizes, capacity_bytes, config.pool.pin_piece_bytes)
        warm_up(config.eviction.policy)
        allocator = ExtentAllocator(capacity_bytes, config.pool.pin_piece_bytes, name=CPU_TIER)
        index = CacheIndex(
            make_policy(config.eviction.policy),
            ghost_entries=config.eviction.ghost_entries,
            expected_entries=allocator.capacity_bytes // sizes.packed + config.eviction.ghost_entries,
        )
        pacer = EvictionPacer(allocator.capacity_bytes, config.eviction.watermark, config.eviction.ratio)
        return cls(index, allocator, pacer, sizes)

    # -- save --------------------------------------------------------------------------------------

    def plan_save(
        self,
        keys: NDArray[np.uint64],
        block_ids: NDArray[np.int32],
        owner: str,
        *,
        as_is: bool = False,
        chain: NDArray[np.uint64] | None = None,
    ) -> SavePlan:
        """Reserve what is not there yet and find room for it, the chain's head first.

        Args:
            keys: a prefix chain, root first, `uint64 [n, 4]` from `pack_keys`.
            block_ids: `int32 [n]`.
            owner: who is accounted for the extents.
            as_is: do not pack, although the codec would.
            chain: blocks that must not go to make room for these, `uint64 [m, 4]`, as what is in front of them;
                by default `keys`.
        """
        packs = self._sizes.packs and not as_is
        nbytes = self._sizes.packed if packs else self._sizes.raw
        reservation = self.index.reserve(keys)
        slots = reservation.owned
        offsets = self._make_room(reservation.num_owned, nbytes, owner, keys if chain is None else chain)
        if len(offsets) < len(slots):
            self.index.abort(slots[len(offsets) :], None)
            slots = slots[: len(offsets)]
        packed = np.ones(len(offsets), dtype=np.bool_) if packs else None
        plan = SavePlan(TransferPlan(Direction.SAVE, block_ids, offsets, packed), reservation.states, slots, nbytes)
        if len(slots) < len(block_ids):
            plan = plan._replace(transfer=plan.transfer._replace(block_ids=block_ids[plan.positions]))
        return plan

    def finish_save(
        self,
        plan: SavePlan,
        digests: NDArray[np.uint64],
        succeeded: NDArray[np.bool_] | None = None,
        too_lossy: NDArray[np.bool_] | None = None,
        num_tried: int | None = None,
    ) -> Sequence[SaveOutcome]:
        """Commit what arrived, give back the rest.

        Args:
            plan: what `plan_save` returned.
            digests: `uint64 [n]`.
            succeeded: `bool [n]`, what arrived and may be used; None for all.
            too_lossy: `bool [n]`, what did not because packing loses too much of it.
            num_tried: how many, from the first, were not given up before anything moved; None for all. The others
                have not failed, and their keys have no new reason for a miss.

        Returns:
            The call's outcomes.
        """
        offsets = plan.transfer.offsets
        if self._shrunk:
            within = self._within(offsets, plan.nbytes)
            succeeded = within if succeeded is None else succeeded & within
        succeeded = _unless_all(succeeded)
        if succeeded is None:
            self.allocator.free_many(self.index.commit(plan.slots, offsets, plan.nbytes, digests))
            if len(plan.slots) == len(plan.states):
                return [SaveOutcome.STORED] * len(plan.states)
            return _save_outcomes(plan, np.ones(len(offsets), dtype=np.bool_), None)
        unseen = self.index.commit(plan.slots[succeeded], offsets[succeeded], plan.nbytes, digests[succeeded])
        lossy = np.zeros_like(succeeded) if too_lossy is None else too_lossy & ~succeeded
        self.index.abort(plan.slots[lossy], MissReason.TOO_LOSSY)
        failed = ~succeeded & ~lossy
        tried = len(failed) if num_tried is None else num_tried
        self.index.abort(plan.slots[:tried][failed[:tried]], MissReason.TRANSFER_FAILED)
        self.index.abort(plan.slots[tried:], None)
        self.allocator.free_many(unseen)
        self.allocator.free_many(offsets[~succeeded])
        return _save_outcomes(plan, succeeded, too_lossy)

    def _make_room(self, count: int, nbytes: int, owner: str, chain: NDArray[np.uint64]) -> NDArray[np.int64]:
        paced = self._pacer.step(self.allocator.allocated_bytes, count * nbytes)
        if not paced:
            offsets = self.allocator.allocate_many(count, nbytes, owner)
            if offsets.size == count:
                return offsets
            self.allocator.free_many(offsets)
        held = self.index.hold(chain).hits  # a tail without its head is of no use, so it does not drive it out
        try:
            return self._evict_and_allocate(count, nbytes, owner, paced)
        finally:
            self._remove(self.index.unpin(held))

    def _evict_and_allocate(self, count: int, nbytes: int, owner: str, paced_bytes: int) -> NDArray[np.int64]:
        self._evict(paced_bytes, self.on_evicted)
        offsets = self.allocator.allocate_many(count, nbytes, owner)
        for _ in range(MAX_EVICTIONS_A_PLAN):
            if offsets.size == count or not self._evict((count - offsets.size) * nbytes):
                break
            more = self.allocator.allocate_many(count - offsets.size, nbytes, owner)
            offsets = np.concatenate([offsets, more])
        return offsets

    def _evict(self, nbytes: int, on_evicted: Callable[[Evicted], int] | None = None) -> int:
        if nbytes <= 0:
            return 0
        evicted = self.index.evict(nbytes)
        offsets = evicted.offsets
        taken = on_evicted(evicted) if on_evicted is not None and offsets.size else 0
        self.allocator.free_many(offsets[taken:])
        if self.on_removed is not None and offsets.size:
            self.on_removed(offsets)
        return offsets.size

    # -- lower tiers -------------------------------------------------------------------------------

    def plan_fetch(
        self,
        keys: NDArray[np.uint64],
        packed: NDArray[np.bool_],
        owner: str,
        *,
        chain: NDArray[np.uint64] | None = None,
    ) -> FetchPlan:
        """Reserve blocks that a lower tier has, and find room for them, the chain's head first.

        Args:
            keys: `uint64 [n, 4]`.
            packed: `bool [n]`, how they rest there.
            owner: who is accounted for the extents.
            chain: as in `plan_save`.
        """
        reservation = self.index.reserve(keys)
        wanted = np.flatnonzero(reservation.states == RESERVED)
        sizes = np.where(packed[wanted], self._sizes.packed, self._sizes.raw)
        offsets = np.full(wanted.size, -1, dtype=np.int64)
        for nbytes in np.unique(sizes).tolist():
            places = np.flatnonzero(sizes == nbytes)
            found = self._make_room(places.size, nbytes, owner, keys if chain is None else chain)
            offsets[places[: found.size]] = found
        got = offsets >= 0
        self.index.abort(reservation.slots[wanted[~got]], None)
        return FetchPlan(wanted[got], reservation.slots[wanted[got]], offsets[got], sizes[got])

    def finish_fetch(self, slot: int, offset: int, nbytes: int, digest: int) -> None:
        """A fetched block has arrived: it is visible now, unless the pool was cut off below it meanwhile."""
        if self._shrunk and not self._within(np.array([offset]), nbytes).all():
            self.abandon_fetch(slot, offset, MissReason.TRANSFER_FAILED)
            return
        slots = np.array([slot])
        self.allocator.free_many(
            self.index.commit(slots, np.array([offset]), nbytes, np.array([digest], dtype=np.uint64))
        )

    def abandon_fetch(self, slot: int, offset: int, reason: MissReason) -> None:
        """A fetched block will not arrive."""
        self.index.abort(np.array([slot]), reason)
        self.allocator.free_many([offset])

    def hold(self, keys: NDArray[np.uint64]) -> HeldBlocks:
        """Keep blocks in place while they are read for a lower tier; what is gone is left out."""
        pins = self.index.hold(keys)
        return HeldBlocks(np.flatnonzero(pins.slots >= 0), pins.hits, pins.offsets, pins.nbytes, pins.digests)

    def release(self, slots: NDArray[np.int64]) -> None:
        """Let held blocks go."""
        self._remove(self.index.unpin(slots))

    def free(self, offset: int) -> None:
        """Give back the extent of a block that was taken over when it was evicted."""
        self.allocator.free_many([offset])

    def is_packed(self, nbytes: int) -> bool:
        """Whether a block whose extent has this size rests packed."""
        return self._sizes.packs and nbytes == self._sizes.packed

    # -- load --------------------------------------------------------------------------------------

    def plan_load(self, keys: NDArray[np.uint64], block_ids: NDArray[np.int32]) -> LoadPlan:
        """Pin what is there.

        Args:
            keys: a prefix chain, root first, `uint64 [n, 4]` from `pack_keys`.
            block_ids: `int32 [n]`.
        """
        pins = self.index.pin(keys)
        packed = pins.nbytes == self._sizes.packed if self._sizes.packs else None
        plan = LoadPlan(TransferPlan(Direction.LOAD, block_ids, pins.offsets, packed), pins)
        if pins.num_hits < len(block_ids):
            plan = plan._replace(transfer=plan.transfer._replace(block_ids=block_ids[plan.positions]))
        return plan

    def finish_load(
        self, plan: LoadPlan, intact: NDArray[np.bool_] | None = None, succeeded: NDArray[np.bool_] | None = None
    ) -> Sequence[MissReason | None]:
        """Drop what arrived but is not intact, unpin.

        Args:
            plan: what `plan_load` returned.
            intact: `bool [n]`, what is as it was saved; None for all.
            succeeded: `bool [n]`, what arrived; None for all.

        Returns:
            The call's outcomes, `None` for a hit.
        """
        pins, intact, succeeded = plan.pins, _unless_all(intact), _unless_all(succeeded)
        if intact is None and succeeded is None and pins.num_hits == len(pins):
            self._remove(self.index.unpin(pins.hits))
            return [None] * pins.num_hits
        everything = np.ones(pins.num_hits, dtype=np.bool_)
        intact, succeeded = everything if intact is None else intact, everything if succeeded is None else succeeded
        corrupt = succeeded & ~intact
        if corrupt.any():
            self.index.drop(pins.hits[corrupt], MissReason.CORRUPT)
        self._remove(self.index.unpin(pins.hits))
        outcomes: list[MissReason | None] = [MISS_REASONS[reason] for reason in pins.reasons.tolist()]
        good = (succeeded & intact).tolist()
        for position, hit, damaged in zip(plan.positions.tolist(), good, corrupt.tolist(), strict=True):
            failure = MissReason.CORRUPT if damaged else MissReason.TRANSFER_FAILED
            outcomes[position] = None if hit else failure
        return outcomes

    # -- all ---------------------------------------------------------------------------------------

    def touch(self, keys: NDArray[np.uint64]) -> None:
        """Count a whole chain as used now, so that its tail goes before its head.

        For chains that were planned in parts, or grew: each part by itself is in order, but later parts are
        more recent than earlier ones.
        """
        self.index.touch(keys)

    def shrink(self, capacity_bytes: int) -> None:
        """Keep to the first `capacity_bytes` of the pool from now on, as the rest cannot be used.

        Blocks that lie beyond are gone, as far as they are in use when that has ended; what is on its way there fails.

        Raises:
            ValueError: the pool is smaller already.
        """
        self.allocator.shrink(capacity_bytes)
        self._pacer.resize(max(self.allocator.capacity_bytes, 1))
        self._shrunk = True
        self._remove(self.index.drop_beyond(self.allocator.capacity_bytes, MissReason.TRANSFER_FAILED))

    def _within(self, offsets: NDArray[np.int64], nbytes: int) -> NDArray[np.bool_]:
        within: NDArray[np.bool_] = offsets + nbytes <= self.allocator.capacity_bytes
        return within

    def clear(self) -> None:
        """Forget every block; extents that are pinned or in flight come back when their transfers end."""
        self._remove(self.index.clear())

    def _remove(self, offsets: NDArray[np.int64]) -> None:
        self.allocator.free_many(offsets)
        if self.on_removed is not None and offsets.size:
            self.on_removed(offsets)


def check_block_fits(sizes: BlockSizes, capacity_bytes: int, piece_bytes: int) -> None:
    """Refuse a pool that cannot hold a single block.

    Raises:
        ConfigError: a block does not fit the pool or a piece of it.
    """
    if sizes.raw > capacity_bytes:
        raise ConfigError(
            f"a block takes {sizes.raw} bytes, the pool has {capacity_bytes}: "
            "raise pool.bytes to what many blocks take, such as 16GiB"
        )
    if sizes.raw > piece_bytes:
        raise ConfigError(
            f"a block takes {sizes.raw} bytes and must lie in one piece of the pool, which has {piece_bytes}: "
            "raise pool.pin_piece_bytes"
        )


def _unless_all(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return None if mask is None or np.count_nonzero(mask) == len(mask) else mask


def _save_outcomes(
    plan: SavePlan, succeeded: NDArray[np.bool_], too_lossy: NDArray[np.bool_] | None
) -> list[SaveOutcome]:
    outcomes = [_NOT_MOVED[state] for state in plan.states.tolist()]
    lossy = np.zeros_like(succeeded) if too_lossy is None else too_lossy
    for position, stored, lost in zip(plan.positions.tolist(), succeeded.tolist(), lossy.tolist(), strict=True):
        failure = SaveOutcome.TOO_LOSSY if lost else SaveOutcome.FAILED
        outcomes[position] = SaveOutcome.STORED if stored else failure
    return outcomes
