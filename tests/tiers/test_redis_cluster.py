"""The tier over a cluster of three servers: it keeps the contract, follows names that move, and outlives a node."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

import pytest

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NBYTES, TierConformance, key_of, write_request
from kvortex.tiers import Cause, RedisTier, Tier
from kvortex.types import SaveOutcome
from tests.tiers.redis_support import RedisCluster, read_one, tier_over, write_one

PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def running() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running: RedisCluster) -> RedisCluster:
    """The servers, empty: a slot of theirs can only be moved if no other test has left a block in it."""
    running.clear()
    return running


def name_of(tier: Tier, key: bytes) -> bytes:
    return cast(RedisTier, tier)._blocks.name_of(key)


class TestRedisCluster(TierConformance):
    keeps_blocks_after_closing = True
    cluster: ClassVar[RedisCluster]

    @pytest.fixture(autouse=True)
    @classmethod
    def over_cluster(cls, cluster: RedisCluster) -> None:
        cls.cluster = cluster

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        prefix = hashlib.sha256(str(root).encode()).hexdigest()[:16]
        return tier_over(self.cluster.url(f"&prefix={prefix}:&capacity_bytes={capacity_bytes}"), namespace)

    def raw_keys(self, tier: Tier) -> set[bytes]:
        names = {name for node in self.cluster.nodes for name in node.ask("KEYS", "*")}
        return {bytes.fromhex(name[-64:].decode()) for name in names if name == name_of(tier, _key_in(name))}

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        name = name_of(tier, key)
        return cast(bytes, self.cluster.node_of(name).ask("GET", name))

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        name = name_of(tier, key)
        self.cluster.node_of(name).ask("SET", name, data)


def _key_in(name: bytes) -> bytes:
    return bytes.fromhex(name[-64:].decode())


async def test_blocks_are_spread_over_all_servers(cluster: RedisCluster) -> None:
    async with tier_over(cluster.url("&prefix=spread:")) as tier:
        await tier.write([write_request(n) for n in range(60)])
        on_each = [sum(name.startswith(b"spread:") for name in node.ask("KEYS", "*")) for node in cluster.nodes]
        assert sum(on_each) == 60
        assert min(on_each) > 0
        assert await tier.find([key_of(n) for n in range(61)]) == [NBYTES] * 60 + [0]
        assert await tier.delete([key_of(n) for n in range(61)]) == [True] * 60 + [False]


async def test_a_name_that_has_moved_is_followed(cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.redis.servers.TABLE_S", 0.0)
    async with tier_over(cluster.url("&prefix=moved:")) as tier:
        for number, use in enumerate(["write", "find", "read"]):
            name = name_of(tier, key_of(number))
            source = cluster.node_of(name)
            target = cluster.nodes[cluster.nodes.index(source) - 1]
            assert await tier.find([key_of(number)]) == [0]
            cluster.move(name, target)
            if use == "write":
                assert (await write_one(tier, number)).outcome is SaveOutcome.STORED
            else:
                async with tier_over(cluster.url("&prefix=moved:")) as other:
                    await write_one(other, number)
                if use == "find":
                    assert await tier.find([key_of(number), key_of(99)]) == [NBYTES, 0]
            assert (await read_one(tier, number)).reason is None
            assert target.ask("EXISTS", name) == 1
        assert tier.stats().causes[Cause.IO_ERROR] == 0


async def test_a_server_that_stands_still_costs_its_own_blocks_only(cluster: RedisCluster) -> None:
    url = cluster.url("&prefix=still:&connections=16").replace("timeout_s=20", "timeout_s=0.5")
    async with tier_over(url) as tier:
        async with asyncio.timeout(PATIENCE_S):
            for number in range(16):
                while (await write_one(tier, number)).outcome not in (SaveOutcome.STORED, SaveOutcome.ALREADY_STORED):
                    await asyncio.sleep(0.01)
        still = cluster.nodes[1]
        there = [cluster.node_of(name_of(tier, key_of(n))) is not still for n in range(16)]
        assert 0 < sum(there) < 16
        still.stop()
        try:
            found = await tier.find([key_of(n) for n in range(16)])
            assert [bool(size) for size in found] == there
            for number in range(16):
                outcome = await read_one(tier, number)
                assert (outcome.reason is None) == there[number]
        finally:
            still.go_on()
        async with asyncio.timeout(PATIENCE_S):
            while not all(await tier.find([key_of(n) for n in range(16)])):
                await asyncio.sleep(0.01)


async def test_a_cluster_that_is_not_there_is_a_miss(cluster: RedisCluster) -> None:
    async with tier_over("redis+cluster://127.0.0.1:1,127.0.0.1:2") as tier:
        assert (await read_one(tier, 0)).cause is Cause.IO_ERROR
        assert (await write_one(tier, 0)).outcome is SaveOutcome.FAILED
        assert await tier.find([key_of(0)]) == [0]
    async with tier_over(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.ports[2]}?prefix=seed:") as tier:
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED


async def test_a_cluster_that_refuses_this_client_is_told(cluster: RedisCluster) -> None:
    with pytest.raises(ConfigError, match="refuses: WRONGPASS"):
        await tier_over(cluster.url().replace("://", "://me:wrong@")).open()
