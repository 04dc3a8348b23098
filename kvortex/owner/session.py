"""What one client of the owner holds: its cache, reservations, pins and scratch memory. No I/O."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError, OwnerError
from kvortex.index import MISS_REASONS, RESERVED, STORED
from kvortex.owner.caches import Cache, Caches
from kvortex.owner.events import Watcher
from kvortex.owner.protocol import (
    Arrays,
    Field,
    Kind,
    PoolNumbers,
    as_flags,
    expected,
    flags_of,
    keys_of,
    numbers,
    text_of,
)
from kvortex.owner.tier_session import TierSession
from kvortex.planes.plans import SavePlan
from kvortex.types import Direction, TransferPlan

logger = logging.getLogger(__name__)

Answer: TypeAlias = tuple[Kind, tuple[Field, ...]] | None

_WITHOUT_CACHE: Final = frozenset(
    (Kind.ADD_CACHE, Kind.SCRATCH, Kind.SCRATCH_DONE, Kind.WRITER, Kind.WRITERS, Kind.SETTLED)
)


_RESERVED: Final = np.dtype([("held", np.bool_), ("form", np.uint8), ("num_clears", np.int32), ("offset", np.int64)])
"""A block that a client saves: its form, how often its cache had been cleared before, and where it is."""
_PINNED: Final = np.dtype([("count", np.int32)])
"""How often a client has pinned a block."""


class Table:
    """Rows by the slots of the index; it grows as slots come.

    Args:
        dtype: of a row.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.rows: NDArray[Any] = np.zeros(0, dtype)

    def up_to(self, slots: NDArray[np.int64]) -> NDArray[Any]:
        """The rows, with room for these slots."""
        least = int(slots.max()) + 1 if slots.size else 0
        if least > len(self.rows):
            rows = np.zeros(max(least, 2 * len(self.rows)), self.rows.dtype)
            rows[: len(self.rows)] = self.rows
            self.rows = rows
        return self.rows

    def has(self, slots: NDArray[np.int64]) -> bool:
        """True if there is a row for each of these slots, whoever names them."""
        return not slots.size or (int(slots.min()) >= 0 and int(slots.max()) < len(self.rows))

    def used(self, field: str) -> NDArray[np.intp]:
        """Slots with a field that is not zero."""
        return np.flatnonzero(self.rows[field])


class Peer(Protocol):
    """What a session needs to know of the process behind it."""

    def has_settled(self, client: int) -> None:
        """None of the transfers of a client's earlier connections writes any more."""

    def write_for(self, name: str) -> None:
        """It writes to what the connections reserve that name it so."""


