"""A real server refuses, is full, evicts, holds other things than blocks, or proves who it is by TLS."""

import asyncio
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    is_right,
    key_of,
    payload_of,
    read_request,
    until,
    write_request,
)
from kvortex.tiers import Cause, RedisTier
from kvortex.tiers.frame import SHORT_HEADER_BYTES, FrameHeader, encode_header
from kvortex.tiers.redis.resp import Wire
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.redis_support import Fault, Harm, Proxy, RedisServer, Way, tier_over

PATIENCE_S = 30.0
LATER_S = 1000.0


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def name_of(tier: RedisTier, number: int) -> bytes:
    return tier._blocks.name_of(key_of(number))


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- servers that refuse ---------------------------------------------------------------------------------


async def test_a_full_server_refuses_writes_and_serves_reads(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        async with server.tier() as tier:
            outcomes = await tier.write([write_request(n, 1 << 16) for n in range(128)])
            stored = [n for n, outcome in enumerate(outcomes) if outcome.outcome is SaveOutcome.STORED]
            refused = [outcome for outcome in outcomes if outcome.outcome is SaveOutcome.NO_SPACE]
            assert len(stored) + len(refused) == 128
            assert len(stored) > 0
            assert len(refused) > 0
            assert {outcome.cause for outcome in refused} == {Cause.NO_SPACE}
            assert (await read_one(tier, stored[0], 1 << 16)).reason is None
            full = [line for line in warnings_in(caplog) if "OOM" in line]
            assert len(full) == 1
            assert tier.num_connections <= 4 + 4 + 2  # a refusal breaks no connection


async def test_what_the_server_has_evicted_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru") as server:
        async with server.tier() as tier:
            keys = [key_of(n) for n in range(200)]
            outcomes = await tier.write([write_request(n, 1 << 16) for n in range(200)])
            assert {outcome.outcome for outcome in outcomes} == {SaveOutcome.STORED}
            assert warnings_in(caplog) == []
            server.ask("CONFIG", "SET", "maxmemory", 0)  # it evicts no more, whatever this test asks it
            there = [bool(server.ask("EXISTS", name_of(tier, n))) for n in range(200)]
            assert 0 < sum(there) < 200
            assert all(tier.lookup(keys))
            await tier.touch(keys, [time.time() + LATER_S] * 200)
            assert [bool(size) for size in tier.lookup(keys)] == there
            gone = there.index(False)
            assert (await read_one(tier, gone, 1 << 16)).cause is Cause.ABSENT
            assert (await write_one(tier, gone, 1 << 16)).outcome is SaveOutcome.STORED


async def test_a_block_that_the_server_has_lost_is_written_again(server: RedisServer) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        server.ask("FLUSHALL")
        assert tier.lookup([key_of(0)]) == [NBYTES]
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert (await write_one(tier, 0)).outcome is SaveOutcome.ALREADY_STORED


@pytest.mark.parametrize(
    ("settings", "options", "warned"),
    [
        ((), "", "has no maxmemory"),
        (("--maxmemory", "64mb"), "", "evicts no blocks (maxmemory-policy noeviction)"),
        (("--maxmemory", "64mb", "--maxmemory-policy", "volatile-lru"), "", "evicts no blocks"),
        (("--maxmemory", "64mb", "--maxmemory-policy", "volatile-lru"), "&ttl_s=1000", ""),
        (("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu"), "", ""),
    ],
)
async def test_a_server_that_does_not_evict_is_told_of_once(
    caplog: pytest.LogCaptureFixture, settings: tuple[str, ...], options: str, warned: str
) -> None:
    with RedisServer(*settings) as server:
        async with server.tier(options):
            pass
    lines = warnings_in(caplog)
    assert len(lines) == bool(warned)
    assert all(warned in line and "maxmemory-policy allkeys-lru" in line for line in lines)


@pytest.fixture
def with_users(server: RedisServer) -> RedisServer:
    server.ask("ACL", "SETUSER", "all", "on", ">p@ss:/w", "~kvortex:*", "+@all")
    server.ask("ACL", "SETUSER", "reader", "on", ">r", "~kvortex:*", "+get", "+strlen")
    return server


async def test_a_user_that_may_only_read_reads(with_users: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        with_users.tier(user="all:p%40ss%3A%2Fw@") as writer,
        with_users.tier("&ttl_s=100", user="reader:r@") as reader,
    ):
        caplog.clear()
        await write_one(writer, 0)
        for _ in range(5):
            outcome = await write_one(reader, 1)
            assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.PERMISSION)
            assert (await read_one(reader, 0)).reason is None  # the answer to the renewal is not taken for a block
        assert len(warnings_in(caplog)) == 1
        assert await reader.delete([key_of(0)]) == [False]
        assert (await read_one(reader, 0)).reason is None


