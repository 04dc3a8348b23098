"""Counters while the engine runs, frozen snapshots to look at, and their Prometheus text.

`EngineStats` takes a lock for every change, so any thread may record and snapshot. The parts it is made of
(`LatencyHistogram`, `TransferStats`, `MissCounters`) take none: by themselves they are for a single writer.
Memory is fixed: it grows with the number of tiers and pools, never with time.
"""

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from kvortex.config import format_bytes
from kvortex.exposition import prometheus_text
from kvortex.types import Direction, MissReason

PERCENTILES = (50, 90, 99)

_TRANSFER_HEAD = ("transfer", "tier", "blocks", "bytes", "failed", "p50 ms", "p90 ms", "p99 ms")
_POOL_HEAD = ("pool", "capacity", "allocated", "largest free", "fragmented", "extents", "pinned")


class LatencyHistogram:
    """Latencies in log-spaced buckets from 1 us to about 1,074 s, eight to an octave: 242 integers.

    A percentile is the geometric middle of its bucket and so at most 4.5% off, for latencies in that range.
    Shorter and longer ones count too, but share one bucket at either end; results never leave the range of
    what was recorded. Not thread-safe.
    """

    LOWEST_S = 1e-6
    BUCKETS_PER_OCTAVE = 8
    OCTAVES = 30

    def __init__(self) -> None:
        self._counts = [0] * (self.BUCKETS_PER_OCTAVE * self.OCTAVES + 2)
        self._count = 0
        self._sum_s = 0.0
        self._min_s = math.inf
        self._max_s = 0.0

    @property
    def count(self) -> int:
        """Latencies recorded."""
        return self._count

    @property
    def sum(self) -> float:
        """Their sum, in seconds; exact."""
        return self._sum_s

    def record(self, seconds: float) -> None:
        """Adds one latency; `ValueError` unless it is finite and not negative."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a latency of {seconds} s; pass finite seconds, zero or more")
        self._counts[self._bucket_of(seconds)] += 1
        self._count += 1
        self._sum_s += seconds
        self._min_s = min(self._min_s, seconds)
        self._max_s = max(self._max_s, seconds)

    def cumulative(self) -> tuple[tuple[float, int], ...]:
        """(seconds, number of latencies below them), four times as many seconds a step: the same for every histogram,
        so that those of several engines can be added."""
        sums = list(accumulate(self._counts))
        octaves = range(self.OCTAVES % 4, self.OCTAVES + 1, 2)
        return tuple((self.LOWEST_S * 2**n, sums[n * self.BUCKETS_PER_OCTAVE]) for n in octaves)

    def percentile(self, p: float) -> float:
        """Seconds that `p` percent (0 to 100) of the latencies do not exceed; 0.0 when empty.

        By nearest rank. `ValueError` for another `p`.
        """
        if not 0 <= p <= 100:
            raise ValueError(f"percentile {p}; pass 0 to 100")
        if self._count == 0:
            return 0.0
        rank = max(1, math.ceil(p / 100 * self._count))
        bucket = bisect_left(list(accumulate(self._counts)), rank)
        return min(max(self._middle_of(bucket), self._min_s), self._max_s)

    def merge(self, other: "LatencyHistogram") -> None:
        """Adds everything that `other` has recorded."""
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self._count += other._count
        self._sum_s += other._sum_s
        self._min_s = min(self._min_s, other._min_s)
        self._max_s = max(self._max_s, other._max_s)

    def _bucket_of(self, seconds: float) -> int:
        """0 holds what is below LOWEST_S, the last what is above the range."""
        if seconds < self.LOWEST_S:
            return 0
        step = math.floor(math.log2(seconds / self.LOWEST_S) * self.BUCKETS_PER_OCTAVE)
        return min(step + 1, len(self._counts) - 1)

    def _middle_of(self, bucket: int) -> float:
        if bucket == 0:
            return 0.0
        if bucket == len(self._counts) - 1:
            return math.inf
        middle: float = 2 ** ((bucket - 0.5) / self.BUCKETS_PER_OCTAVE)
        return self.LOWEST_S * middle


@dataclass
class TransferStats:
    """What moved in one direction to or from one tier. Not thread-safe.

    `blocks` and `nbytes` count what arrived, `failures` blocks that did not; `latency` counts transfers.
    """

    blocks: int = 0
    nbytes: int = 0
    failures: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    def record(self, *, blocks: int, nbytes: int, seconds: float, failures: int = 0) -> None:
        """Adds one transfer."""
        self.latency.record(seconds)
        self.blocks += blocks
        self.nbytes += nbytes
        self.failures += failures


@dataclass
class MissCounters:
    """Looked-up blocks: served, or missed and why. Not thread-safe."""

    hits: int = 0
    by_reason: dict[MissReason, int] = field(default_factory=lambda: dict.fromkeys(MissReason, 0))

    def record(self, outcomes: Iterable[MissReason | None]) -> None:
        """Adds one outcome a block; `None` is a hit, as in `LoadResult.outcomes`."""
        outcomes = tuple(outcomes)
        hits = outcomes.count(None)
        self.hits += hits
        if hits < len(outcomes):
            for reason, count in Counter(outcomes).items():
                if reason is not None:
                    self.by_reason[reason] += count


@dataclass(frozen=True, slots=True)
class BreakerFigures:
    """A circuit breaker at one moment: "closed", "open" or "half_open", and how often it has been opened."""

    state: str
    opened: int


@dataclass(frozen=True, slots=True)
class TieringFigures:
    """What moved between the pool and a lower tier, in blocks.

    `shed_blocks` were not written because too much waited already; `usable` is False for a tier that did not open.
    `causes` counts what lay behind every miss and refused write of the tier; the bytes are its own, of all processes.
    `breakers` are those of `reads` and `writes`: while one is open the tier is not asked, and nothing waits for it.
    """

    tier: str
    usable: bool
    written_blocks: int
    failed_writes: int
    fetched_blocks: int
    shed_blocks: int
    demoted_blocks: int
    waiting_blocks: int
    arriving_blocks: int
    used_bytes: int
    capacity_bytes: int
    causes: Mapping[str, int]
    breakers: Mapping[str, BreakerFigures]


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Occupancy of one memory pool. `fragmentation` is 1 - largest free range / free bytes, 0.0 when full."""

    name: str
    capacity_bytes: int
    allocated_bytes: int
    largest_free_bytes: int
    fragmentation: float
    num_extents: int
    pinned_bytes: int


