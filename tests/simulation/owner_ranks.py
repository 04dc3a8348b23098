"""What must hold of the priorities and quotas of an owner's caches."""

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvortex.index import COMMITTED, Evicted, table
from kvortex.owner.caches import Cache, Caches


class WatchedRanks:
    """Looks at every eviction, and at what caches take.

    Args:
        caches: the caches of the pool.
        complain: is told what is wrong.
        tally: counts what happens.
    """

    def __init__(self, caches: Caches, complain: Callable[[str], None], tally: Counter[str]) -> None:
        self._caches = caches
        self._control = caches.control
        self._complain = complain
        self._tally = tally
        self._most: dict[str, int] = {}  # bytes that a cache may take although it has a lower quota by now
        index, rank = caches.control.index, caches.rank
        evict, evict_of = index.evict, index.evict_of

        def rank_watched(cache: Cache, priority: int | None, quota_bytes: int | None) -> None:
            rank(cache, priority, quota_bytes)
            self._most[cache.account] = self._used(cache)

        def evict_watched(nbytes: int) -> Evicted:
            evicted = evict(nbytes)
            self._check_priorities(evicted.forms)
            return evicted

        def evict_of_watched(form: int, nbytes: int) -> Evicted:
            evicted = evict_of(form, nbytes)
            self._tally["evicted for a quota"] += len(evicted.forms)
            if {self._of(other) for other in evicted.forms.tolist()} - {self._of(form)}:
                self._complain("a block was evicted for the quota of another cache")
            return evicted

        # A block of these methods is seen here, whatever the control plane makes of it.
        caches.rank = rank_watched  # type: ignore[method-assign]
        index.evict, index.evict_of = evict_watched, evict_of_watched  # type: ignore[method-assign]

    def _of(self, form: int) -> Cache:
        (cache,) = (cache for cache in self._caches if 0 <= form - 2 * cache.first < 2 * cache.num_groups)
        return cache

    def _used(self, cache: Cache) -> int:
        return self._control.allocator.bytes_by_owner().get(cache.account, 0)

    @property
    def _rows(self) -> NDArray[np.void]:
        found = self._control.index._table
        return found.rows[: int(found.totals[table.SLOTS_USED])]

    def _check_priorities(self, evicted: NDArray[np.int64]) -> None:
        rows = self._rows
        idle = rows["form"][(rows["state"] == COMMITTED) & (rows["pins"] == 0)]
        of_evicted, of_idle = ([self._of(form).priority for form in forms.tolist()] for forms in (evicted, idle))
        if of_evicted and of_idle:
            self._tally["evicted before a higher priority"] += max(of_evicted) < max(of_idle)
            if max(of_evicted) > min(of_idle):
                self._complain(f"a block of priority {max(of_evicted)} was evicted before one of {min(of_idle)}")

    def check(self) -> None:
        """No cache takes more than its quota, or than it took when it got that; and all bytes are counted."""
        for cache in self._caches:
            if cache.quota_bytes is None:
                continue
            used = self._used(cache)
            if used > max(cache.quota_bytes, self._most[cache.account]):
                self._complain(f"{cache.account} takes {used} bytes, and its quota is {cache.quota_bytes}")
            self._most[cache.account] = used
            if used != (counted := self._control.allocator.bytes_of(cache.account)):
                self._complain(f"{cache.account} takes {used} bytes, of which {counted} are counted")

    def check_at_rest(self) -> None:
        """The bytes of each cache are those of the blocks that can be loaded."""
        rows = self._rows[self._rows["state"] == COMMITTED]
        for cache in self._caches:
            own = (rows["form"] >= 2 * cache.first) & (rows["form"] < 2 * (cache.first + cache.num_groups))
            if (stored := int(rows["nbytes"][own].sum())) != (used := self._used(cache)):
                self._complain(f"{cache.account} takes {used} bytes, and has blocks of {stored}")
