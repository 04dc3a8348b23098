"""A real server goes, comes, hangs, or its connections break: misses and failed writes, and the tier goes on."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.testing.tier_conformance import NBYTES, is_right, key_of, read_request, until, write_request
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, RedisTier
from kvortex.tiers.redis.resp import Wire
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.redis_support import Fault, Harm, Proxy, RedisServer, Way, proxied, tier_over

PATIENCE_S = 30.0
LATER_S = 1000.0


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def both() -> Iterator[tuple[RedisServer, Proxy]]:
    with proxied() as running:
        yield running


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def name_of(tier: RedisTier, number: int) -> bytes:
    return tier._blocks.name_of(key_of(number))


async def until_written(tier: RedisTier, number: int) -> None:
    """Write a block as often as it takes."""
    async with asyncio.timeout(PATIENCE_S):
        while (await write_one(tier, number)).outcome is not SaveOutcome.STORED:
            await asyncio.sleep(0.01)


def used_by(tier: RedisTier) -> set[Wire]:
    """The connections that threads use now."""
    return tier._servers.all()[0]._used


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvortex-redis")]


# -- servers that come and go ----------------------------------------------------------------------------


async def test_a_server_that_comes_later_is_used(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvortex")
    server = RedisServer()
    try:
        async with server.tier() as tier:
            for _ in range(20):
                assert (await read_one(tier, 0)).cause is Cause.IO_ERROR
                assert await tier.find([key_of(0)]) == [0]
                assert (await write_one(tier, 0)).outcome is SaveOutcome.FAILED
            (line,) = warnings_in(caplog)
            assert str(server.socket) in line
            server.start()
            await until_written(tier, 0)
            assert (await read_one(tier, 0)).reason is None
            assert "connected again" in caplog.text
    finally:
        server.close()


async def test_nobody_waits_for_a_port_at_which_no_server_is() -> None:
    async with tier_over("redis://127.0.0.1:1") as tier:
        assert (await read_one(tier, 0)).cause is Cause.IO_ERROR


async def test_a_server_that_was_started_anew_costs_no_failure(server: RedisServer) -> None:
    async with server.tier() as tier:
        await tier.write([write_request(n) for n in range(8)])
        server.kill()
        server.start()
        assert (await read_one(tier, 0)).cause is Cause.ABSENT
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert tier.stats().causes[Cause.IO_ERROR] == 0


async def test_a_server_that_is_killed_under_way_is_a_miss(server: RedisServer) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        server.stop()
        reading = asyncio.create_task(read_one(tier, 0))
        await until(lambda: bool(used_by(tier)))
        server.kill()
        outcome = await asyncio.wait_for(reading, PATIENCE_S)
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)


async def test_a_server_that_stands_still_gets_no_buffer_that_was_given_back(server: RedisServer) -> None:
    """The value arrives when the tier has given the buffer back; it must not be written there."""
    async with tier_over(server.url().replace("timeout_s=20", "timeout_s=0.3")) as tier:
        await write_one(tier, 0)
        server.stop()
        settled: list[ReadOutcome] = []
        buffer = np.zeros(NBYTES, dtype=np.uint8)
        (outcome,) = await tier.read([ReadRequest(key_of(0), buffer, settled.append)], deadline_s=0.01)
        assert (outcome.reason, outcome.cause, outcome.settled) == (MissReason.DEADLINE, Cause.DEADLINE, False)
        assert settled == []
        assert tier.stats().unsettled == 1
        await until(lambda: bool(settled), PATIENCE_S)
        assert [late.cause for late in settled] == [Cause.IO_ERROR]
        assert "no answer within 0.3 s" in settled[0].detail
        assert tier.num_connections == 0  # it was closed
        buffer[:] = 0x55
        server.go_on()
        await until_written(tier, 1)
        assert (await read_one(tier, 0)).reason is None
        assert (buffer == 0x55).all()
        assert tier.stats().unsettled == 0


async def test_a_late_value_is_a_hit_when_it_settles(both: tuple[RedisServer, Proxy]) -> None:
    _, proxy = both
    async with proxy.tier() as tier:
        await write_one(tier, 0)
        proxy.fault = Fault(Way.ANSWERED, 6000, Harm.HOLD)
        settled: list[ReadOutcome] = []
        request = ReadRequest(key_of(0), np.zeros(NBYTES, dtype=np.uint8), settled.append)
        (outcome,) = await tier.read([request], deadline_s=0.05)
        assert (outcome.cause, outcome.settled) == (Cause.DEADLINE, False)
        assert settled == []
        proxy.release()
        await until(lambda: bool(settled), PATIENCE_S)
        assert is_right(request, settled[0])


async def test_look_ups_end_at_their_deadline(server: RedisServer) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        server.stop()
        async with asyncio.timeout(10):  # the tier's own limit is 20 s
            assert await tier.find([key_of(0)], deadline_s=0.01) == [0]
            assert await tier.delete([key_of(0)], deadline_s=0.01) == [False]
            await tier.touch([key_of(0)], [time.time() + LATER_S], deadline_s=0.01)
        assert tier.stats().causes[Cause.DEADLINE] == 3
        server.go_on()


# -- connections that break ------------------------------------------------------------------------------

# Bytes of an answer: in its first line, in the frame's header, in the payload, and in front of its last byte.
PLACES = [2, 60, 6000, NBYTES + 137]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("harm", [Harm.RESET, Harm.CUT, Harm.DRIP, Harm.HOLD])
async def test_an_answer_that_breaks_off_is_a_miss_and_the_block_stays(
    both: tuple[RedisServer, Proxy], harm: Harm, place: int
) -> None:
    _, proxy = both
    url = proxy.url().replace("timeout_s=20", "timeout_s=0.25" if harm in (Harm.DRIP, Harm.HOLD) else "timeout_s=20")
    async with tier_over(url) as tier:
        await until_written(tier, 0)
        if harm is Harm.DRIP and place == PLACES[-1]:
            place = 7000  # the last bytes would drip in in time
        proxy.fault = Fault(Way.ANSWERED, place, harm)
        outcome = await asyncio.wait_for(read_one(tier, 0), PATIENCE_S)
        assert proxy.fault is None
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)
        assert tier.stats().removed_corrupt == 0
        async with asyncio.timeout(PATIENCE_S):
            while (await read_one(tier, 0)).reason is not None:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("place", [10, 200, 6000])
@pytest.mark.parametrize("harm", [Harm.RESET, Harm.CUT, Harm.DRIP, Harm.HOLD])
async def test_a_write_that_breaks_off_stores_nothing(both: tuple[RedisServer, Proxy], harm: Harm, place: int) -> None:
    server, proxy = both
    url = proxy.url().replace("timeout_s=20", "timeout_s=0.25" if harm in (Harm.DRIP, Harm.HOLD) else "timeout_s=20")
    async with tier_over(url) as tier:
        await until_written(tier, 1)
        proxy.fault = Fault(Way.ASKED, place, harm)
        outcome = await asyncio.wait_for(write_one(tier, 0), PATIENCE_S)
        assert proxy.fault is None
        assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.IO_ERROR)
        assert server.ask("EXISTS", name_of(tier, 0)) == 0
        assert tier.lookup([key_of(0)]) == [0]
        await until_written(tier, 0)
        assert (await read_one(tier, 0)).reason is None


async def test_broken_connections_leave_no_files_and_no_threads_behind(both: tuple[RedisServer, Proxy]) -> None:
    _, proxy = both
    async with proxy.tier("&connections=2") as tier:
        await until_written(tier, 0)
        before = num_files()
        for harm in [Harm.RESET, Harm.CUT] * 10:
            proxy.fault = Fault(Way.ANSWERED, 6000, harm)
            await tier.read([read_request(0) for _ in range(4)])
        assert (await read_one(tier, 0)).reason is None
        assert tier.num_connections <= 2 + 2 + 2  # of reads, of writes, of look-ups
        await until(lambda: num_files() <= before + 3 * 2 * 6, PATIENCE_S)  # both ends in the proxy, too
    await until(lambda: threads() == [], PATIENCE_S)
    assert tier.num_connections == 0


async def test_no_more_blocks_move_at_a_time_than_there_are_connections(server: RedisServer) -> None:
    async with server.tier("&connections=3") as tier:
        await tier.write([write_request(n) for n in range(64)])
        server.stop()
        requests = [read_request(n) for n in range(64)]
        reading = asyncio.create_task(tier.read(requests))
        await until(lambda: len(used_by(tier)) == 3)
        assert len([name for name in threads() if "read" in name]) == 3
        server.go_on()
        assert all(map(is_right, requests, await reading))
        assert tier.num_connections <= 3 + 3 + 2


async def test_closing_ends_what_a_server_that_stands_still_would_keep(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvortex.tiers.redis.settings.CONNECT_S", 0.2)
    before = num_files()
    tier = tier_over(server.url().replace("timeout_s=20", "timeout_s=600"))
    await tier.open()
    server.stop()
    settled: list[ReadOutcome] = []
    requests = [ReadRequest(key_of(n), bytearray(NBYTES), settled.append) for n in range(16)]
    reading = asyncio.create_task(tier.read(requests))
    finding = [asyncio.create_task(tier.find([key_of(n)])) for n in range(4)]
    # One has a connection, and waits for its answer; the others wait for the first answer to a new connection.
    await until(lambda: len(used_by(tier)) == 1)
    async with asyncio.timeout(PATIENCE_S):
        await tier.aclose()
        assert {outcome.cause for outcome in await reading} <= {Cause.CLOSED, Cause.IO_ERROR}
        assert await asyncio.gather(*finding) == [[0]] * 4
    await until(lambda: len(settled) == 16 and threads() == [], PATIENCE_S)
    assert num_files() == before


async def test_cancelling_under_way_keeps_connections_in_order(server: RedisServer) -> None:
    """What a cancelled call has asked for is not the answer to the next call."""
    async with server.tier("&connections=2") as tier:
        await tier.write([write_request(n) for n in range(16)])
        for _ in range(10):
            reading = asyncio.create_task(tier.read([read_request(n) for n in range(16)]))
            finding = asyncio.create_task(tier.find([key_of(n) for n in range(16)]))
            await asyncio.sleep(0.001)
            reading.cancel()
            finding.cancel()
            await asyncio.wait([reading, finding])
            requests = [read_request(n) for n in range(16)]
            assert all(map(is_right, requests, await tier.read(requests)))
            assert await tier.find([key_of(0), key_of(99)]) == [NBYTES, 0]
