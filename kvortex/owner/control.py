"""The control plane of a shared pool, as a client sees it: the calls of `ControlPlane`, answered by the owner.

If the owner is lost, nothing is found, nothing is saved, and no call waits: the engine goes on without the pool.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Encodings
from kvortex.errors import OwnerError
from kvortex.groups import GroupSet
from kvortex.index import MISS_REASONS, Pins
from kvortex.index.table import PIN_DIGESTS, PIN_FORMS, PIN_HITS, PIN_NBYTES, PIN_OFFSETS, PIN_REASONS, PIN_SLOTS
from kvortex.layout.canonical import CanonicalCache
from kvortex.owner.caches import describe_forms, describe_groups
from kvortex.owner.client import OwnerClient, OwnerLost, Question
from kvortex.owner.protocol import Arrays, Field, Kind, PoolNumbers, as_flags, numbers, text_of
from kvortex.owner.remote_index import RemoteAllocator, RemoteIndex
from kvortex.planes.plans import NOT_PLANNED, HeldBlocks, LoadPlan, Planned, SavePlan, load_outcomes, save_outcomes
from kvortex.tiering.keys import split_keys
from kvortex.types import BlockSizes, Direction, MissReason, SaveOutcome, TransferPlan, form_of

logger = logging.getLogger(__name__)

_GENERATION: Final = 1 << 40
"""A slot number is that of the owner, plus this for each connection that was lost before: so old ones are known."""

_NO_KEYS = np.empty(0, dtype=np.uint64)


class RemoteEvents(NamedTuple):
    """Keys of blocks that the lower tier has stored, and of those that it could not give back."""

    written: list[bytes]
    lost: list[bytes]


class _Asked(NamedTuple):
    """A question to the owner, and the connection that it went over."""

    client: OwnerClient
    question: Question
    generation: int


def _answer_to(asked: _Asked | None) -> tuple[Arrays, int]:
    """The answer, and the number of the connection that it came over."""
    if asked is None:
        raise OwnerLost("the owner is lost")
    return asked.client.answer(asked.question), asked.generation


class RemoteControl:
    """Plans saves and loads in a pool that an owner holds; methods and results are those of `ControlPlane`.

    Args:
        client: the connection. It is closed with this object.
        namespace: digest of all that must agree before bytes may be reused, 32 bytes. Keys are XORed with it, so that
            those of different namespaces differ.
        sizes: bytes of a block in the pool, for each group.
        encodings: how blocks are encoded, by form.
        groups: the groups of the cache.
        num_parts: how many parts a block has, of which the digests stand at the end of its payload.
        canonical: how its blocks become canonical, for lower tiers that keep them so; or why they do not.
        writers: names of other processes that write to what it reserves.
        priority: of the blocks of this namespace; None to leave it as it is.
        quota_bytes: what they may take of the pool; None to leave it as it is.

    Attributes:
        tier: name of the lower tier behind the pool, empty if there is none.
        on_removed: called with the offsets, `int64 [n]`, of visible blocks of any engine that have left the pool,
            before this one gets their memory; see `watch`.

    Raises:
        OwnerError: the owner refuses this cache.
    """

    def __init__(
        self,
        client: OwnerClient,
        namespace: bytes,
        sizes: Sequence[BlockSizes],
        encodings: Encodings,
        groups: GroupSet,
        *,
        num_parts: int = 1,
        canonical: CanonicalCache | str = "",
        writers: Sequence[str] = (),
        priority: int | None = None,
        quota_bytes: int | None = None,
    ) -> None:
        self.client = client
        self.groups = groups
        self.extents = np.array([nbytes for s in sizes for nbytes in (s.raw, s.packed)], dtype=np.int64)
        self.usual_forms = np.array([form_of(n, s.packs) for n, s in enumerate(sizes)], dtype=np.uint8)
        self.has_forms = len(sizes) > 1 or sizes[0].packs
        self.index = RemoteIndex(self)
        self.allocator = RemoteAllocator(self, client.pool_bytes)
        self._writers = tuple(writers)
        self._rank = numbers(priority is not None, priority or 0, quota_bytes is not None, quota_bytes or 0)
        self._namespace = np.frombuffer(namespace, dtype=np.uint64)
        self._salt = self._namespace
        self._forgotten: set[int] = set()  # slots of saves in flight that must not be seen
        self._in_flight: set[int] = set()  # slots of saves in flight
        self._begun: list[Planned[SavePlan]] = []  # for which the owner was asked
        self._forms = describe_forms(self.extents.tolist(), encodings)
        self.tier = ""
        self.on_removed: Callable[[NDArray[np.int64]], None] | None = None
        self._described = describe_groups(groups, num_parts, canonical).encode()
        self._lock = threading.Lock()
        self._saving: Counter[int] = Counter()  # saves in flight, by the connection that planned them
        self.tier = self._add_cache(client, client.start_deadline_s)
        client.on_connected = partial(self._connected, client)

    def _add_cache(self, client: OwnerClient, deadline_s: float | None = None) -> str:
        for writer in self._writers:
            client.ask(Kind.WRITERS, writer.encode())
        (tier,) = client.ask(Kind.ADD_CACHE, self._namespace, self._forms, self._described, deadline_s=deadline_s)
        if self._rank.any():
            client.ask(Kind.RANK, self._rank)
        return text_of(tier)

    def move_to(self, client: OwnerClient) -> None:
        """Plan in the pool of another owner from now on. What was planned before ends as if the connection was lost.

        Raises:
            OwnerError: the owner refuses this cache, or has not the same kind of lower tier. The client is closed then.
        """
        self.introduce(client)
        self.switch_to(client)

    def introduce(self, client: OwnerClient) -> None:
        """Tell another owner of this cache; from any thread. Nothing is planned there before `switch_to`.

        Raises:
            OwnerError: as `move_to`.
        """
        try:
            with client.exclusive():
                tier = self._add_cache(client)
                if tier != self.tier:
                    raise OwnerError(f"its lower tier is {tier or 'none'}, not {self.tier or 'none'}")
                if self.on_removed is not None:
                    client.ask(Kind.WATCH)
                client.on_connected = partial(self._connected, client)
        except OwnerError:
            client.close()
            raise

    def switch_to(self, client: OwnerClient) -> None:
        """Plan in the pool of an owner that was told of this cache; where saves and loads are planned."""
        before = self.client
        with before.exclusive(), client.exclusive():
            client.generation = before.generation + 1
            self.client = client
            self.allocator.capacity_bytes = client.pool_bytes
        before.close()

    def _connected(self, client: OwnerClient) -> None:
        self._add_cache(client)
        if self.on_removed is not None:
            client.ask(Kind.WATCH)
        if client is self.client:
            self._say_if_settled()

    def _say_if_settled(self) -> None:
        with self._lock:
            waits = any(count for number, count in self._saving.items() if number < self.client.generation)
        if not waits:
            self.client.tell(Kind.SETTLED)

    def own(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Keys in the owner's index, `uint64 [n, 4]`, from those of this cache."""
        mine: NDArray[np.uint64] = keys ^ self._salt
        return mine

    def figures(self) -> PoolNumbers:
        """The figures of the pool; zeros if the owner is lost."""
        try:
            (found,) = self.client.ask(Kind.FIGURES)
        except OwnerLost:
            return PoolNumbers(*[0] * len(PoolNumbers._fields))
        return PoolNumbers(*found[: len(PoolNumbers._fields)].tolist())

    def _current(self, slots: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The owner's numbers of these slots; None if an earlier connection had them."""
        own = slots - self.client.generation * _GENERATION
        return own if not own.size or 0 <= int(own.min()) < _GENERATION else None

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
        """See `ControlPlane.plan_save`."""
        return self.begin_save(keys, block_ids, owner, groups=groups, as_is=as_is, chain=chain).result()

    def begin_save(
        self,
        keys: NDArray[np.uint64],
        block_ids: NDArray[np.int32],
        owner: str,
        *,
        groups: NDArray[np.uint8] | None = None,
        as_is: bool = False,
        chain: NDArray[np.uint64] | None = None,
    ) -> Planned[SavePlan]:
        """See `ControlPlane.begin_save`."""
        count = len(keys)
        of_blocks = np.zeros(count, dtype=np.uint8) if groups is None else np.ascontiguousarray(groups)
        front = _NO_KEYS if chain is None or len(chain) == count else self.own(chain)
        told = self._told_by_a_save
        asked = self._ask_ahead(Kind.PLAN_SAVE, numbers(as_is), self.own(keys), of_blocks, front, on_answer=told)
        planned = Planned(lambda: self._planned_save(asked, block_ids))
        with self._lock:
            self._begun = [*(begun for begun in self._begun if not begun.is_made), planned]
        return planned

    def _told_by_a_save(self, fields: Arrays) -> None:
        self._tell_removed(fields[-1])

    def _ask_ahead(
        self, kind: Kind, *fields: Field, on_answer: Callable[[Arrays], None] | None = None
    ) -> _Asked | None:
        """None if the owner is lost."""
        client = self.client
        with client.exclusive():
            try:
                return _Asked(client, client.ask_ahead(kind, *fields, on_answer=on_answer), client.generation)
            except OwnerLost:
                return None

    def _planned_save(self, asked: _Asked | None, block_ids: NDArray[np.int32]) -> SavePlan:
        try:
            (states, slots, offsets, forms, positions, _), generation = _answer_to(asked)
        except OwnerLost:
            states = np.full(len(block_ids), NOT_PLANNED, dtype=np.int64)
            slots = offsets = positions = np.empty(0, dtype=np.int64)
            forms, generation = np.empty(0, dtype=np.uint8), -1
        numbered = slots + generation * _GENERATION
        if slots.size:
            with self._lock:
                self._saving[generation] += 1
                self._in_flight.update(numbered.tolist())
        transfer = TransferPlan(Direction.SAVE, block_ids[positions], offsets, forms.copy() if self.has_forms else None)
        return SavePlan(
            transfer,
            states.astype(np.int64),
            numbered,
            self.extents[forms],
            positions.astype(np.intp),
        )

    def finish_save(
        self,
        plan: SavePlan,
        digests: NDArray[np.uint64],
        succeeded: NDArray[np.bool_] | None = None,
        too_lossy: NDArray[np.bool_] | None = None,
        tried: NDArray[np.bool_] | None = None,
    ) -> Sequence[SaveOutcome]:
        """See `ControlPlane.finish_save`. If the owner is lost, nothing was stored."""
        if not plan.slots.size:
            return save_outcomes(plan)
        generation = int(plan.slots[0]) // _GENERATION
        succeeded = self._without_forgotten(plan.slots, succeeded)
        with self.client.exclusive():
            slots = self._current(plan.slots)
            masks = (as_flags(mask) for mask in (succeeded, too_lossy, tried))
            told = slots is not None and self.client.tell(
                Kind.FINISH_SAVE, slots, np.ascontiguousarray(digests), *masks
            )
        with self._lock:
            self._saving[generation] -= 1
        if slots is None:
            self._say_if_settled()
        if not told:
            succeeded = np.zeros(len(plan.slots), dtype=np.bool_)
        return save_outcomes(plan, succeeded, too_lossy)

    def _without_forgotten(
        self, slots: NDArray[np.int64], succeeded: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_] | None:
        mine = slots.tolist()
        with self._lock:
            self._in_flight.difference_update(mine)
            if self._forgotten.isdisjoint(mine):
                return succeeded
            kept = np.array([slot not in self._forgotten for slot in mine], dtype=np.bool_)
            self._forgotten.difference_update(mine)
        return kept if succeeded is None else succeeded & kept

    # -- load --------------------------------------------------------------------------------------

    def plan_load(self, keys: NDArray[np.uint64], block_ids: NDArray[np.int32]) -> LoadPlan:
        """See `ControlPlane.plan_load`."""
        return self.begin_load(keys, block_ids).result()

    def begin_load(self, keys: NDArray[np.uint64], block_ids: NDArray[np.int32]) -> Planned[LoadPlan]:
        """See `ControlPlane.begin_load`."""
        asked = self._ask_ahead(Kind.PLAN_LOAD, self.own(keys))
        return Planned(lambda: LoadPlan.of_pins(self._pins(asked, len(keys)), block_ids, self.has_forms))

    def _pins(self, asked: _Asked | None, count: int) -> Pins:
        results = np.full((7, count), -1, dtype=np.int64)
        try:
            (slots, reasons, offsets, nbytes, digests, forms), generation = _answer_to(asked)
        except OwnerLost:
            results[PIN_REASONS] = MISS_REASONS.index(MissReason.OWNER_LOST)
            return Pins(results, 0)
        hits = slots >= 0
        results[PIN_SLOTS, hits] = slots[hits] + generation * _GENERATION
        results[PIN_REASONS] = reasons
        count = int(np.count_nonzero(hits))
        results[PIN_HITS, :count] = results[PIN_SLOTS, hits]
        results[PIN_OFFSETS, :count], results[PIN_NBYTES, :count] = offsets, nbytes
        results[PIN_DIGESTS, :count], results[PIN_FORMS, :count] = digests.view(np.int64), forms
        return Pins(results, count)

    def finish_load(
        self, plan: LoadPlan, intact: NDArray[np.bool_] | None = None, succeeded: NDArray[np.bool_] | None = None
    ) -> Sequence[MissReason | None]:
        """See `ControlPlane.finish_load`."""
        outcomes, corrupt = load_outcomes(plan, intact, succeeded)
        self._unpin(plan.pins.hits, corrupt)
        return outcomes

    def _unpin(self, slots: NDArray[np.int64], corrupt: NDArray[np.bool_] | None = None) -> None:
        with self.client.exclusive():
            current = self._current(slots)
            if current is not None and current.size:
                self.client.tell(Kind.FINISH_LOAD, np.ascontiguousarray(current), as_flags(corrupt))

    def hold(self, keys: NDArray[np.uint64]) -> HeldBlocks:
        """See `ControlPlane.hold`."""
        pins = self._pins(self._ask_ahead(Kind.HOLD, self.own(keys)), len(keys))
        return HeldBlocks(
            np.flatnonzero(pins.slots >= 0), pins.hits, pins.offsets, pins.nbytes, pins.digests, pins.forms
        )

    def release(self, slots: NDArray[np.int64]) -> None:
        """See `ControlPlane.release`."""
        self._unpin(slots)

    # -- events ------------------------------------------------------------------------------------

    def watch(self, on_removed: Callable[[NDArray[np.int64]], None]) -> None:
        """Have `on_removed` called from now on, during other calls of this object."""
        self.on_removed = on_removed
        self.client.ask(Kind.WATCH)

    def _tell_removed(self, offsets: NDArray[np.int64]) -> None:
        if self.on_removed is not None and offsets.size:
            self.on_removed(offsets)

    def take_events(self) -> RemoteEvents | None:
        """What has happened since the last call; None if some of it is not known, or the owner is lost."""
        try:
            removed, was_overdue, written, lost = self.client.ask(Kind.EVENTS)
        except OwnerLost:
            return None
        self._tell_removed(removed)
        return None if was_overdue[0] else RemoteEvents(self._from_pool(written), self._from_pool(lost))

    def _from_pool(self, keys: NDArray[np.uint64]) -> list[bytes]:
        return split_keys(self.own(keys.reshape(-1, 4)))  # XOR is its own inverse

    def places(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Offsets of blocks in the pool, `int64 [n]`, -1 for those that are not there."""
        try:
            offsets, removed = self.client.ask(Kind.PLACES, self.own(keys))
        except OwnerLost:
            return np.full(len(keys), -1, dtype=np.int64)
        self._tell_removed(removed)
        return offsets

    # -- all ---------------------------------------------------------------------------------------

    def touch(self, keys: NDArray[np.uint64]) -> None:
        """See `ControlPlane.touch`."""
        self.client.tell(Kind.TOUCH, self.own(keys))

    def invalidate(self, keys: NDArray[np.uint64]) -> None:
        """See `ControlPlane.invalidate`.

        Raises:
            OwnerError: the owner is lost, so the blocks may be found again when it is back.
        """
        self.client.ask(Kind.INVALIDATE, self.own(keys))

    def clear(self) -> None:
        """Drop the blocks of this namespace, those that other engines have saved included.

        Raises:
            OwnerError: see `invalidate`.
        """
        self.client.ask(Kind.CLEAR)

    def forget(self) -> None:
        """Find nothing from now on of what is stored now; other engines still do.

        What this engine saves afterwards, nobody else finds: for instance because its model has got other weights,
        which the namespace does not tell. Saves in flight will not be seen.
        """
        for begun in self._begun:
            begun.result()
        with self._lock:
            self._salt = self._namespace ^ np.frombuffer(os.urandom(32), dtype=np.uint64)
            self._forgotten |= self._in_flight

    def shrink(self, capacity_bytes: int) -> None:
        """This process cannot pin more of the pool than that.

        If the pool is the engine's own, only that much of it is used. Otherwise this engine does without it.
        """
        try:
            self.client.ask(Kind.SHRINK, numbers(capacity_bytes))
        except OwnerLost:
            return
        except OwnerError:
            self._leave(capacity_bytes)
            return
        self.allocator.capacity_bytes = capacity_bytes

    def _leave(self, capacity_bytes: int) -> None:
        logger.error(
            "only %d of the pool's %d bytes can be pinned here, so it is not used: raise the limit on locked memory",
            capacity_bytes,
            self.client.pool_bytes,
        )
        self.client.close()

    def close(self) -> None:
        """End the connection. The blocks stay: they serve others, and this engine when it is started again."""
        self.client.close()


def scratch_of(client: OwnerClient, nbytes: int) -> int:
    """Offset of memory in the pool that holds no block, for a test.

    Raises:
        OwnerError: the pool has no room.
    """
    (offset,) = client.ask(Kind.SCRATCH, numbers(nbytes))
    if offset.size != 1:
        raise OwnerError("the owner gave no scratch memory")
    return int(offset[0])
