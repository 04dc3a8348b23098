"""The control plane: decides which blocks are saved, to which extents, and which can be loaded. No I/O, no GPU.

It owns the index, the allocator and the eviction pacer, and returns plans. The `transfer` of a plan is plain data, and
a data plane carries it out, in this process or another. The caller passes the outcome to `finish_save` or
`finish_load`. Not thread-safe, except for the reads of the index.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config import KVortexConfig
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import ConfigError
from kvortex.groups import GroupSet, KVKind
from kvortex.index import (
    FORM_0,
    RESERVED,
    CacheIndex,
    Evicted,
    EvictionPacer,
    make_policy,
    warm_up,
)
from kvortex.memory import ExtentAllocator
from kvortex.planes.plans import (
    FetchPlan,
    HeldBlocks,
    LoadPlan,
    Planned,
    SavePlan,
    load_outcomes,
    save_outcomes,
    unless_all,
)
from kvortex.planes.quota import Quota, check_quota
from kvortex.types import MAX_GROUPS, BlockSizes, Direction, MissReason, SaveOutcome, TransferPlan, form_of

logger = logging.getLogger(__name__)

CPU_TIER: Final = "cpu"

OnEvicted: TypeAlias = Callable[[Evicted], NDArray[np.bool_]]

UNKNOWN_BLOCK_BYTES: Final = 256 << 10
"""Bytes of a block, for the size of the index, as long as no cache is known. The index grows when it is full."""

MAX_EVICTIONS_A_PLAN: Final = 4
"""Rounds of eviction in one plan. One may not be enough: with blocks of two sizes, freed extents may be too small."""


class ControlPlane:
    """Plans saves and loads over one index and one range of extents.

    A pool may hold blocks of several caches: `add_cache` adds one. Their groups have consecutive numbers, which calls
    name, and their keys must differ.

    Args:
        index: the blocks.
        allocator: allocates extents of the pool.
        pacer: decides how much to evict as the pool fills.
        sizes: bytes that a block takes in the pool, for each group of the first cache; empty if there is none yet.
        groups: the groups of that cache; None if it has one, of which nothing else needs to be known.

    Attributes:
        on_removed: called with the offsets, `int64 [n]`, of visible blocks that have left the pool.
        on_evicted: called with the eviction victims of the pacer, coldest first. It returns which of them it takes
            over, `bool [n]`: it calls `free` for each of these when it has written the block elsewhere.
    """

    def __init__(
        self,
        index: CacheIndex,
        allocator: ExtentAllocator,
        pacer: EvictionPacer,
        sizes: Sequence[BlockSizes],
        groups: GroupSet | None = None,
    ) -> None:
        self.index = index
        self.allocator = allocator
        self.groups: GroupSet | None = None
        """The groups of the first cache."""
        self.on_removed: Callable[[NDArray[np.int64]], None] | None = None
        self.on_evicted: OnEvicted | None = None
        self._pacer = pacer
        self.extents = np.empty(0, dtype=np.int64)
        """Bytes of an extent, by form, `int64 [2 * num_groups]`."""
        self.usual_forms = np.empty(0, dtype=np.uint8)
        """The form in which blocks of each group are stored: packed if they can be, `uint8 [num_groups]`."""
        self._quotas: dict[str, Quota] = {}  # by the name under which a cache's extents are accounted
        self._caches: list[tuple[int, GroupSet]] = []  # those with several groups, with the number of their first one
        if sizes:
            self.add_cache(sizes, groups)
            self.groups = groups
        self._unusable_bytes = 0
        """Bytes of holes that were too small for an extent, when that happened last. Where a tier takes what the pacer
        evicts, they count as used: what has to go at once, because of them, cannot wait until it is written."""
        self._shrunk = False

    @classmethod
    def from_config(
        cls,
        config: KVortexConfig,
        capacity_bytes: int,
        sizes: Sequence[BlockSizes],
        groups: GroupSet | None = None,
    ) -> Self:
        """A control plane over an empty pool of `capacity_bytes`.

        Raises:
            ConfigError: a block does not fit the pool or a piece of it, or the eviction policy is unknown.
        """
        if sizes:
            check_blocks_fit(sizes, capacity_bytes, config.pool.pin_piece_bytes)
        warm_up(config.eviction.policy)
        allocator = ExtentAllocator(capacity_bytes, config.pool.pin_piece_bytes, name=CPU_TIER)
        smallest = min((s.packed for s in sizes), default=UNKNOWN_BLOCK_BYTES)
        index = CacheIndex(
            make_policy(config.eviction.policy),
            ghost_entries=config.eviction.ghost_entries,
            expected_entries=max(allocator.capacity_bytes // smallest + config.eviction.ghost_entries, 1),
        )
        pacer = EvictionPacer(allocator.capacity_bytes, config.eviction.watermark, config.eviction.ratio)
        return cls(index, allocator, pacer, sizes, groups)

    @property
    def num_groups(self) -> int:
        """Groups of all caches."""
        return len(self.usual_forms)

    @property
    def has_forms(self) -> bool:
        """Whether blocks can have another form than 0."""
        return self.num_groups > 1 or self.usual_forms[0] != 0

    def add_cache(self, sizes: Sequence[BlockSizes], groups: GroupSet | None = None) -> int:
        """Let blocks of another cache into the pool.

        Args:
            sizes: bytes that a block takes in the pool, for each of its groups.
            groups: its groups; None if it has one, of which nothing else needs to be known.

        Returns:
            The number of its first group.

        Raises:
            ConfigError: there are too many groups; or a block does not fit the pool or a piece of it.
        """
        first = self.num_groups
        if first + len(sizes) > MAX_GROUPS:
            raise ConfigError(f"the caches of a pool have more than {MAX_GROUPS} groups of layers together")
        check_blocks_fit(sizes, self.allocator.capacity_bytes, self.allocator.piece_bytes)
        extents = [nbytes for s in sizes for nbytes in (s.raw, s.packed)]
        forms = [form_of(first + n, s.packs) for n, s in enumerate(sizes)]
        self.extents = np.append(self.extents, np.array(extents, dtype=np.int64))
        self.usual_forms = np.append(self.usual_forms, np.array(forms, dtype=np.uint8))
        if groups is not None and not groups.is_single:
            self._caches.append((first, groups))
        return first

    def rank(self, owner: str, groups: range, *, priority: int = 0, quota_bytes: int | None = None) -> None:
        """Say when the blocks of a cache are evicted. If it has more than its quota, it shrinks with its next save.

        Args:
            owner: name under which its extents are accounted, in every call for it.
            groups: numbers of its groups.
            priority: its blocks are evicted before those of a higher priority.
            quota_bytes: bytes that its extents may take together; None for as many as there are.

        Raises:
            ConfigError: a block of each group does not fit the quota; nothing has changed.
        """
        forms = range(2 * groups.start, 2 * groups.stop)
        if quota_bytes is not None:
            check_quota(self.extents[forms.start : forms.stop : 2], quota_bytes)
            self.allocator.watch(owner)
            self._quotas[owner] = Quota(quota_bytes, forms.start, self._pacer.of(quota_bytes))
        else:
            self._quotas.pop(owner, None)
        self.index.rank(forms, priority=priority, is_bounded=quota_bytes is not None)

    # -- save --------------------------------------------------------------------------------------

    def plan_save(
        self,
        keys: NDArray[np.uint64],
        block_ids: NDArray[np.int32],
        owner: str,
        *,
        groups: NDArray[np.uint8] | None = None,
        as_is: bool = False,
        chain: NDArray[np.uint64] | None = None,
    ) -> SavePlan:
        """Reserve the blocks that are not stored yet and find room for them, the head of the chain first.

        Args:
            keys: keys of blocks, `uint64 [n, 4]` from `pack_keys`; what is worth more comes first, such as the root of
                a chain.
            block_ids: ids of these blocks in the paged cache, `int32 [n]`.
            owner: name under which the extents are accounted; if a quota was set for it, they keep to that.
            groups: the number of each block's group, `uint8 [n]`, all of one cache; None if all belong to the first.
            as_is: store the blocks raw, although the codec packs.
            chain: keys, `uint64 [m, 4]`, of blocks that must not be evicted to make room for these, such as those in
                front of them; by default `keys`.
        """
        reservation = self.index.reserve(keys, 0 if groups is None or not len(groups) else 2 * int(groups[0]))
        slots, chain = reservation.owned, keys if chain is None else chain
        if self.num_groups == 1 or groups is None:
            form = 0 if as_is else int(self.usual_forms[0])
            nbytes, placed = self.extents[form : form + 1], None
            offsets = self._make_room(reservation.num_owned, int(nbytes[0]), owner, chain)
            if len(offsets) < len(slots):
                self.index.abort(slots[len(offsets) :], None)
                slots = slots[: len(offsets)]
            forms = np.full(len(slots), form, dtype=np.uint8) if form else None
        else:
            wanted = np.flatnonzero(reservation.states == RESERVED)
            forms = 2 * groups[wanted] if as_is else self.usual_forms[groups[wanted]]
            offsets = self._place(forms, owner, chain)
            if (got := offsets >= 0).all():
                placed = wanted
            else:
                self.index.abort(slots[~got], None)
                placed, forms, offsets, slots = wanted[got], forms[got], offsets[got], slots[got]
            nbytes = self.extents[forms]
        plan = SavePlan(
            TransferPlan(Direction.SAVE, block_ids, offsets, forms), reservation.states, slots, nbytes, placed
        )
        if len(slots) < len(block_ids):
            plan = plan._replace(transfer=plan.transfer._replace(block_ids=block_ids[plan.positions]))
        return plan

    def begin_save(
        self,
        keys: NDArray[np.uint64],
        block_ids: NDArray[np.int32],
        owner: str,
        *,
        groups: NDArray[np.uint8] | None = None,
        as_is: bool = False,
    ) -> Planned[SavePlan]:
        """`plan_save`; where an owner plans, the caller can do something else meanwhile."""
        return Planned.made(self.plan_save(keys, block_ids, owner, groups=groups, as_is=as_is))

    def finish_save(
        self,
        plan: SavePlan,
        digests: NDArray[np.uint64],
        succeeded: NDArray[np.bool_] | None = None,
        too_lossy: NDArray[np.bool_] | None = None,
        tried: NDArray[np.bool_] | None = None,
    ) -> Sequence[SaveOutcome]:
        """Commit the blocks that arrived, and free the extents of the others.

        Args:
            plan: the result of `plan_save`.
            digests: digests of the `m` blocks that move, `uint64 [m]`.
            succeeded: which of them arrived and may be used, `bool [m]`; None for all.
            too_lossy: which of them did not, because packing would lose too much, `bool [m]`; None for none.
            tried: which of them were not given up before they moved, `bool [m]`; None for all. The others have not
                failed, and their keys get no new reason for a miss.

        Returns:
            The outcomes of all `n` blocks of the call.
        """
        offsets = plan.transfer.offsets
        if self._shrunk:
            within = self._within(offsets, plan.nbytes)
            succeeded = within if succeeded is None else succeeded & within
        succeeded = unless_all(succeeded)
        if succeeded is None:
            self.allocator.free_many(self._commit(plan, digests))
            return save_outcomes(plan)
        unseen = self._commit(plan, digests, succeeded)
        lossy = np.zeros_like(succeeded) if too_lossy is None else too_lossy & ~succeeded
        self.index.abort(plan.slots[lossy], MissReason.TOO_LOSSY)
        failed = ~succeeded & ~lossy
        given_up = np.zeros_like(succeeded) if tried is None else failed & ~tried
        self.index.abort(plan.slots[failed & ~given_up], MissReason.TRANSFER_FAILED)
        self.index.abort(plan.slots[given_up], None)
        self.allocator.free_many(unseen)
        self.allocator.free_many(offsets[~succeeded])
        return save_outcomes(plan, succeeded, too_lossy)

    def _commit(
        self, plan: SavePlan, digests: NDArray[np.uint64], which: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Commit the blocks that move, or those of `which`, `bool [m]`; returns offsets as `CacheIndex.commit` does."""
        slots, offsets, nbytes = plan.slots, plan.transfer.offsets, plan.nbytes
        forms = FORM_0 if plan.transfer.forms is None else plan.transfer.forms
        if which is not None:
            slots, offsets, digests = slots[which], offsets[which], digests[which]
            nbytes = nbytes if len(nbytes) == 1 else nbytes[which]
            forms = forms if len(forms) == 1 else forms[which]
        return self.index.commit(slots, offsets, nbytes, digests, forms)

    def _place(self, forms: NDArray[np.uint8], owner: str, chain: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Offsets of extents for these forms, `int64 [n]`, -1 for blocks without room; the first get room first."""
        nbytes = self.extents[forms]
        offsets = _by_size(nbytes, forms, lambda count, size: self._make_room(count, size, owner, chain))
        if (offsets >= 0).all():
            return offsets
        # All that can go has gone, and the largest blocks have taken the room: give it to the first blocks instead.
        self.allocator.free_many(offsets[offsets >= 0])
        free = self._free_bytes(owner)
        fitting = int(np.searchsorted(np.cumsum(nbytes), free, "right"))
        offsets[:] = -1
        offsets[:fitting] = _by_size(
            nbytes[:fitting], forms[:fitting], lambda count, size: self.allocator.allocate_many(count, size, owner)
        )
        return offsets

    def _free_bytes(self, owner: str) -> int:
        free = self.allocator.capacity_bytes - self.allocator.allocated_bytes
        quota = self._quotas.get(owner)
        return free if quota is None else min(free, max(quota.nbytes - self.allocator.bytes_of(owner), 0))

    def _make_room(self, count: int, nbytes: int, owner: str, chain: NDArray[np.uint64]) -> NDArray[np.int64]:
        if self._quotas and owner in self._quotas:
            count = self._keep_to_quota(self._quotas[owner], count, nbytes, owner, chain)
        unusable = self._unusable_bytes if self.on_evicted is not None else 0
        paced = self._pacer.step(self.allocator.allocated_bytes + unusable, count * nbytes)
        if not paced:
            offsets = self.allocator.allocate_many(count, nbytes, owner)
            if offsets.size == count:
                return offsets
            self.allocator.free_many(offsets)
        held = self.index.hold(chain).hits  # a tail is useless without its head, so it must not evict it
        try:
            return self._evict_and_allocate(count, nbytes, owner, paced)
        finally:
            self._remove(self.index.unpin(held))

    def _keep_to_quota(self, quota: Quota, count: int, nbytes: int, owner: str, chain: NDArray[np.uint64]) -> int:
        """Evict blocks of a cache until as many bytes more keep to its quota; returns how many of the blocks do."""
        size = align_up(nbytes, EXTENT_ALIGNMENT_BYTES)
        if paced := quota.pacer.step(self.allocator.bytes_of(owner), count * size):
            held = self.index.hold(chain).hits
            try:
                self._evict(paced, self.on_evicted, quota)
                # What a tier has taken over still takes room.
                self._evict(self.allocator.bytes_of(owner) + count * size - quota.nbytes, quota=quota)
            finally:
                self._remove(self.index.unpin(held))
        return min(count, max(quota.nbytes - self.allocator.bytes_of(owner), 0) // size)

    def _evict_and_allocate(self, count: int, nbytes: int, owner: str, paced_bytes: int) -> NDArray[np.int64]:
        self._evict(paced_bytes, self.on_evicted)
        offsets = self.allocator.allocate_many(count, nbytes, owner)
        if offsets.size < count:
            self._unusable_bytes = self.allocator.capacity_bytes - self.allocator.allocated_bytes
        for _ in range(MAX_EVICTIONS_A_PLAN):
            if offsets.size == count or not self._evict((count - offsets.size) * nbytes):
                break
            more = self.allocator.allocate_many(count - offsets.size, nbytes, owner)
            offsets = np.concatenate([offsets, more])
        return offsets

    def _evict(self, nbytes: int, on_evicted: OnEvicted | None = None, quota: Quota | None = None) -> int:
        if nbytes <= 0:
            return 0
        evicted = self.index.evict(nbytes) if quota is None else self.index.evict_of(quota.form, nbytes)
        offsets = evicted.offsets
        free = offsets
        if on_evicted is not None and offsets.size:
            free = offsets[~on_evicted(evicted)]
        self.allocator.free_many(free)
        if self.on_removed is not None and offsets.size:
            self.on_removed(offsets)
        if offsets.size:
            self._drop_companions(evicted)
        return offsets.size

    def _drop_companions(self, evicted: Evicted) -> None:
        """Drop the blocks of other groups that end where evicted blocks of full attention have ended: they are useless.

        If the lower tier keeps what is evicted, they stay: the evicted blocks can come back. They stay as well if no
        group has full attention: then what ends at a boundary serves other boundaries, too.
        """
        if self.on_evicted is not None:
            return
        for first, groups in self._caches:
            if groups.groups[groups.anchor].kind is not KVKind.FULL:
                continue
            hashes = evicted.keys[evicted.forms // 2 == first + groups.anchor]  # the anchor's keys are the hashes
            for number in range(len(groups)):
                if number != groups.anchor and len(hashes):
                    self._remove(self.index.drop_keys(groups.tagged(hashes, number), MissReason.EVICTED))

    # -- lower tiers -------------------------------------------------------------------------------

    def plan_fetch(
        self,
        keys: NDArray[np.uint64],
        forms: NDArray[np.uint8],
        owner: str,
        *,
        chain: NDArray[np.uint64] | None = None,
    ) -> FetchPlan:
        """Reserve blocks that a lower tier has, and find room for them, the head of the chain first.

        Args:
            keys: keys of blocks, `uint64 [n, 4]`.
            forms: the form of each block there, `uint8 [n]`.
            owner: name under which the extents are accounted.
            chain: blocks that must not be evicted, as in `plan_save`.
        """
        reservation = self.index.reserve(keys, int(forms[0]) if len(forms) else 0)
        wanted = np.flatnonzero(reservation.states == RESERVED)
        forms = forms[wanted]
        offsets = self._place(forms, owner, keys if chain is None else chain)
        got = offsets >= 0
        self.index.abort(reservation.slots[wanted[~got]], None)
        return FetchPlan(wanted[got], reservation.slots[wanted[got]], offsets[got], forms[got])

    def finish_fetch(self, slot: int, offset: int, form: int, digest: int) -> None:
        """A fetched block has arrived: make it visible, unless the pool has shrunk below its extent.

        Args:
            slot: the block's slot in the index.
            offset: offset of its extent in bytes.
            form: its form.
            digest: digest of its payload.
        """
        nbytes = int(self.extents[form])
        if self._shrunk and not self._within(np.array([offset]), nbytes).all():
            self.abandon_fetch(slot, offset, MissReason.TRANSFER_FAILED)
            return
        slots = np.array([slot])
        self.allocator.free_many(
            self.index.commit(
                slots,
                np.array([offset]),
                nbytes,
                np.array([digest], dtype=np.uint64),
                np.array([form], dtype=np.uint8),
            )
        )

    def abandon_fetch(self, slot: int, offset: int, reason: MissReason) -> None:
        """A fetched block will not arrive: free its extent, and remember `reason` for a miss."""
        self.index.abort(np.array([slot]), reason)
        self.allocator.free_many([offset])

    def hold(self, keys: NDArray[np.uint64]) -> HeldBlocks:
        """Protect blocks, `uint64 [n, 4]`, from eviction while a lower tier reads them; absent ones are skipped."""
        pins = self.index.hold(keys)
        return HeldBlocks(
            np.flatnonzero(pins.slots >= 0), pins.hits, pins.offsets, pins.nbytes, pins.digests, pins.forms
        )

    def release(self, slots: NDArray[np.int64]) -> None:
        """Release held blocks; `slots` are theirs, `int64 [m]`."""
        self._remove(self.index.unpin(slots))

    def free(self, offset: int) -> None:
        """Free an extent that holds no block: of one that was taken over when it was evicted, or of `scratch`."""
        self.allocator.free_many([offset])

    def scratch(self, nbytes: int) -> int | None:
        """Allocate an extent that holds no block, and evict for it; give it back with `free`.

        Returns:
            Its offset in bytes; None if there is no room.
        """
        offsets = self._make_room(1, nbytes, "scratch", np.empty((0, 4), dtype=np.uint64))
        return int(offsets[0]) if offsets.size else None

    # -- load --------------------------------------------------------------------------------------

    def plan_load(self, keys: NDArray[np.uint64], block_ids: NDArray[np.int32]) -> LoadPlan:
        """Pin the blocks that are stored.

        Args:
            keys: block hashes of a chain, root first, `uint64 [n, 4]` from `pack_keys`.
            block_ids: ids of these blocks in the paged cache, `int32 [n]`.
        """
        return LoadPlan.of_pins(self.index.pin(keys), block_ids, self.has_forms)

    def begin_load(self, keys: NDArray[np.uint64], block_ids: NDArray[np.int32]) -> Planned[LoadPlan]:
        """`plan_load`; where an owner plans, the caller can do something else meanwhile."""
        return Planned.made(self.plan_load(keys, block_ids))

    def finish_load(
        self, plan: LoadPlan, intact: NDArray[np.bool_] | None = None, succeeded: NDArray[np.bool_] | None = None
    ) -> Sequence[MissReason | None]:
        """Unpin the blocks, and drop those that are corrupt.

        Args:
            plan: the result of `plan_load`.
            intact: which of the `m` blocks that move are as they were saved, `bool [m]`; None for all.
            succeeded: which of them arrived, `bool [m]`; None for all.

        Returns:
            The outcomes of all `n` blocks of the call, `None` for a hit.
        """
        outcomes, corrupt = load_outcomes(plan, intact, succeeded)
        self.unpin(plan.pins.hits, corrupt)
        return outcomes

    def unpin(self, slots: NDArray[np.int64], corrupt: NDArray[np.bool_] | None = None) -> None:
        """Unpin blocks after a load.

        Args:
            slots: their slots, `int64 [m]`.
            corrupt: which of them did not arrive as they were saved, `bool [m]`; None for none. They are dropped.
        """
        if corrupt is not None and corrupt.any():
            self.index.drop(slots[corrupt], MissReason.CORRUPT)
        self._remove(self.index.unpin(slots))

    # -- all ---------------------------------------------------------------------------------------

    def touch(self, keys: NDArray[np.uint64]) -> None:
        """Count a whole chain, `uint64 [n, 4]`, as used now, so that its tail is evicted before its head.

        This is for chains that were planned in parts, or have grown. Within each part the order is right, but later
        parts count as used more recently than earlier ones.
        """
        self.index.touch(keys)

    def shrink(self, capacity_bytes: int) -> None:
        """Use only the first `capacity_bytes` of the pool from now on.

        Blocks beyond it are dropped; those that are pinned keep their extents until they are unpinned. Saves and
        fetches in flight to extents beyond it fail.

        Raises:
            ValueError: the pool is smaller already.
        """
        self.allocator.shrink(capacity_bytes)
        self._pacer.resize(max(self.allocator.capacity_bytes, 1))
        self._shrunk = True
        self._remove(self.index.drop_beyond(self.allocator.capacity_bytes, MissReason.TRANSFER_FAILED))

    def _within(self, offsets: NDArray[np.int64], nbytes: int | NDArray[np.int64]) -> NDArray[np.bool_]:
        within: NDArray[np.bool_] = offsets + nbytes <= self.allocator.capacity_bytes
        return within

    def invalidate(self, keys: NDArray[np.uint64]) -> None:
        """Drop blocks, `uint64 [n, 4]`; those that are being stored will not be seen. As in `clear`, extents that are
        pinned or in flight are freed when their transfers end.
        """
        self._remove(self.index.invalidate(keys))

    def clear(self) -> None:
        """Drop every block. Extents that are pinned or in flight are freed when their transfers end."""
        self._remove(self.index.clear())

    def forget(self) -> None:
        """Find nothing from now on of what is stored now: here the same as `clear`."""
        self.clear()

    def clear_cache(self, first_group: int, num_groups: int) -> None:
        """Drop every visible block of one cache, like `invalidate`; the arguments are those of its groups."""
        self._remove(self.index.drop_forms(2 * first_group, 2 * (first_group + num_groups), MissReason.INVALIDATED))

    def close(self) -> None:
        """Drop every block at the end; extents that are still held are logged."""
        self.clear()
        if leak := self.allocator.leak_report():
            logger.error("extents still held at shutdown: %s", leak)

    def _remove(self, offsets: NDArray[np.int64]) -> None:
        self.allocator.free_many(offsets)
        if self.on_removed is not None and offsets.size:
            self.on_removed(offsets)


def check_blocks_fit(sizes: Sequence[BlockSizes], capacity_bytes: int, piece_bytes: int) -> None:
    """Refuse a pool that cannot hold a block of each group.

    Raises:
        ConfigError: a block of each group does not fit the pool, or the largest block a piece of it.
    """
    largest, together = max(s.raw for s in sizes), sum(s.raw for s in sizes)
    if together > capacity_bytes:
        blocks = "a block takes" if len(sizes) == 1 else f"one block of each of {len(sizes)} groups of layers takes"
        raise ConfigError(
            f"{blocks} {together} bytes, the pool has {capacity_bytes}: "
            "raise pool.bytes to what many blocks take, such as 16GiB"
        )
    if largest > piece_bytes:
        raise ConfigError(
            f"a block takes {largest} bytes and must lie in one piece of the pool, which has {piece_bytes}: "
            "raise pool.pin_piece_bytes"
        )


def _by_size(
    nbytes: NDArray[np.int64], forms: NDArray[np.uint8], allocate: Callable[[int, int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Offsets of extents of different sizes, `int64 [n]`, the largest first; -1 for blocks that get none.

    Blocks of one form get neighbouring extents where possible: they are moved together.

    Args:
        nbytes: bytes of each extent, `int64 [n]`.
        forms: form of each block, `uint8 [n]`.
        allocate: (number, bytes of each) -> offsets of as many extents as there is room for, `int64 [m]`.
    """
    offsets = np.full(nbytes.size, -1, dtype=np.int64)
    for size in np.unique(nbytes)[::-1].tolist():
        places = np.flatnonzero(nbytes == size)
        places = places[np.argsort(forms[places], kind="stable")]
        found = allocate(places.size, size)
        offsets[places[: found.size]] = found
    return offsets
