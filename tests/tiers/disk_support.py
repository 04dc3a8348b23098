"""Disk tiers for tests, and direct access to their files."""

from pathlib import Path
from typing import Any

from kvortex.testing.tier_conformance import NAMESPACE, ROOMY_BYTES, is_right, read_request
from kvortex.tiers import DiskTier, DiskTierConfig, ReadOutcome
from kvortex.tiers.disk.layout import DiskLayout
from kvortex.tiers.disk.os_calls import OsCalls


def disk_tier(root: Path, *, calls: OsCalls | None = None, namespace: bytes = NAMESPACE, **settings: Any) -> DiskTier:
    """A tier, not opened, in `root`."""
    config = DiskTierConfig(**{"path": root, "capacity_bytes": ROOMY_BYTES, **settings})
    return DiskTier(config, namespace=namespace, calls=calls)


def file_of(root: Path, key: bytes, namespace: bytes = NAMESPACE) -> Path:
    """Where the block's file lies."""
    return Path(DiskLayout(root, namespace).path(key))


def temp_files(root: Path) -> list[Path]:
    """Every temporary file, of whatever writer."""
    return list((root / "tmp").rglob("*.tmp"))


async def read_one(tier: DiskTier, number: int, **arguments: Any) -> ReadOutcome:
    """Read a test block; its bytes are right if it is a hit."""
    request = read_request(number)
    (outcome,) = await tier.read([request], **arguments)
    assert outcome.reason is not None or is_right(request, outcome)
    return outcome