async def test_a_right_that_is_taken_away_is_a_miss(with_users: RedisServer) -> None:
    async with with_users.tier(user="all:p%40ss%3A%2Fw@") as tier:
        await write_one(tier, 0)
        with_users.ask("ACL", "SETUSER", "all", "-get")
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.PERMISSION)
        with_users.ask("ACL", "SETUSER", "all", "+get")
        assert (await read_one(tier, 0)).reason is None


@pytest.mark.parametrize(
    ("user", "options", "message"),
    [
        ("reader:wrong@", "", "refuses: WRONGPASS"),
        ("nobody:r@", "", "refuses: WRONGPASS"),
        ("reader:r@", "&prefix=other:", "refuses: NOPERM"),
        ("", "&db=99", "refuses: ERR DB index"),
    ],
)
async def test_a_server_that_refuses_this_client_is_told(
    with_users: RedisServer, user: str, options: str, message: str
) -> None:
    before = num_files()
    tier = with_users.tier(options, user=user)
    with pytest.raises(ConfigError, match=message):
        await tier.open()
    await tier.aclose()
    assert num_files() == before


async def test_a_server_that_asks_for_a_password(server: RedisServer, tmp_path: Path) -> None:
    server.ask("CONFIG", "SET", "requirepass", "first")
    with pytest.raises(ConfigError, match=r"refuses: .*[Aa]uthentication required"):
        await server.tier().open()
    password = tmp_path / "password"
    password.write_text("first\n")
    async with server.tier(user=":first@") as by_url, server.tier(f"&password_file={password}") as by_file:
        await write_one(by_url, 0)
        assert (await read_one(by_file, 0)).reason is None
        server.kill()
        server.start()
        server.ask("CONFIG", "SET", "requirepass", "second")
        assert (await read_one(by_file, 0)).cause is Cause.PERMISSION
        password.write_text("second")
        async with asyncio.timeout(PATIENCE_S):
            while (await write_one(by_file, 0)).outcome is not SaveOutcome.STORED:
                await asyncio.sleep(0.01)


async def test_databases_are_kept_apart(server: RedisServer) -> None:
    async with server.tier("&db=3") as third, server.tier() as first:
        await write_one(third, 0)
        assert (await read_one(first, 0)).cause is Cause.ABSENT
        assert (await read_one(third, 0)).reason is None


# -- values that are no blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("SET", "hello"), ("SET", ""), ("SET", "x" * (1 << 20)), ("RPUSH", "a", "b"), ("HSET", "a", "b")]
)
async def test_a_foreign_value_is_a_miss_and_is_removed(server: RedisServer, words: tuple[str, ...]) -> None:
    async with server.tier() as tier:
        server.ask(words[0], name_of(tier, 0), *words[1:])
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.CORRUPT, Cause.CORRUPT)
        assert server.ask("EXISTS", name_of(tier, 0)) == 0
        assert tier.stats().removed_corrupt == 1
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(tier, 0)).reason is None


async def test_a_foreign_value_is_not_found_and_is_written_over(server: RedisServer) -> None:
    async with server.tier() as tier:
        server.ask("RPUSH", name_of(tier, 0), "a", "b")
        await write_one(tier, 1)
        assert await tier.find([key_of(0), key_of(1)]) == [0, NBYTES]
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(tier, 0)).reason is None


async def test_a_value_that_is_too_short_for_a_block_is_none(server: RedisServer) -> None:
    """Nobody would read it, and so find out that it is damaged."""
    async with server.tier() as tier:
        for number, nbytes in enumerate([1, SHORT_HEADER_BYTES]):
            server.ask("SET", name_of(tier, number), bytes(nbytes))
            assert await tier.find([key_of(number)]) == [0]
            assert (await write_one(tier, number)).outcome is SaveOutcome.STORED
            assert (await read_one(tier, number)).reason is None


