"""The control plane over several groups of layers: what is evicted first, and extents of several sizes in one pool."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.groups import GroupSet, KVGroup
from kvortex.index import Evicted, pack_keys
from kvortex.planes.control import ControlPlane
from kvortex.planes.plans import LoadPlan, SavePlan
from kvortex.types import BlockSizes, MissReason, SaveOutcome

TOKENS = 16
STATE_TOKENS = 64
GROUPS = GroupSet(
    [
        KVGroup("window", ("w",), TOKENS, "window", 40),
        KVGroup("full", ("f",), TOKENS),
        KVGroup("state", ("s",), STATE_TOKENS, "state"),
    ],
    TOKENS,
)
WINDOW, FULL, STATE = range(3)
NAMES = "wfs"
SIZES = (BlockSizes(4096, 4096), BlockSizes(8192, 8192), BlockSizes(12288, 12288))
PACKED_SIZES = (BlockSizes(4096, 2176), BlockSizes(8192, 4224), BlockSizes(12288, 12288))
POLICIES = ("lru", "s3fifo", "arc")
Block = tuple[int, int]
"""The number of a group, and the token at which the block ends."""


def make_control(
    pool_bytes: int, sizes: Sequence[BlockSizes] = SIZES, groups: GroupSet = GROUPS, **changes: object
) -> ControlPlane:
    config = KVortexConfig(**{"pool": pool_bytes, "eviction": {"watermark": 1.0}, **changes})
    return ControlPlane.from_config(config, config.pool.bytes, sizes, groups)


def blocks_of(num_tokens: int, window: int = -1) -> list[Block]:
    """All blocks of a request in the order of their worth; of the window the last so many, -1 for all."""
    found = [(FULL, end) for end in range(TOKENS, num_tokens + 1, TOKENS)]
    in_window = [(WINDOW, end) for _, end in found]
    found += in_window if window < 0 else in_window[len(in_window) - window :]
    found += [(STATE, end) for end in range(STATE_TOKENS, num_tokens + 1, STATE_TOKENS)]
    order = GROUPS.order(np.array([n for n, _ in found]), np.array([end for _, end in found]))
    return [found[place] for place in order]


def hash_at(end: int, salt: int = 0) -> np.ndarray:
    return pack_keys([bytes([salt + 1]) * 16 + end.to_bytes(16, "little")])


def keys_of(blocks: Sequence[Block], salt: int = 0) -> np.ndarray:
    keys = [GROUPS.tagged(hash_at(end, salt), number) for number, end in blocks]
    return np.concatenate(keys) if keys else np.empty((0, 4), np.uint64)


def numbers_of(blocks: Sequence[Block]) -> np.ndarray:
    return np.array([number for number, _ in blocks], dtype=np.uint8)


def plan_of(control: ControlPlane, blocks: Sequence[Block], salt: int = 0, **how: object) -> SavePlan:
    ids = np.arange(len(blocks), dtype=np.int32)
    return control.plan_save(keys_of(blocks, salt), ids, "save", groups=numbers_of(blocks), **how)


def save(control: ControlPlane, blocks: Sequence[Block], salt: int = 0, **how: object) -> list[SaveOutcome]:
    plan = plan_of(control, blocks, salt, **how)
    return list(control.finish_save(plan, np.zeros(len(plan.slots), np.uint64)))


def there(control: ControlPlane, blocks: Sequence[Block], salt: int = 0) -> list[Block]:
    mask = control.index.contains_mask(keys_of(blocks, salt)).tolist()
    return [block for block, is_there in zip(blocks, mask, strict=True) if is_there]


def watch_evictions(control: ControlPlane) -> list[bytes]:
    """Keys of the blocks that the eviction order gives, from now on, one after another."""
    seen: list[bytes] = []
    evict = control.index.evict

    def watched(nbytes: int) -> Evicted:
        evicted = evict(nbytes)
        seen.extend(key.tobytes() for key in evicted.keys)
        return evicted

    control.index.evict = watched  # type: ignore[method-assign]
    return seen


# -- the order ---------------------------------------------------------------------------------------


def test_a_tail_goes_before_its_head_and_at_each_boundary_full_attention_last() -> None:
    control, blocks = make_control(1 << 20), blocks_of(256)
    save(control, blocks)
    seen = watch_evictions(control)
    while len(control.index):
        control._evict(1)
    assert seen == [keys_of([block])[0].tobytes() for block in reversed(blocks)]
    assert control.allocator.leak_report() == ""


def test_a_full_pool_loses_first_what_serves_one_boundary() -> None:
    """As the pool fills, the older request is at each moment a prefix of its blocks in the order of their worth."""
    blocks = blocks_of(256)
    total = sum(SIZES[number].raw for number, _ in blocks)
    control = make_control(total + 4096)
    save(control, blocks)
    lengths = []
    for end in range(TOKENS, 257, TOKENS):
        save(control, [block for block in blocks if block[1] == end], salt=1)
        left = there(control, blocks)
        assert left == blocks[: len(left)]
        lengths.append(len(left))
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 8
    control.clear()


def test_what_a_request_asks_for_again_stays_in_its_order() -> None:
    """A load of what is needed at a boundary leaves the state behind the prefix, and the rest of the states goes."""
    control, blocks = make_control(1 << 20), blocks_of(256)
    save(control, blocks)
    needed = [b for b in blocks if b[0] == FULL or b in {(STATE, 256), (WINDOW, 256), (WINDOW, 240), (WINDOW, 224)}]
    control.finish_load(control.plan_load(keys_of(needed), np.arange(len(needed), dtype=np.int32)))
    seen = watch_evictions(control)
    while len(control.index):
        control._evict(1)
    rest = [block for block in blocks if block not in needed]
    assert seen == [keys_of([block])[0].tobytes() for block in [*reversed(rest), *reversed(needed)]]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_evicted_window_or_state_leaves_its_prefix(policy: str) -> None:
    control, blocks = make_control(1 << 20, eviction={"policy": policy, "watermark": 1.0}), blocks_of(128)
    save(control, blocks)
    seen = watch_evictions(control)
    full = [block for block in blocks if block[0] == FULL]
    while not any(keys_of([block])[0].tobytes() in seen for block in full):
        assert there(control, full) == full
        control._evict(1)
    control.clear()


def survivors(control: ControlPlane, blocks: Sequence[Block], seen: list[bytes]) -> list[Block]:
    """What must be left of the blocks: all but those that were evicted and those whose full attention was."""
    gone = {block for block in blocks if keys_of([block])[0].tobytes() in seen}
    return [block for block in blocks if block not in gone and (FULL, block[1]) not in gone]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_companions_go_with_full_attention_and_nothing_else_does(policy: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    control, blocks = make_control(1 << 20, eviction={"policy": policy, "watermark": 1.0}), blocks_of(256)
    save(control, blocks)
    seen = watch_evictions(control)
    for _ in range(40):
        some = [blocks[place] for place in sorted(generator.permutation(len(blocks))[:6].tolist())]
        control.finish_load(control.plan_load(keys_of(some), np.arange(6, dtype=np.int32)[: len(some)]))
        control._evict(int(generator.integers(1, 20_000)))
        assert there(control, blocks) == survivors(control, blocks, seen)
        held = control.hold(keys_of(blocks))
        assert control.allocator.allocated_bytes == int(held.nbytes.sum())
        control.release(held.slots)
    assert not there(control, blocks)
    assert control.allocator.leak_report() == ""


def test_a_companion_that_is_being_loaded_goes_when_its_load_ends() -> None:
    control, blocks = make_control(1 << 20), blocks_of(64)
    save(control, blocks)
    pinned = [(STATE, 64), (WINDOW, 64)]
    load = control.plan_load(keys_of(pinned), np.arange(2, dtype=np.int32))
    while there(control, [(FULL, 64)]):
        control._evict(1)
    assert not there(control, pinned)
    kept = control.allocator.allocated_bytes
    assert list(control.finish_load(load)) == [None, None]
    assert control.allocator.allocated_bytes == kept - SIZES[STATE].raw - SIZES[WINDOW].raw
    reasons = {control.index.miss_reason(key.tobytes()) for key in keys_of(pinned)}
    assert reasons == {MissReason.EVICTED}
    control.clear()


def test_removed_blocks_are_reported_once_companions_included() -> None:
    control, blocks = make_control(1 << 20), blocks_of(128)
    save(control, blocks)
    removed: list[int] = []
    control.on_removed = lambda offsets: removed.extend(offsets.tolist())
    held = control.hold(keys_of(blocks))
    offsets = sorted(held.offsets.tolist())
    control.release(held.slots)
    control.finish_load(control.plan_load(keys_of([(STATE, 64), (STATE, 128)]), np.arange(2, dtype=np.int32)))
    while len(control.index):
        control._evict(1)
    assert sorted(removed) == offsets


def test_where_a_tier_takes_what_is_evicted_companions_stay() -> None:
    control, blocks = make_control(1 << 20), blocks_of(64)
    save(control, blocks)
    taken: list[int] = []

    def take(evicted: Evicted) -> NDArray[np.bool_]:
        taken.extend(evicted.offsets.tolist())
        return np.ones(len(evicted.offsets), dtype=np.bool_)

    control.on_evicted = take
    control.finish_load(control.plan_load(keys_of([(STATE, 64)]), np.arange(1, dtype=np.int32)))
    control._evict(sum(SIZES[number].raw for number, _ in blocks) - SIZES[STATE].raw, control.on_evicted)
    assert there(control, blocks) == [(STATE, 64)]
    assert len(taken) == len(blocks) - 1
    for offset in taken:
        control.free(offset)
    control.clear()
    assert control.allocator.leak_report() == ""


def test_without_full_attention_the_window_behind_an_evicted_state_stays() -> None:
    """The block of the window that ends at token 16 is needed to resume at 32, and the state at 16 is not."""
    groups = GroupSet([KVGroup("state", ("s",), 16, "state"), KVGroup("window", ("w",), 16, "window", 40)], 16)
    control = make_control(1 << 20, SIZES[:2], groups)
    blocks = [(number, end) for end in (16, 32) for number in (0, 1)]
    keys = np.concatenate([groups.tagged(hash_at(end), number) for number, end in blocks])
    numbers = np.array([number for number, _ in blocks], dtype=np.uint8)
    plan = control.plan_save(keys, np.arange(4, dtype=np.int32), "save", groups=numbers)
    control.finish_save(plan, np.zeros(4, np.uint64))
    control.touch(keys[1:])  # all but the state at 16
    control._evict(1)
    assert control.index.contains_mask(keys).tolist() == [False, True, True, True]
    found = [control.index.contains_mask(keys[number::2]) for number in (0, 1)]
    assert groups.longest_match(found, 32).num_tokens == 32
    control.clear()


# -- room --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sizes", [SIZES, PACKED_SIZES])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
def test_a_request_that_is_larger_than_the_pool_keeps_its_head(
    policy: str, sizes: Sequence[BlockSizes], share: float
) -> None:
    """Just the blocks without room are given up, and those with room are worth the most: one can resume with them."""
    blocks = blocks_of(512)
    nbytes = [sizes[number].packed for number, _ in blocks]
    pool = max(int(share * sum(nbytes)), sum(size.raw for size in sizes))
    control = make_control(pool, sizes, eviction={"policy": policy, "watermark": 1.0})
    fitting = int(np.searchsorted(np.cumsum(nbytes), control.allocator.capacity_bytes, "right"))
    plan = plan_of(control, blocks)
    assert plan.positions.tolist() == list(range(fitting))
    assert plan.transfer.block_ids.tolist() == list(range(fitting))
    assert control.index.num_pending == fitting
    outcomes = list(control.finish_save(plan, np.zeros(fitting, np.uint64)))
    assert outcomes == [SaveOutcome.STORED] * fitting + [SaveOutcome.NO_SPACE] * (len(blocks) - fitting)
    assert there(control, blocks) == blocks[:fitting]
    assert control.index.num_pending == 0
    reasons = {control.index.miss_reason(key.tobytes()) for key in keys_of(blocks[fitting:])}
    assert reasons == {MissReason.NEVER_STORED}
    control.clear()
    assert control.allocator.leak_report() == ""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tail_does_not_drive_out_its_own_head(policy: str) -> None:
    blocks = blocks_of(256)
    half = [block for block in blocks if block[1] <= 128]
    control = make_control(
        sum(SIZES[number].raw for number, _ in half) + 8192, eviction={"policy": policy, "watermark": 1.0}
    )
    save(control, half)
    for start in range(len(half), len(blocks), 8):
        part = blocks[start : start + 8]
        save(control, part, chain=keys_of(blocks[: start + len(part)]))
        assert there(control, half) == half
    control.clear()


def test_blocks_that_are_stored_or_on_their_way_take_no_room() -> None:
    control, blocks = make_control(1 << 20), blocks_of(128)
    first = plan_of(control, blocks[:6])
    save(control, blocks[6:9])
    used = control.allocator.allocated_bytes
    second = plan_of(control, blocks)
    assert second.positions.tolist() == list(range(9, len(blocks)))
    added = sum(SIZES[number].raw for number, _ in blocks[9:])
    assert control.allocator.allocated_bytes == used + added
    outcomes = list(control.finish_save(second, np.zeros(len(blocks) - 9, np.uint64)))
    assert outcomes[:9] == [SaveOutcome.PENDING] * 6 + [SaveOutcome.ALREADY_STORED] * 3
    assert outcomes[9:] == [SaveOutcome.STORED] * (len(blocks) - 9)
    assert list(control.finish_save(first, np.zeros(6, np.uint64))) == [SaveOutcome.STORED] * 6
    control.clear()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tier_gets_what_is_evicted_although_holes_are_too_small(policy: str) -> None:
    """What is evicted to make room at once is lost to the tier: that must stay rare where sizes do not fit together."""
    sizes = [BlockSizes(2176, 2176), BlockSizes(8192, 8192), BlockSizes(100_096, 100_096)]
    control = make_control(22_000_000, sizes, eviction={"policy": policy})
    taken: list[int] = []

    def take(evicted: Evicted) -> NDArray[np.bool_]:
        taken.extend(evicted.offsets.tolist())
        return np.ones(len(evicted.offsets), dtype=np.bool_)

    control.on_evicted = take
    generator, num_taken = np.random.default_rng(0), 0
    for _ in range(700):
        blocks = blocks_of(int(generator.integers(1, 17)) * TOKENS, int(generator.integers(-1, 4)))
        assert SaveOutcome.NO_SPACE not in save(control, blocks, salt=int(generator.integers(0, 250)))
        for offset in taken:  # written
            control.free(offset)
        num_taken += len(taken)
        taken.clear()
    assert control.index.evicted_blocks > 2000
    assert num_taken > 0.97 * control.index.evicted_blocks
    control.on_evicted = None
    control.clear()


# -- forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_is", [False, True])
def test_a_plan_says_the_form_of_each_block(as_is: bool) -> None:
    control, blocks = make_control(1 << 20, PACKED_SIZES), blocks_of(128)
    plan = plan_of(control, blocks, as_is=as_is)
    forms = {WINDOW: 0 if as_is else 1, FULL: 2 if as_is else 3, STATE: 4}
    assert plan.transfer.forms is not None
    assert plan.transfer.forms.dtype == np.uint8
    assert plan.transfer.forms.tolist() == [forms[number] for number, _ in blocks]
    sizes = [PACKED_SIZES[number].raw if as_is else PACKED_SIZES[number].packed for number, _ in blocks]
    assert plan.nbytes.tolist() == sizes
    assert control.allocator.allocated_bytes == sum(-(-size // 128) * 128 for size in sizes)
    control.finish_save(plan, np.arange(len(blocks), dtype=np.uint64))
    load = control.plan_load(keys_of(blocks), np.arange(len(blocks), dtype=np.int32))
    assert load.transfer.forms is not None
    assert load.transfer.forms.tolist() == plan.transfer.forms.tolist()
    assert load.transfer.offsets.tolist() == plan.transfer.offsets.tolist()
    assert load.pins.digests.tolist() == list(range(len(blocks)))
    control.finish_load(load)
    control.clear()


def test_a_load_with_misses_says_the_forms_of_its_hits() -> None:
    control, blocks = make_control(1 << 20, PACKED_SIZES), blocks_of(128)
    saved = blocks[1::3]
    save(control, saved)
    load = control.plan_load(keys_of(blocks), np.arange(len(blocks), dtype=np.int32))
    assert load.positions.tolist() == list(range(1, len(blocks), 3))
    assert load.transfer.block_ids.tolist() == load.positions.tolist()
    assert load.transfer.forms is not None
    assert load.transfer.forms.tolist() == [{WINDOW: 1, FULL: 3, STATE: 4}[number] for number, _ in saved]
    control.finish_load(load)
    control.clear()


def test_lossy_and_failed_blocks_free_extents_of_their_own_size() -> None:
    control, blocks = make_control(1 << 20, PACKED_SIZES), blocks_of(64)
    plan = plan_of(control, blocks)
    succeeded, lossy = np.ones(len(blocks), dtype=bool), np.zeros(len(blocks), dtype=bool)
    succeeded[[0, 3, 5]] = False
    lossy[3] = True
    outcomes = list(control.finish_save(plan, np.zeros(len(blocks), np.uint64), succeeded, lossy))
    assert [outcomes[n] for n in (0, 3, 5)] == [SaveOutcome.FAILED, SaveOutcome.TOO_LOSSY, SaveOutcome.FAILED]
    stored = [block for n, block in enumerate(blocks) if n not in (0, 3, 5)]
    assert there(control, blocks) == stored
    assert control.allocator.allocated_bytes == sum(PACKED_SIZES[number].packed for number, _ in stored)
    again = plan_of(control, [blocks[3]], as_is=True)
    assert again.transfer.forms is not None
    assert again.transfer.forms.tolist() == [2 * blocks[3][0]]
    control.finish_save(again, np.zeros(1, np.uint64))
    assert there(control, [blocks[3]]) == [blocks[3]]
    control.clear()


def test_fetched_blocks_have_the_forms_that_the_tier_has() -> None:
    control = make_control(1 << 20, PACKED_SIZES)
    blocks, forms = [(FULL, 16), (WINDOW, 16), (FULL, 32), (STATE, 64)], [3, 0, 2, 4]
    plan = control.plan_fetch(keys_of(blocks), np.array(forms, np.uint8), "fetch")
    assert plan.forms.tolist() == forms
    assert control.allocator.allocated_bytes == 4224 + 4096 + 8192 + 12288
    columns = zip(plan.slots.tolist(), plan.offsets.tolist(), plan.forms.tolist(), strict=True)
    for number, (slot, offset, form) in enumerate(columns):
        if number == 1:
            control.abandon_fetch(slot, offset, MissReason.CORRUPT)
        else:
            control.finish_fetch(slot, offset, form, number)
    assert there(control, blocks) == [blocks[0], *blocks[2:]]
    held = control.hold(keys_of(blocks))
    assert (held.forms.tolist(), held.nbytes.tolist()) == ([3, 2, 4], [4224, 8192, 12288])
    control.release(held.slots)
    control.clear()


# -- extents -----------------------------------------------------------------------------------------


class Churn:
    """Random saves, loads, fetches, evictions and clears, of which some are still under way."""

    def __init__(self, seed: int, policy: str) -> None:
        self.random = np.random.default_rng(seed)
        self.control = make_control(
            260_000,
            PACKED_SIZES,
            pool={"bytes": 260_000, "pin_piece_bytes": 65_536},
            eviction={"policy": policy, "watermark": 1.0},
        )
        self.saves: list[SavePlan] = []
        self.loads: list[LoadPlan] = []
        self.all_keys = np.concatenate([keys_of(blocks_of(256), salt) for salt in range(4)])

    def step(self) -> None:
        {0: self.begin_save, 1: self.begin_load, 2: self.fetch, 3: self.end_load}.get(
            int(self.random.integers(0, 6)), self.end_save
        )()
        if self.random.random() < 0.02:
            self.control.clear()

    def some_blocks(self) -> tuple[list[Block], int]:
        blocks = blocks_of(int(self.random.integers(1, 17)) * TOKENS, int(self.random.integers(-1, 4)))
        return blocks, int(self.random.integers(0, 4))

    def begin_save(self) -> None:
        blocks, salt = self.some_blocks()
        self.saves.append(plan_of(self.control, blocks, salt, as_is=bool(self.random.random() < 0.2)))

    def end_save(self) -> None:
        if self.saves:
            plan = self.saves.pop(int(self.random.integers(0, len(self.saves))))
            count = len(plan.slots)
            succeeded = self.random.random(count) < 0.9
            lossy = self.random.random(count) < 0.5
            tried = self.random.random(count) < 0.8
            succeeded &= tried
            lossy &= tried
            self.control.finish_save(plan, np.zeros(count, np.uint64), succeeded, lossy, tried)

    def begin_load(self) -> None:
        blocks, salt = self.some_blocks()
        ids = np.arange(len(blocks), dtype=np.int32)
        self.loads.append(self.control.plan_load(keys_of(blocks, salt), ids))

    def end_load(self) -> None:
        if self.loads:
            plan = self.loads.pop(int(self.random.integers(0, len(self.loads))))
            count = plan.pins.num_hits
            self.control.finish_load(plan, self.random.random(count) < 0.9, self.random.random(count) < 0.95)

    def fetch(self) -> None:
        blocks, salt = self.some_blocks()
        forms = (2 * numbers_of(blocks) + (numbers_of(blocks) != STATE)).astype(np.uint8)
        plan = self.control.plan_fetch(keys_of(blocks, salt), forms, "fetch")
        for slot, offset, form in zip(plan.slots.tolist(), plan.offsets.tolist(), plan.forms.tolist(), strict=True):
            if self.random.random() < 0.8:
                self.control.finish_fetch(slot, offset, form, 0)
            else:
                self.control.abandon_fetch(slot, offset, MissReason.DEADLINE)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Offset and bytes of all extents in use, each at least once."""
        held = self.control.hold(self.all_keys)
        yield from zip(held.offsets.tolist(), held.nbytes.tolist(), strict=True)
        self.control.release(held.slots)
        for save in self.saves:
            sizes = np.broadcast_to(save.nbytes, save.transfer.offsets.shape)
            yield from zip(save.transfer.offsets.tolist(), sizes.tolist(), strict=True)
        for load in self.loads:
            yield from zip(load.pins.offsets.tolist(), load.pins.nbytes.tolist(), strict=True)

    def check(self) -> None:
        extents = sorted(set(self.extents()))
        end = 0
        for offset, nbytes in extents:
            assert offset >= end, "two extents overlap"
            end = offset + nbytes
            assert offset // 65_536 == (end - 1) // 65_536, "an extent lies in one piece"
        assert self.control.allocator.allocated_bytes == sum(nbytes for _, nbytes in extents)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_extents_of_all_sizes_never_overlap_and_account_to_zero(policy: str, seed: int) -> None:
    churn = Churn(seed, policy)
    for _ in range(600):
        churn.step()
        churn.check()
    assert churn.control.index.evicted_blocks > 0
    while churn.saves:
        churn.end_save()
    while churn.loads:
        churn.end_load()
    churn.control.clear()
    assert churn.control.index.num_pending == 0
    assert churn.control.allocator.leak_report() == ""
