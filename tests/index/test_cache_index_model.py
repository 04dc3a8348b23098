"""Random histories of the index against a slow, obvious model of it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvortex.errors import EngineStateError
from kvortex.index import CacheIndex, LRUPolicy
from kvortex.types import MissReason, SaveOutcome

KEYS = [bytes([n]) * 32 for n in range(8)]
chains = st.lists(st.sampled_from(KEYS), max_size=5)
reasons = st.sampled_from([MissReason.CORRUPT, MissReason.TRANSFER_FAILED])


class AgainstNaiveModel(RuleBasedStateMachine):
    """The index and a slow, obvious model take the same steps."""

    def __init__(self):
        super().__init__()
        self.index = CacheIndex(LRUPolicy(), ghost_entries=3)
        self.blocks = {}  # key -> [location, nbytes, pins]
        self.pending = {}  # key -> orphaned
        self.order = []  # coldest first
        self.parked = set()
        self.reasons = []  # (key, reason), oldest first
        self.pins = []  # (entry, block)
        self.dropped = []  # blocks dropped while pinned
        self.evicted = 0
        self.out, self.back = [], []  # locations given to the index and got from it

    def touch(self, chain, new=True):
        for k in reversed(chain):
            if k in self.order:
                self.order.remove(k)
            elif not new or k in self.parked or self.pending.get(k):
                continue
            self.order.append(k)

    def remember(self, k, reason):
        self.reasons = [(other, why) for other, why in self.reasons if other != k]
        if reason is not None:
            self.reasons = [*self.reasons, (k, reason)][-3:]

    def leave(self, k):
        self.order = [other for other in self.order if other != k]
        self.parked.discard(k)

    def idle(self, chain):
        chain = [k for k in chain if k in self.parked]
        self.parked -= set(chain)
        self.touch(chain)

    def gone(self, k, reason):
        block = self.blocks.pop(k)
        self.remember(k, reason)
        self.leave(k)
        if block[2]:
            self.dropped.append(block)
            return []
        return [block[0]]

    @rule(chain=chains)
    def reserve(self, chain):
        expected = []
        for k in chain:
            if k in self.blocks:
                expected.append(SaveOutcome.ALREADY_STORED)
            elif k in self.pending:
                expected.append(SaveOutcome.PENDING)
            else:
                self.pending[k] = False
                expected.append(None)
        assert self.index.reserve(chain) == expected
        self.touch(chain)

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), nbytes=st.integers(1, 5))
    def commit(self, data, nbytes):
        chain = data.draw(st.lists(st.sampled_from(sorted(self.pending)), unique=True))
        locations = [len(self.out) + i for i in range(len(chain))]
        arguments = (chain, locations, [nbytes] * len(chain), [0] * len(chain))
        unused = [location for k, location in zip(chain, locations, strict=True) if self.pending[k]]
        assert self.index.commit(*arguments) == unused
        self.out += locations
        self.back += unused
        for k, location in zip(chain, locations, strict=True):
            if not self.pending.pop(k):
                self.blocks[k] = [location, nbytes, 0]
                self.remember(k, None)
        self.idle(chain)

    @rule(chain=chains)
    def settle_what_is_not_reserved(self, chain):
        if set(chain) <= set(self.pending) and len(set(chain)) == len(chain):
            return
        zeros = [0] * len(chain)
        with pytest.raises(EngineStateError):
            self.index.commit(chain, zeros, zeros, zeros)
        with pytest.raises(EngineStateError):
            self.index.abort(chain, MissReason.CORRUPT)

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), reason=st.none() | reasons)
    def abort(self, data, reason):
        chain = data.draw(st.lists(st.sampled_from(sorted(self.pending)), unique=True, max_size=2))
        self.index.abort(chain, reason)
        for k in chain:
            if not self.pending.pop(k) and reason is not None:
                self.remember(k, reason)
            self.leave(k)

    @rule(chain=chains)
    def pin(self, chain):
        for k, found in zip(chain, self.index.pin(chain), strict=True):
            if k in self.blocks:
                assert found.location == self.blocks[k][0]
                self.blocks[k][2] += 1
                self.pins.append((found, self.blocks[k]))
            else:
                assert found == self.expected_reason(k)
        self.touch([k for k in chain if k in self.blocks], new=False)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.pins))), unique=True, max_size=4))
        taken = [self.pins[i] for i in chosen]
        self.pins = [pin for i, pin in enumerate(self.pins) if i not in chosen]
        free, idle = [], []
        for entry, block in taken:
            block[2] -= 1
            if not block[2]:
                if any(block is dropped for dropped in self.dropped):
                    free.append(block[0])
                else:
                    idle.append(entry.key)
        assert self.index.unpin([entry for entry, _ in taken]) == free
        self.back += free
        self.idle(idle)

    @rule(k=st.sampled_from(KEYS), reason=reasons, data=st.data())
    def drop(self, k, reason, data):
        expected = data.draw(st.sampled_from([None, *(entry for entry, _ in self.pins)]))
        location = self.index.drop(k, reason, expected)
        if k in self.blocks and (expected is None or expected.location == self.blocks[k][0]):
            freed = self.gone(k, reason)
        else:
            freed = []
        assert location == (freed[0] if freed else None)
        self.back += freed

    @rule(nbytes=st.integers(0, 12))
    def evict(self, nbytes):
        expected, freed = [], 0
        for k in list(self.order):
            if freed >= nbytes:
                break
            if k not in self.blocks or self.blocks[k][2]:
                self.leave(k)
                self.parked.add(k)
            else:
                freed += self.blocks[k][1]
                expected += self.gone(k, MissReason.EVICTED)
        assert self.index.evict(nbytes) == expected
        self.evicted += len(expected)
        self.back += expected

    @rule()
    def clear(self):
        expected = [location for k in list(self.blocks) for location in self.gone(k, None)]
        assert self.index.clear() == expected
        self.back += expected
        self.pending = dict.fromkeys(self.pending, True)
        self.order, self.parked, self.reasons = [], set(), []

    def expected_reason(self, k):
        if k in self.pending or k in self.blocks:
            return MissReason.PENDING
        return dict(self.reasons).get(k, MissReason.NEVER_STORED)

    @invariant()
    def agree(self):
        index = self.index
        assert index.contains_mask(KEYS).tolist() == [k in self.blocks for k in KEYS]
        assert index.prefix_length(KEYS) == [*(k in self.blocks for k in KEYS), False].index(False)
        assert [index.miss_reason(k) for k in KEYS] == [self.expected_reason(k) for k in KEYS]
        assert (len(index), index.num_pending) == (len(self.blocks), len(self.pending))
        assert index.committed_bytes == sum(nbytes for _, nbytes, _ in self.blocks.values())
        assert index.evicted_blocks == self.evicted

    @invariant()
    def every_location_is_back_once_or_held(self):
        held = [block[0] for block in self.blocks.values()]
        held += [block[0] for block in self.dropped if block[2]]
        assert sorted(self.back + held) == list(range(len(self.out)))

    @invariant()
    def every_idle_block_can_be_evicted(self):
        idle = {k for k, block in self.blocks.items() if not block[2]}
        assert idle <= set(self.index._policy.victims())
        assert not self.index._parked & set(self.index._policy.victims())

    @invariant()
    def only_busy_keys_are_out_of_the_order(self):
        pinned = {k for k, block in self.blocks.items() if block[2]}
        assert self.index._parked <= pinned | set(self.pending)
        assert set(self.index._policy.victims()) <= set(self.blocks) | set(self.pending)


TestAgainstNaiveModel = AgainstNaiveModel.TestCase
TestAgainstNaiveModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
