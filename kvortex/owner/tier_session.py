"""What one client of the owner asks of the lower tier behind its cache. No I/O here."""

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import OwnerError
from kvortex.owner.caches import Cache
from kvortex.owner.protocol import Field, Kind, TierCall, as_flags, expected, keys_of, numbers
from kvortex.owner.tickets import Tickets
from kvortex.planes.control import ControlPlane
from kvortex.tiering import Tiering
from kvortex.types import MissReason


class TierSession:
    """The calls of one client to the lower tier.

    Args:
        cache: the client's cache.
        tiering: that of the cache.
        control: the control plane of the pool.
    """

    def __init__(self, cache: Cache, tiering: Tiering, control: ControlPlane) -> None:
        self._control = control
        self._cache = cache
        self._tiering = tiering
        self._tickets = Tickets(tiering)
        self.handlers: Mapping[Kind, Callable[..., tuple[Kind, tuple[Field, ...]]]] = {
            Kind.TIER_KNOWN: self._known,
            Kind.FETCH: self._fetch,
            Kind.END_FETCH: self._end_fetch,
            Kind.TIER_CALL: self._call,
            Kind.CALLS: self._calls,
            Kind.TIER_FIGURES: self._figures,
        }

    def close(self) -> None:
        """The client is gone: cancel what it waits for."""
        self._tickets.close()

    def _own(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Keys as the engines of the cache give them, from those in the pool."""
        own: NDArray[np.uint64] = keys ^ self._cache.namespace
        return own

    # -- what the client does with the pool --------------------------------------------------------

    def saved(self, keys: NDArray[np.uint64]) -> None:
        """New blocks of the pool, a chain, were stored; keys are those in the pool, `uint64 [n, 4]`."""
        if len(keys):
            self._tiering.saved(self._own(keys), np.ones(len(keys), dtype=np.bool_))

    def used(self, keys: NDArray[np.uint64]) -> None:
        """Blocks of the pool, a chain, were asked for again."""
        if len(keys):
            self._tiering.used(self._own(keys))

    def touched(self, keys: NDArray[np.uint64]) -> None:
        """A request has ended that used a chain of blocks."""
        self._tiering.touch(self._own(keys))

    def loaded(self, keys: NDArray[np.uint64], corrupt: NDArray[np.bool_] | None) -> None:
        """Blocks were loaded; some of them, `bool [n]`, or none, were not as they had been saved."""
        outcomes: list[MissReason | None] = [None] * len(keys)
        for position in [] if corrupt is None else np.flatnonzero(corrupt).tolist():
            outcomes[position] = MissReason.CORRUPT
        self._tiering.loaded(self._own(keys), outcomes)

    # -- what it asks for --------------------------------------------------------------------------

    def _known(self, keys: NDArray[np.uint64]) -> tuple[Kind, tuple[Field, ...]]:
        found = as_flags(self._tiering.known(self._own(keys_of(keys))))
        return Kind.TIER_FOUND, (found, numbers(self._tiering.asks_store, self._tiering.knows_all))

    def _fetch(
        self, options: NDArray[np.int64], keys: NDArray[np.uint64], groups: NDArray[np.uint8]
    ) -> tuple[Kind, tuple[Field, ...]]:
        keys, leading = keys_of(keys), bool(expected(options, 1)[0])
        if (expected(groups, len(keys)) >= self._cache.num_groups).any():
            raise OwnerError("a block is of a group that the cache does not have")
        number, flags = self._tickets.fetch(self._own(keys), groups.copy(), leading=leading)
        return Kind.FETCHING, (numbers(number), flags)

    def _end_fetch(self, options: NDArray[np.int64]) -> tuple[Kind, tuple[Field, ...]]:
        number, cancels = expected(options, 2).tolist()
        return Kind.FETCHING, (numbers(0), self._tickets.end_fetch(number, cancels=bool(cancels)))

    def _call(self, which: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[Kind, tuple[Field, ...]]:
        number, own = int(expected(which, 1)[0]), self._own(keys_of(keys))
        if number not in set(TierCall):
            raise OwnerError(f"there is no call {number} of a lower tier")
        return Kind.CALLED, (numbers(self._tickets.start(self._work(TierCall(number), own))),)

    def _work(self, call: TierCall, keys: NDArray[np.uint64]) -> Coroutine[Any, Any, bool]:
        tiering = self._tiering
        match call:
            case TierCall.READY:
                return tiering.ready()
            case TierCall.FLUSH:
                return _done(tiering.flush())
            case TierCall.INVALIDATE:
                in_pool = self._own(keys)  # XOR is its own inverse
                return tiering.invalidate(keys, lambda: self._control.invalidate(in_pool))
            case TierCall.CLEAR:
                return tiering.clear(lambda: self._cache.clear(self._control))
            case TierCall.ASK:
                return _done(tiering.ask(keys))

    def _calls(self) -> tuple[Kind, tuple[Field, ...]]:
        return Kind.CALLS_FOUND, (self._tickets.report().ravel(),)

    def _figures(self) -> tuple[Kind, tuple[Field, ...]]:
        return Kind.TIER_FIGURES_FOUND, (json.dumps(asdict(self._tiering.figures())).encode(),)


async def _done(call: Coroutine[Any, Any, None]) -> bool:
    await call
    return True
