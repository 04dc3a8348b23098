"""The index, case by case; `test_cache_index_model.py` compares it with a naive model."""

import hashlib
import threading

import numpy as np
import pytest

from kvortex.config import EVICTION_POLICIES
from kvortex.errors import ConfigError, EngineStateError, InvalidHashError
from kvortex.index import BUSY, MISS_REASONS, RESERVED, STORED, CacheIndex, make_policy, pack_keys
from kvortex.types import MissReason

every_policy = pytest.mark.parametrize("policy", EVICTION_POLICIES)


def key(number: int, chain: str = "") -> bytes:
    return hashlib.sha256(f"{chain}{number}".encode()).digest()


def keys(*numbers: int) -> np.ndarray:
    return pack_keys([key(n) for n in numbers])


def make(policy: str = "lru", **options: int) -> CacheIndex:
    return CacheIndex(make_policy(policy), **options)


def store(index: CacheIndex, *numbers: int, nbytes: int = 1) -> None:
    """Store blocks whose offset is their number and whose digest is a hundred more."""
    slots = index.reserve(keys(*numbers)).slots
    mine = slots >= 0
    owned = np.array(numbers)[mine]
    assert index.commit(slots[mine], owned, nbytes, owned + 100).size == 0


def test_reserved_blocks_are_invisible_until_committed() -> None:
    index = make()
    reservation = index.reserve(keys(1, 2))
    slots, states = reservation.slots, reservation.states
    assert states.tolist() == [RESERVED, RESERVED]
    assert not index.contains_mask([key(1), key(2)]).any()
    assert index.miss_reason(key(1)) is MissReason.PENDING
    assert index.num_pending == 2
    index.commit(slots, np.array([10, 20]), 5, np.array([1, 2]))
    assert index.contains_mask([key(1), key(2), key(3)]).tolist() == [True, True, False]
    assert (len(index), index.num_pending, index.committed_bytes) == (2, 0, 10)


def test_states_of_a_reservation() -> None:
    index = make()
    store(index, 1)
    index.reserve(keys(2))
    assert index.reserve(keys(1, 2, 3, 3)).states.tolist() == [STORED, BUSY, RESERVED, BUSY]


@pytest.mark.parametrize("bad", [b"short", b"x" * 33, "y" * 32, 5])
def test_bad_keys_are_refused(bad: object) -> None:
    with pytest.raises(InvalidHashError):
        pack_keys([key(1), bad])  # type: ignore[list-item]


def test_commit_and_abort_are_all_or_nothing() -> None:
    index = make()
    slots = index.reserve(keys(1, 2)).slots
    for wrong in (np.array([slots[0], slots[0]]), np.array([slots[0], 900])):
        with pytest.raises(EngineStateError):
            index.commit(wrong, np.array([1, 2]), 1, np.array([1, 2]))
        with pytest.raises(EngineStateError):
            index.abort(wrong, None)
    assert index.num_pending == 2
    with pytest.raises(InvalidHashError, match="length"):
        index.commit(slots, np.array([1]), 1, np.array([1, 2]))
    index.commit(slots, np.array([1, 2]), 1, np.array([1, 2]))
    with pytest.raises(EngineStateError):
        index.commit(slots, np.array([1, 2]), 1, np.array([1, 2]))
    assert len(index) == 2


def test_abort_remembers_why_or_what_was_known_before() -> None:
    index = make()
    index.abort(index.reserve(keys(1)).slots, MissReason.TRANSFER_FAILED)
    assert index.miss_reason(key(1)) is MissReason.TRANSFER_FAILED
    index.abort(index.reserve(keys(1)).slots, None)
    assert index.miss_reason(key(1)) is MissReason.TRANSFER_FAILED
    index.abort(index.reserve(keys(2)).slots, None)
    assert index.miss_reason(key(2)) is MissReason.NEVER_STORED
    store(index, 1)
    index.drop_keys(pack_keys([key(1)]), MissReason.CORRUPT)
    assert index.miss_reason(key(1)) is MissReason.CORRUPT


