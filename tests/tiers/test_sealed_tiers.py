"""Tiers that seal keep the contract: over Redis, over S3, over files, and over a store of objects."""

from pathlib import Path
from typing import ClassVar

import pytest

from kvortex.tiers import DiskTier, DiskTierConfig, Tier
from tests.tiers import test_base_tier, test_disk_tier, test_redis_tier, test_s3_tier
from tests.tiers.object_support import DictTier
from tests.tiers.seal_support import write_keys


class WithKeys:
    """A file with a key, for all tests of a class."""

    seals = True
    keys: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def with_keys(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.keys = write_keys(tmp_path_factory.mktemp("keys") / "seal.keys", "new", "old")


class TestSealedRedisTier(WithKeys, test_redis_tier.TestRedisTier):
    def url(self) -> str:
        return self.server.url(f"&seal_keys={self.keys}")


class TestSealedS3Tier(WithKeys, test_s3_tier.TestS3Tier):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def with_option(cls, with_keys: None) -> None:
        cls.options = f"&seal_keys={cls.keys}"


class TestSealedBaseTier(WithKeys, test_base_tier.TestBaseTier):
    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        store = test_base_tier.STORES.setdefault(root, {})
        return DictTier(store, namespace=namespace, capacity_bytes=capacity_bytes, seal_keys=str(self.keys))


class TestSealedDiskTier(WithKeys, test_disk_tier.TestDiskTier):
    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        config = DiskTierConfig(path=root / "tier", capacity_bytes=capacity_bytes, seal_keys=self.keys)
        return DiskTier(config, namespace=namespace)
