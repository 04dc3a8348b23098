"""The tier over S3 keeps the contract over real servers."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

import pytest

from kvortex.testing.tier_conformance import ROOMY_BYTES, TierConformance
from kvortex.tiers import S3Tier, Tier
from kvortex.tiers.s3.segment import StoredEntry
from tests.tiers.s3_support import Moto, Rclone, S3Server, keys_in_environment


class TestS3Tier(TierConformance):
    """Over moto; the tier evicts where the suite states a small capacity."""

    keeps_blocks_after_closing = True
    make_server: ClassVar[type[S3Server]] = Moto
    server: ClassVar[S3Server]
    states_roomy: ClassVar[bool] = False
    options: ClassVar[str] = ""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def running(cls) -> Iterator[None]:
        with keys_in_environment(), cls.make_server() as cls.server:
            yield

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        options = self.options
        if self.states_roomy or capacity_bytes != ROOMY_BYTES:
            options += f"&capacity_bytes={capacity_bytes}"
        return self.server.tier(
            options, prefix=hashlib.sha256(str(root).encode()).hexdigest()[:16], namespace=namespace
        )

    def places(self, tier: Tier) -> dict[bytes, tuple[str, StoredEntry]]:
        """What the objects say: key -> the name of an object, and what its footer says of the block."""
        mine = cast(S3Tier, tier)
        namespace = mine._catalogue._namespace
        footers = self.server.footers(mine._settings.prefix, namespace, sealed=self.seals)
        gone = {(each.segment.name, each.position) for footer in footers.values() for each in footer.removals}
        return {
            entry.key: (name, entry)
            for name, footer in footers.items()
            for position, entry in enumerate(footer.blocks)
            if (name.rpartition("/")[2], position) not in gone
        }

    def raw_keys(self, tier: Tier) -> set[bytes]:
        return set(self.places(tier))

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        name, entry = self.places(tier)[key]
        return self.server.get(name)[entry.offset : entry.end]

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        name, entry = self.places(tier)[key]
        whole = self.server.get(name)
        self.server.put(name, whole[: entry.offset] + data + whole[entry.end :])


class TestS3TierOverRclone(TestS3Tier):
    """The same over rclone, which checks signatures; the tier knows its capacity always."""

    make_server = Rclone
    states_roomy = True