def test_a_prefix_ends_at_the_first_hole() -> None:
    index = make()
    store(index, 1, 2, 4)
    chain = [key(n) for n in (1, 2, 3, 4)]
    assert index.prefix_length(chain) == 2
    assert index.prefix_length(pack_keys(chain)) == 2
    assert index.prefix_length(chain[:2]) == 2
    assert index.prefix_length([]) == 0


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_reasons_are_bounded_and_the_oldest_goes_first(limit: int) -> None:
    index = make(ghost_entries=limit)
    for number in range(6):
        store(index, number)
        index.evict(1)
    told = [index.miss_reason(key(number)) for number in range(6)]
    assert told == [MissReason.NEVER_STORED] * (6 - limit) + [MissReason.EVICTED] * limit


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError):
        make(ghost_entries=-1)


@every_policy
def test_pins_hold_and_count(policy: str) -> None:
    index = make(policy)
    store(index, 1, 2, nbytes=8)
    pins = index.pin(keys(1, 9, 2))
    mine = pins.hits
    assert pins.slots.tolist() == [mine[0], -1, mine[1]]
    assert MISS_REASONS[pins.reasons[1]] is MissReason.NEVER_STORED
    assert pins.offsets.tolist() == [1, 2]
    assert pins.digests.tolist() == [101, 102]
    assert pins.nbytes.tolist() == [8, 8]
    again = index.pin(keys(1)).slots
    assert index.evict(100).offsets.size == 0
    assert index.unpin(mine).size == 0
    assert index.evict(100).offsets.tolist() == [2]
    assert index.unpin(again).size == 0
    assert index.evict(100).offsets.tolist() == [1]


def test_one_pin_too_few_takes_none() -> None:
    index = make()
    store(index, 1, 2)
    slots = index.pin(keys(1, 2)).slots
    with pytest.raises(EngineStateError):
        index.unpin(np.array([slots[0], slots[1], slots[1]]))
    assert index.evict(100).offsets.size == 0
    index.unpin(slots)
    assert sorted(index.evict(100).offsets.tolist()) == [1, 2]


def test_a_key_pinned_twice_is_unpinned_twice_in_one_call() -> None:
    index = make()
    store(index, 1)
    slots = index.pin(keys(1, 1)).slots
    index.drop(slots[:1], MissReason.CORRUPT)
    assert index.unpin(slots).tolist() == [1]


def test_a_dropped_block_vanishes_now_and_comes_back_with_its_last_pin() -> None:
    index = make()
    store(index, 1)
    slots = index.pin(keys(1)).slots
    assert index.drop(slots, MissReason.CORRUPT).size == 0
    assert index.miss_reason(key(1)) is MissReason.CORRUPT
    assert index.committed_bytes == 0
    store(index, 1)  # stored anew while the old one is still pinned
    assert index.contains_mask([key(1)]).all()
    assert index.drop(slots, MissReason.CORRUPT).size == 0, "dropped before"
    assert index.contains_mask([key(1)]).all()
    assert index.unpin(slots).tolist() == [1]
    assert index.contains_mask([key(1)]).all()


def test_a_reservation_is_not_dropped() -> None:
    index = make()
    slots = index.reserve(keys(1)).slots
    assert index.drop_keys(pack_keys([key(1)]), MissReason.CORRUPT).size == 0
    index.commit(slots, np.array([1]), 1, np.array([1]))
    assert index.contains_mask([key(1)]).all()


@every_policy
def test_the_tail_goes_first_and_no_more_than_asked(policy: str) -> None:
    index = make(policy)
    store(index, 1, 2, 3, 4, nbytes=10)
    assert index.evict(15).offsets.tolist() == [4, 3]
    assert index.prefix_length([key(n) for n in (1, 2, 3, 4)]) == 2
    assert index.evicted_blocks == 2
    assert index.evict(0).offsets.size == 0
    assert index.evict(1000).offsets.tolist() == [2, 1]


