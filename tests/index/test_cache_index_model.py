"""The index against a model that keeps everything in plain dicts and lists."""

import hashlib
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvortex.index import MISS_REASONS, RESERVED, STORED, CacheIndex, make_policy, pack_keys
from kvortex.types import MissReason
from tests.index.naive_policies import NAIVE

# A third of the keys share their first word: same bucket, same tag.
KEYS = [(bytes(8) if n % 3 == 0 else b"") + hashlib.sha256(bytes([n])).digest() for n in range(14)]
KEYS = [k[:32] for k in KEYS]
GHOSTS = 4
chains = st.lists(st.sampled_from(range(len(KEYS))), min_size=1, max_size=6)
reasons = st.sampled_from([MissReason.CORRUPT, MissReason.TRANSFER_FAILED])


class AgainstNaiveModel(RuleBasedStateMachine):
    policy: str

    def __init__(self) -> None:
        super().__init__()
        self.index = CacheIndex(make_policy(self.policy), ghost_entries=GHOSTS, expected_entries=2)
        self.committed: dict[int, list[Any]] = {}  # key -> [offset, nbytes, pins]
        self.reserved: dict[int, tuple[int, bool]] = {}  # slot -> (key, orphaned)
        self.order: Any = NAIVE[self.policy]()  # of slots, reserved ones too
        self.slots: dict[int, int] = {}  # key -> slot, of reserved and committed ones
        self.parked: set[int] = set()
        self.ghosts: dict[int, MissReason] = {}
        self.ring: list[int] = []  # keys as they became ghosts; only a key's last entry counts
        self.pins: list[tuple[int, list[Any], int]] = []  # (slot, entry, key)
        self.dropped: list[list[Any]] = []
        self.next_offset = 0

    # -- the model's own moves

    def _pending(self) -> dict[int, bool]:
        return dict(self.reserved.values())

    def _slots_in_order(self, chain: list[int]) -> list[int]:
        return [self.slots[k] for k in chain if k not in self.parked]

    def _remember(self, k: int, reason: MissReason) -> None:
        self.ghosts[k] = reason
        self.ring.append(k)
        if len(self.ring) > GHOSTS:
            oldest = self.ring.pop(0)
            if oldest not in self.ring:
                self.ghosts.pop(oldest, None)

    def _forget_order(self, k: int) -> None:
        self.order.remove([self.slots.pop(k)])
        self.parked.discard(k)

    def _drop(self, k: int, reason: MissReason) -> list[int]:
        """Drop a block; returns its offset if nobody has it pinned, nothing if it is not there."""
        if (entry := self.committed.pop(k, None)) is None:
            return []
        self._remember(k, reason)
        self._forget_order(k)
        if entry[2]:
            self.dropped.append(entry)
            return []
        return [entry[0]]

    # -- rules

    @rule(chain=chains)
    def reserve(self, chain: list[int]) -> None:
        reservation = self.index.reserve(pack_keys([KEYS[k] for k in chain]))
        slots, states = reservation.slots, reservation.states
        assert reservation.owned.tolist() == [slot for slot in slots.tolist() if slot >= 0]
        pending = self._pending()
        seen = set(pending)
        evicted = [self.ghosts.get(k) is MissReason.EVICTED and k not in chain[:i] for i, k in enumerate(chain)]
        for k, slot, state in zip(chain, slots.tolist(), states.tolist(), strict=True):
            if k in self.committed:
                assert state == STORED
            elif k in seen:
                assert state != RESERVED
                assert state != STORED
            else:
                assert state == RESERVED
                self.reserved[slot] = (k, False)
                self.slots[k] = slot
                seen.add(k)
        ordered = [i for i, k in enumerate(chain) if not pending.get(k, False) and k not in self.parked]
        self.order.insert([self.slots[chain[i]] for i in ordered], [evicted[i] for i in ordered])

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), nbytes=st.integers(1, 5))
    def commit(self, data: st.DataObject, nbytes: int) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.reserved)), min_size=1, unique=True))
        offsets = [self.next_offset + i for i in range(len(slots))]
        self.next_offset += len(slots)
        unseen = self.index.commit(np.array(slots), np.array(offsets), nbytes, np.array(offsets) + 7)
        expected = []
        idle = []
        for slot, offset in zip(slots, offsets, strict=True):
            k, orphaned = self.reserved.pop(slot)
            if orphaned:
                expected.append(offset)
            else:
                self.committed[k] = [offset, nbytes, 0]
                self.ghosts.pop(k, None)
                self.ring = [-1 if name == k else name for name in self.ring]
                self.order.weigh([slot], [nbytes])
                if k in self.parked:
                    idle.append(k)
        self.parked.difference_update(idle)
        self.order.insert(self._slots_in_order(idle))
        assert unseen.tolist() == expected

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), reason=st.none() | reasons)
    def abort(self, data: st.DataObject, reason: MissReason | None) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.reserved)), min_size=1, unique=True))
        self.index.abort(np.array(slots), reason)
        for slot in slots:
            k, orphaned = self.reserved.pop(slot)
            if not orphaned:
                self._forget_order(k)
            if reason is not None and not orphaned:
                self._remember(k, reason)

    @rule(chain=chains)
    def pin(self, chain: list[int]) -> None:
        pins = self.index.pin(pack_keys([KEYS[k] for k in chain]))
        pending = self._pending()
        hits = zip(pins.hits.tolist(), pins.offsets.tolist(), pins.nbytes.tolist(), pins.digests.tolist(), strict=True)
        for k, slot, code in zip(chain, pins.slots.tolist(), pins.reasons.tolist(), strict=True):
            if k in self.committed:
                entry = self.committed[k]
                entry[2] += 1
                self.pins.append((slot, entry, k))
                assert next(hits) == (slot, entry[0], entry[1], entry[0] + 7)
            else:
                assert slot == -1
                expected = MissReason.PENDING if k in pending else self.ghosts.get(k, MissReason.NEVER_STORED)
                assert MISS_REASONS[code] is expected
        assert not list(hits)
        self.order.access([self.slots[k] for k in chain if k in self.committed])

    @rule(chain=chains)
    def touch(self, chain: list[int]) -> None:
        self.index.touch(pack_keys([KEYS[k] for k in chain]))
        self.order.access([self.slots[k] for k in chain if k in self.committed])

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        picked = data.draw(st.lists(st.sampled_from(range(len(self.pins))), min_size=1, unique=True))
        taken = [self.pins[i] for i in picked]
        freed = self.index.unpin(np.array([slot for slot, _, _ in taken]))
        for i in sorted(picked, reverse=True):
            del self.pins[i]
        expected, woken = [], []
        for _, entry, _ in taken:
            entry[2] -= 1
        for _, entry, k in taken:
            if entry[2] == 0 and any(entry is d for d in self.dropped):
                self.dropped = [d for d in self.dropped if d is not entry]
                expected.append(entry[0])
            elif entry[2] == 0 and k in self.parked and self.committed.get(k) is entry:
                self.parked.discard(k)
                woken.append(k)
        self.order.insert(self._slots_in_order(woken))
        assert sorted(freed.tolist()) == sorted(expected)

    @rule(k=st.sampled_from(range(len(KEYS))), reason=reasons)
    def drop(self, k: int, reason: MissReason) -> None:
        freed = self.index.drop_keys(pack_keys([KEYS[k]]), reason)
        assert freed.tolist() == self._drop(k, reason)

    @rule(chain=chains)
    def invalidate(self, chain: list[int]) -> None:
        freed = self.index.invalidate(pack_keys([KEYS[k] for k in chain]))
        expected: list[int] = []
        slots = {k: slot for slot, (k, orphaned) in self.reserved.items() if not orphaned}
        for k in dict.fromkeys(chain):
            if k in slots:
                self.reserved[slots[k]] = (k, True)
                self._forget_order(k)
                self.ghosts.pop(k, None)
                self.ring = [-1 if name == k else name for name in self.ring]
        for k in dict.fromkeys(chain):
            expected += self._drop(k, MissReason.INVALIDATED)
        assert freed.tolist() == expected

    @rule(nbytes=st.integers(0, 12))
    def evict(self, nbytes: int) -> None:
        freed = self.index.evict(nbytes).offsets
        keys = {slot: k for k, slot in self.slots.items()}
        sizes = {slot: self.committed[k][1] for slot, k in keys.items() if k in self.committed}
        busy = {slot for slot, k in keys.items() if k not in self.committed or self.committed[k][2]}
        expected = []
        for slot in self.order.pop_coldest(nbytes, sizes, busy):
            if slot in busy:
                self.parked.add(keys[slot])
                continue
            expected.append(self.committed.pop(keys[slot])[0])
            del self.slots[keys[slot]]
            self._remember(keys[slot], MissReason.EVICTED)
        assert freed.tolist() == expected
        enough = sum(sizes[slot] for slot in sizes if keys[slot] not in self.committed) >= nbytes
        assert enough or all(entry[2] for entry in self.committed.values())

    @rule()
    def clear(self) -> None:
        freed = self.index.clear()
        expected = []
        for entry in self.committed.values():
            if entry[2]:
                self.dropped.append(entry)
            else:
                expected.append(entry[0])
        self.committed.clear()
        self.order.remove(list(self.slots.values()))
        self.slots.clear()
        self.parked.clear()
        self.ghosts.clear()
        self.ring.clear()
        self.reserved = {slot: (k, True) for slot, (k, _) in self.reserved.items()}
        assert sorted(freed.tolist()) == sorted(expected)

    # -- what holds at any time

    @invariant()
    def the_same_is_visible(self) -> None:
        assert self.index.contains_mask(KEYS).tolist() == [k in self.committed for k in range(len(KEYS))]
        assert len(self.index) == len(self.committed)

    @invariant()
    def figures_agree(self) -> None:
        assert self.index.committed_bytes == sum(entry[1] for entry in self.committed.values())
        assert self.index.num_pending == len(self.reserved)

    @invariant()
    def reasons_agree(self) -> None:
        pending = self._pending()
        for k, name in enumerate(KEYS):
            if k in pending or k in self.committed:
                assert self.index.miss_reason(name) is MissReason.PENDING
            else:
                assert self.index.miss_reason(name) is self.ghosts.get(k, MissReason.NEVER_STORED)


class AgainstNaiveLRU(AgainstNaiveModel):
    policy = "lru"


class AgainstNaiveS3FIFO(AgainstNaiveModel):
    policy = "s3fifo"


class AgainstNaiveARC(AgainstNaiveModel):
    policy = "arc"


TestLRU, TestS3FIFO, TestARC = AgainstNaiveLRU.TestCase, AgainstNaiveS3FIFO.TestCase, AgainstNaiveARC.TestCase
for case in (TestLRU, TestS3FIFO, TestARC):
    case.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
