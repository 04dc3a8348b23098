"""Figures of one part of an engine at one moment: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvortex.types import Direction


@dataclass(frozen=True, slots=True)
class BreakerFigures:
    """A circuit breaker at one moment: its state ("closed", "open" or "half_open"), and how often it has opened."""

    state: str
    opened: int


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """One tier of several.

    Attributes:
        tier: its name.
        usable: False if it has failed to open, or is not open yet.
        hits: blocks that were read from it.
        num_blocks: blocks that it is known to have.
        used_bytes, capacity_bytes: bytes that it uses, and may use.
        breakers: its breakers of `reads` and `writes`.
    """

    tier: str
    usable: bool
    hits: int
    num_blocks: int
    used_bytes: int
    capacity_bytes: int
    breakers: Mapping[str, BreakerFigures]


@dataclass(frozen=True, slots=True)
class TieringFigures:
    """Transfers between the pool and a lower tier, in blocks.

    Attributes:
        tier: name of the tier.
        usable: False if the tier has failed to open, or is not open yet.
        written_blocks, failed_writes: blocks that the tier has stored, and has not.
        fetched_blocks: blocks that were read into the pool.
        shed_blocks: blocks that were not written because too many waited.
        demoted_blocks: blocks that were evicted and kept until they were written.
        waiting_blocks: blocks that wait to be written now.
        arriving_blocks: blocks that loads wait for now.
        used_bytes, capacity_bytes: bytes that the tier uses, and may use, for all processes that share it.
        causes: number of misses and refused writes of the tier, by cause.
        breakers: the breakers of `reads` and `writes`. While one is open the tier is not called, and nothing waits.
        links: the tiers one by one, if there are several.
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
    links: tuple[LinkFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Occupancy of one memory pool. `fragmentation` is 1 - largest free range / free bytes, 0.0 when full.

    `pinned_bytes` are page-locked; `leased_bytes` belong to blocks that leases keep from eviction. In a pool that
    engines share, `priority` is that of this engine's namespace; its blocks take `quota_used_bytes` of `quota_bytes`,
    both 0 without a quota.
    """

    name: str
    capacity_bytes: int
    allocated_bytes: int
    largest_free_bytes: int
    fragmentation: float
    num_extents: int
    pinned_bytes: int
    leased_bytes: int = 0
    priority: int = 0
    quota_bytes: int = 0
    quota_used_bytes: int = 0


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
    """(seconds, number of transfers that took less); the seconds are the same in every snapshot."""