class Session:
    """One client. A client that goes away loses all this; `close` says what it may still write to.

    Args:
        caches: the caches of the pool.
        peer: the client's process.
        client: the client's number, the same in all its connections. A process may have several.
        is_sole: the pool is for one engine: it may be made smaller.
    """

    def __init__(self, caches: Caches, peer: Peer, client: int = 0, *, is_sole: bool = False) -> None:
        self._is_sole = is_sole
        self._caches = caches
        self._control = caches.control
        self._peer = peer
        self._client = client
        self.writers: list[str] = []
        """Names of other processes that write to what it reserves."""
        self._cache: Cache | None = None
        self._tier: TierSession | None = None
        self._watcher: Watcher | None = None
        self._reserved = Table(_RESERVED)
        self._pins = Table(_PINNED)
        self._scratch: int | None = None
        self._handlers: Mapping[Kind, Callable[..., Answer]] = {
            Kind.ADD_CACHE: self._add_cache,
            Kind.SCRATCH: self._give_scratch,
            Kind.SCRATCH_DONE: self._take_scratch,
            Kind.WRITER: self._write_for,
            Kind.WRITERS: self._written_by,
            Kind.SETTLED: self._settled,
            Kind.RANK: self._rank,
            Kind.SHRINK: self._shrink,
            Kind.PLAN_SAVE: self._plan_save,
            Kind.FINISH_SAVE: self._finish_save,
            Kind.PLAN_LOAD: self._plan_load,
            Kind.FINISH_LOAD: self._finish_load,
            Kind.HOLD: self._hold,
            Kind.CONTAINS: self._contains,
            Kind.PREFIX: self._prefix,
            Kind.STATES: self._states,
            Kind.MISS_REASON: self._miss_reason,
            Kind.TOUCH: self._touch,
            Kind.INVALIDATE: self._invalidate,
            Kind.CLEAR: self._clear,
            Kind.WATCH: self._watch,
            Kind.EVENTS: self._events,
            Kind.PLACES: self._places,
            Kind.FIGURES: self._figures,
        }

    def answer(self, kind: Kind, fields: Arrays) -> Answer:
        """Do what a frame asks for; returns kind and fields of the answer, None if there is none.

        Raises:
            OwnerError: the frame is wrong, for instance names a slot that this client does not hold. Its connection is
                closed then, because the two sides do not agree any more on what it holds.
        """
        handler = self._handlers.get(kind)
        if handler is None and self._tier is not None:
            handler = self._tier.handlers.get(kind)
        if handler is None:
            raise OwnerError(f"{kind.name} is no request")
        if self._cache is None and kind not in _WITHOUT_CACHE:
            raise OwnerError(f"{kind.name} comes before ADD_CACHE")
        try:
            return handler(*fields)
        except ConfigError as error:
            return Kind.REFUSED, (str(error).encode(),)

    @property
    def cache(self) -> Cache:
        """The client's cache."""
        assert self._cache is not None
        return self._cache

    def close(self) -> list[int]:
        """Forget the client.

        Returns:
            Offsets of extents that its device may still write: free them when its process is gone.
        """
        if self._tier is not None:
            self._tier.close()
        if self._watcher is not None:
            self.cache.watchers.remove(self._watcher)
            self._watcher = None
        pinned, reserved = self._pins.used("count"), self._reserved.used("held")
        self._control.unpin(np.repeat(pinned, self._pins.rows["count"][pinned]))
        offsets: list[int] = self._reserved.rows["offset"][reserved].tolist()
        self._control.index.abort(reserved, None)
        self._pins, self._reserved = Table(_PINNED), Table(_RESERVED)
        if self._scratch is not None:
            offsets.append(self._scratch)
            self._scratch = None
        return offsets

    # -- registration ------------------------------------------------------------------------------

    def _add_cache(
        self, namespace: NDArray[np.uint64], forms: NDArray[np.int64], described: NDArray[np.uint8]
    ) -> Answer:
        if self._cache is not None:
            raise OwnerError("a connection serves one cache")
        cache = self._cache = self._caches.add(expected(namespace, 4), forms, text_of(described))
        if cache.tiering is None:
            return Kind.CACHE_ADDED, (b"",)
        self._tier = TierSession(cache, cache.tiering, self._control)
        return Kind.CACHE_ADDED, (cache.tiering.backing.tier.name.encode(),)

    def _rank(self, request: NDArray[np.int64]) -> Answer:
        has_priority, priority, has_quota, quota_bytes = expected(request, 4).tolist()
        self._caches.rank(self.cache, priority if has_priority else None, quota_bytes if has_quota else None)
        return Kind.DONE, ()

    def _give_scratch(self, request: NDArray[np.int64]) -> Answer:
        nbytes = int(expected(request, 1)[0])
        if self._scratch is not None or not 0 < nbytes <= self._control.allocator.piece_bytes:
            raise ConfigError(f"there is no scratch memory of {nbytes} bytes: raise the pieces of the pool")
        self._scratch = self._control.scratch(nbytes)
        if self._scratch is None:
            raise ConfigError(f"the pool has no {nbytes} bytes for the test of a new engine: all its blocks are in use")
        return Kind.SCRATCH_GIVEN, (numbers(self._scratch),)

    def _take_scratch(self) -> Answer:
        if self._scratch is not None:
            self._control.free(self._scratch)
            self._scratch = None
        return None

    def _settled(self) -> Answer:
        self._peer.has_settled(self._client)
        return None

    def _shrink(self, request: NDArray[np.int64]) -> Answer:
        nbytes = int(expected(request, 1)[0])
        if not self._is_sole:
            raise ConfigError("the pool serves several engines")
        if 0 <= nbytes < self._control.allocator.capacity_bytes:
            self._control.shrink(nbytes)
        return Kind.DONE, ()

    def _write_for(self, name: NDArray[np.uint8]) -> Answer:
        self._peer.write_for(text_of(name))
        return Kind.DONE, ()

    def _written_by(self, name: NDArray[np.uint8]) -> Answer:
        self.writers.append(text_of(name))
        return Kind.DONE, ()

    # -- save --------------------------------------------------------------------------------------

    def _plan_save(
        self,
        options: NDArray[np.int64],
        keys: NDArray[np.uint64],
        groups: NDArray[np.uint8],
        chain: NDArray[np.uint64],
    ) -> Answer:
        keys, chain = keys_of(keys), keys_of(chain)
        if (expected(groups, len(keys)) >= self.cache.num_groups).any():
            raise OwnerError("a block is of a group that the cache does not have")
        plan = self._control.plan_save(
            keys,
            np.zeros(len(keys), dtype=np.int32),
            self.cache.account,
            groups=groups + np.uint8(self.cache.first),
            as_is=bool(expected(options, 1)[0]),
            chain=chain if len(chain) else keys,
        )
        offsets, forms = plan.transfer.offsets, self._forms_of(plan)
        rows = self._reserved.up_to(plan.slots)
        rows["held"][plan.slots] = True
        rows["offset"][plan.slots], rows["form"][plan.slots] = offsets, forms
        rows["num_clears"][plan.slots] = self.cache.num_clears
        states = plan.states.astype(np.uint8)
        if self._tier is not None:
            self._tier.used(keys[plan.states == STORED])
        return Kind.SAVE_PLANNED, (
            states,
            plan.slots,
            offsets,
            self._own(forms),
            plan.positions.astype(np.int64),
            self._removed(),
        )

    def _forms_of(self, plan: SavePlan) -> NDArray[np.uint8]:
        forms = plan.transfer.forms
        return np.zeros(len(plan.slots), dtype=np.uint8) if forms is None else forms

    def _own(self, forms: NDArray[Any]) -> NDArray[np.uint8]:
        """Forms as the client counts them."""
        own: NDArray[np.uint8] = (forms - 2 * self.cache.first).astype(np.uint8)
        return own

    def _finish_save(
        self,
        slots: NDArray[np.int64],
        digests: NDArray[np.uint64],
        succeeded: NDArray[np.uint8],
        too_lossy: NDArray[np.uint8],
        tried: NDArray[np.uint8],
    ) -> Answer:
        expected(digests, slots.size)
        masks = [flags_of(mask, slots.size) for mask in (succeeded, too_lossy, tried)]
        rows = self._reserved.rows
        if not self._reserved.has(slots) or not rows["held"][slots].all() or len(np.unique(slots)) < slots.size:
            raise OwnerError("a save ended with blocks that this client has not reserved")
        rows["held"][slots] = False
        offsets, forms = rows["offset"][slots], rows["form"][slots]
        stale = rows["num_clears"][slots] < self.cache.num_clears
        if stale.any():  # as if they had been given up before they moved
            succeeded_, too_lossy_, tried_ = masks
            masks = [_without(succeeded_, stale), too_lossy_, _without(tried_, stale)]
        transfer = TransferPlan(Direction.SAVE, np.zeros(slots.size, dtype=np.int32), offsets, forms)
        states = np.full(slots.size, RESERVED, dtype=np.int64)
        plan = SavePlan(transfer, states, slots.copy(), self._control.extents[forms])
        stored = slots if masks[0] is None else slots[masks[0]]
        keys = self._control.index.keys_of(stored)
        self._control.finish_save(plan, digests.copy(), *masks)
        if self._tier is not None:
            self._tier.saved(keys)
        return None

    # -- load --------------------------------------------------------------------------------------

    def _plan_load(self, keys: NDArray[np.uint64]) -> Answer:
        return self._pinned(keys, touches=True)

    def _hold(self, keys: NDArray[np.uint64]) -> Answer:
        return self._pinned(keys, touches=False)

    def _pinned(self, keys: NDArray[np.uint64], *, touches: bool) -> Answer:
        index = self._control.index
        pins = index.pin(keys_of(keys)) if touches else index.hold(keys_of(keys))
        np.add.at(self._pins.up_to(pins.hits)["count"], pins.hits, 1)
        return Kind.LOAD_PLANNED, (
            np.ascontiguousarray(pins.slots),
            pins.reasons.astype(np.uint8) if len(pins) else np.empty(0, np.uint8),
            np.ascontiguousarray(pins.offsets),
            np.ascontiguousarray(pins.nbytes),
            np.ascontiguousarray(pins.digests),
            self._own(pins.forms),
        )

    def _finish_load(self, slots: NDArray[np.int64], corrupt: NDArray[np.uint8]) -> Answer:
        damaged = flags_of(corrupt, slots.size)
        if not self._pins.has(slots):
            raise OwnerError("a load ended with blocks that this client has not pinned")
        counts = self._pins.rows["count"]
        np.subtract.at(counts, slots, 1)
        if slots.size and int(counts[slots].min()) < 0:
            np.add.at(counts, slots, 1)
            raise OwnerError("a load ended with blocks that this client has not pinned")
        keys = self._control.index.keys_of(slots)
        self._control.unpin(slots.copy(), damaged)
        if self._tier is not None:
            self._tier.loaded(keys, damaged)
        return None

    # -- look-ups and the rest ---------------------------------------------------------------------

    def _contains(self, keys: NDArray[np.uint64]) -> Answer:
        return Kind.FOUND, (as_flags(self._control.index.contains_mask(keys_of(keys))),)

    def _prefix(self, keys: NDArray[np.uint64]) -> Answer:
        length, reason = self._control.index.leading(keys_of(keys))
        return Kind.LENGTH, (numbers(length, -1 if reason is None else MISS_REASONS.index(reason)),)

    def _states(self, keys: NDArray[np.uint64]) -> Answer:
        return Kind.STATES_FOUND, (self._control.index.states(keys_of(keys)),)

    def _miss_reason(self, key: NDArray[np.uint64]) -> Answer:
        reason = self._control.index.miss_reason(expected(key, 4).tobytes())
        return Kind.REASON, (numbers(MISS_REASONS.index(reason)),)

    def _touch(self, keys: NDArray[np.uint64]) -> Answer:
        self._control.touch(keys_of(keys))
        if self._tier is not None:
            self._tier.touched(keys_of(keys))
        return None

    def _invalidate(self, keys: NDArray[np.uint64]) -> Answer:
        self._control.invalidate(keys_of(keys))
        return Kind.DONE, ()

    def _clear(self) -> Answer:
        self.cache.clear(self._control)
        return Kind.DONE, ()

    # -- events ------------------------------------------------------------------------------------

    def _watch(self) -> Answer:
        if self._watcher is None:
            self._watcher = Watcher()
            self.cache.watchers.append(self._watcher)
        return Kind.DONE, ()

    def _removed(self) -> NDArray[np.int64]:
        return numbers() if self._watcher is None else self._watcher.take_removed()

    def _events(self) -> Answer:
        if self._watcher is None:
            raise OwnerError("EVENTS comes before WATCH")
        removed = self._removed()
        was_overdue, written, lost = self._watcher.take()
        return Kind.EVENTS_FOUND, (
            removed,
            numbers(was_overdue),
            *(keys ^ self.cache.namespace for keys in (written, lost)),
        )

    def _places(self, keys: NDArray[np.uint64]) -> Answer:
        control = self._control
        held = control.hold(keys_of(keys))
        control.release(held.slots)
        offsets = np.full(len(keys) // 4, -1, dtype=np.int64)
        offsets[held.positions] = held.offsets
        return Kind.PLACES_FOUND, (offsets, self._removed())

    def _figures(self) -> Answer:
        control = self._control
        figures = control.allocator.figures()
        found = PoolNumbers(
            capacity_bytes=figures.capacity_bytes,
            allocated_bytes=figures.allocated_bytes,
            largest_free_bytes=figures.largest_free_bytes,
            fragmentation_ppb=int(figures.fragmentation * 1e9),
            num_extents=figures.num_extents,
            evicted_blocks=control.index.evicted_blocks,
            changes=control.index.removed_blocks + self.cache.num_clears,
            priority=self.cache.priority,
            quota_bytes=self.cache.quota_bytes or 0,
            quota_used_bytes=control.allocator.bytes_of(self.cache.account) if self.cache.quota_bytes else 0,
        )
        return Kind.POOL_FIGURES, (numbers(*found),)


def _without(mask: NDArray[np.bool_] | None, stale: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ~stale if mask is None else mask & ~stale
