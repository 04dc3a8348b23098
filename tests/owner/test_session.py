"""What an owner keeps of its clients, without any I/O: who sees which blocks, and who may write where."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvortex.errors import ConfigError, OwnerError
from kvortex.groups import GroupSet, KVGroup
from kvortex.index import BUSY, MISS_REASONS, RESERVED, STORED, policy, policy_steps, table
from kvortex.owner.caches import Caches
from kvortex.owner.protocol import Kind, numbers
from kvortex.types import BlockSizes, MissReason
from tests.owner.owner_support import NO_FLAGS, NO_KEYS, Client, Keys, make_caches, some_keys, spawn

GROUPS = GroupSet(
    [
        KVGroup("window", ("w",), 16, "window", 40),
        KVGroup("full", ("f",), 16),
        KVGroup("state", ("s",), 64, "state"),
    ],
    16,
)
GROUP_SIZES = (BlockSizes(4096, 2176), BlockSizes(8192, 4224), BlockSizes(12288, 12288))
PACKING = BlockSizes(4096, 2176)
BLOCK = 4096


# -- played lives ------------------------------------------------------------------------------------


def all_blocks(namespace: int) -> tuple[Keys, list[int]]:
    """Keys of every block of a namespace, and the numbers of their groups."""
    hashes = some_keys(12, namespace + 1)
    if namespace == 0:
        return hashes, [0] * 12
    return np.concatenate([GROUPS.tagged(hashes, n) for n in range(3)]), [n for n in range(3) for _ in range(12)]


@dataclass
class Saving:
    """A block that a client saves."""

    key: bytes
    offset: int
    nbytes: int
    is_meant: bool = True
    """Whether it may be seen: false after it was invalidated or cleared."""


@dataclass(eq=False)
class Pinned:
    """A block that a client has pinned, once."""

    key: bytes
    slot: int
    offset: int
    nbytes: int
    digest: int


@dataclass(eq=False)
class Player:
    """A client, and what it should hold."""

    client: Client
    number: int
    saves: dict[int, Saving] = field(default_factory=dict)
    pins: list[Pinned] = field(default_factory=list)
    scratch: tuple[int, int] | None = None


PLACES = st.integers(0, 2)
CHOICES = st.lists(st.integers(0, 35), min_size=1, max_size=14)
BITS = st.integers(0, 2**14 - 1)


class Lives(RuleBasedStateMachine):
    """Three clients of two namespaces in a pool that is too small for all their blocks."""

    @initialize(
        policy=st.sampled_from(["lru", "s3fifo", "arc"]),
        is_full=st.sampled_from([True, True, False]),
        first_priority=st.sampled_from([1, -1]),
    )
    def start(self, policy: str, is_full: bool, first_priority: int) -> None:
        self.caches = make_caches(180_000, 65_536, policy=policy)
        self.control = self.caches.control
        self.stored: dict[bytes, int] = {}  # key -> digest, of blocks that may be found
        self.abandoned: dict[int, int] = {}  # offset -> bytes, of extents that a closed client may still write to
        self.whose: dict[int, int] = {}  # offset -> namespace of the block that it was given to last, or -1
        self.priorities, self.quotas = [0, 0], [1 << 30, 1 << 30]
        self.num_saved = 0
        self.players = [self.opened(0), self.opened(1), self.opened(1)]
        if is_full:
            self.rank(at=0, priority=first_priority, quota=None)
            for at, count in ((1, 32), (0, 12)):
                self.plan_save(at=at, places=list(range(count)), raw=True)
                self.finish_save(at=at, which=2**14 - 1, good=0, lossy=0, tried=0, all_good=True)

    def opened(self, namespace: int) -> Player:
        client = Client(self.caches, namespace)
        sizes, groups = ((PACKING,), None) if namespace == 0 else (GROUP_SIZES, GROUPS)
        return Player(client.add(sizes) if groups is None else client.add(sizes, groups), namespace)

    def chosen(self, player: Player, places: list[int]) -> tuple[Keys, np.ndarray]:
        keys, numbers_ = all_blocks(player.number)
        rows = [place % len(keys) for place in places]
        return keys[rows], np.array(numbers_, np.uint8)[rows]

    def in_use(self) -> Iterator[tuple[int, int]]:
        """Offset and bytes of extents that somebody may read or write, besides those that are stored."""
        yield from self.abandoned.items()
        for player in self.players:
            yield from ((save.offset, save.nbytes) for save in player.saves.values())
            yield from ((pin.offset, pin.nbytes) for pin in player.pins)
            if player.scratch is not None:
                yield player.scratch

    def extents(self) -> set[tuple[int, int]]:
        """Offset and bytes of all extents."""
        held = self.control.hold(np.concatenate([all_blocks(n)[0] for n in range(2)]))
        self.control.release(held.slots)
        return set(self.in_use()) | set(zip(held.offsets.tolist(), held.nbytes.tolist(), strict=True))

    def bytes_of(self, namespace: int) -> int:
        return sum(nbytes for offset, nbytes in self.extents() if self.whose[offset] == namespace)

    def idle(self, without: set[bytes]) -> dict[bytes, int]:
        """Blocks that may be evicted now, and their namespaces."""
        pinned = {pin.slot for player in self.players for pin in player.pins}
        found: dict[bytes, int] = {}
        for namespace in range(2):
            keys, _ = all_blocks(namespace)
            held = self.control.hold(keys)
            self.control.release(held.slots)
            for place, slot in zip(held.positions.tolist(), held.slots.tolist(), strict=True):
                if slot not in pinned and keys[place].tobytes() not in without:
                    found[keys[place].tobytes()] = namespace
        return found

    def check_new(self, offset: int, nbytes: int) -> None:
        for other, length in self.in_use():
            assert offset + nbytes <= other or other + length <= offset, "an extent was handed out that is in use"

    # -- rules

    @rule(at=PLACES, places=CHOICES, raw=st.booleans())
    def plan_save(self, at: int, places: list[int], raw: bool) -> None:
        player = self.players[at]
        keys, groups = self.chosen(player, places)
        in_flight = {save.key for other in self.players for save in other.saves.values()}
        named = {key.tobytes() for key in keys}
        before, used = self.idle(named), self.bytes_of(player.number)
        idle_bytes = sum(self.sizes_of([key for key, number in before.items() if number == player.number]))
        states, slots, offsets, forms, positions, _ = player.client.plan_save(keys, groups, raw=raw)
        self.check_evictions(before, self.idle(named), player.number)
        assert (np.diff(positions) > 0).all()
        for key, state in zip(keys, states.tolist(), strict=True):
            if state == STORED:
                assert key.tobytes() in self.stored
            elif state == RESERVED:
                assert key.tobytes() not in in_flight
                in_flight.add(key.tobytes())
            else:
                assert state == BUSY
                assert key.tobytes() in in_flight
        sizes = [PACKING] if player.number == 0 else GROUP_SIZES
        for place, slot, offset, form in zip(
            positions.tolist(), slots.tolist(), offsets.tolist(), forms.tolist(), strict=True
        ):
            assert states[place] == RESERVED
            size = sizes[groups[place]]
            assert form == 2 * groups[place] + (size.packs and not raw)
            assert all(slot not in other.saves for other in self.players)
            nbytes = size.raw if raw else size.packed
            self.check_new(offset, nbytes)
            player.saves[slot] = Saving(keys[place].tobytes(), offset, nbytes)
            self.whose[offset] = player.number
        if (states == RESERVED).any():
            busy_bytes = used - idle_bytes
            assert self.bytes_of(player.number) <= max(self.quotas[player.number], busy_bytes)

    def sizes_of(self, keys: list[bytes]) -> list[int]:
        held = self.control.hold(np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 4))
        self.control.release(held.slots)
        return [int(nbytes) for nbytes in held.nbytes]

    def check_evictions(self, before: dict[bytes, int], after: dict[bytes, int], namespace: int) -> None:
        """No block has gone while one of a lower priority stayed, unless its own namespace has needed its quota."""
        lowest = min((self.priorities[number] for number in after.values()), default=1 << 30)
        for number in {number for key, number in before.items() if key not in after}:
            keeps_to_quota = number == namespace and self.quotas[number] < 1 << 30
            assert self.priorities[number] <= lowest or keeps_to_quota, "evicted before what has a lower priority"

    @rule(
        at=PLACES,
        priority=st.none() | st.integers(-1, 1),
        quota=st.none() | st.sampled_from([4000, 30_000, 60_000, 120_000]),
    )
    def rank(self, at: int, priority: int | None, quota: int | None) -> None:
        player = self.players[at]
        if quota == 4000:
            with pytest.raises(ConfigError, match=r"raise owner\.quota"):
                player.client.rank(priority, quota)
            return
        player.client.rank(priority, quota)
        number = player.number
        self.priorities[number] = self.priorities[number] if priority is None else priority
        self.quotas[number] = self.quotas[number] if quota is None else quota

    @rule(at=PLACES, which=BITS, good=BITS, lossy=BITS, tried=BITS, all_good=st.booleans())
    def finish_save(self, at: int, which: int, good: int, lossy: int, tried: int, all_good: bool) -> None:
        player = self.players[at]
        slots = [slot for n, slot in enumerate(player.saves) if which >> n % 14 & 1]
        masks = [np.array([bits >> n % 14 & 1 for n in range(len(slots))], np.uint8) for bits in (good, lossy, tried)]
        masks[0] &= masks[2]
        masks[1] &= masks[2] & ~masks[0]
        digests = np.arange(self.num_saved, self.num_saved + len(slots), dtype=np.uint64)
        self.num_saved += len(slots)
        player.client.finish_save(np.array(slots, np.int64), digests, *([] if all_good else masks))
        for n, slot in enumerate(slots):
            save = player.saves.pop(slot)
            is_there = player.client.found(np.frombuffer(save.key, np.uint64))[0]
            if save.is_meant and (all_good or masks[0][n]):
                self.stored[save.key] = int(digests[n])
                assert is_there, "a block that was saved just now is found"
            else:
                assert not is_there

    @rule(at=PLACES, places=CHOICES, touches=st.booleans())
    def pin(self, at: int, places: list[int], touches: bool) -> None:
        player = self.players[at]
        keys, groups = self.chosen(player, places)
        found = player.client.found(keys)
        length, reason = player.client.ask(Kind.PREFIX, keys)[0].tolist()
        assert length == (found.index(False) if False in found else len(found))
        kind = Kind.PLAN_LOAD if touches else Kind.HOLD
        slots, reasons, offsets, nbytes, digests, forms = player.client.ask(kind, keys)
        hits = np.flatnonzero(slots >= 0)
        assert [slot >= 0 for slot in slots.tolist()] == found
        assert (forms // 2 == groups[hits]).all()
        for n, place in enumerate(hits.tolist()):
            key = keys[place].tobytes()
            assert self.stored.get(key) == int(digests[n]), "a block was found that must not be"
            player.pins.append(Pinned(key, int(slots[place]), int(offsets[n]), int(nbytes[n]), int(digests[n])))
        assert reason == (-1 if all(found) else reasons[length])
        in_flight = {save.key for other in self.players for save in other.saves.values()}
        for place in np.flatnonzero(slots < 0).tolist():
            assert MISS_REASONS[reasons[place]] is not MissReason.OWNER_LOST
            assert (MISS_REASONS[reasons[place]] is MissReason.PENDING) == (keys[place].tobytes() in in_flight)

    @rule(at=PLACES, which=BITS, corrupt=BITS)
    def unpin(self, at: int, which: int, corrupt: int) -> None:
        player = self.players[at]
        ended = [pin for n, pin in enumerate(player.pins) if which >> n % 14 & 1]
        player.pins = [pin for pin in player.pins if pin not in ended]
        damaged = [corrupt >> n % 14 & 1 for n in range(len(ended))]
        slots = np.array([pin.slot for pin in ended], np.int64)
        player.client.ask(Kind.FINISH_LOAD, slots, np.array(damaged, np.uint8) if any(damaged) else NO_FLAGS)
        for pin, is_damaged in zip(ended, damaged, strict=True):
            if is_damaged and self.stored.get(pin.key) == pin.digest:
                del self.stored[pin.key]
                assert not player.client.found(np.frombuffer(pin.key, np.uint64))[0]

    @rule(at=PLACES, places=CHOICES)
    def touch(self, at: int, places: list[int]) -> None:
        self.players[at].client.ask(Kind.TOUCH, self.chosen(self.players[at], places)[0])

    @rule(at=PLACES, places=CHOICES)
    def invalidate(self, at: int, places: list[int]) -> None:
        player = self.players[at]
        keys, _ = self.chosen(player, places)
        player.client.ask(Kind.INVALIDATE, keys)
        self.forget({key.tobytes() for key in keys})

    @rule(at=PLACES)
    def clear(self, at: int) -> None:
        player = self.players[at]
        player.client.ask(Kind.CLEAR)
        self.forget({key.tobytes() for key in all_blocks(player.number)[0]})

    def forget(self, keys: set[bytes]) -> None:
        for key in keys:
            self.stored.pop(key, None)
        for player in self.players:
            for save in player.saves.values():
                save.is_meant = save.is_meant and save.key not in keys

    @rule(at=PLACES, nbytes=st.sampled_from([4096, 65_536]))
    def scratch(self, at: int, nbytes: int) -> None:
        player = self.players[at]
        if player.scratch is not None:
            player.client.ask(Kind.SCRATCH_DONE)
            player.scratch = None
            return
        answer = player.client.session.answer(Kind.SCRATCH, [numbers(nbytes)])
        assert answer is not None
        if answer[0] is Kind.SCRATCH_GIVEN:
            offset = int(answer[1][0][0])
            self.check_new(offset, nbytes)
            player.scratch = (offset, nbytes)
            self.whose[offset] = -1

    @rule(at=PLACES, namespace=st.integers(0, 1))
    def close_and_open(self, at: int, namespace: int) -> None:
        """Its blocks are given up, but its device may write to them until its process has ended."""
        self.close(self.players[at])
        self.players[at] = self.opened(namespace)

    def close(self, player: Player) -> None:
        offsets = player.client.session.close()
        extents = [(save.offset, save.nbytes) for save in player.saves.values()]
        extents += [player.scratch] if player.scratch is not None else []
        assert sorted(offsets) == sorted(offset for offset, _ in extents)
        self.abandoned.update(extents)
        player.saves, player.pins, player.scratch = {}, [], None

    @precondition(lambda self: self.abandoned)
    @rule(which=BITS)
    def processes_end(self, which: int) -> None:
        for offset in [offset for n, offset in enumerate(self.abandoned) if which >> n % 14 & 1]:
            self.control.free(offset)
            del self.abandoned[offset]

    # -- what is always true

    @invariant()
    def extents_do_not_overlap_and_account(self) -> None:
        extents = self.extents()
        end = 0
        for offset, nbytes in sorted(extents):
            assert offset >= end, "two extents overlap"
            end = offset + nbytes
        assert self.control.allocator.allocated_bytes == sum(nbytes for _, nbytes in extents)

    @invariant()
    def bytes_of_namespaces_are_counted_exactly(self) -> None:
        for player in self.players:
            priority, quota, used = player.client.ask(Kind.FIGURES)[0][7:].tolist()
            assert (priority, quota or 1 << 30) == (self.priorities[player.number], self.quotas[player.number])
            assert used == (self.bytes_of(player.number) if quota else 0)

    @invariant()
    def nothing_is_found_that_must_not_be(self) -> None:
        for namespace in range(2):
            keys, _ = all_blocks(namespace)
            for key, is_found in zip(keys, self.control.index.contains_mask(keys).tolist(), strict=True):
                assert not is_found or key.tobytes() in self.stored

    def teardown(self) -> None:
        if not hasattr(self, "players"):
            return
        for player in self.players:
            self.close(player)
        for offset in self.abandoned:
            self.control.free(offset)
        assert self.control.index.num_pending == 0
        assert self.control.allocator.allocated_bytes == self.control.index.committed_bytes
        self.control.clear()
        assert self.control.allocator.allocated_bytes == 0
        assert self.control.allocator.leak_report() == ""
        assert not any(self.control.allocator.bytes_of(name) for name in self.control._quotas)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# -- single steps ------------------------------------------------------------------------------------


@pytest.fixture
def caches() -> Iterator[Caches]:
    """The caches of a pool that is empty again when all clients are closed and it is cleared."""
    made = make_caches(1 << 20)
    yield made
    made.control.clear()
    assert made.control.allocator.leak_report() == ""


def ended(*clients: Client) -> None:
    """Close clients, whose processes end at once."""
    for client in clients:
        for offset in client.session.close():
            client.session._control.free(offset)


ADD_CACHE = (np.zeros(4, np.uint64), numbers(4096, 4096, 0, 4096, 4096, 0), b"{}")
A_KEY = some_keys(1)
WRONG_FRAMES = {
    "an answer": (Kind.WELCOME, (numbers(1, 2, 3, 4), b"")),
    "a hello again": (Kind.HELLO, (numbers(1),)),
    "a second cache": (Kind.ADD_CACHE, ADD_CACHE),
    "a group that the cache has not": (Kind.PLAN_SAVE, (numbers(0), A_KEY, np.ones(1, np.uint8), NO_KEYS)),
    "fewer groups than keys": (Kind.PLAN_SAVE, (numbers(0), A_KEY, NO_FLAGS, NO_KEYS)),
    "half a key": (Kind.PLAN_SAVE, (numbers(0), A_KEY[0, :2], NO_FLAGS, NO_KEYS)),
    "no options": (Kind.PLAN_SAVE, (numbers(), A_KEY, np.zeros(1, np.uint8), NO_KEYS)),
    "a chain of half a key": (Kind.PLAN_SAVE, (numbers(0), A_KEY, np.zeros(1, np.uint8), A_KEY[0, :2])),
    "a save that it did not plan": (Kind.FINISH_SAVE, (numbers(7), np.zeros(1, np.uint64), *[NO_FLAGS] * 3)),
    "the save of another": (Kind.FINISH_SAVE, (numbers(0), np.zeros(1, np.uint64), *[NO_FLAGS] * 3)),
    "its own save twice": (Kind.FINISH_SAVE, (numbers(1, 1), np.zeros(2, np.uint64), *[NO_FLAGS] * 3)),
    "too few digests": (Kind.FINISH_SAVE, (numbers(1), NO_KEYS, *[NO_FLAGS] * 3)),
    "too many flags": (Kind.FINISH_SAVE, (numbers(1), np.zeros(1, np.uint64), np.ones(2, np.uint8), *[NO_FLAGS] * 2)),
    "a load that it did not plan": (Kind.FINISH_LOAD, (numbers(7), NO_FLAGS)),
    "a slot below zero": (Kind.FINISH_LOAD, (numbers(-1), NO_FLAGS)),
    "the load of another": (Kind.FINISH_LOAD, (numbers(2), NO_FLAGS)),
    "its own load twice": (Kind.FINISH_LOAD, (numbers(3, 3), NO_FLAGS)),
    "too few flags": (Kind.FINISH_LOAD, (numbers(3, 3), np.ones(1, np.uint8))),
    "two keys for one": (Kind.MISS_REASON, (some_keys(2),)),
    "no key for one": (Kind.MISS_REASON, (NO_KEYS,)),
    "keys and a half": (Kind.HOLD, (np.zeros(6, np.uint64),)),
    "no size of scratch": (Kind.SCRATCH, (numbers(),)),
    "half a rank": (Kind.RANK, (numbers(1, 7),)),
}


@pytest.mark.parametrize("what", list(WRONG_FRAMES))
def test_a_wrong_frame_changes_nothing(caches: Caches, what: str) -> None:
    """Another client saves slot 0 and has pinned slot 2, this one saves slot 1 and has pinned slot 3."""
    other, client = Client(caches).add(), Client(caches).add()
    keys = some_keys(4, 5)
    assert other.plan_save(keys[:1])[1].tolist() == [0]
    assert client.plan_save(keys[1:2])[1].tolist() == [1]
    other.save(keys[2:])
    assert other.ask(Kind.PLAN_LOAD, keys[2:3])[0].tolist() == [2]
    assert client.ask(Kind.PLAN_LOAD, keys[3:])[0].tolist() == [3]
    before = caches.control.allocator.allocated_bytes
    kind, fields = WRONG_FRAMES[what]
    with pytest.raises(OwnerError):
        client.ask(kind, *fields)
    assert caches.control.allocator.allocated_bytes == before
    client.finish_save(numbers(1))
    other.finish_save(numbers(0))
    other.ask(Kind.FINISH_LOAD, numbers(2), NO_FLAGS)
    client.ask(Kind.FINISH_LOAD, numbers(3), NO_FLAGS)
    assert client.found(keys) == [True] * 4
    ended(other, client)


NEED_NO_CACHE = {Kind.ADD_CACHE, Kind.SCRATCH, Kind.SCRATCH_DONE, Kind.SETTLED}


@pytest.mark.parametrize("kind", [kind for kind, _ in WRONG_FRAMES.values() if kind not in NEED_NO_CACHE])
def test_nothing_can_be_asked_before_a_cache_is_known(caches: Caches, kind: Kind) -> None:
    with pytest.raises(OwnerError, match=r"comes before ADD_CACHE|is no request"):
        Client(caches).session.answer(kind, [])


def test_a_namespace_has_one_layout(caches: Caches) -> None:
    Client(caches, 1).add()
    for sizes, groups in (((BlockSizes(8192, 8192),), None), ((BlockSizes(4096, 2176),), None), (GROUP_SIZES, GROUPS)):
        with pytest.raises(ConfigError, match="other sizes"):
            Client(caches, 1).add(sizes, groups) if groups else Client(caches, 1).add(sizes)
    Client(caches, 1).add()
    assert len(caches) == 1


def test_caches_that_cannot_be_are_refused(caches: Caches) -> None:
    client, described = (
        Client(caches),
        json.dumps({"hash_block_size": 16, "groups": [["f", ["f"], 16]], "parts": 1}).encode(),
    )
    good, raw = numbers(4096, 4096, 0, 4096, 4096, 0), (4096, 4096, 0)
    sizes = [
        numbers(),
        numbers(*raw),
        numbers(0, 0, 0, *raw),
        numbers(*raw, -1, -1, 0),
        numbers(*raw, 8192, 8192, 0),
        numbers(*raw, 4096, 8192, 0),
        numbers(*raw, 4096, 0, 0),
        numbers(*raw, 4096, 4096, 77),
    ]
    fields = [(np.zeros(4, np.uint64), size, described) for size in sizes]
    fields += [
        (np.zeros(3, np.uint64), good, described),
        (np.zeros(4, np.uint64), np.tile(good, 2), described),
        (np.zeros(4, np.uint64), good, described.replace(b'"parts": 1', b'"parts": 0')),
        (np.zeros(4, np.uint64), good, described.replace(b', "parts": 1', b"")),
        (np.zeros(4, np.uint64), good, b"[]"),
        (np.zeros(4, np.uint64), good, b"\xff{"),
    ]
    for namespace, size, text in fields:
        with pytest.raises(OwnerError):
            client.ask(Kind.ADD_CACHE, namespace, size, text)
    assert len(caches) == 0
    too_large = numbers(*(1 << 21, 1 << 21, 0) * 2)
    kind, (why,) = client.session.answer(  # type: ignore[misc]
        Kind.ADD_CACHE, [np.zeros(4, np.uint64), too_large, np.frombuffer(described, np.uint8)]
    )
    assert kind is Kind.REFUSED
    assert "a block takes 2097152 bytes, the pool has 1048576" in why.decode()
    client.add()


def test_scratch_memory_is_given_and_taken_back(caches: Caches) -> None:
    client, other = Client(caches), Client(caches).add()
    (offset,) = client.ask(Kind.SCRATCH, numbers(8192))
    assert caches.control.allocator.allocated_bytes == 8192
    other.save(some_keys(254))
    slots, _, offsets, *_ = other.ask(Kind.HOLD, some_keys(254))
    assert not ((offsets < offset[0] + 8192) & (offsets + BLOCK > offset[0])).any()
    other.ask(Kind.FINISH_LOAD, slots, NO_FLAGS)
    assert client.session.answer(Kind.SCRATCH, [numbers(4096)])[0] is Kind.REFUSED  # type: ignore[index]
    for _ in range(2):
        client.ask(Kind.SCRATCH_DONE)
    assert caches.control.allocator.allocated_bytes == 254 * BLOCK
    client.ask(Kind.SETTLED)
    assert client.process.settled == [7]
    for nbytes in (0, -5, 1 << 30):
        assert client.session.answer(Kind.SCRATCH, [numbers(nbytes)])[0] is Kind.REFUSED  # type: ignore[index]
    client.ask(Kind.SCRATCH, numbers(1 << 19))  # evicts
    ended(client, other)


def test_a_block_that_two_clients_save_is_stored_once(caches: Caches) -> None:
    first, second, keys = Client(caches).add(), Client(caches).add(), some_keys(4)
    states, slots, *_ = first.plan_save(keys)
    assert states.tolist() == [RESERVED] * 4
    assert second.save(keys) == [BUSY] * 4
    assert second.found(keys) == [False] * 4
    assert MISS_REASONS[second.ask(Kind.MISS_REASON, keys[0])[0][0]] is MissReason.PENDING
    first.finish_save(slots)
    assert second.save(keys) == [STORED] * 4
    assert second.found(keys) == [True] * 4
    assert caches.control.allocator.allocated_bytes == 4 * BLOCK
    ended(first, second)


def test_what_a_closed_client_was_saving_is_never_seen_and_others_may_save_it(caches: Caches) -> None:
    gone, other, keys = Client(caches).add(), Client(caches).add(), some_keys(4)
    _, slots, written, *_ = gone.plan_save(keys)
    gone.finish_save(slots[:1])
    left = gone.session.close()
    assert left == written[1:].tolist()
    assert gone.session.close() == []
    assert other.found(keys) == [True, False, False, False]
    states, slots, offsets, *_ = other.plan_save(keys)
    assert states.tolist() == [STORED, RESERVED, RESERVED, RESERVED]
    assert set(offsets.tolist()).isdisjoint(written.tolist())
    other.finish_save(slots)
    assert caches.control.allocator.allocated_bytes == 7 * BLOCK
    for offset in left:
        caches.control.free(offset)
    ended(other)


def test_what_a_closed_client_had_pinned_can_be_evicted(caches: Caches) -> None:
    reader, writer = Client(caches).add(), Client(caches).add()
    writer.save(some_keys(256))
    for _ in range(2):
        reader.ask(Kind.PLAN_LOAD, some_keys(256))
    assert writer.save(some_keys(10, 1)) == [RESERVED] * 10
    assert writer.found(some_keys(10, 1)) == [False] * 10
    assert reader.session.close() == []
    writer.save(some_keys(10, 1))
    assert writer.found(some_keys(10, 1)) == [True] * 10
    ended(writer)


def test_a_clear_leaves_other_namespaces_and_hides_what_is_being_saved(caches: Caches) -> None:
    mine, twin, other = Client(caches, 1).add(), Client(caches, 1).add(), Client(caches, 2).add((PACKING,))
    keys, theirs = some_keys(8, 1), some_keys(8, 2)
    mine.save(keys[:4])
    other.save(theirs[:4])
    _, slots, *_ = twin.plan_save(keys[4:])
    _, other_slots, *_ = other.plan_save(theirs[4:])
    changes = mine.ask(Kind.FIGURES)[0][6]
    mine.ask(Kind.CLEAR)
    assert mine.ask(Kind.FIGURES)[0][6] > changes, "a save in flight learns that it may have gone"
    twin.finish_save(slots)
    other.finish_save(other_slots)
    assert mine.found(keys) == [False] * 8
    assert other.found(theirs) == [True] * 8
    assert MISS_REASONS[mine.ask(Kind.MISS_REASON, keys[0])[0][0]] is MissReason.INVALIDATED
    assert caches.control.allocator.allocated_bytes == 8 * PACKING.packed
    assert mine.save(keys) == [RESERVED] * 8
    assert twin.found(keys) == [True] * 8
    ended(mine, twin, other)


def test_the_client_that_says_something_last_ranks_the_namespace(
    caches: Caches, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvortex.owner")
    first, second, other = Client(caches, 1).add(), Client(caches, 1).add(), Client(caches, 2).add()

    def shown() -> list[list[int]]:
        return [client.ask(Kind.FIGURES)[0][7:9].tolist() for client in (first, second, other)]

    for client in (first, other):
        client.rank()
    assert shown() == [[0, 0]] * 3
    assert not caplog.messages, "nothing was said"
    first.rank(2, 10 * BLOCK)
    second.rank(priority=1)
    assert shown() == [[1, 10 * BLOCK]] * 2 + [[0, 0]]
    second.rank(quota_bytes=20 * BLOCK)
    first.rank(1, 20 * BLOCK)  # nothing new
    first.rank(0)
    assert shown() == [[0, 20 * BLOCK]] * 2 + [[0, 0]]
    (name,) = {message.split(" has ")[0] for message in caplog.messages}
    assert [message.split(" has ")[1] for message in caplog.messages] == [
        "priority 2 and a quota of 40.0 KiB instead of priority 0 and no quota now",
        "priority 1 and a quota of 40.0 KiB instead of priority 2 and a quota of 40.0 KiB now",
        "priority 1 and a quota of 80.0 KiB instead of priority 1 and a quota of 40.0 KiB now",
        "priority 0 and a quota of 80.0 KiB instead of priority 1 and a quota of 80.0 KiB now",
    ]
    assert name == f"namespace {'01' + '00' * 7}"
    for quota in (0, -1, BLOCK - 1):
        with pytest.raises(ConfigError, match=r"a block takes 4096 bytes, .* raise owner\.quota"):
            first.rank(5, quota)
    assert shown() == [[0, 20 * BLOCK]] * 2 + [[0, 0]]
    first.save(some_keys(30, 1))
    assert first.ask(Kind.FIGURES)[0][9] == 20 * BLOCK
    assert caches.control.allocator.bytes_by_owner() == {name: 20 * BLOCK}
    ended(first, second, other)


def serve_everything(name: str) -> None:
    """All that an owner does for a client, in a pool that is too small, and a check that nothing is compiled for it."""
    modules = (table, policy, policy_steps)
    steps = [step for module in modules for step in vars(module).values() if hasattr(step, "signatures")]
    caches = make_caches(1 << 16, policy=name)
    before = [len(step.signatures) for step in steps]
    client, keys = Client(caches).add((PACKING,)), some_keys(20)
    for salt in range(12):
        if salt > 5:
            client.rank(salt % 2, (1 << 15) + salt)
        _, slots, *_ = client.plan_save(keys ^ np.uint64(salt))
        client.finish_save(slots[:9])
        client.finish_save(slots[9:], None, np.arange(slots.size - 9, dtype=np.uint8) % 2)
    slots, *_ = client.ask(Kind.PLAN_LOAD, keys ^ np.uint64(11))
    client.ask(Kind.FINISH_LOAD, slots[:2], np.array([1, 0], np.uint8))
    for kind in (Kind.HOLD, Kind.CONTAINS, Kind.PREFIX, Kind.STATES, Kind.TOUCH, Kind.INVALIDATE):
        client.ask(kind, keys)
    client.ask(Kind.MISS_REASON, keys[0])
    client.ask(Kind.CLEAR)
    assert caches.control.index.evicted_blocks > 0
    assert [len(step.signatures) for step in steps] == before
    client.plan_save(keys)
    ended(client)


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "arc"])
def test_nothing_is_compiled_while_clients_are_served(policy: str) -> None:
    """A compilation takes seconds, and all clients would wait. In a process that has compiled nothing else."""
    program = spawn(["-c", f"from tests.owner.test_session import serve_everything; serve_everything({policy!r})"])
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
