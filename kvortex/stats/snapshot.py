"""All counters of an engine at one moment, as text, as JSON and as metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvortex.stats.figures import LinkFigures, PoolFigures, TieringFigures, TransferSnapshot
from kvortex.stats.prometheus import Metric, Sample, prometheus_text
from kvortex.stats.table import pool_lines, tiering_lines, transfer_lines
from kvortex.types import Direction, MissReason


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """All counters since the engine was created, at one moment.

    `hits` and `misses` count blocks that loads asked for, `looked_up_blocks` and `found_blocks` those of prefixes that
    `match_prefix` was asked for. A block that moves to two tiers counts twice in the totals over tiers.
    """

    hits: int
    misses: Mapping[MissReason, int]
    evicted_blocks: int
    kept_as_is_blocks: int
    transfers: tuple[TransferSnapshot, ...]
    pools: tuple[PoolFigures, ...]
    tiering: TieringFigures | None = None
    looked_up_blocks: int = 0
    found_blocks: int = 0
    block_size: int = 0
    """Tokens of a block; 0 before caches are registered."""

    @property
    def looked_up_tokens(self) -> int:
        return self.looked_up_blocks * self.block_size

    @property
    def found_tokens(self) -> int:
        return self.found_blocks * self.block_size

    @property
    def num_misses(self) -> int:
        return sum(self.misses.values())

    @property
    def hit_rate(self) -> float:
        """Found blocks over looked-up blocks; without look-ups `load_hit_rate`.

        A caller that looks a prefix up, and loads what was found, has only hits in its loads.
        """
        return self.found_blocks / self.looked_up_blocks if self.looked_up_blocks else self.load_hit_rate

    @property
    def load_hit_rate(self) -> float:
        """Hits over the blocks that loads asked for; 0.0 before the first load."""
        loads = self.hits + self.num_misses
        return self.hits / loads if loads else 0.0

    @property
    def blocks_saved(self) -> int:
        return sum(t.blocks for t in self._going(Direction.SAVE))

    @property
    def bytes_saved(self) -> int:
        return sum(t.nbytes for t in self._going(Direction.SAVE))

    @property
    def blocks_loaded(self) -> int:
        return sum(t.blocks for t in self._going(Direction.LOAD))

    @property
    def bytes_loaded(self) -> int:
        return sum(t.nbytes for t in self._going(Direction.LOAD))

    def _going(self, direction: Direction) -> list[TransferSnapshot]:
        return [t for t in self.transfers if t.direction is direction]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain dicts, lists, strings and numbers, ready for JSON."""
        return {
            "hit_rate": self.hit_rate,
            "load_hit_rate": self.load_hit_rate,
            "looked_up_blocks": self.looked_up_blocks,
            "found_blocks": self.found_blocks,
            "looked_up_tokens": self.looked_up_tokens,
            "found_tokens": self.found_tokens,
            "hits": self.hits,
            "misses": {reason.value: count for reason, count in self.misses.items()},
            "blocks_saved": self.blocks_saved,
            "bytes_saved": self.bytes_saved,
            "blocks_loaded": self.blocks_loaded,
            "bytes_loaded": self.bytes_loaded,
            "evicted_blocks": self.evicted_blocks,
            "kept_as_is_blocks": self.kept_as_is_blocks,
            "transfers": [asdict(t) | {"direction": t.direction.value} for t in self.transfers],
            "pools": [asdict(pool) for pool in self.pools],
            "tiering": asdict(self.tiering) if self.tiering is not None else None,
        }

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason.value} {count}" for reason, count in self.misses.items() if count)
        lines = [
            *self._lookup_lines(),
            f"hit rate {self.load_hit_rate:.1%}: {self.hits} hits, {self.num_misses} misses"
            + (f" ({reasons})" if reasons else ""),
            f"evicted {self.evicted_blocks} blocks"
            + (f", kept {self.kept_as_is_blocks} as they are" if self.kept_as_is_blocks else ""),
        ]
        lines += transfer_lines(self.transfers) + pool_lines(self.pools)
        if self.tiering is not None:
            lines += tiering_lines(self.tiering)
        return "\n".join(lines)

    def _lookup_lines(self) -> list[str]:
        if not self.looked_up_blocks:
            return []
        return [
            f"looked up {self.looked_up_blocks} blocks, found {self.found_blocks} ({self.hit_rate:.1%}, "
            f"{self.found_tokens} of {self.looked_up_tokens} tokens); of what was loaded:"
        ]

    def to_prometheus(self, prefix: str = "kvortex") -> str:
        """The text exposition format of Prometheus, version 0.0.4; latencies are histograms over the engine's life.

        Raises:
            ValueError: `prefix` cannot start a metric name.
        """
        return prometheus_text(metrics_of(self), prefix)


