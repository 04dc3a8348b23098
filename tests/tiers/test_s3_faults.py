"""A real server goes, comes, hangs, refuses, or its connections break: blocks are missed, and the tier goes on."""

import asyncio
import logging
import os
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NBYTES, is_right, key_of, read_request, until, write_request
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, S3Tier, WriteOutcome
from kvortex.tiers.s3.failures import StoreFailure
from kvortex.tiers.s3.payloads import Payloads
from kvortex.tiers.s3.store import ObjectStore
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.redis_support import Fault, Harm, Way
from tests.tiers.s3_support import BUCKET, GET, LIST, PUT, HttpProxy, Rclone, keys_in_environment, refusal, tier_over

PATIENCE_S = 60.0


@pytest.fixture(autouse=True, scope="module")
def keys() -> Iterator[None]:
    with keys_in_environment():
        yield


@pytest.fixture(autouse=True)
def no_answer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up is never answered from an earlier one."""
    monkeypatch.setattr("kvortex.tiers.s3.tier.FRESH_S", 0.0)
    monkeypatch.setattr("kvortex.tiers.s3.reader.FRESH_S", 0.0)


@pytest.fixture(scope="module")
def shared() -> Iterator[Rclone]:
    """For tests that leave it as it was, but for its objects."""
    with keys_in_environment(), Rclone() as running:
        yield running


@pytest.fixture
def server(shared: Rclone) -> Rclone:
    shared.proxy.fault = None
    shared.proxy.answers = []
    if names := shared.names():
        shared.delete(*names)
    shared.proxy.asked.clear()
    return shared


@pytest.fixture
def own_server() -> Iterator[Rclone]:
    """For tests that end it, or have it stand still."""
    with Rclone() as running:
        yield running


def impatient(server: Rclone, timeout_s: float = 0.3, options: str = "") -> S3Tier:
    return tier_over(server.url(options).replace("timeout_s=20", f"timeout_s={timeout_s:g}"))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def until_written(tier: S3Tier, number: int) -> None:
    """Write a block as often as it takes."""
    async with asyncio.timeout(PATIENCE_S):
        while not (await write_one(tier, number)).outcome.is_stored:
            await asyncio.sleep(0.01)


async def until_read(tier: S3Tier, number: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await read_one(tier, number)).reason is not None:
            await asyncio.sleep(0.01)


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- servers that come and go ----------------------------------------------------------------------------


async def test_a_server_that_comes_later_is_used(caplog: pytest.LogCaptureFixture, own_server: Rclone) -> None:
    caplog.set_level(logging.INFO, "kvortex")
    own_server.kill()
    async with own_server.tier() as tier:
        await tier.scanned()
        for _ in range(20):
            assert (await read_one(tier, 0)).cause is Cause.IO_ERROR
            assert await tier.find([key_of(0)]) == [0]
            assert (await write_one(tier, 0)).outcome is SaveOutcome.FAILED
        assert 1 <= len(warnings_in(caplog)) <= 3  # one for each kind of failure
        assert all(f"s3://{BUCKET}/kvortex at {own_server.endpoint}" in line for line in warnings_in(caplog))
        own_server.start()
        await until_written(tier, 0)
        await until_read(tier, 0)
        assert "connected again" in caplog.text


async def test_nobody_waits_for_a_port_at_which_no_server_is(caplog: pytest.LogCaptureFixture) -> None:
    async with tier_over("s3://bucket?endpoint=http://127.0.0.1:1") as tier:
        outcome = await read_one(tier, 0)
        assert outcome.cause is Cause.IO_ERROR
        assert "nothing listens there; check the endpoint" in outcome.detail
    assert len(warnings_in(caplog)) == 1


async def test_after_a_request_without_an_answer_nobody_asks_for_a_while(server: Rclone) -> None:
    async with server.tier() as tier:
        await tier.scanned()
        await write_one(tier, 0)
        store = tier._catalogue._store
        assert isinstance(store, ObjectStore)
        store._pause_after(StoreFailure("Refused", "nothing there"))
        store._retry_at_s += 3600
        server.proxy.asked.clear()
        assert (await read_one(tier, 0)).detail == "nothing there"
        assert server.proxy.asked == []
        store._retry_at_s = 0.0
        for pause_s in (0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
            store._pause_after(StoreFailure("Refused", "nothing there"))
            assert store._pause_s == pytest.approx(pause_s)
            store._pause_after(StoreFailure("Refused", "nothing there"))  # another one at the same time
            assert store._pause_s == pytest.approx(pause_s)
            store._retry_at_s = 0.0
        assert (await read_one(tier, 0)).reason is None
        assert store._pause_s == 0.0


async def test_a_server_that_was_started_anew_costs_no_failure(own_server: Rclone) -> None:
    async with own_server.tier() as tier:
        await tier.write([write_request(n) for n in range(8)])
        own_server.kill()
        own_server.start()
        assert (await read_one(tier, 0)).reason is None
        assert (await write_one(tier, 9)).outcome is SaveOutcome.STORED
        assert tier.stats().causes[Cause.IO_ERROR] == 0


async def test_a_server_that_stands_still_gets_no_buffer_that_was_given_back(own_server: Rclone) -> None:
    """The block arrives when the tier has given the buffer back; it must not be written there."""
    async with own_server.tier() as tier:
        await write_one(tier, 0)
        own_server.stop()
        settled: list[ReadOutcome] = []
        buffer = np.zeros(NBYTES, dtype=np.uint8)
        (outcome,) = await tier.read([ReadRequest(key_of(0), buffer, settled.append)], deadline_s=0.05)
        assert (outcome.reason, outcome.cause, outcome.settled) == (MissReason.DEADLINE, Cause.DEADLINE, True)
        assert settled == [outcome]
        assert tier.stats().unsettled == 0
        buffer[:] = 0x55
        own_server.go_on()
        await until_read(tier, 0)
        assert (buffer == 0x55).all()


async def test_a_write_whose_time_is_over_goes_on_and_tells_its_end(own_server: Rclone) -> None:
    async with own_server.tier() as tier:
        await tier.scanned()
        await write_one(tier, 1)
        own_server.stop()
        settled: list[WriteOutcome] = []
        (outcome,) = await tier.write([write_request(0, on_settled=settled.append)], deadline_s=0.05)
        assert (outcome.outcome, outcome.cause, outcome.settled) == (SaveOutcome.FAILED, Cause.DEADLINE, False)
        assert settled == []
        assert tier.stats().unsettled == 1
        assert (await write_one(tier, 0, deadline_s=0.05)).outcome is SaveOutcome.PENDING
        own_server.go_on()
        await until(lambda: bool(settled), PATIENCE_S)
        assert settled == [WriteOutcome(SaveOutcome.STORED)]
        assert tier.stats().unsettled == 0
        assert (await read_one(tier, 0)).reason is None


async def test_a_write_that_waits_for_others_is_dropped_at_its_deadline(server: Rclone) -> None:
    async with tier_over(server.url().replace("linger_s=0", "linger_s=10")) as tier:
        await tier.scanned()
        settled: list[WriteOutcome] = []
        (outcome,) = await tier.write([write_request(0, on_settled=settled.append)], deadline_s=0.2)
        assert (outcome.cause, outcome.settled) == (Cause.DEADLINE, True)
        assert settled == [outcome]
        tier._writer._seal()
        assert server.names() == []
        assert tier.lookup([key_of(0)]) == [0]


async def test_look_ups_end_at_their_deadline(own_server: Rclone) -> None:
    async with impatient(own_server, 600) as tier:
        await tier.scanned()
        await write_one(tier, 0)
        own_server.stop()
        async with asyncio.timeout(PATIENCE_S):
            assert await tier.find([key_of(0), key_of(1)], deadline_s=0.01) == [NBYTES, 0]
            assert await tier.delete([key_of(0)], deadline_s=0.01) == [False]
        assert tier.stats().causes[Cause.DEADLINE] == 2
        own_server.go_on()


async def test_a_store_without_an_answer_fails_in_the_stated_time(own_server: Rclone) -> None:
    async with impatient(own_server) as tier:
        await tier.scanned()
        await until_written(tier, 0)
        own_server.stop()
        outcome = await asyncio.wait_for(read_one(tier, 0), PATIENCE_S)
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)
        assert outcome.detail == "no answer in 0.3 s"
        written = await asyncio.wait_for(write_one(tier, 5), PATIENCE_S)
        assert (written.outcome, written.cause, written.settled) == (SaveOutcome.FAILED, Cause.IO_ERROR, True)
        own_server.go_on()
        await until_read(tier, 0)


# -- connections that break ------------------------------------------------------------------------------

# Bytes of an answer: in its status, in its headers, in the payload, and near its end.
PLACES = [5, 200, 6000, NBYTES]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("harm", [Harm.RESET, Harm.CUT])
async def test_an_answer_that_breaks_off_is_asked_for_again(server: Rclone, harm: Harm, place: int) -> None:
    async with server.tier() as tier:
        await until_written(tier, 0)
        server.proxy.fault = Fault(Way.ANSWERED, place, harm)
        outcome = await asyncio.wait_for(read_one(tier, 0), PATIENCE_S)
        assert server.proxy.fault is None
        assert outcome.reason is None or outcome.cause is Cause.IO_ERROR  # behind the headers it depends on the client
        assert outcome.reason is None or place > PLACES[1]
        await until_read(tier, 0)
        assert tier.stats().removed_corrupt == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("harm", [Harm.DRIP, Harm.HOLD])
async def test_an_answer_that_takes_too_long_is_a_miss_and_the_block_stays(
    server: Rclone, harm: Harm, place: int
) -> None:
    async with impatient(server) as tier:
        await tier.scanned()
        await until_written(tier, 0)
        if harm is Harm.DRIP and place == PLACES[-1]:
            place = 7000  # the last bytes would drip in in time
        server.proxy.fault = Fault(Way.ANSWERED, place, harm)
        outcome = await asyncio.wait_for(read_one(tier, 0), PATIENCE_S)
        assert server.proxy.fault is None
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)
        assert tier.stats().removed_corrupt == 0
        await until_read(tier, 0)


@pytest.mark.parametrize("place", [10, 300, 6000])
@pytest.mark.parametrize("harm", [Harm.RESET, Harm.CUT, Harm.DRIP, Harm.HOLD])
async def test_a_write_that_breaks_off_stores_all_or_nothing(server: Rclone, harm: Harm, place: int) -> None:
    async with impatient(server, 0.5 if harm in (Harm.DRIP, Harm.HOLD) else 20) as tier:
        await tier.scanned()
        await until_written(tier, 1)
        server.proxy.fault = Fault(Way.ASKED, place, harm)
        outcome = await asyncio.wait_for(write_one(tier, 0), PATIENCE_S)
        assert server.proxy.fault is None
        assert outcome.outcome is SaveOutcome.STORED or outcome.cause is Cause.IO_ERROR
        if harm in (Harm.DRIP, Harm.HOLD):
            assert outcome.cause is Cause.IO_ERROR
        assert bool(tier.lookup([key_of(0)])[0]) is (outcome.outcome is SaveOutcome.STORED)
        await until_written(tier, 0)
        await until_read(tier, 0)
    async with server.tier() as other:  # what is there is whole
        assert await other.find([key_of(0)]) == [NBYTES]
        assert (await read_one(other, 0)).reason is None
        assert other.stats().removed_corrupt == 0


# -- answers that refuse ---------------------------------------------------------------------------------


async def test_a_server_that_asks_for_patience_is_asked_again(server: Rclone) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        server.proxy.answers = [(GET, refusal(503, "SlowDown"))]
        assert (await read_one(tier, 0)).reason is None
        server.proxy.answers = [(LIST, refusal(500, "InternalError"))]
        assert await tier.find([key_of(9)]) == [0]
        assert server.proxy.answers == []
        assert tier.stats().causes[Cause.IO_ERROR] == 0


async def test_a_full_store_is_no_space_and_reads_go_on(server: Rclone, caplog: pytest.LogCaptureFixture) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        for _ in range(2):
            server.proxy.answers = [(PUT, refusal(409, "QuotaExceeded", "the bucket is full"))]
            written = await write_one(tier, 1)
            assert (written.outcome, written.cause) == (SaveOutcome.NO_SPACE, Cause.NO_SPACE)
            assert "the bucket is full" in written.detail
        assert (await read_one(tier, 0)).reason is None
        (line,) = warnings_in(caplog)
        assert "QuotaExceeded" in line
        assert tier.used_bytes == len(server.get(server.names()[0]))


async def test_rights_to_read_alone_are_enough_to_read(server: Rclone) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        server.proxy.answers = [(PUT, refusal(403, "AccessDenied"))]
        written = await write_one(tier, 1)
        assert (written.outcome, written.cause) == (SaveOutcome.FAILED, Cause.PERMISSION)
        assert "s3:PutObject" in written.detail
        name = server.names()[0]
        data = bytearray(server.get(name))
        data[5] ^= 1
        server.put(name, bytes(data))
        server.proxy.answers = [("POST", refusal(403, "AccessDenied"))]
        for cause in (Cause.CORRUPT, Cause.ABSENT):  # it cannot be removed, and is not used again all the same
            assert (await read_one(tier, 0)).cause is cause
        assert tier.stats().removed_corrupt == 0


async def test_a_footer_that_cannot_be_read_is_not_taken_for_a_damaged_one(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await two.scanned()
        await write_one(one, 0)
        server.proxy.answers = [(GET, refusal(403, "AccessDenied"))]
        assert await two.find([key_of(0)]) == [0]
        assert (two.stats().causes[Cause.PERMISSION], two.stats().causes[Cause.CORRUPT]) == (1, 0)
        assert len(server.names()) == 1
        assert await two.find([key_of(0)]) == [NBYTES]


async def test_an_answer_with_too_few_bytes_is_not_taken_for_damage(server: Rclone) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        (name,) = server.names()
        nbytes = len(server.get(name))
        lines = ["HTTP/1.1 206 Partial Content", "Content-Length: 100", f"Content-Range: bytes 0-99/{nbytes}"]
        lines += ['ETag: "1"', "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT", "", ""]
        server.proxy.answers = [(GET, "\r\n".join(lines).encode() + bytes(100))]
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)
        assert server.names() == [name]
        await until_read(tier, 0)


async def test_a_listing_without_rights_does_not_stop_what_is_known(server: Rclone) -> None:
    async with server.tier() as tier:
        await write_one(tier, 0)
        server.proxy.answers = [(LIST, refusal(403, "AccessDenied"))] * 2
        assert await tier.find([key_of(0), key_of(1)]) == [NBYTES, 0]
        assert (await read_one(tier, 0)).reason is None
        assert tier.stats().causes[Cause.PERMISSION] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7NOBODY0"}, "InvalidAccessKeyId.*check AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "x" * 40}, "SignatureDoesNotMatch.*check AWS_SECRET_ACCESS_KEY"),
    ],
)
async def test_wrong_keys_are_told_when_the_tier_is_opened(
    server: Rclone, change: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in change.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=says) as error:
        await server.tier().open()
    assert "x" * 40 not in str(error.value)


async def test_a_bucket_that_does_not_exist_is_told_when_the_tier_is_opened(server: Rclone) -> None:
    with pytest.raises(ConfigError, match=r"s3://nobody/kvortex at http://.*NoSuchBucket.*create the bucket"):
        await tier_over(server.url(bucket="nobody")).open()


async def test_keys_of_a_profile_are_used(server: Rclone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [f"{name.lower()} = {os.environ[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    (tmp_path / "keys").write_text("\n".join(["[work]", *lines, ""]))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with server.tier("&profile=work") as tier:
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED


async def test_requests_without_keys_are_not_signed(own_server: Rclone) -> None:
    with pytest.raises(ConfigError, match="UnsupportedAlgorithm"):
        await own_server.tier("&anonymous=true").open()


async def test_tls_needs_an_authority_that_is_trusted(server: Rclone, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with HttpProxy(server.socket, context) as proxy:
        url = f"s3://{BUCKET}?endpoint=https://127.0.0.1:{proxy.port}&linger_s=0"
        with pytest.raises(ConfigError, match="name its authority as ca_file"):
            await tier_over(url).open()
        async with tier_over(f"{url}&ca_file={tmp_path / 'ca.pem'}") as tier:
            assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
            assert (await read_one(tier, 0)).reason is None
    with pytest.raises(ConfigError, match="does not speak TLS"):
        await tier_over(f"s3://{BUCKET}?endpoint=https://127.0.0.1:{server.proxy.port}").open()


# -- closing and cancelling ------------------------------------------------------------------------------


async def test_closing_ends_what_a_server_that_stands_still_would_keep(own_server: Rclone) -> None:
    tier = impatient(own_server, 600)
    await tier.open()
    await tier.scanned()
    await write_one(tier, 0)
    own_server.stop()
    reads: list[ReadOutcome] = []
    writes: list[WriteOutcome] = []
    reading = asyncio.create_task(
        tier.read([ReadRequest(key_of(n), bytearray(NBYTES), reads.append) for n in range(16)])
    )
    writing = asyncio.create_task(tier.write([write_request(n, on_settled=writes.append) for n in range(1, 4)]))
    finding = [asyncio.create_task(tier.find([key_of(50 + n)])) for n in range(4)]
    await until(lambda: tier._catalogue._listing is not None, PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        await tier.aclose()
        assert {outcome.cause for outcome in await reading} <= {Cause.CLOSED, Cause.IO_ERROR}
        assert {outcome.cause for outcome in await writing} <= {Cause.CLOSED, Cause.IO_ERROR}
        assert await asyncio.gather(*finding) == [[0]] * 4
    assert (len(reads), len(writes)) == (16, 3)
    assert tier.stats().unsettled == 0
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("kvortex-s3")] == []


async def test_closing_waits_for_uploads(server: Rclone) -> None:
    tier = server.tier()
    await tier.open()
    await tier.scanned()
    settled: list[WriteOutcome] = []
    server.proxy.asked.clear()
    writing = asyncio.create_task(tier.write([write_request(n, on_settled=settled.append) for n in range(8)]))
    await until(lambda: server.proxy.count(PUT) > 0, PATIENCE_S)
    await tier.aclose()
    await writing
    assert settled == [WriteOutcome(SaveOutcome.STORED)] * 8
    assert len(server.names()) == 1


async def test_nothing_is_left_open(server: Rclone) -> None:
    before, tiers = num_files(), []
    for _ in range(3):
        async with server.tier() as tier:
            await tier.write([write_request(n) for n in range(8)])
            server.proxy.fault = Fault(Way.ANSWERED, 6000, Harm.RESET)
            requests = [read_request(n) for n in range(8)]
            await asyncio.gather(*(tier.read([request]) for request in requests))
            await tier.delete([key_of(n) for n in range(8)])
        tiers.append(tier)  # it is closed, although somebody still knows it
    await until(lambda: num_files() <= before, PATIENCE_S)


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_buffer_is_not_given_back_while_it_is_written_to(
    server: Rclone, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    begun, may_go_on, take = threading.Event(), threading.Event(), Payloads.take

    def slow_take(*arguments: Any) -> ReadOutcome:
        begun.set()
        assert may_go_on.wait(PATIENCE_S)
        return take(*arguments)

    monkeypatch.setattr(Payloads, "take", slow_take)
    async with server.tier() as tier:
        await write_one(tier, 0)
        settled: list[ReadOutcome] = []
        request = ReadRequest(key_of(0), np.zeros(NBYTES, dtype=np.uint8), settled.append)
        reading = asyncio.create_task(tier.read([request], deadline_s=None if is_cancelled else 0.5))
        await until(begun.is_set, PATIENCE_S)
        if is_cancelled:
            reading.cancel()
            await asyncio.wait([reading])
        else:
            await asyncio.sleep(0.6)  # the deadline passes, whenever that is noticed
        assert settled == []
        may_go_on.set()
        await until(lambda: bool(settled), PATIENCE_S)
        await asyncio.wait([reading])
        assert settled[0].cause in (Cause.CANCELLED, Cause.DEADLINE)
        assert tier.stats().unsettled == 0


async def test_cancelling_under_way_harms_nobody_else(server: Rclone) -> None:
    async with server.tier("&connections=2") as tier:
        await tier.write([write_request(n) for n in range(16)])
        for turn in range(10):
            reading = asyncio.create_task(tier.read([read_request(n) for n in range(16)]))
            finding = asyncio.create_task(tier.find([key_of(n) for n in range(100, 116)]))
            writing = asyncio.create_task(tier.write([write_request(20 + turn)]))
            await asyncio.sleep(0.001 * (turn % 4))
            for task in (reading, finding, writing):
                task.cancel()
            await asyncio.wait([reading, finding, writing])
            requests = [read_request(n) for n in range(16)]
            assert all(map(is_right, requests, await tier.read(requests)))
        await until(lambda: tier.stats().unsettled == 0, PATIENCE_S)
        for turn in range(10):
            assert (await write_one(tier, 20 + turn)).outcome.is_stored
