"""Counters of an engine, snapshots of them, and their text for people and for Prometheus.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.stats.counters import EngineStats, MissCounters, TransferStats
from kvortex.stats.figures import BreakerFigures, LinkFigures, PoolFigures, TieringFigures, TransferSnapshot
from kvortex.stats.histogram import LatencyHistogram
from kvortex.stats.snapshot import StatsSnapshot

__all__ = [
    "BreakerFigures",
    "EngineStats",
    "LatencyHistogram",
    "LinkFigures",
    "MissCounters",
    "PoolFigures",
    "StatsSnapshot",
    "TieringFigures",
    "TransferSnapshot",
    "TransferStats",
]
