"""Lower tiers, which store blocks below the pool: one contract, and its implementations."""

from kvortex.tiers.base import (
    Cause,
    ReadOutcome,
    ReadRequest,
    ScanProgress,
    StoredBlock,
    Tier,
    TierStats,
    WriteOutcome,
    WriteRequest,
)
from kvortex.tiers.base_tier import BaseTier
from kvortex.tiers.disk import DiskTier, DiskTierConfig
from kvortex.tiers.indexed import IndexedTier
from kvortex.tiers.memory import MemoryTier
from kvortex.tiers.redis import RedisTier
from kvortex.tiers.s3 import S3Tier
from kvortex.tiers.sealing import Framing, framing_of
from kvortex.tiers.urls import TierUrl, tier_from_url

__all__ = [
    "BaseTier",
    "Cause",
    "DiskTier",
    "DiskTierConfig",
    "Framing",
    "IndexedTier",
    "MemoryTier",
    "ReadOutcome",
    "ReadRequest",
    "RedisTier",
    "S3Tier",
    "ScanProgress",
    "StoredBlock",
    "Tier",
    "TierStats",
    "TierUrl",
    "WriteOutcome",
    "WriteRequest",
    "framing_of",
    "tier_from_url",
]
