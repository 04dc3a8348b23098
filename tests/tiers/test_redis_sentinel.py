"""The tier behind a sentinel: it uses the server that the sentinel names, and follows when that is another one."""

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trustme

from kvortex.testing.tier_conformance import until, write_request
from kvortex.tiers import Cause
from kvortex.types import SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.redis_support import Proxy, RedisServer, free_ports, tier_over

PATIENCE_S = 60.0
LOCAL = ("--bind", "127.0.0.1")


@pytest.fixture
def ports() -> list[int]:
    return free_ports(3)


@pytest.fixture
def pair(ports: list[int]) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A server and its replica."""
    with (
        RedisServer(*LOCAL, "--repl-diskless-sync-delay", "0", port=ports[0]) as first,
        RedisServer(*LOCAL, "--replicaof", "127.0.0.1", str(ports[0]), port=ports[1]) as second,
    ):
        yield first, second


@pytest.fixture
def sentinel(ports: list[int], pair: tuple[RedisServer, RedisServer]) -> Iterator[RedisServer]:
    config = f"sentinel monitor main 127.0.0.1 {ports[0]} 1\nsentinel down-after-milliseconds main 60000\n"
    with RedisServer(*LOCAL, port=ports[2], config=config) as running:
        running.ask("SENTINEL", "DEBUG", "info-period", 100, "ping-period", 100, "publish-period", 100)
        yield running


def role_of(server: RedisServer) -> str:
    return str(server.ask("INFO", "replication")["role"])


def fails_over(sentinel: RedisServer) -> bool:
    """Ask for another server; False if the replica is not known to be good yet."""
    try:
        sentinel.ask("SENTINEL", "FAILOVER", "main")
    except redis.exceptions.ResponseError:
        return False
    return True


@pytest.mark.slow
async def test_the_server_that_the_sentinel_names_is_used_and_followed(
    ports: list[int], pair: tuple[RedisServer, RedisServer], sentinel: RedisServer
) -> None:
    first, second = pair
    async with tier_over(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{ports[2]}/main?timeout_s=20") as tier:
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        await until(lambda: second.ask("DBSIZE") == 1, PATIENCE_S)
        await until(lambda: len(sentinel.ask("SENTINEL", "REPLICAS", "main")) == 1, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while not fails_over(sentinel):
                await asyncio.sleep(0.01)
        await until(lambda: (role_of(first), role_of(second)) == ("slave", "master"), PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while (await write_one(tier, 1)).outcome is not SaveOutcome.STORED:
                await asyncio.sleep(0.01)
        assert (await read_one(tier, 0)).reason is None
        assert second.ask("DBSIZE") == 2


async def test_a_server_that_has_become_a_replica_refuses_and_is_asked_for_again(
    ports: list[int], pair: tuple[RedisServer, RedisServer]
) -> None:
    _, second = pair
    async with tier_over(f"redis://127.0.0.1:{ports[1]}") as tier:
        await until(lambda: second.ask("INFO", "replication")["master_link_status"] == "up", PATIENCE_S)
        for outcome in await tier.write([write_request(n) for n in range(8)]):
            assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.READ_ONLY)
        assert tier.num_connections == 0  # behind a sentinel, new ones lead to another server


async def test_a_service_that_no_sentinel_knows_is_a_miss(ports: list[int], sentinel: RedisServer) -> None:
    async with tier_over(f"redis+sentinel://127.0.0.1:{ports[2]}/other") as tier:
        assert (await read_one(tier, 0)).cause is Cause.IO_ERROR


# -- sentinels that ask who it is ------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[tuple[RedisServer, RedisServer, str]]:
    """A server, a sentinel that names it, and the sentinel's place."""
    ports = free_ports(2)
    config = f"sentinel monitor main 127.0.0.1 {ports[0]} 1\nsentinel down-after-milliseconds main 600000\n"
    with RedisServer(*LOCAL, port=ports[0]) as server, RedisServer(*LOCAL, port=ports[1], config=config) as sentinel:
        yield server, sentinel, f"127.0.0.1:{ports[1]}"


@pytest.mark.parametrize("user", ["default", "watcher"])
async def test_sentinels_with_a_password(
    alone: tuple[RedisServer, RedisServer, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, user: str
) -> None:
    server, sentinel, place = alone
    server.ask("CONFIG", "SET", "requirepass", "of-server")
    if user != "default":
        sentinel.ask("ACL", "SETUSER", user, "on", ">of-sentinel", "+@all", "allchannels")
    sentinel.ask("ACL", "SETUSER", "default", "resetpass", ">of-sentinel" if user == "default" else ">unknown")
    file = tmp_path / "password"
    file.write_text("wrong-one\n")
    named = f"&sentinel_username={user}" if user != "default" else ""
    url = f"redis+sentinel://:of-server@{place}/main?timeout_s=20&sentinel_password_file={file}{named}"
    async with tier_over(url) as tier:
        outcome = await write_one(tier, 0)
        assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.IO_ERROR)
        assert "No master found" in outcome.detail
        file.write_text("of-sentinel\n")  # it is read for each question
        async with asyncio.timeout(PATIENCE_S):
            while (await write_one(tier, 0)).outcome is not SaveOutcome.STORED:
                await asyncio.sleep(0.01)
        assert (await read_one(tier, 0)).reason is None
    told = " ".join(record.getMessage() for record in caplog.records)
    assert not any(secret in told for secret in ("of-server", "of-sentinel", "wrong-one"))


async def test_servers_and_sentinels_by_tls(alone: tuple[RedisServer, RedisServer, str], tmp_path: Path) -> None:
    server, sentinel, _ = alone
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with Proxy(server.socket, context) as to_server, Proxy(sentinel.socket, context) as to_sentinel:
        # The sentinel itself knows nothing of TLS. It names the port as long as it does not take the server for down.
        sentinel.ask("SENTINEL", "MONITOR", "by-tls", "127.0.0.1", to_server.port, 1)
        sentinel.ask("SENTINEL", "SET", "by-tls", "down-after-milliseconds", 600_000)
        url = f"rediss+sentinel://127.0.0.1:{to_sentinel.port}/by-tls?timeout_s=20&ca_file={tmp_path}/ca.pem"
        async with tier_over(f"{url}&sentinel_tls=true") as tier:
            assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
            assert (await read_one(tier, 0)).reason is None
            assert server.ask("DBSIZE") == 1
        async with tier_over(url) as tier:
            assert (await read_one(tier, 0)).cause is Cause.IO_ERROR  # this sentinel only speaks TLS
