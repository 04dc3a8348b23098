"""The tier in ordinary memory keeps the contract."""

from pathlib import Path
from typing import cast

import numpy as np

from kvortex.testing.tier_conformance import TierConformance
from kvortex.tiers import MemoryTier, Tier


class TestMemoryTier(TierConformance):
    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        return MemoryTier(capacity_bytes, namespace=namespace)

    def raw_keys(self, tier: Tier) -> set[bytes]:
        return set(cast(MemoryTier, tier)._kept)

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        return cast(MemoryTier, tier)._kept[key].payload.tobytes()

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        cast(MemoryTier, tier)._kept[key].payload = np.frombuffer(data, dtype=np.uint8)
