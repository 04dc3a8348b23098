"""The tier over a cluster of three servers: it keeps the contract, follows names that move, and outlives a node."""

import asyncio
import hashlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

import pytest
import redis
import trustme

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NBYTES, TierConformance, key_of, write_request
from kvortex.tiers import Cause, RedisTier, Tier
from kvortex.tiers.redis.servers import Cluster
from kvortex.types import SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.redis_support import RedisCluster, tier_over

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


async def test_a_name_that_has_moved_is_followed(cluster: RedisCluster) -> None:
    """At once: the old node says where it is, whatever the table of slots still says."""
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
            place = ("127.0.0.1", cluster.ports[cluster.nodes.index(target)])
            async with asyncio.timeout(PATIENCE_S):  # the table of slots is asked for again
                while cast(Cluster, tier._servers)._current().node_of(name) != place:
                    await asyncio.sleep(0.01)
        assert tier.stats().causes[Cause.IO_ERROR] == 0


@pytest.mark.parametrize("options", ["", "&ttl_s=1000"])
async def test_blocks_of_a_slot_that_is_on_its_way_are_served(cluster: RedisCluster, options: str) -> None:
    """Some have gone to the other node, some have not, and new ones come: all are hits, in no table of slots."""
    async with tier_over(cluster.url("&prefix={moving}:" + options)) as tier:
        name = name_of(tier, key_of(0))
        slot, source = redis.crc.key_slot(name), cluster.node_of(name)
        target = cluster.nodes[cluster.nodes.index(source) - 1]
        await tier.write([write_request(n) for n in range(10)])
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.ask("CLUSTER", "MYID"))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.ask("CLUSTER", "MYID"))
        place = ("127.0.0.1", cluster.ports[cluster.nodes.index(target)])
        for number in range(0, 10, 2):
            source.ask("MIGRATE", *place, name_of(tier, key_of(number)), 0, 20_000)
        assert (source.ask("DBSIZE"), target.ask("DBSIZE")) == (5, 5)
        for number in range(10, 14):
            assert (await write_one(tier, number)).outcome is SaveOutcome.STORED
            assert (await write_one(tier, number)).outcome is SaveOutcome.ALREADY_STORED
        assert (source.ask("DBSIZE"), target.ask("DBSIZE")) == (5, 9)
        keys = [key_of(number) for number in range(15)]
        assert await tier.find(keys) == [NBYTES] * 14 + [0]
        for number in range(14):
            assert (await read_one(tier, number)).reason is None
        assert (await read_one(tier, 14)).cause is Cause.ABSENT
        await tier.touch(keys, [time.time() + 1000.0] * 15)
        assert all(tier.lookup(keys[:14]))
        assert await tier.delete([key_of(0), key_of(1), key_of(14)]) == [True, True, False]
        assert (source.ask("DBSIZE"), target.ask("DBSIZE")) == (4, 8)
        for number in range(3, 10, 2):
            source.ask("MIGRATE", *place, name_of(tier, key_of(number)), 0, 20_000)
        cluster.move(name, target)
        for number in range(2, 14):
            assert (await read_one(tier, number)).reason is None
        assert tier.stats().causes[Cause.IO_ERROR] == 0


async def test_a_cluster_by_tls(cluster: RedisCluster, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    with cluster.behind(context) as ports:
        url = f"rediss+cluster://127.0.0.1:{ports[0]}?timeout_s=20&prefix=tls:"
        async with tier_over(f"{url}&ca_file={tmp_path}/ca.pem") as tier:
            outcomes = await tier.write([write_request(n) for n in range(30)])
            assert {outcome.outcome for outcome in outcomes} == {SaveOutcome.STORED}
            assert await tier.find([key_of(n) for n in range(31)]) == [NBYTES] * 30 + [0]
            for number in range(30):
                assert (await read_one(tier, number)).reason is None
        assert min(node.ask("DBSIZE") for node in cluster.nodes) > 0
        with pytest.raises(ConfigError, match="refuses: TLS "):
            await tier_over(f"{url}&ca_file={tmp_path}/other.pem").open()


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
