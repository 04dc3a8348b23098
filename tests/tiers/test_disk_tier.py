"""The disk tier keeps the contract, with direct and with buffered I/O."""

from pathlib import Path
from typing import ClassVar, cast

from kvortex.testing.tier_conformance import TierConformance
from kvortex.tiers import DiskTier, DiskTierConfig, Tier
from kvortex.tiers.disk.layout import DiskLayout


class TestDiskTier(TierConformance):
    keeps_blocks_after_closing = True
    direct: ClassVar[bool | None] = None

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        config = DiskTierConfig(path=root / "tier", capacity_bytes=capacity_bytes, direct=self.direct)
        return DiskTier(config, namespace=namespace)

    def raw_keys(self, tier: Tier) -> set[bytes]:
        layout = layout_of(tier)
        return {bytes.fromhex(path.stem) for path in Path(layout.blocks, layout.namespace_name).rglob("*.kv1")}

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        return Path(layout_of(tier).path(key)).read_bytes()

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        Path(layout_of(tier).path(key)).write_bytes(data)


class TestBufferedDiskTier(TestDiskTier):
    direct = False


def layout_of(tier: Tier) -> DiskLayout:
    return cast(DiskTier, tier)._layout
