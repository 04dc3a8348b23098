"""Several orders of eviction over one index: lower priorities go first, and a cache with a quota has an order alone."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from kvortex.index import COMMITTED, CacheIndex, make_policy, pack_keys, table
from kvortex.index.orders import EvictionOrders
from kvortex.index.policy_steps import T1, T2

POLICIES = ["lru", "s3fifo", "arc"]
NBYTES = 10


def make_index(policy: str = "lru", entries: int = 64, ghosts: int = 16) -> CacheIndex:
    return CacheIndex(make_policy(policy), ghost_entries=ghosts, expected_entries=entries)


def keys(count: int, cache: int, start: int = 0) -> np.ndarray:
    """Keys of blocks of a cache: the first byte tells which."""
    return pack_keys([bytes([cache]) * 16 + n.to_bytes(16, "little") for n in range(start, start + count)])


def store(index: CacheIndex, chain: np.ndarray, cache: int) -> None:
    """Save a chain; a cache has the forms 2 * cache and 2 * cache + 1."""
    slots = index.reserve(chain, 2 * cache).owned
    count = len(slots)
    index.commit(slots, slots.copy(), NBYTES, np.zeros(count, np.uint64), np.full(count, 2 * cache, np.uint8))


def rank(index: CacheIndex, cache: int, priority: int = 0, *, is_bounded: bool = False) -> None:
    index.rank(range(2 * cache, 2 * cache + 2), priority=priority, is_bounded=is_bounded)


def victims(index: CacheIndex, count: int, cache: int | None = None) -> list[tuple[int, int]]:
    """Evict so many blocks, of one cache or of all; cache and number of each."""
    evicted = index.evict(count * NBYTES) if cache is None else index.evict_of(2 * cache, count * NBYTES)
    return [(int(key[0]), int.from_bytes(key[16:], "little")) for key in map(np.ndarray.tobytes, evicted.keys)]


@pytest.mark.parametrize("policy", POLICIES)
def test_lower_priorities_go_first_and_each_in_its_order(policy: str) -> None:
    index = make_index(policy)
    rank(index, 2, 5)
    rank(index, 1, -1)
    for cache in (1, 0, 2):
        store(index, keys(3, cache), cache)
    assert victims(index, 7) == [(1, 2), (1, 1), (1, 0), (0, 2), (0, 1), (0, 0), (2, 2)]
    assert victims(index, 9) == [(2, 1), (2, 0)]


@pytest.mark.parametrize("policy", POLICIES)
def test_caches_of_one_priority_have_one_order(policy: str) -> None:
    """Whether it is the one that they had without a word, or another one."""
    orders = []
    for priority in (None, 0, 3):
        index = make_index(policy)
        for cache in (0, 1) if priority is not None else ():
            rank(index, cache, priority, is_bounded=cache == 1)
        for number in range(4):
            store(index, keys(2, number % 2, 2 * number), number % 2)
        index.touch(keys(2, 0))
        orders.append(victims(index, 8))
    assert orders[0] == orders[1] == orders[2]
    assert {cache for cache, _ in orders[0][:4]} == {0, 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_of_one_cache_alone_its_own_coldest_go(policy: str) -> None:
    index = make_index(policy)
    rank(index, 1, is_bounded=True)
    for cache in (0, 1, 0):
        store(index, keys(3, cache, 0 if len(index) < 6 else 3), cache)
    assert victims(index, 2, cache=1) == [(1, 2), (1, 1)]
    assert victims(index, 9, cache=1) == [(1, 0)]
    assert victims(index, 9, cache=1) == []
    assert len(index) == 6
    store(index, keys(3, 1, 10), 1)
    assert victims(index, 1, cache=1) == [(1, 12)]
    assert [cache for cache, _ in victims(index, 99)].count(1) == 2, "what one order has lost, the other one has lost"
    assert victims(index, 9, cache=1) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_priority_that_comes_later_takes_what_is_there_along(policy: str) -> None:
    index = make_index(policy)
    store(index, keys(4, 1), 1)
    store(index, keys(2, 0), 0)
    reserved = index.reserve(keys(2, 1, 4), 2).owned
    held = index.hold(keys(1, 1)).hits
    rank(index, 1, 1)
    assert victims(index, 1) == [(0, 1)], "of the lower priority, although it was used last"
    rank(index, 1, 2, is_bounded=True)
    index.unpin(held)
    index.commit(reserved, reserved.copy(), NBYTES, np.zeros(2, np.uint64), np.full(2, 2, np.uint8))
    assert victims(index, 1) == [(0, 0)]
    assert victims(index, 3, cache=1) == [(1, 3), (1, 2), (1, 1)]
    rank(index, 1, -1, is_bounded=True)
    store(index, keys(1, 0), 0)
    assert {cache for cache, _ in victims(index, 3)} == {1}
    assert victims(index, 9) == [(0, 0)]
    assert len(index) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_busy_block_is_passed_over_and_comes_back_into_both_orders(policy: str) -> None:
    for first in (None, 1):
        for second in (None, 1):
            index = make_index(policy)
            rank(index, 1, 1, is_bounded=True)
            store(index, keys(3, 1), 1)
            held = index.hold(keys(1, 1, 2)).hits
            assert victims(index, 9, first) == [(1, 1), (1, 0)]
            assert victims(index, 9, second) == []
            index.unpin(held)
            assert victims(index, 9, second) == [(1, 2)]
            assert victims(index, 9, first) == []


@pytest.mark.parametrize("policy", ["s3fifo", "arc"])
def test_another_caches_block_in_the_slot_of_an_evicted_one_is_new(policy: str) -> None:
    """The order of priority 0 has evicted a block of cache 0 from slot 0. Then one of cache 1 is there, and joins it.

    It is not taken for the first one, which would have come back: it goes before a block that was saved later.
    """
    orders = EvictionOrders(make_policy(policy), 0)
    orders.resize(4)
    nbytes, pins, none = np.full(4, NBYTES), np.zeros(4, np.int32), np.empty(0, np.int64)

    def insert(slot: int, form: int, *, returns: bool = False) -> None:
        orders.assign(np.array([slot]), form)
        orders.insert(np.array([slot]), np.array([int(returns)]))
        orders.weigh(np.array([slot]), nbytes[:1])

    insert(0, 0)
    insert(2, 0)
    assert orders.pop_coldest(1, nbytes, pins).tolist() == [0]
    orders.rank(range(2, 4), none, nbytes, pins, priority=1, is_bounded=False)
    insert(0, 2)
    pins[2] = 1  # so that the order of priority 0 has a size, and remembers as much
    assert orders.pop_coldest(1, nbytes, pins).tolist() == [2, 0]
    orders.rank(range(2, 4), none, nbytes, pins, priority=0, is_bounded=False)
    insert(0, 2, returns=True)
    insert(1, 2)
    assert orders.pop_coldest(1, nbytes, pins).tolist() == [0]


def test_growth_keeps_every_order() -> None:
    index = make_index(entries=4)
    rank(index, 1, 1, is_bounded=True)
    for cache in (1, 0):
        store(index, keys(40, cache), cache)
    assert victims(index, 40) == [(0, n) for n in range(39, -1, -1)]
    assert victims(index, 40, cache=1) == [(1, n) for n in range(39, -1, -1)]


# -- against a plain model ---------------------------------------------------------------------------


class Model:
    """LRU over several caches, with lists: blocks by last use, the coldest first."""

    def __init__(self) -> None:
        self.order: list[tuple[int, int]] = []
        self.priority = dict.fromkeys(range(3), 0)

    def use(self, cache: int, numbers: Sequence[int]) -> None:
        blocks = [(cache, number) for number in reversed(numbers)]
        self.order = [block for block in self.order if block not in blocks] + blocks

    def evict(self, count: int, cache: int | None) -> list[tuple[int, int]]:
        own = [block for block in self.order if cache in (None, block[0])]
        gone = sorted(own, key=lambda block: 0 if cache is not None else self.priority[block[0]])[:count]
        self.order = [block for block in self.order if block not in gone]
        return gone

    def move(self, cache: int, priority: int) -> None:
        """Its blocks become the hottest of their new priority."""
        if self.priority[cache] != priority:
            self.priority[cache] = priority
            own = [block for block in self.order if block[0] == cache]
            self.order = [block for block in self.order if block[0] != cache] + own


@pytest.mark.parametrize("seed", range(20))
def test_lru_agrees_with_its_model(seed: int) -> None:
    dice, index, model = random.Random(seed), make_index(entries=16, ghosts=8), Model()
    bounded: set[int] = set()
    for _ in range(300):
        cache, start = dice.randrange(3), dice.randrange(20)
        numbers = list(range(start, start + dice.randint(1, 4)))
        roll = dice.random()
        if roll < 0.5:
            store(index, keys(len(numbers), cache, start), cache)
            model.use(cache, numbers)
        elif roll < 0.6:
            index.touch(keys(len(numbers), cache, start))
            model.use(cache, [number for number in numbers if (cache, number) in model.order])
        elif roll < 0.65:
            freed = index.drop_keys(keys(1, cache, start), table.MISS_REASONS[3])
            assert bool(freed.size) == ((cache, start) in model.order)
            model.order = [block for block in model.order if block != (cache, start)]
        elif roll < 0.7:
            priority = dice.randint(-1, 1)
            bounded |= {cache} if dice.random() < 0.5 else set()
            rank(index, cache, priority, is_bounded=cache in bounded)
            model.move(cache, priority)
        else:
            count, one = dice.randint(1, 4), dice.choice([None, *bounded])
            assert victims(index, count, one) == model.evict(count, one)
    assert victims(index, 1000) == model.evict(1000, None)


def weighed_bytes(index: CacheIndex) -> list[int]:
    """Bytes that S3-FIFO or ARC takes for held: in all orders of priorities, and in the order of cache 1 alone."""
    orders = index._policy
    assert isinstance(orders, EvictionOrders)
    alone = [share.alone for share in orders._shares if share.alone is not None][:1]
    cells = [[order._cells for order in group] for group in (orders._levels.values(), alone)]  # type: ignore[attr-defined]
    return [sum(int(lists["nbytes"][[T1, T2]].sum()) for lists in group) for group in cells]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_no_policy_loses_a_block_or_evicts_one_of_a_higher_priority_too_early(policy: str, seed: int) -> None:
    """With pins and reservations, which the model above has not."""
    dice, index = random.Random(seed), make_index(policy, entries=16, ghosts=8)
    priority, bounded = dict.fromkeys(range(3), 0), {1}
    rank(index, 1, is_bounded=True)
    pinned: list[np.ndarray] = []
    reserved: list[tuple[int, np.ndarray]] = []

    def idle() -> list[int]:
        rows = index._table.rows
        at = np.flatnonzero((rows["state"] == COMMITTED) & (rows["pins"] == 0))
        return [int(form) // 2 for form in rows["form"][at]]

    for _ in range(400):
        cache, chain_of = dice.randrange(3), keys(dice.randint(1, 5), dice.randrange(3), dice.randrange(20))
        cache = int(chain_of.view(np.uint8)[0, 0])
        roll = dice.random()
        if roll < 0.35:
            store(index, chain_of, cache)
        elif roll < 0.45:
            reserved.append((cache, index.reserve(chain_of, 2 * cache).owned.copy()))
        elif roll < 0.55 and reserved:
            whose, slots = reserved.pop(dice.randrange(len(reserved)))
            if dice.random() < 0.5:
                forms = np.full(len(slots), 2 * whose + 1, np.uint8)
                index.commit(slots, slots.copy(), NBYTES, np.zeros(len(slots), np.uint64), forms)
            else:
                index.abort(slots, None)
        elif roll < 0.65:
            pinned.append(index.pin(chain_of).hits.copy())
        elif roll < 0.75 and pinned:
            index.unpin(pinned.pop(dice.randrange(len(pinned))))
        elif roll < 0.8:
            bounded |= {cache} if dice.random() < 0.3 else set()
            priority[cache] = dice.randint(-1, 1)
            rank(index, cache, priority[cache], is_bounded=cache in bounded)
        elif roll < 0.82:
            index.invalidate(chain_of)
        else:
            before, count, one = idle(), dice.randint(1, 6), dice.choice([None, *bounded])
            gone = [whose for whose, _ in victims(index, count, one)]
            own = [whose for whose in before if one in (None, whose)]
            assert len(gone) == min(count, len(own)), "all that may be evicted is found"
            ranks = sorted(priority[whose] if one is None else 0 for whose in own)
            assert [priority[whose] if one is None else 0 for whose in gone] == ranks[: len(gone)]
            assert one is None or set(gone) <= {one}
        if policy != "lru":
            assert weighed_bytes(index)[0] <= index.committed_bytes, "a reservation counts nothing"
    for slots in pinned:
        index.unpin(slots)
    for _, slots in reserved:
        index.abort(slots, None)
    if policy != "lru":
        assert weighed_bytes(index) == [index.committed_bytes, NBYTES * idle().count(1)]
    victims(index, 1000)
    assert len(index) == len(index._policy) == 0