@every_policy
def test_a_save_committed_in_batches_still_loses_its_tail_first(policy: str) -> None:
    index = make(policy)
    slots = index.reserve(keys(1, 2, 3)).slots
    for i in range(3):
        index.commit(slots[i : i + 1], np.array([i + 1]), 1, np.array([0]))
    assert index.evict(1).offsets.tolist() == [3]


def test_use_makes_hot() -> None:
    index = make()
    store(index, 1)
    store(index, 2)
    index.reserve(keys(1))
    assert index.evict(1).offsets.tolist() == [2]
    store(index, 3)
    index.unpin(index.pin(keys(1)).slots)
    assert index.evict(1).offsets.tolist() == [3]


@every_policy
def test_busy_blocks_are_passed_over_once_and_come_back(policy: str) -> None:
    index = make(policy)
    store(index, *range(100))
    pinned = index.pin(keys(*range(50, 100))).slots
    reserved = index.reserve(keys(500)).slots
    assert index.evict(3).offsets.size == 3
    assert index.evict(1000).offsets.size == 47
    assert index.evict(1000).offsets.size == 0
    index.unpin(pinned)
    index.commit(reserved, np.array([500]), 1, np.array([0]))
    assert sorted(index.evict(1000).offsets.tolist()) == [*range(50, 100), 500]


def test_clear_forgets_blocks_and_reasons() -> None:
    index = make()
    store(index, 1, 2, 3)
    index.evict(1)
    pinned = index.pin(keys(1)).slots
    orphan = index.reserve(keys(9)).slots
    assert index.clear().tolist() == [2]
    assert len(index) == index.committed_bytes == 0
    assert index.miss_reason(key(3)) is MissReason.NEVER_STORED
    assert index.unpin(pinned).tolist() == [1]
    assert index.miss_reason(key(9)) is MissReason.PENDING
    assert index.reserve(keys(9)).states.tolist() == [BUSY]
    assert index.commit(orphan, np.array([77]), 1, np.array([0])).tolist() == [77]
    assert not index.contains_mask([key(9)]).any()
    store(index, 9)
    assert index.contains_mask([key(9)]).all()


@every_policy
def test_growth_keeps_everything(policy: str) -> None:
    index = make(policy, expected_entries=2, ghost_entries=4)
    pinned = []
    for number in range(2000):
        store(index, number)
        if number % 100 == 0:
            pinned.append(index.pin(keys(number)).slots)
    assert index.contains_mask([key(n) for n in range(2000)]).all()
    assert index.evict(10**9).offsets.size == 1980
    for slots in pinned:
        index.unpin(slots)
    assert index.evict(10**9).offsets.size == 20


def test_keys_that_share_their_bits_are_told_apart() -> None:
    """Same first word, so same bucket and same tag: only the rest differs."""
    index = make()
    crowd = [bytes(8) + key(n)[8:] for n in range(60)]
    slots = index.reserve(pack_keys(crowd)).slots
    index.commit(slots, np.arange(60), 1, np.zeros(60, dtype=np.uint64))
    rng = np.random.default_rng(3)
    gone: set[int] = set()
    for n in rng.permutation(60).tolist():
        index.drop_keys(pack_keys([crowd[n]]), MissReason.CORRUPT)
        gone.add(n)
        assert index.contains_mask(crowd).tolist() == [i not in gone for i in range(60)]


@every_policy
def test_readers_never_raise_and_never_see_uncommitted_blocks(policy: str) -> None:
    index = make(policy, expected_entries=4)
    stop = threading.Event()
    failures: list[str] = []
    never = [key(n, "never") for n in range(64)]
    some = [key(n) for n in range(64)]

    def read() -> None:
        while not stop.is_set():
            if index.contains_mask(never).any():
                failures.append("a block that was never committed is visible")
            if index.prefix_length(some) > 64:
                failures.append("prefix")
            index.miss_reason(some[5])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(300):
        store(index, *range(64))
        store(index, *range(1000 + 10 * turn, 1010 + 10 * turn))
        slots = index.reserve(pack_keys(never)).slots
        index.abort(slots, MissReason.TRANSFER_FAILED)
        index.evict(40)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