async def test_a_frame_of_a_later_version_is_left_as_it_is(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("kvortex.tiers.frame.FORMAT_VERSION", 3)
        header = FrameHeader(NAMESPACE, key_of(0), 0, NBYTES, NBYTES, 0)
        later = encode_header(header, SHORT_HEADER_BYTES) + bytes(NBYTES)
    async with server.tier() as tier:
        server.ask("SET", name_of(tier, 0), later)
        assert (await write_one(tier, 0)).outcome is SaveOutcome.ALREADY_STORED  # nobody has looked into it
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.NEVER_STORED, Cause.UNKNOWN_VERSION)
        written = await write_one(tier, 0)
        assert (written.outcome, written.cause) == (SaveOutcome.FAILED, Cause.UNKNOWN_VERSION)
        assert server.ask("GET", name_of(tier, 0)) == later
        server.ask("DEL", name_of(tier, 0))
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(tier, 0)).reason is None


async def test_names_and_the_end_of_blocks(server: RedisServer) -> None:
    """Blocks have names that people can read, and end by themselves; use puts the end off."""
    async with server.tier("&ttl_s=1000") as tier:
        await tier.write([write_request(0), write_request(1)])
        name = f"kvortex:{bytes(range(32)).hex()}:{key_of(0).hex()}".encode()
        assert name in server.ask("KEYS", "*")
        assert server.ask("GET", name)[128:] == payload_of(key_of(0))
        assert 0 < server.ask("TTL", name) <= 1000
        server.ask("EXPIRE", name, 100)
        connections = set(tier._servers.all()[0]._idle)
        for _ in range(2):
            assert (await read_one(tier, 0)).reason is None
        assert set(tier._servers.all()[0]._idle) == connections  # no answer was left in one of them
        assert server.ask("TTL", name) > 100
        server.ask("EXPIRE", name, 100)
        await tier.touch([key_of(0), key_of(1), key_of(2)], [time.time() + LATER_S] * 3)
        assert server.ask("TTL", name) > 100
        server.ask("PEXPIRE", name, 1)
        await until(lambda: server.ask("EXISTS", name) == 0, PATIENCE_S)
        assert (await read_one(tier, 0)).cause is Cause.ABSENT
    async with server.tier() as lasting:
        await write_one(lasting, 5)
        assert server.ask("TTL", name_of(lasting, 5)) == -1


async def test_what_others_store_is_found_without_being_told(server: RedisServer) -> None:
    async with server.tier() as mine, server.tier() as theirs:
        await theirs.write([write_request(n) for n in range(20)])
        keys = [key_of(n) for n in range(9000)]
        assert mine.finds_more
        assert mine.may_have_unknown
        assert mine.lookup(keys[:20]) == [0] * 20
        before = server.ask("INFO", "commandstats")["cmdstat_strlen"]["calls"]
        assert await mine.find(keys) == [NBYTES] * 20 + [0] * 8980
        assert server.ask("INFO", "commandstats")["cmdstat_strlen"]["calls"] - before == 9000
        assert mine.lookup(keys[:20]) == [NBYTES] * 20
        assert {outcome.outcome for outcome in await mine.write([write_request(0)])} == {SaveOutcome.ALREADY_STORED}


