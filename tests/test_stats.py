import json
import math
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.stats import EngineStats, LatencyHistogram, PoolFigures
from kvortex.types import Direction, MissReason

POOL = PoolFigures("pinned", 1 << 30, 3 << 20, 512 << 20, 0.25, 7, 1 << 30)


def nearest_rank(values, p):
    return sorted(values)[max(1, math.ceil(p / 100 * len(values))) - 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1000), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_within_five_percent(values, p):
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    assert histogram.percentile(p) == pytest.approx(nearest_rank(values, p), rel=0.05)
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))


def test_histogram_of_a_known_distribution():
    values = np.random.default_rng(7).lognormal(-7, 1, 5000)
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(float(value))
    for p in (50, 90, 99):
        assert histogram.percentile(p) == pytest.approx(np.percentile(values, p), rel=0.05)


def test_histogram_merges():
    parts, whole = [LatencyHistogram(), LatencyHistogram()], LatencyHistogram()
    for i in range(1, 200):
        parts[i % 2].record(i * 1e-3)
        whole.record(i * 1e-3)
    parts[0].merge(parts[1])
    assert parts[0].count == whole.count
    assert parts[0].sum == pytest.approx(whole.sum)
    assert [parts[0].percentile(p) for p in range(101)] == [whole.percentile(p) for p in range(101)]


def test_histogram_at_its_ends():
    histogram = LatencyHistogram()
    assert histogram.percentile(99) == 0.0
    for seconds in (0.0, 1e-9, 1e-6, 1e5):
        histogram.record(seconds)
    assert 0.0 <= histogram.percentile(0) <= 1e-9
    assert histogram.percentile(100) == 1e5
    histogram.merge(LatencyHistogram())
    assert histogram.percentile(100) == 1e5


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf])
def test_histogram_refuses_what_is_no_latency(seconds):
    histogram = LatencyHistogram()
    with pytest.raises(ValueError, match="latency"):
        histogram.record(seconds)
    assert histogram.count == 0


@pytest.mark.parametrize("p", [-1, 100.5, math.nan])
def test_histogram_refuses_what_is_no_percentile(p):
    with pytest.raises(ValueError, match="percentile"):
        LatencyHistogram().percentile(p)


def busy_stats():
    stats = EngineStats()
    stats.record_outcomes([None, None, None, MissReason.EVICTED])
    stats.record_transfer(Direction.SAVE, "cpu", blocks=4, nbytes=4096, seconds=0.010)
    stats.record_transfer(Direction.SAVE, "disk", blocks=2, nbytes=2048, seconds=0.020, failures=1)
    stats.record_transfer(Direction.LOAD, "cpu", blocks=3, nbytes=3072, seconds=0.005)
    return stats


def test_snapshot_totals():
    snapshot = busy_stats().snapshot([POOL], evicted_blocks=5)
    assert snapshot.hit_rate == 0.75
    assert (snapshot.hits, snapshot.num_misses, snapshot.evicted_blocks) == (3, 1, 5)
    assert snapshot.misses[MissReason.EVICTED] == 1
    assert (snapshot.blocks_saved, snapshot.bytes_saved) == (6, 6144)
    assert (snapshot.blocks_loaded, snapshot.bytes_loaded) == (3, 3072)
    disk = next(t for t in snapshot.transfers if t.tier == "disk")
    assert (disk.direction, disk.failures, disk.num_transfers) == (Direction.SAVE, 1, 1)
    assert disk.p50_s == disk.p99_s == 0.020
    assert snapshot.pools == (POOL,)


def test_a_snapshot_does_not_change():
    stats = busy_stats()
    before = stats.snapshot()
    text = str(before)
    stats.record_outcomes([MissReason.CORRUPT])
    stats.record_transfer(Direction.LOAD, "cpu", blocks=1, nbytes=1, seconds=9.0)
    assert str(before) == text
    assert stats.snapshot().num_misses == 2


def test_hit_rate_without_lookups():
    assert EngineStats().snapshot().hit_rate == 0.0
    assert str(EngineStats().snapshot()).startswith("hit rate 0.0%")


def test_to_dict_is_json():
    data = json.loads(json.dumps(busy_stats().snapshot([POOL]).to_dict(), allow_nan=False))
    assert data["misses"] == {reason.value: int(reason is MissReason.EVICTED) for reason in MissReason}
    assert data["transfers"][0]["direction"] == "save"
    assert data["pools"][0]["fragmentation"] == 0.25


def test_table_lines_up():
    lines = str(busy_stats().snapshot([POOL])).splitlines()
    assert lines[0] == "hit rate 75.0%: 3 hits, 1 misses (evicted 1)"
    table = lines[2:6]
    assert table[0].split()[:2] == ["transfer", "tier"]
    assert len({len(line) for line in table}) == 1
    assert "512.0 MiB" in lines[-1]


