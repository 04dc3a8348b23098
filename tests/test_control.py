"""The control plane by itself: a chain keeps its head, and a pool that turns out smaller is kept to."""

import numpy as np
import pytest

from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane
from kvortex.types import BlockSizes, MissReason, SaveOutcome

BLOCK_NBYTES = 4096


def make_control(blocks: int, **changes: object) -> ControlPlane:
    config = KVortexConfig(pool=blocks * BLOCK_NBYTES, **changes)
    return ControlPlane.from_config(config, config.pool.bytes, [BlockSizes(BLOCK_NBYTES, BLOCK_NBYTES)])


def keys(count: int, salt: int = 0) -> np.ndarray:
    return pack_keys([bytes([salt]) * 16 + number.to_bytes(16, "little") for number in range(count)])


def ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def save(control: ControlPlane, part: np.ndarray, **how: np.ndarray) -> list[SaveOutcome]:
    plan = control.plan_save(part, ids(len(part)), "save", **how)
    return list(control.finish_save(plan, np.zeros(len(plan.slots), np.uint64)))


def there(control: ControlPlane, chain: np.ndarray) -> list[bool]:
    return control.index.contains_mask(chain).tolist()


# -- a chain's head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "arc"])
def test_a_tail_does_not_drive_out_its_own_head(policy: str) -> None:
    control = make_control(10, eviction=policy)
    save(control, keys(6))
    outcomes = save(control, keys(16))
    stored = [outcome.is_stored for outcome in outcomes]
    assert stored == there(control, keys(16)) == [True] * 10 + [False] * 6
    assert outcomes[6:] == [SaveOutcome.STORED] * 4 + [SaveOutcome.NO_SPACE] * 6
    control.clear()


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "arc"])
def test_others_make_room_for_a_tail(policy: str) -> None:
    control = make_control(10, eviction=policy)
    save(control, keys(8, salt=1))
    save(control, keys(2))
    assert save(control, keys(6)) == [SaveOutcome.ALREADY_STORED] * 2 + [SaveOutcome.STORED] * 4
    assert there(control, keys(6)) == [True] * 6
    control.clear()


def test_what_is_in_front_of_a_part_stays_too() -> None:
    control = make_control(10)
    chain = keys(16)
    save(control, chain[:8])
    outcomes = save(control, chain[8:], chain=chain)
    assert there(control, chain) == [True] * 10 + [False] * 6
    assert [outcome.is_stored for outcome in outcomes] == [True] * 2 + [False] * 6
    control.clear()


def test_fetched_blocks_do_not_drive_out_what_is_in_front_of_them() -> None:
    control = make_control(10)
    chain = keys(16)
    save(control, chain[:8])
    plan = control.plan_fetch(chain[8:], np.zeros(8, np.uint8), "fetch", chain=chain)
    assert plan.positions.tolist() == [0, 1]
    for slot, offset in zip(plan.slots.tolist(), plan.offsets.tolist(), strict=True):
        control.finish_fetch(slot, offset, 0, 0)
    assert there(control, chain) == [True] * 10 + [False] * 6
    control.clear()


def test_what_was_given_up_has_not_failed() -> None:
    control = make_control(10)
    plan = control.plan_save(keys(6), ids(6), "save")
    arrived = np.array([True, False, True, False, False, False])
    control.finish_save(plan, np.zeros(6, np.uint64), arrived, None, tried=np.arange(6) < 4)
    reasons = [control.index.miss_reason(key.tobytes()) for key in keys(6)]
    assert there(control, keys(6)) == arrived.tolist()
    assert [reasons[1], reasons[3]] == [MissReason.TRANSFER_FAILED] * 2
    assert reasons[4:] == [MissReason.NEVER_STORED] * 2
    control.clear()


# -- a smaller pool ----------------------------------------------------------------------------------


def test_what_lies_beyond_a_smaller_pool_is_gone_and_the_rest_goes_on() -> None:
    control = make_control(20, eviction={"watermark": 1.0})
    removed: list[int] = []
    control.on_removed = lambda offsets: removed.extend(offsets.tolist())
    save(control, keys(20))
    control.shrink(8 * BLOCK_NBYTES + 100)
    assert there(control, keys(20)) == [True] * 8 + [False] * 12
    assert sorted(removed) == [n * BLOCK_NBYTES for n in range(8, 20)]
    figures = control.allocator.figures()
    assert (figures.capacity_bytes, figures.allocated_bytes) == (8 * BLOCK_NBYTES, 8 * BLOCK_NBYTES)
    for salt in range(1, 5):
        assert save(control, keys(6, salt)) == [SaveOutcome.STORED] * 6
        assert control.index.committed_bytes <= 8 * BLOCK_NBYTES
    assert control.index.evicted_blocks > 0
    control.clear()
    assert control.allocator.figures().largest_free_bytes == 8 * BLOCK_NBYTES


def test_what_is_in_use_beyond_a_smaller_pool_goes_when_its_use_ends() -> None:
    control = make_control(20)
    save(control, keys(12))
    load = control.plan_load(keys(12), ids(12))
    control.shrink(8 * BLOCK_NBYTES)
    assert there(control, keys(12)) == [True] * 8 + [False] * 4
    assert control.allocator.allocated_bytes == 12 * BLOCK_NBYTES
    control.finish_load(load)
    assert control.allocator.allocated_bytes == 8 * BLOCK_NBYTES
    assert control.index.miss_reason(keys(12)[9].tobytes()) is MissReason.TRANSFER_FAILED
    control.clear()


def test_what_was_on_its_way_beyond_a_smaller_pool_does_not_become_visible() -> None:
    control = make_control(20)
    saved = control.plan_save(keys(6), ids(6), "save")
    fetched = control.plan_fetch(keys(4, salt=1), np.zeros(4, np.uint8), "fetch")
    control.shrink(4 * BLOCK_NBYTES)
    outcomes = control.finish_save(saved, np.zeros(6, np.uint64))
    assert list(outcomes) == [SaveOutcome.STORED] * 4 + [SaveOutcome.FAILED] * 2
    for slot, offset in zip(fetched.slots.tolist(), fetched.offsets.tolist(), strict=True):
        control.finish_fetch(slot, offset, 0, 0)
    assert there(control, keys(4, salt=1)) == [False] * 4
    assert there(control, keys(6)) == [True] * 4 + [False] * 2
    control.clear()
    assert control.allocator.leak_report() == ""


def test_a_pool_of_which_nothing_is_left_stores_nothing() -> None:
    control = make_control(20)
    save(control, keys(6))
    control.shrink(0)
    assert len(control.index) == 0
    assert save(control, keys(2)) == [SaveOutcome.NO_SPACE] * 2
    with pytest.raises(ValueError, match="cannot shrink"):
        control.shrink(BLOCK_NBYTES)


@pytest.mark.parametrize(
    ("pool", "piece", "setting"), [(4096, 8192, r"pool\.bytes"), (16384, 4096, r"pool\.pin_piece_bytes")]
)
def test_a_pool_that_holds_no_block_is_refused_with_what_to_raise(pool: int, piece: int, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"raise {setting}"):
        ControlPlane.from_config(KVortexConfig(pool={"pin_piece_bytes": piece}), pool, [BlockSizes(8192, 8192)])
