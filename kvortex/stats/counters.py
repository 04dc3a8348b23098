"""Counters while the engine runs.

`EngineStats` takes a lock for every change, so any thread may record and snapshot. The parts it is made of
(`LatencyHistogram`, `TransferStats`, `MissCounters`) take none: by themselves they are for a single writer.
Memory is fixed: it grows with the number of tiers and pools, never with time.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvortex.stats.figures import PoolFigures, TieringFigures, TransferSnapshot
from kvortex.stats.histogram import LatencyHistogram
from kvortex.stats.snapshot import StatsSnapshot
from kvortex.types import Direction, MissReason

PERCENTILES = (50, 90, 99)


@dataclass
class TransferStats:
    """Transfers in one direction to or from one tier. Not thread-safe.

    `blocks` and `nbytes` count blocks that arrived, `failures` those that did not. `latency` has one entry a transfer.
    """

    blocks: int = 0
    nbytes: int = 0
    failures: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    def record(self, *, blocks: int, nbytes: int, seconds: float, failures: int = 0) -> None:
        """Add one transfer."""
        self.latency.record(seconds)
        self.blocks += blocks
        self.nbytes += nbytes
        self.failures += failures


@dataclass
class MissCounters:
    """Hits, and misses by reason, of blocks that loads asked for. Not thread-safe."""

    hits: int = 0
    by_reason: dict[MissReason, int] = field(default_factory=lambda: dict.fromkeys(MissReason, 0))

    def record(self, outcomes: Iterable[MissReason | None]) -> None:
        """Add one outcome a block; `None` is a hit, as in `LoadResult.outcomes`."""
        outcomes = tuple(outcomes)
        hits = outcomes.count(None)
        self.hits += hits
        if hits < len(outcomes):
            for reason, count in Counter(outcomes).items():
                if reason is not None:
                    self.by_reason[reason] += count


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
        """Add a look-up of a prefix of `blocks` blocks; the first `found` of them could be loaded."""
        with self._lock:
            self._looked_up_blocks += blocks
            self._found_blocks += found

    def record_outcomes(self, outcomes: Iterable[MissReason | None]) -> None:
        """Add one outcome for each block that a load asked for; `None` is a hit."""
        outcomes = tuple(outcomes)  # a generator runs outside of the lock
        with self._lock:
            self._lookups.record(outcomes)

    def record_transfer(
        self, direction: Direction, tier: str, *, blocks: int, nbytes: int, seconds: float, failures: int = 0
    ) -> None:
        """Add one transfer.

        Args:
            direction: direction of the transfer.
            tier: name of the tier on the other side.
            blocks: blocks that arrived.
            nbytes: their bytes.
            seconds: duration of the transfer.
            failures: blocks that did not arrive.
        """
        with self._lock:
            stats = self._transfers.get((direction, tier))
            if stats is None:
                stats = self._transfers[direction, tier] = TransferStats()
            stats.record(blocks=blocks, nbytes=nbytes, seconds=seconds, failures=failures)

    def record_kept_as_is(self, blocks: int) -> None:
        """Add blocks that were stored raw, because packing would have changed them too much."""
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
        """All counters at one moment.

        Args:
            pools: figures of the pools, as the caller has read them.
            evicted_blocks: counter of the index.
            tiering: figures of the lower tier; None without one.
            block_size: tokens of a block; 0 if it is not known yet.
        """
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