@dataclass(frozen=True, slots=True)
class TransferSnapshot:
    """`TransferStats` at one moment; latencies in seconds, of whole transfers."""

    direction: Direction
    tier: str
    blocks: int
    nbytes: int
    failures: int
    num_transfers: int
    total_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    buckets: tuple[tuple[float, int], ...] = ()
    """(seconds, number of transfers that took less), for seconds that are the same everywhere."""


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """Everything counted since the engine was made, at one moment.

    `hits` and `misses` are of blocks that a load asked for, `looked_up_blocks` and `found_blocks` of prefixes that
    `match_prefix` was asked for. A block that goes to two tiers counts in both, and so twice in the totals over tiers.
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
    """In tokens; 0 before caches are registered."""

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
        """Of look-ups, found blocks over all that were asked for; of loads where none was made; 0.0 before both.

        Who looks a prefix up and loads what was found has hits alone in its loads.
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
        """The same figures as plain dicts, lists, strings and numbers: ready for JSON."""
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
        if self.transfers:
            lines += _aligned([_TRANSFER_HEAD, *(_transfer_row(t) for t in self.transfers)], num_left=2)
        if self.pools:
            lines += _aligned([_POOL_HEAD, *(_pool_row(p) for p in self.pools)], num_left=1)
        if (t := self.tiering) is not None:
            state = "" if t.usable else " (cannot be used)"
            lines.append(
                f"{t.tier}{state}: {t.written_blocks} written, {t.failed_writes} refused, {t.fetched_blocks} fetched, "
                f"{t.shed_blocks} shed, {t.waiting_blocks} waiting, {format_bytes(t.used_bytes)} of "
                f"{format_bytes(t.capacity_bytes)}"
                + "".join(f", {count} {cause}" for cause, count in t.causes.items() if count)
                + "".join(
                    f", {what} are {b.state}, {b.opened} times so far" for what, b in t.breakers.items() if b.opened
                )
            )
        return "\n".join(lines)

    def _lookup_lines(self) -> list[str]:
        if not self.looked_up_blocks:
            return []
        return [
            f"looked up {self.looked_up_blocks} blocks, found {self.found_blocks} ({self.hit_rate:.1%}, "
            f"{self.found_tokens} of {self.looked_up_tokens} tokens); of what was loaded:"
        ]

    def to_prometheus(self, prefix: str = "kvortex") -> str:
        """The text exposition format, version 0.0.4; latencies are histograms over the engine's life.

        Raises `ValueError` when `prefix` cannot start a metric name.
        """
        return prometheus_text(self, prefix)