async def test_the_blocks_of_a_write_are_looked_up_together(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server.tier() as mine, server.tier() as theirs:
        await theirs.write([write_request(n) for n in range(0, 100, 3)])
        before = server.ask("INFO", "commandstats")["cmdstat_strlen"]["calls"]
        asked: list[int] = []
        sent: list[Wire] = []
        send, find = Wire.send, mine._blocks.find
        monkeypatch.setattr(Wire, "send", lambda wire, *parts: sent.append(wire) or send(wire, *parts))
        mine._blocks.find = lambda keys: asked.append(len(keys)) or find(keys)  # type: ignore[method-assign]
        outcomes = await mine.write([write_request(n) for n in range(100)])
        assert [outcome.outcome is SaveOutcome.ALREADY_STORED for outcome in outcomes] == [
            n % 3 == 0 for n in range(100)
        ]
        assert sorted(asked) == [4, 32, 32, 32]
        assert len(sent) == 4 + 66  # nothing else is asked for
        assert server.ask("INFO", "commandstats")["cmdstat_strlen"]["calls"] - before == 100


async def test_a_tier_that_lists_forgets_what_others_have_deleted(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvortex.tiers.redis.tier.RESCAN_S", 0.01)
    async with server.tier("&capacity_bytes=1GiB") as mine, server.tier() as theirs:
        await theirs.write([write_request(n) for n in range(3)])
        keys = [key_of(n) for n in range(3)]
        await until(lambda: all(mine.lookup(keys)), PATIENCE_S)
        await theirs.delete(keys[:1])
        await until(lambda: not mine.lookup(keys)[0], PATIENCE_S)
        assert all(mine.lookup(keys[1:]))


async def test_what_is_known_is_bounded(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.redis.blocks.KNOWN_BLOCKS", 10)
    async with server.tier() as tier:
        for number in range(30):
            await write_one(tier, number)
        assert tier.stats().num_blocks == 10
        assert [bool(size) for size in tier.lookup([key_of(n) for n in range(30)])] == [False] * 20 + [True] * 10
        assert await tier.find([key_of(n) for n in range(30)]) == [NBYTES] * 30
        assert tier.stats().num_blocks == 10


# -- TLS -------------------------------------------------------------------------------------------------


@pytest.fixture
async def by_tls(server: RedisServer, tmp_path: Path) -> AsyncIterator[Proxy]:
    """A server that asks clients for a certificate; authority, certificate and key are in `tmp_path`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.load_verify_locations(tmp_path / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with Proxy(server.socket, context) as proxy:
        yield proxy


async def test_both_sides_prove_who_they_are(by_tls: Proxy, tmp_path: Path) -> None:
    files = f"&ca_file={tmp_path}/ca.pem&cert_file={tmp_path}/client.pem"
    async with tier_over(by_tls.url(files, scheme="rediss")) as tier:
        outcomes = await tier.write([write_request(n, 1 << 20) for n in range(8)])
        assert {outcome.outcome for outcome in outcomes} == {SaveOutcome.STORED}
        requests = [read_request(n, 1 << 20) for n in range(8)]
        assert all(map(is_right, requests, await tier.read(requests)))
        by_tls.fault = Fault(Way.ANSWERED, 500_000, Harm.CUT)
        assert (await read_one(tier, 0, 1 << 20)).cause is Cause.IO_ERROR
        assert (await read_one(tier, 0, 1 << 20)).reason is None
        accepted = by_tls.num_accepted
        for number in range(8):
            assert (await read_one(tier, number, 1 << 20)).reason is None
        assert by_tls.num_accepted == accepted  # connections are kept


@pytest.mark.parametrize("harm", [Harm.HOLD, Harm.DRIP])
async def test_a_server_behind_tls_that_stands_still_is_a_miss(by_tls: Proxy, tmp_path: Path, harm: Harm) -> None:
    files = f"&ca_file={tmp_path}/ca.pem&cert_file={tmp_path}/client.pem"
    url = by_tls.url(files, scheme="rediss").replace("timeout_s=20", "timeout_s=0.5")
    async with tier_over(url) as tier:
        async with asyncio.timeout(PATIENCE_S):
            while (await write_one(tier, 0)).outcome is not SaveOutcome.STORED:
                await asyncio.sleep(0.01)
        by_tls.fault = Fault(Way.ANSWERED, 6000, harm)
        outcome = await asyncio.wait_for(read_one(tier, 0), PATIENCE_S)
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)


async def test_another_authority_is_refused(by_tls: Proxy, tmp_path: Path) -> None:
    files = f"&ca_file={tmp_path}/other.pem&cert_file={tmp_path}/client.pem"
    with pytest.raises(ConfigError, match="refuses: TLS "):
        await tier_over(by_tls.url(files, scheme="rediss")).open()


async def test_a_certificate_for_another_host_is_refused(server: RedisServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("example.org").configure_cert(context)
    with Proxy(server.socket, context) as proxy, pytest.raises(ConfigError, match=r"refuses: TLS .*127.0.0.1"):
        await tier_over(proxy.url(f"&ca_file={tmp_path}/ca.pem", scheme="rediss")).open()
