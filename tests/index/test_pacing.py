"""Eviction keeps pace with saves: never late, never all at once, and with an end."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import ConfigError
from kvortex.index import EvictionPacer

CAPACITY = 10_000
WATERMARK, RATIO = 0.8, 0.2
HIGH, LOW, FLOOR = 8_000, 6_400, CAPACITY // 256


@pytest.fixture
def pacer():
    return EvictionPacer(CAPACITY, WATERMARK, RATIO)


def test_nothing_below_the_watermark(pacer):
    assert pacer.step(HIGH - 100, 100) == 0


def test_a_cycle_begins_above_the_watermark(pacer):
    assert pacer.step(HIGH - 100, 101) == 202


def test_a_cycle_goes_on_below_the_watermark_until_its_aim(pacer):
    pacer.step(HIGH, 100)
    assert pacer.step(LOW + 500, 100) == 200
    assert pacer.step(LOW + 10, 30) == 40, "down to the aim"
    assert pacer.step(LOW, 30) == 0, "the cycle has ended"
    assert pacer.step(HIGH - 30, 30) == 0


def test_a_cycle_whose_aim_was_reached_by_other_means_has_ended(pacer):
    pacer.step(HIGH, 100)
    assert pacer.step(LOW - 30, 30) == 0
    assert pacer.step(HIGH - 30, 30) == 0


def test_a_pool_of_another_size_is_kept_to(pacer):
    pacer.resize(CAPACITY // 2)
    assert pacer.step(HIGH // 2 - 100, 100) == 0
    assert pacer.step(HIGH // 2, 100) == 200
    with pytest.raises(ConfigError, match="capacity_bytes"):
        pacer.resize(0)


def test_small_saves_evict_the_floor(pacer):
    assert pacer.step(HIGH, 1) == FLOOR


def test_an_idle_pool_works_its_cycle_off(pacer):
    pacer.step(HIGH, 100)
    assert pacer.step(HIGH, 0) == FLOOR


def test_the_pool_never_overflows_whatever_the_pace(pacer):
    assert pacer.step(CAPACITY, 10) == FLOOR
    pacer = EvictionPacer(CAPACITY, watermark=1.0, eviction_ratio=0.01)
    assert pacer.step(CAPACITY, 3_000) == 3_100
    assert pacer.step(CAPACITY + 500, 1) == 501, "an overfull pool is brought back at once"


def test_no_more_than_is_used(pacer):
    assert pacer.step(50, 20_000) == 50
    assert pacer.step(0, 20_000) == 0


def test_a_tiny_pool_still_makes_progress():
    pacer = EvictionPacer(10, WATERMARK, RATIO)
    assert pacer.step(9, 0) == 1


@given(
    capacity=st.integers(1, 1 << 40),
    watermark=st.floats(0.01, 1.0),
    ratio=st.floats(0.01, 0.99),
    steps=st.lists(st.floats(0, 0.3), max_size=60),
)
def test_invariants_of_a_run(capacity, watermark, ratio, steps):
    pacer = EvictionPacer(capacity, watermark, ratio)
    floor, used = max(1, capacity // 256), 0
    low = math.floor(capacity * watermark * (1 - ratio))
    for share in steps:
        incoming = int(capacity * share)
        evicted = pacer.step(used, incoming)
        overflow = used + incoming - capacity
        assert 0 <= evicted <= used
        assert evicted <= max(2 * incoming, floor, overflow), "more than its pace"
        assert used + incoming - evicted <= capacity or evicted == used
        assert evicted == 0 or used + incoming - evicted >= min(low, capacity), "past the aim of the cycle"
        if used + incoming <= low:
            assert evicted == 0
        used += incoming - evicted
        assert used <= capacity


@given(incoming=st.integers(1, 200))
def test_a_steady_stream_swings_between_the_two_lines(incoming):
    pacer, used, levels = EvictionPacer(CAPACITY, WATERMARK, RATIO), 0, []
    for _ in range(20 * CAPACITY // incoming):
        used += incoming - pacer.step(used, incoming)
        levels.append(used)
    later = levels[2 * CAPACITY // incoming :]
    assert min(later) >= LOW
    assert max(later) <= HIGH + incoming
    assert max(later) > HIGH - incoming, "what lies between the lines is used"
    lows = [level <= LOW + incoming for level in later]
    assert sum(now and not before for before, now in pairwise(lows)) >= 2, "cycles end and begin again"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("capacity_bytes", (capacity, 0.8, 0.2)) for capacity in (0, -1)),
        *(("watermark", (100, watermark, 0.2)) for watermark in (0, -0.1, 1.01, math.nan)),
        *(("eviction_ratio", (100, 0.8, ratio)) for ratio in (0, 1, -0.1, math.nan)),
    ],
)
def test_bad_settings(name, arguments):
    with pytest.raises(ConfigError, match=name):
        EvictionPacer(*arguments)


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1)])
def test_negative_bytes(pacer, arguments):
    with pytest.raises(ConfigError, match="negative"):
        pacer.step(*arguments)