def test_concurrent_saves_of_one_block_have_one_owner() -> None:
    index = make()
    owners: list[int] = []

    def save() -> None:
        owners.extend(index.reserve(keys(*range(50))).states.tolist())

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owners.count(RESERVED) == 50


@every_policy
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_evicts_no_pin_and_leaves_no_hole(policy: str, seed: int) -> None:
    """Random turns of 40 conversations: loads that stay pinned for a while, saves, evictions of blocks of two sizes."""
    rng = np.random.default_rng(seed)
    index = make(policy, expected_entries=16, ghost_entries=100)
    lengths, pinned, out, next_offset = np.zeros(40, np.int64), [], set(), 0
    for _ in range(400):
        talk = int(rng.integers(40) * rng.random())
        lengths[talk] = min(lengths[talk] + rng.integers(1, 8), 60)
        chain = [key(n, f"talk {talk} ") for n in range(lengths[talk])]
        known = index.prefix_length(chain)
        pinned.append((chain[:known], index.pin(pack_keys(chain[:known])).slots))
        reservation = index.reserve(pack_keys(chain))
        slots, states = reservation.slots, reservation.states
        mine = slots[states == RESERVED]
        offsets = np.arange(next_offset, next_offset + mine.size)
        next_offset += mine.size
        assert index.commit(mine, offsets, rng.integers(1, 3, mine.size), offsets).size == 0
        if len(pinned) > 6:
            assert index.unpin(pinned.pop(int(rng.integers(7)))[1]).size == 0
        target, before = int(rng.integers(60)), index.committed_bytes
        freed = set(index.evict(target).offsets.tolist())
        assert not freed & out
        out |= freed
        kept = {held for chain, _ in pinned for held in chain}
        assert index.contains_mask(sorted(kept)).all()
        assert before - index.committed_bytes >= target or len(index) == len(kept)
    for _, slots in pinned:
        index.unpin(slots)
    out |= set(index.evict(index.committed_bytes // 2).offsets.tolist())
    for talk, length in enumerate(lengths.tolist()):
        chain = [key(n, f"talk {talk} ") for n in range(length)]
        assert index.prefix_length(chain) == index.contains_mask(chain).sum()
    out |= set(index.evict(10**9).offsets.tolist())
    assert out == set(range(next_offset))


def test_a_slot_does_not_make_a_block_look_evicted() -> None:
    """The ghost of a damaged block lies in the slot of an evicted one: stored again, it is as new as any other."""
    index = make("s3fifo", ghost_entries=1)
    store(index, 1)
    store(index, 2)
    store(index, 3)
    assert index.evict(1).offsets.tolist() == [1]
    pinned = index.pin(keys(2, 3)).slots
    index.drop_keys(pack_keys([key(2)]), MissReason.CORRUPT)  # its ghost takes a new slot, 1 is forgotten
    index.drop_keys(pack_keys([key(3)]), MissReason.CORRUPT)  # its ghost takes the slot that 1 had
    index.unpin(pinned)
    store(index, 3)
    store(index, 4)
    assert index.evict(1).offsets.tolist() == [3]


@pytest.mark.parametrize(("policy", "left"), [("lru", 0), ("s3fifo", 50), ("arc", 50)])
def test_a_scan_of_prompts_that_nobody_asks_again(policy: str, left: int) -> None:
    """A system prompt of 50 blocks that two requests used, then 60 prompts of 20 blocks each, in room for 200."""
    index = make(policy)
    for prompt in (range(50), range(50), *(range(1000 + 20 * n, 1020 + 20 * n) for n in range(60))):
        index.unpin(index.pin(keys(*prompt)).slots[: index.prefix_length(keys(*prompt))])
        store(index, *prompt)
        index.touch(keys(*prompt))  # as `ControlPlane` does when a request ends
        index.evict(len(index) - 200)
    assert index.prefix_length(keys(*range(50))) == left
