"""Statistics in the text exposition format of Prometheus, version 0.0.4."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.stats import StatsSnapshot, TieringFigures


def prometheus_text(snapshot: "StatsSnapshot", prefix: str) -> str:
    """All metrics, their names begun with `prefix`.

    Raises `ValueError` when `prefix` cannot start a metric name.
    """
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", prefix):
        raise ValueError(f"{prefix!r} cannot start a metric name; use letters, digits and underscores")
    out: list[str] = []
    for name, kind, text, samples in _metrics(snapshot):
        metric = f"{prefix}_{name}"
        out += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        out += [f"{metric}{suffix}{_labels(labels)} {value}" for suffix, labels, value in samples]
    return "\n".join(out) + "\n"


_Sample = tuple[str, dict[str, str], float]
_Metric = tuple[str, str, str, list[_Sample]]


def _metrics(snapshot: "StatsSnapshot") -> list[_Metric]:
    """(name, type, help, samples) of every metric; a sample is (suffix, labels, value)."""
    transfers = [({"direction": t.direction.value, "tier": t.tier}, t) for t in snapshot.transfers]
    pools = [({"pool": p.name}, p) for p in snapshot.pools]
    misses: list[_Sample] = [("", {"reason": r.value}, n) for r, n in snapshot.misses.items()]
    latencies: list[_Sample] = []
    for labels, t in transfers:
        latencies += [("_bucket", labels | {"le": f"{seconds:.6g}"}, below) for seconds, below in t.buckets]
        latencies += [("_bucket", labels | {"le": "+Inf"}, t.num_transfers)]
        latencies += [("_sum", labels, t.total_s), ("_count", labels, t.num_transfers)]
    counter, gauge = "counter", "gauge"
    return [
        ("looked_up_blocks_total", counter, "Blocks of prefixes looked up.", [("", {}, snapshot.looked_up_blocks)]),
        ("found_blocks_total", counter, "Those that could be loaded.", [("", {}, snapshot.found_blocks)]),
        ("looked_up_tokens_total", counter, "Tokens of prefixes looked up.", [("", {}, snapshot.looked_up_tokens)]),
        ("found_tokens_total", counter, "Those that could be loaded.", [("", {}, snapshot.found_tokens)]),
        ("hits_total", counter, "Blocks that loads asked for and got.", [("", {}, snapshot.hits)]),
        ("misses_total", counter, "Blocks that loads asked for and did not get, by reason.", misses),
        ("evicted_blocks_total", counter, "Blocks evicted.", [("", {}, snapshot.evicted_blocks)]),
        (
            "kept_as_is_blocks_total",
            counter,
            "Blocks that packing would have changed too much.",
            [("", {}, snapshot.kept_as_is_blocks)],
        ),
        ("transfer_blocks_total", counter, "Blocks moved.", [("", ls, t.blocks) for ls, t in transfers]),
        ("transfer_bytes_total", counter, "Bytes moved.", [("", ls, t.nbytes) for ls, t in transfers]),
        ("transfer_failures_total", counter, "Blocks lost.", [("", ls, t.failures) for ls, t in transfers]),
        ("transfer_latency_seconds", "histogram", "Latency of whole transfers.", latencies),
        *_tiering_metrics(snapshot.tiering),
        ("pool_capacity_bytes", gauge, "Size.", [("", ls, p.capacity_bytes) for ls, p in pools]),
        ("pool_allocated_bytes", gauge, "Bytes in use.", [("", ls, p.allocated_bytes) for ls, p in pools]),
        ("pool_largest_free_bytes", gauge, "Free run.", [("", ls, p.largest_free_bytes) for ls, p in pools]),
        ("pool_fragmentation", gauge, "0 is none.", [("", ls, p.fragmentation) for ls, p in pools]),
        ("pool_extents", gauge, "Extents in use.", [("", ls, p.num_extents) for ls, p in pools]),
        ("pool_pinned_bytes", gauge, "Page-locked bytes.", [("", ls, p.pinned_bytes) for ls, p in pools]),
    ]


def _tiering_metrics(figures: "TieringFigures | None") -> list[_Metric]:
    if figures is None:
        return []
    labels = {"tier": figures.tier}
    counters: dict[str, tuple[str, float]] = {
        "tier_written_blocks_total": ("Blocks written to a lower tier.", figures.written_blocks),
        "tier_failed_writes_total": ("Blocks that a lower tier did not take.", figures.failed_writes),
        "tier_fetched_blocks_total": ("Blocks brought back from a lower tier.", figures.fetched_blocks),
        "tier_shed_blocks_total": ("Blocks not written because too much waited.", figures.shed_blocks),
    }
    gauges: dict[str, tuple[str, float]] = {
        "tier_usable": ("1 if the tier could be opened.", int(figures.usable)),
        "tier_waiting_blocks": ("Blocks that wait to be written.", figures.waiting_blocks),
        "tier_arriving_blocks": ("Blocks on their way back.", figures.arriving_blocks),
        "tier_used_bytes": ("Bytes that the tier takes.", figures.used_bytes),
        "tier_capacity_bytes": ("Bytes that it may take.", figures.capacity_bytes),
    }
    causes: list[_Sample] = [("", labels | {"cause": cause}, n) for cause, n in figures.causes.items()]
    breakers = [(labels | {"calls": calls}, breaker) for calls, breaker in figures.breakers.items()]
    refusing: list[_Sample] = [("", ls, int(b.state != "closed")) for ls, b in breakers]
    opened: list[_Sample] = [("", ls, b.opened) for ls, b in breakers]
    return [
        *((name, "counter", text, [("", labels, value)]) for name, (text, value) in counters.items()),
        ("tier_causes_total", "counter", "What lay behind misses and refused writes.", causes),
        ("tier_breaker_opened_total", "counter", "Times that a tier was left alone because it hung or failed.", opened),
        ("tier_breaker_open", "gauge", "1 while a tier is left alone.", refusing),
        *((name, "gauge", text, [("", labels, value)]) for name, (text, value) in gauges.items()),
    ]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{key}="{value.translate(escaped)}"' for key, value in labels.items()) + "}"
