"""Figures of one part of an engine at one moment: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvortex.types import Direction


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
