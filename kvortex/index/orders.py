"""Several orders of eviction over one index: for each priority, and for the blocks of a cache that has a quota."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.index.policy import EvictionPolicy, Slots

NUM_FORMS = 256
_COMMON = 0
"""Number of the share of all blocks of which nothing else was said."""


@dataclass(slots=True)
class _Share:
    """Blocks that are ranked alike: those of one cache.

    Attributes:
        priority: that of the order which they are in, together with others.
        alone: an order of these blocks alone, which they are in as well; None without a quota.
    """

    priority: int = 0
    alone: EvictionPolicy | None = None


class EvictionOrders(EvictionPolicy):
    """An order for each priority, of which the lowest loses its blocks first, and an order for each cache with a quota.

    Every order is a policy of the same kind. A block is in the order of its priority, with the blocks of all caches
    that have it. If its cache has a quota, the block is in that cache's own order, too: so the coldest block of a cache
    is found without a look at those of others. What an eviction takes out of one of the two leaves the other one.

    Args:
        policy: the order so far, which becomes that of priority 0.
        capacity: slots that it allows.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self._levels: dict[int, EvictionPolicy] = {0: policy}  # by priority, the lowest first
        self._shares = [_Share()]
        self._share_of_form = np.zeros(NUM_FORMS, np.uint8)
        self._share_of = np.zeros(capacity, np.uint8)  # by slot; also of a slot that is in no order any more

    # -- shares ------------------------------------------------------------------------------------

    def assign(self, slots: Slots, form: int) -> None:
        """New blocks, of which one has this form, are in these slots, and will be inserted.

        What the orders remember of another cache's block in the same slot is forgotten.
        """
        share = self._share_of_form[form]
        moved = slots[self._share_of[slots] != share]
        if moved.size:
            self.remove(moved)
            self._share_of[moved] = share

    def rank(
        self,
        forms: range,
        live: Slots,
        nbytes: NDArray[np.int64],
        pins: NDArray[np.int32],
        *,
        priority: int,
        is_bounded: bool,
    ) -> None:
        """Rank the blocks of a cache, those that are there and those that come.

        Those that are there keep their order among themselves, and count as used more recently than other blocks of
        their new priority.

        Args:
            forms: the forms of the cache's blocks.
            live: slots of its blocks that are committed or reserved, `int64 [n]`.
            nbytes, pins: as in `pop_coldest`; the bytes of a reserved block are 0.
            priority: the new priority.
            is_bounded: whether the cache has a quota, so that `pop_coldest_of` may be asked. Once true it stays so.
        """
        number = int(self._share_of_form[forms.start])
        if number == _COMMON:
            number = len(self._shares)
            self._shares.append(_Share())
            self._share_of_form[forms.start : forms.stop] = number
            self._share_of[live] = number
        share = self._shares[number]
        if share.priority != priority:
            before = self._levels[share.priority]
            share.priority = priority
            if priority not in self._levels:
                self._levels[priority] = self._another()
            self._copy(live, before, self._levels[priority], nbytes, pins)
            before.remove(live)
            used = {0, *(other.priority for other in self._shares)}
            self._levels = {level: order for level, order in sorted(self._levels.items()) if level in used}
        if is_bounded and share.alone is None:
            share.alone = self._another()
            self._copy(live, self._levels[priority], share.alone, nbytes, pins)

    def _another(self) -> EvictionPolicy:
        made = self._levels[0].another()
        made.resize(len(self._share_of))
        return made

    def _copy(
        self,
        live: Slots,
        source: EvictionPolicy,
        target: EvictionPolicy,
        nbytes: NDArray[np.int64],
        pins: NDArray[np.int32],
    ) -> None:
        """Append those of a cache's slots that are in an order to another one."""
        is_meant = np.zeros(len(self._share_of), np.bool_)
        is_meant[live] = True
        ordered = source.in_order(nbytes, pins)
        ordered = ordered[is_meant[ordered]]
        target.append(ordered)
        target.weigh(ordered, nbytes[ordered])

    # -- as one policy -----------------------------------------------------------------------------

    def resize(self, capacity: int) -> None:
        for order in self._orders():
            order.resize(capacity)
        self._share_of = np.append(self._share_of, np.zeros(capacity - len(self._share_of), np.uint8))

    def insert(self, slots: Slots, evicted: NDArray[np.int64] | None = None) -> None:
        for share, which in self._parts(slots):
            own = slots if which is None else slots[which]
            were = evicted if which is None or evicted is None else evicted[which]
            for order in self._orders_of(share):
                order.insert(own, were)

    def append(self, slots: Slots) -> None:
        for share, which in self._parts(slots):
            for order in self._orders_of(share):
                order.append(slots if which is None else slots[which])

    def access(self, slots: Slots) -> None:
        for share, which in self._parts(slots):
            for order in self._orders_of(share):
                order.access(slots if which is None else slots[which])

    def weigh(self, slots: Slots, nbytes: NDArray[np.int64]) -> None:
        for share, which in self._parts(slots):
            own = slots if which is None else slots[which]
            sizes = nbytes if which is None or len(nbytes) == 1 else nbytes[which]
            for order in self._orders_of(share):
                order.weigh(own, sizes)

    def remove(self, slots: Slots) -> None:
        for share, which in self._parts(slots):
            for order in self._orders_of(share):
                order.remove(slots if which is None else slots[which])

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        popped: list[Slots] = []
        for order in self._levels.values():
            found = order.pop_coldest(target_bytes, nbytes, pins)
            idle = found[pins[found] == 0]
            self._leave_own_orders(idle)
            popped.append(found)
            target_bytes -= int(nbytes[idle].sum())
            if target_bytes <= 0:
                break
        return np.concatenate(popped)

    def pop_coldest_of(self, form: int, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> Slots:
        """`pop_coldest`, of the blocks of one cache, which has a quota. `form` is one of theirs."""
        share = self._shares[self._share_of_form[form]]
        assert share.alone is not None
        found: Slots = share.alone.pop_coldest(target_bytes, nbytes, pins)
        self._levels[share.priority].remove(found[pins[found] == 0])
        return found

    def _leave_own_orders(self, idle: Slots) -> None:
        for share, which in self._parts(idle):
            if share.alone is not None:
                share.alone.remove(idle if which is None else idle[which])

    def _parts(self, slots: Slots) -> Iterator[tuple[_Share, NDArray[np.intp] | None]]:
        """The shares that have some of these slots, and the positions of each one's; None for all of them."""
        if not slots.size:
            return
        numbers = self._share_of[slots]
        if (numbers == numbers[0]).all():
            yield self._shares[numbers[0]], None
            return
        for number in np.unique(numbers).tolist():
            yield self._shares[number], np.flatnonzero(numbers == number)

    def _orders_of(self, share: _Share) -> Iterator[EvictionPolicy]:
        yield self._levels[share.priority]
        if share.alone is not None:
            yield share.alone

    def _orders(self) -> Iterator[EvictionPolicy]:
        yield from self._levels.values()
        yield from (share.alone for share in self._shares if share.alone is not None)

    def __len__(self) -> int:
        return sum(len(order) for order in self._levels.values())