class EngineStats:
    """The live counters of one engine. Thread-safe: each call holds the lock for a few additions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookups = MissCounters()
        self._transfers: dict[tuple[Direction, str], TransferStats] = {}
        self._kept_as_is = 0
        self._looked_up_blocks = 0
        self._found_blocks = 0

    def record_lookup(self, blocks: int, found: int) -> None:
        """Adds a look-up of a prefix of `blocks` blocks, of which the first `found` could be loaded."""
        with self._lock:
            self._looked_up_blocks += blocks
            self._found_blocks += found

    def record_outcomes(self, outcomes: Iterable[MissReason | None]) -> None:
        """Adds one outcome a looked-up block; `None` is a hit."""
        outcomes = tuple(outcomes)  # a generator's own work stays outside of the lock
        with self._lock:
            self._lookups.record(outcomes)

    def record_transfer(
        self, direction: Direction, tier: str, *, blocks: int, nbytes: int, seconds: float, failures: int = 0
    ) -> None:
        """Adds one transfer of `blocks` blocks, `nbytes` bytes; `failures` blocks of it did not arrive."""
        with self._lock:
            stats = self._transfers.get((direction, tier))
            if stats is None:
                stats = self._transfers[direction, tier] = TransferStats()
            stats.record(blocks=blocks, nbytes=nbytes, seconds=seconds, failures=failures)

    def record_kept_as_is(self, blocks: int) -> None:
        """Adds blocks that packing would have changed too much."""
        with self._lock:
            self._kept_as_is += blocks

    def snapshot(
        self,
        pools: Iterable[PoolFigures] = (),
        *,
        evicted_blocks: int = 0,
        tiering: TieringFigures | None = None,
        block_size: int = 0,
    ) -> StatsSnapshot:
        """All counters at one moment, and what the pools and the index count, as the caller read it."""
        figures = tuple(pools)
        with self._lock:
            return StatsSnapshot(
                hits=self._lookups.hits,
                misses=dict(self._lookups.by_reason),
                evicted_blocks=evicted_blocks,
                kept_as_is_blocks=self._kept_as_is,
                transfers=tuple(_snapshot_transfer(*key, stats) for key, stats in self._transfers.items()),
                pools=figures,
                tiering=tiering,
                looked_up_blocks=self._looked_up_blocks,
                found_blocks=self._found_blocks,
                block_size=block_size,
            )


def _snapshot_transfer(direction: Direction, tier: str, stats: TransferStats) -> TransferSnapshot:
    p50_s, p90_s, p99_s = (stats.latency.percentile(p) for p in PERCENTILES)
    return TransferSnapshot(
        direction=direction,
        tier=tier,
        blocks=stats.blocks,
        nbytes=stats.nbytes,
        failures=stats.failures,
        num_transfers=stats.latency.count,
        total_s=stats.latency.sum,
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        buckets=stats.latency.cumulative(),
    )


def _transfer_row(t: TransferSnapshot) -> tuple[str, ...]:
    latencies = (f"{seconds * 1e3:.3f}" for seconds in (t.p50_s, t.p90_s, t.p99_s))
    return (t.direction.value, t.tier, str(t.blocks), format_bytes(t.nbytes), str(t.failures), *latencies)


def _pool_row(p: PoolFigures) -> tuple[str, ...]:
    sizes = (format_bytes(n) for n in (p.capacity_bytes, p.allocated_bytes, p.largest_free_bytes))
    return (p.name, *sizes, f"{p.fragmentation:.1%}", str(p.num_extents), format_bytes(p.pinned_bytes))


def _aligned(rows: list[tuple[str, ...]], num_left: int) -> list[str]:
    """Rows with their columns lined up: the first `num_left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
