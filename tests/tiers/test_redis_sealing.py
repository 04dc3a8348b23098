"""Sealed blocks in a real server, to which others write too: what they put there, and keys that change."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import (
    NBYTES,
    OTHER_NAMESPACE,
    is_right,
    key_of,
    payload_of,
    read_request,
    write_request,
)
from kvortex.tiers import Cause, RedisTier
from kvortex.tiers.frame import SEALED_HEADER_BYTES, SHORT_HEADER_BYTES
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.redis_support import RedisServer
from tests.tiers.seal_support import SECRETS, write_keys


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.ask("FLUSHALL")
    return running


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "seal.keys", "old")


def sealed(server: RedisServer, keys: Path, options: str = "", **named: bytes) -> RedisTier:
    return server.tier(f"&seal_keys={keys}{options}", **named)


def name_of(tier: RedisTier, number: int) -> bytes:
    return tier._blocks.name_of(key_of(number))


async def expect_auth(tier: RedisTier, number: int, cause: Cause = Cause.AUTH) -> None:
    outcome = await read_one(tier, number)
    assert (outcome.reason, outcome.cause) == (MissReason.AUTH, cause)


async def expect_replaced(tier: RedisTier, number: int) -> None:
    """The next write stores the block in the place of what could not be opened."""
    assert tier.lookup([key_of(number)]) == [0]
    assert (await write_one(tier, number)).outcome is SaveOutcome.STORED
    assert (await read_one(tier, number)).reason is None
    assert tier.lookup([key_of(number)]) == [NBYTES]
    assert (await write_one(tier, number)).outcome is SaveOutcome.ALREADY_STORED


async def test_the_server_never_has_a_payload(server: RedisServer, keys: Path) -> None:
    async with sealed(server, keys) as tier:
        await write_one(tier, 0)
        value = server.ask("GET", name_of(tier, 0))
        assert len(value) == SEALED_HEADER_BYTES + NBYTES
        payload = payload_of(key_of(0))
        assert not any(payload[at : at + 8] in value for at in range(0, NBYTES, 64))
        assert await tier.find([key_of(0)]) == tier.lookup([key_of(0)]) == [NBYTES]


async def test_blocks_that_others_have_moved_are_refused(server: RedisServer, keys: Path) -> None:
    async with (
        sealed(server, keys) as tier,
        sealed(server, keys, namespace=OTHER_NAMESPACE) as other,
        sealed(server, keys, "&prefix=moved:") as moved,
    ):
        await tier.write([write_request(0), write_request(1)])
        server.ask("COPY", name_of(tier, 0), name_of(tier, 2))
        server.ask("COPY", name_of(tier, 0), name_of(other, 0))
        server.ask("COPY", name_of(tier, 1), name_of(tier, 0), "REPLACE")
        server.ask("COPY", name_of(tier, 1), name_of(moved, 1))
        for each, number in ((tier, 0), (tier, 2), (other, 0)):
            await expect_auth(each, number)
            await expect_replaced(each, number)
        assert (await read_one(tier, 1)).reason is None
        assert (await read_one(moved, 1)).reason is None  # another name of the same block in the same namespace


@pytest.mark.parametrize("nbytes", [0, 1, 100, SEALED_HEADER_BYTES, SEALED_HEADER_BYTES + NBYTES, 1 << 20])
async def test_what_was_never_sealed_is_refused_and_written_over(server: RedisServer, keys: Path, nbytes: int) -> None:
    async with sealed(server, keys) as tier:
        server.ask("SET", name_of(tier, 0), bytes(nbytes))
        await expect_auth(tier, 0)
        assert server.ask("STRLEN", name_of(tier, 0)) == nbytes  # nobody makes us delete
        await expect_replaced(tier, 0)
        assert tier.stats().removed_corrupt == 0


@pytest.mark.parametrize("nbytes", [1, SEALED_HEADER_BYTES, SHORT_HEADER_BYTES + NBYTES, 1 << 20])
async def test_what_cannot_be_the_block_is_written_over_before_anybody_reads_it(
    server: RedisServer, keys: Path, nbytes: int
) -> None:
    """Or else a value of a wrong length, which nobody has a buffer for, would keep the block away for ever."""
    async with sealed(server, keys) as tier:
        server.ask("SET", name_of(tier, 0), bytes(nbytes))
        await tier.find([key_of(0)])
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(tier, 0)).reason is None


async def test_a_list_in_the_place_of_a_block_is_refused(server: RedisServer, keys: Path) -> None:
    async with sealed(server, keys) as tier:
        server.ask("RPUSH", name_of(tier, 0), "a")
        await expect_auth(tier, 0)
        await expect_replaced(tier, 0)


async def test_plain_and_sealed_tiers_over_one_server_never_serve_each_other(server: RedisServer, keys: Path) -> None:
    async with sealed(server, keys) as with_keys, server.tier() as without:
        for _ in range(2):
            assert (await write_one(without, 0)).outcome is SaveOutcome.STORED
            await expect_auth(with_keys, 0)
            await expect_replaced(with_keys, 0)
            await expect_auth(without, 0, Cause.SEALED)
            assert without.lookup([key_of(0)]) == [0]
        assert (await write_one(without, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(without, 0)).reason is None


async def test_a_value_that_another_host_has_put_right_is_served_again(server: RedisServer, keys: Path) -> None:
    async with sealed(server, keys) as mine, sealed(server, keys) as theirs:
        server.ask("SET", name_of(mine, 0), bytes(SEALED_HEADER_BYTES + NBYTES))
        await expect_auth(mine, 0)
        await expect_auth(theirs, 0)
        await expect_replaced(theirs, 0)
        assert mine.lookup([key_of(0)]) == [0]
        assert await mine.find([key_of(0)]) == [NBYTES]
        assert (await read_one(mine, 0)).reason is None
        assert mine.lookup([key_of(0)]) == [NBYTES]


async def test_values_that_cannot_be_opened_are_evicted_in_their_turn(server: RedisServer, keys: Path) -> None:
    whole = SEALED_HEADER_BYTES + NBYTES
    async with sealed(server, keys, f"&capacity_bytes={4 * whole}") as tier:
        for number in range(4):
            await write_one(tier, number)
        server.ask("SETRANGE", name_of(tier, 1), 300, b"....")
        await expect_auth(tier, 1)
        assert tier.used_bytes == 4 * whole
        await tier.touch([key_of(1)], [2e9])  # it is not used
        await tier.read([read_request(0)])
        await write_one(tier, 4)
        assert server.ask("EXISTS", name_of(tier, 1)) == 0
        assert tier.used_bytes == 4 * whole
        assert [bool(size) for size in tier.lookup([key_of(n) for n in range(5)])] == [True, False, True, True, True]


async def test_a_wrong_secret_opens_nothing(server: RedisServer, keys: Path, tmp_path: Path) -> None:
    wrong = write_keys(tmp_path / "wrong.keys", "old", secrets={"old": SECRETS["other"]})
    async with sealed(server, keys) as tier, sealed(server, wrong) as other:
        await write_one(tier, 0)
        await expect_auth(other, 0)
        await expect_replaced(other, 0)
        await expect_auth(tier, 0)


async def test_two_hosts_change_their_keys_one_after_the_other(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvortex.tiers.keyring.LOOK_S", 0.0)
    files = [write_keys(tmp_path / f"{number}.keys", "old") for number in range(2)]
    async with sealed(server, files[0]) as first, sealed(server, files[1]) as second:
        number = 0
        for names in (["old"], ["old", "new"], ["new", "old"]):
            for file in files:
                write_keys(file, *names)
                for writer, reader in ((first, second), (second, first)):
                    number += 1
                    assert (await write_one(writer, number)).outcome is SaveOutcome.STORED
                    for known in range(1, number + 1):
                        assert (await read_one(reader, known)).reason is None
        seals = {server.ask("GETRANGE", name_of(first, each), 128, 130) for each in range(1, number + 1)}
        assert seals == {b"old", b"new"}
        write_keys(files[0], "new")
        await expect_auth(first, 1)
        assert (await read_one(second, 1)).reason is None
        await expect_replaced(first, 1)
        assert (await read_one(second, 1)).reason is None


async def test_blocks_move_while_keys_change(server: RedisServer, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread puts keys to the front while blocks are written and read: none is missed."""
    monkeypatch.setattr("kvortex.tiers.keyring.LOOK_S", 0.0)
    write_keys(keys, "old", "new")
    ended = threading.Event()

    def rotate() -> None:
        while not ended.is_set():
            write_keys(keys, "new", "old")
            write_keys(keys, "old", "new")

    rotating = threading.Thread(target=rotate)
    rotating.start()
    try:
        async with sealed(server, keys, "&connections=8") as tier:
            for start in range(0, 192, 32):
                numbers = range(start, start + 32)
                written = await tier.write([write_request(number) for number in numbers])
                assert {outcome.outcome for outcome in written} == {SaveOutcome.STORED}
                requests = [read_request(number) for number in numbers]
                assert all(map(is_right, requests, await tier.read(requests)))
    finally:
        ended.set()
        await asyncio.to_thread(rotating.join)


def test_keys_that_cannot_be_used_are_told_when_the_tier_is_made(server: RedisServer, keys: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*none\.keys"):
        server.tier(f"&seal_keys={keys.parent}/none.keys")
    keys.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {keys}"):
        server.tier(f"&seal_keys={keys}")