def test_prometheus_text():
    stats = busy_stats()
    stats.record_transfer(Direction.SAVE, 'a"b\\c\n', blocks=1, nbytes=1, seconds=1e-7)
    text = stats.snapshot([POOL]).to_prometheus("kv")
    assert text.endswith("\n")
    sample = re.compile(r'kv_[a-z_]+(\{[a-z]+="(\\.|[^"\\\n])*"(,[a-z]+="(\\.|[^"\\\n])*")*\})? [0-9.e+-]+')
    for line in text.splitlines():
        assert line.startswith(("# HELP kv_", "# TYPE kv_")) or sample.fullmatch(line), line
    assert "kv_hits_total 3" in text
    assert 'kv_misses_total{reason="never_stored"} 0' in text
    assert 'kv_transfer_latency_seconds_bucket{direction="save",tier="disk",le="+Inf"} 1' in text
    assert 'kv_transfer_latency_seconds_count{direction="load",tier="cpu"} 1' in text
    assert 'tier="a\\"b\\\\c\\n"' in text
    assert 'kv_pool_fragmentation{pool="pinned"} 0.25' in text
    types = re.findall(r"# TYPE (\S+)", text)
    assert len(types) == len(set(types))


def test_what_an_engine_gets_of_a_shared_pool_is_shown_if_somebody_has_set_it() -> None:
    for share, line in (
        ({"priority": -1}, "pinned: priority -1"),
        ({"quota_bytes": 4096, "quota_used_bytes": 2048}, "pinned: priority 0, 2.0 KiB of a quota of 4.0 KiB"),
    ):
        snapshot = busy_stats().snapshot([replace(POOL, **share)])
        assert line in str(snapshot).splitlines()
        text = snapshot.to_prometheus("kv")
        assert ('kv_pool_quota_bytes{pool="pinned"} 4096' in text) == ("quota_bytes" in share)
        assert ('kv_pool_quota_used_bytes{pool="pinned"} 2048' in text) == ("quota_bytes" in share)
    assert "priority" not in str(busy_stats().snapshot([POOL]))


@pytest.mark.parametrize("prefix", ["", "9kv", "kv-cache", "kv\n"])
def test_prometheus_refuses_a_bad_prefix(prefix):
    with pytest.raises(ValueError, match="metric name"):
        EngineStats().snapshot().to_prometheus(prefix)


def test_threads_lose_no_counts():
    stats = EngineStats()

    def work():
        for _ in range(500):
            stats.record_outcomes([None, MissReason.PENDING])
            stats.record_transfer(Direction.LOAD, "cpu", blocks=1, nbytes=2, seconds=1e-3)
            stats.snapshot()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    snapshot = stats.snapshot()
    assert (snapshot.hits, snapshot.num_misses) == (2000, 2000)
    assert (snapshot.blocks_loaded, snapshot.bytes_loaded) == (2000, 4000)


def test_histograms_of_replicas_can_be_added() -> None:
    """Buckets are the same for every engine, whatever it has seen, and each counts what lies below it."""
    one, two, both = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
    for histogram, latencies in ((one, (2e-6, 3e-3, 50.0)), (two, (5e-4, 3e-3, 2000.0, 1e-9))):
        for seconds in latencies:
            histogram.record(seconds)
            both.record(seconds)
    added = [(bound, a + b) for (bound, a), (_, b) in zip(one.cumulative(), two.cumulative(), strict=True)]
    assert added == list(both.cumulative())
    recorded = (2e-6, 3e-3, 50.0, 5e-4, 3e-3, 2000.0, 1e-9)
    assert [(bound, sum(seconds < bound for seconds in recorded)) for bound, _ in added] == added
    assert LatencyHistogram().cumulative() == tuple((bound, 0) for bound, _ in added)


def test_look_ups_are_counted_apart_from_loads() -> None:
    stats = EngineStats()
    stats.record_lookup(100, 9)
    stats.record_outcomes([None] * 9)
    snapshot = stats.snapshot(block_size=16)
    assert snapshot.hit_rate == 0.09
    assert snapshot.load_hit_rate == 1.0
    assert (snapshot.looked_up_tokens, snapshot.found_tokens) == (1600, 144)
    assert "looked up 100 blocks, found 9 (9.0%, 144 of 1600 tokens)" in str(snapshot)
    assert "kvortex_looked_up_tokens_total 1600" in snapshot.to_prometheus()
    assert snapshot.to_dict()["found_blocks"] == 9