def metrics_of(snapshot: StatsSnapshot) -> list[Metric]:
    """(name, type, help, samples) of every metric; a sample is (suffix, labels, value)."""
    transfers = [({"direction": t.direction.value, "tier": t.tier}, t) for t in snapshot.transfers]
    pools = [({"pool": p.name}, p) for p in snapshot.pools]
    misses: list[Sample] = [("", {"reason": r.value}, n) for r, n in snapshot.misses.items()]
    latencies: list[Sample] = []
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
        ("pool_leased_bytes", gauge, "Bytes kept by leases.", [("", ls, p.leased_bytes) for ls, p in pools]),
        *_quota_metrics([(ls, p) for ls, p in pools if p.quota_bytes]),
    ]


def _quota_metrics(pools: Sequence[tuple[dict[str, str], PoolFigures]]) -> list[Metric]:
    """Those of a namespace with a quota; none without one."""
    if not pools:
        return []
    used: list[Sample] = [("", ls, p.quota_used_bytes) for ls, p in pools]
    quotas: list[Sample] = [("", ls, p.quota_bytes) for ls, p in pools]
    return [
        ("pool_quota_bytes", "gauge", "Bytes that this namespace may take.", quotas),
        ("pool_quota_used_bytes", "gauge", "Bytes that this namespace takes.", used),
    ]


def _link_metrics(links: Sequence[tuple[dict[str, str], LinkFigures]]) -> list[Metric]:
    """Those of the tiers of a chain, with a label `link` that has place and name; none where there is one tier."""
    if not links:
        return []
    return [
        (
            "tier_link_hits_total",
            "counter",
            "Blocks read from one of the tiers.",
            [("", ls, x.hits) for ls, x in links],
        ),
        ("tier_link_usable", "gauge", "1 if the tier is open.", [("", ls, int(x.usable)) for ls, x in links]),
        ("tier_link_blocks", "gauge", "Blocks that it is known to have.", [("", ls, x.num_blocks) for ls, x in links]),
        ("tier_link_used_bytes", "gauge", "Bytes that it uses.", [("", ls, x.used_bytes) for ls, x in links]),
        (
            "tier_link_capacity_bytes",
            "gauge",
            "Bytes that it may use.",
            [("", ls, x.capacity_bytes) for ls, x in links],
        ),
    ]


def _tiering_metrics(figures: TieringFigures | None) -> list[Metric]:
    if figures is None:
        return []
    labels = {"tier": figures.tier}
    counters: dict[str, tuple[str, float]] = {
        "tier_written_blocks_total": ("Blocks written to a lower tier.", figures.written_blocks),
        "tier_failed_writes_total": ("Blocks that a lower tier did not store.", figures.failed_writes),
        "tier_fetched_blocks_total": ("Blocks brought back from a lower tier.", figures.fetched_blocks),
        "tier_shed_blocks_total": ("Blocks not written because too many waited.", figures.shed_blocks),
    }
    gauges: dict[str, tuple[str, float]] = {
        "tier_usable": ("1 if the tier is open.", int(figures.usable)),
        "tier_waiting_blocks": ("Blocks that wait to be written.", figures.waiting_blocks),
        "tier_arriving_blocks": ("Blocks that loads wait for.", figures.arriving_blocks),
        "tier_used_bytes": ("Bytes that the tier uses.", figures.used_bytes),
        "tier_capacity_bytes": ("Bytes that the tier may use.", figures.capacity_bytes),
    }
    causes: list[Sample] = [("", labels | {"cause": cause}, n) for cause, n in figures.causes.items()]
    breakers = [(labels | {"calls": calls}, breaker) for calls, breaker in figures.breakers.items()]
    links = [({"tier": figures.tier, "link": f"{n} {link.tier}"}, link) for n, link in enumerate(figures.links, 1)]
    breakers += [(ls | {"calls": calls}, breaker) for ls, link in links for calls, breaker in link.breakers.items()]
    refusing: list[Sample] = [("", ls, int(b.state != "closed")) for ls, b in breakers]
    opened: list[Sample] = [("", ls, b.opened) for ls, b in breakers]
    return [
        *((name, "counter", text, [("", labels, value)]) for name, (text, value) in counters.items()),
        ("tier_causes_total", "counter", "Misses and refused writes of a tier, by cause.", causes),
        ("tier_breaker_opened_total", "counter", "Times that the use of a tier was paused.", opened),
        ("tier_breaker_open", "gauge", "1 while the use of a tier is paused.", refusing),
        *((name, "gauge", text, [("", labels, value)]) for name, (text, value) in gauges.items()),
        *_link_metrics(links),
    ]
