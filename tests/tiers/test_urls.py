"""Tiers by URL: the disk's, and those that other packages add."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kvortex import KVortexConfig, KVortexEngine
from kvortex.config import GIB
from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NAMESPACE
from kvortex.tiers import DiskTier, MemoryTier, TierUrl, tier_from_url
from tests.engine_support import BLOCK_SIZE, chain, contents, make_cache, small_config

MODULE = """
from kvortex.tiers import MemoryTier

def make_tier(url, namespace):
    tier = MemoryTier(url.values({"capacity_bytes": int, "fast": bool})["capacity_bytes"], namespace=namespace)
    tier.url = url
    return tier
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with two tiers, one of which cannot be imported."""
    (tmp_path / "other_tiers.py").write_text(MODULE)
    metadata = tmp_path / "other_tiers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-tiers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[kvortex.tiers]\nkeptelsewhere = other_tiers:make_tier\nbroken = no_such_module:make_tier\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("other_tiers", None)


def config_of(tier: Any) -> Any:
    assert isinstance(tier, DiskTier)
    return tier._config


def test_a_disk_with_options() -> None:
    url = "disk:///var/cache/a%20b?capacity_bytes=500GiB&fsync=1&direct=none&rescan_interval_s=10&read_threads=3"
    config = config_of(tier_from_url(url, NAMESPACE))
    assert (config.path, config.capacity_bytes, config.fsync) == ("/var/cache/a b", 500 * GIB, True)
    assert (config.direct, config.rescan_interval_s, config.read_threads) == (None, 10.0, 3)
    assert config_of(tier_from_url("disk:here", NAMESPACE)).path == "here"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/var/cache/kvortex", "is no URL of a tier; write it as disk:///"),
        ("disk:///a#b", "is no URL of a tier"),
        ("disk://[a", "is no URL of a tier: "),
        ("disk:///a?b", "is no URL of a tier: "),
        ("disk://var/cache", "three slashes: disk:///var/cache"),
        ("disk:///a?capacity=1GiB", "unknown option 'capacity'; disk: knows capacity_bytes, "),
        ("disk:///a?fsync=1&fsync=0", "gives fsync twice"),
        ("disk:///a?fsync=maybe", r"disk\.fsync = 'maybe': write 1 or 0"),
        ("disk:///a?capacity_bytes=lots", "'lots' is no size"),
        ("disk:///a?path=/b", "unknown option 'path'"),
        ("disk:", "must name a directory"),
        ("disks:///a", "did you mean disk:"),
        ("s4://bucket", "is its package installed"),
        ("broken://", "cannot be imported: No module named 'no_such_module'"),
        ("keptelsewhere:?slow=1", "unknown option 'slow'"),
    ],
)
def test_what_is_wrong_is_told(other_package: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tier_from_url(url, NAMESPACE)


def test_another_package_adds_a_tier(other_package: Path) -> None:
    tier: Any = tier_from_url("keptelsewhere://me@there:99/a/b?capacity_bytes=1MiB&fast=yes", NAMESPACE)
    assert isinstance(tier, MemoryTier)
    assert (tier.capacity_bytes, tier.namespace) == (1 << 20, NAMESPACE)
    options = {"capacity_bytes": "1MiB", "fast": "yes"}
    text = "keptelsewhere://me@there:99/a/b?capacity_bytes=1MiB&fast=yes"
    assert tier.url == TierUrl(text, "keptelsewhere", "me@there:99", "/a/b", options)
    assert tier.url.values({"capacity_bytes": int, "fast": bool}) == {"capacity_bytes": 1 << 20, "fast": True}


def test_one_way_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"as tier\.urls \(disk:///a\) or as disk\.path \(/b\), not both"):
        KVortexConfig(tier="disk:///a", disk="/b")
    assert KVortexConfig(tier="disk:///a").lower_tier == "disk:///a"
    assert KVortexConfig(disk="/b").lower_tier == "/b"
    assert KVortexConfig().lower_tier == ""
    assert KVortexConfig.from_env({"KVORTEX_TIER": "disk:///a", "KVORTEX_TIER_TIMEOUT_S": "3"}).tier.timeout_s == 3


async def test_an_engine_over_a_url(tmp_path: Path) -> None:
    cache, hashes = make_cache(), chain(8)
    config = small_config(tier=f"disk://{tmp_path}?capacity_bytes=1GiB", identity={"model": "a"})
    for _ in range(2):
        async with KVortexEngine.create(config) as engine:
            engine.register_kv_caches(cache, BLOCK_SIZE)
            assert await engine.wait_tier()
            await engine.save_blocks(hashes, range(8))
            await engine.flush()
            assert engine.get_stats().tiering.capacity_bytes == GIB
            assert (await engine.load_blocks(hashes, range(8, 16))).ok
    assert engine.get_stats().tiering.fetched_blocks == 0
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert (await engine.load_blocks(hashes, range(16, 24))).ok
        assert engine.get_stats().tiering.fetched_blocks == 8
    assert contents(cache, range(8)) == contents(cache, range(16, 24))
