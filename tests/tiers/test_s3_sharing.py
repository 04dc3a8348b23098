"""A bucket that several processes share: what they learn of each other, by how many requests, and what they remove."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    digest_of,
    is_right,
    key_of,
    payload_of,
    read_request,
    until,
    write_request,
)
from kvortex.tiers import Cause, ReadRequest, S3Tier, WriteRequest
from kvortex.tiers.s3.catalogue import SKEW_S
from kvortex.tiers.s3.objects import Listed
from kvortex.tiers.s3.segment import Footer, Removal, SegmentId, decode_footer, encode_footer
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.s3_support import (
    BUCKET,
    DELETE,
    GET,
    LIST,
    PUT,
    Moto,
    Rclone,
    S3Server,
    keys_in_environment,
    tier_over,
)

PATIENCE_S = 60.0
FOLDER = f"kvortex/{NAMESPACE.hex()}"


@pytest.fixture(scope="module")
def rclone() -> Iterator[Rclone]:
    with keys_in_environment(), Rclone() as running:
        yield running


@pytest.fixture
def server(rclone: Rclone, monkeypatch: pytest.MonkeyPatch) -> Rclone:
    """An empty bucket; a look-up is never answered from an earlier one."""
    if names := rclone.names():
        rclone.delete(*names)
    rclone.proxy.asked.clear()
    monkeypatch.setattr("kvortex.tiers.s3.tier.FRESH_S", 0.0)
    monkeypatch.setattr("kvortex.tiers.s3.reader.FRESH_S", 0.0)
    return rclone


def names(server: S3Server) -> list[str]:
    return server.names(FOLDER)


# -- learning --------------------------------------------------------------------------------------------


async def test_two_processes_find_each_others_blocks_without_being_told(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await asyncio.gather(one.scanned(), two.scanned())
        for number, (writer, reader) in enumerate([(one, two), (two, one)] * 3):
            assert (await write_one(writer, number)).outcome is SaveOutcome.STORED
            assert reader.lookup([key_of(number)]) == [0]
            assert await reader.find([key_of(number), key_of(99)]) == [NBYTES, 0]
            assert (await read_one(reader, number)).reason is None
            assert (await write_one(reader, number)).outcome is SaveOutcome.ALREADY_STORED


async def test_a_read_asks_the_bucket_for_what_is_not_known(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await two.scanned()
        await write_one(one, 0)
        assert (await read_one(two, 0)).reason is None


async def test_a_prompt_costs_one_request(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await two.scanned()
        await one.write([write_request(n, 64) for n in range(300)])
        keys = [key_of(n) for n in range(300)]
        server.proxy.asked.clear()
        assert await two.find(keys) == [64] * 300
        assert (server.proxy.count(LIST), server.proxy.count(GET)) == (1, 1)  # names, and the footer of a new object
        assert await two.find(keys) == [64] * 300
        assert len(server.proxy.asked) == 2  # what is known is not asked for
        assert await two.find([key_of(n) for n in range(400, 700)]) == [0] * 300
        assert (server.proxy.count(LIST), server.proxy.count(GET)) == (2, 1)


async def test_look_ups_share_a_listing(server: Rclone) -> None:
    async with server.tier() as tier:
        await tier.scanned()
        server.proxy.asked.clear()
        await asyncio.gather(*(tier.find([key_of(n)]) for n in range(50)))
        assert server.proxy.count(LIST) == 1


async def test_an_answer_holds_for_a_moment(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.s3.tier.FRESH_S", 3600.0)
    async with server.tier() as tier:
        await tier.scanned()
        server.proxy.asked.clear()
        for start in range(0, 640, 64):
            assert await tier.find([key_of(n) for n in range(start, start + 64)]) == [0] * 64
        assert server.proxy.asked == []


async def test_a_listing_begins_where_new_names_can_be(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [SegmentId(number, 0, 72).name for number in (1, 2, 3)]
    for name in old:
        server.put(f"{FOLDER}/{name}", bytes(100))
    async with server.tier() as tier:
        await tier.scanned()
        await write_one(tier, 0)
        assert await tier.find([key_of(1)]) == [0]
        server.proxy.asked.clear()
        assert await tier.find([key_of(1)]) == [0]
        (asked,) = server.proxy.asked
        after = int(asked.partition("start-after=")[2].partition("&")[0].rpartition("%2F")[2], 16)
        margin_s = SKEW_S + tier._settings.timeout_s  # clocks differ, and uploads take their time
        assert 1000 * margin_s <= time.time() * 1000 - after < 1000 * (margin_s + 600)


async def test_what_comes_late_is_found(server: Rclone) -> None:
    """Its upload took longer than that of an object which was named later."""
    async with server.tier() as one, server.tier() as two:
        two._catalogue._margin_ms = 3_600_000  # however slow this machine is
        await one.scanned()
        await write_one(one, 0)
        (early,) = names(server)
        data = server.get(early)
        server.delete(early)
        await write_one(one, 1)
        assert await two.find([key_of(1), key_of(0)]) == [NBYTES, 0]
        server.put(early, data)
        assert await two.find([key_of(0)]) == [NBYTES]
        assert (await read_one(two, 0)).reason is None


async def test_a_new_process_reads_each_footer_once(server: Rclone) -> None:
    async with server.tier() as tier:
        for number in range(20):
            await write_one(tier, number)
    server.proxy.asked.clear()
    async with server.tier() as tier:
        await tier.scanned()
        assert all(tier.lookup([key_of(n) for n in range(20)]))
        progress = tier.stats().scan
        assert (progress.parts_done, progress.parts_total, progress.blocks, progress.complete) == (20, 20, 20, True)
    assert server.proxy.count(GET) == 20
    assert server.proxy.count(LIST) <= 2  # one to see that it works


async def test_look_ups_do_not_wait_for_a_long_first_listing(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.s3.tier.FIRST_LISTING_S", 0.02)
    async with server.tier() as one:
        await write_one(one, 0)
    tier = server.tier()
    pages, may_go_on = tier._catalogue._store.pages, asyncio.Event()

    async def slow_pages(after: str = "") -> AsyncIterator[list[Listed]]:
        async for page in pages(after):
            yield page
            await may_go_on.wait()

    monkeypatch.setattr(tier._catalogue._store, "pages", slow_pages)
    async with tier:
        assert await tier.find([key_of(0)]) == [0]
        assert not tier.stats().scan.complete
        monkeypatch.setattr("kvortex.tiers.s3.tier.FIRST_LISTING_S", 3600.0)
        tier._catalogue._listing = (float("-inf"), tier._catalogue._listing[1])  # type: ignore[index]
        async with asyncio.timeout(PATIENCE_S):  # many look-ups do not wait one after the other
            assert await tier.find([key_of(0)]) == [0]
        may_go_on.set()
        await tier.scanned()
        assert tier.lookup([key_of(0)]) == [NBYTES]


# -- writing and reading ---------------------------------------------------------------------------------


async def test_writes_that_come_together_are_one_object_in_their_order(server: Rclone) -> None:
    async with tier_over(server.url().replace("linger_s=0", "linger_s=0.5")) as tier:
        await tier.scanned()
        await asyncio.gather(*(write_one(tier, n) for n in range(12)))
        (footer,) = server.footers("kvortex").values()
        assert [entry.key for entry in footer.blocks] == [key_of(n) for n in range(12)]
        assert [entry.offset for entry in footer.blocks] == [NBYTES * n for n in range(12)]


async def test_what_fills_an_object_waits_for_nothing(server: Rclone) -> None:
    async with server.tier("&segment_bytes=64KiB") as tier, asyncio.timeout(PATIENCE_S):
        tier._writer._linger_s = 3600.0
        await tier.write([write_request(n, 1 << 14) for n in range(4)])
        await tier.write([write_request(n, 1 << 14) for n in range(10, 16)])
        assert sorted(len(footer.blocks) for footer in server.footers("kvortex").values()) == [2, 4, 4]


async def test_a_long_write_is_cut_into_objects_of_the_stated_size(server: Rclone) -> None:
    async with server.tier("&segment_bytes=64KiB") as tier:
        requests = [write_request(n) for n in range(23)] + [write_request(50, 200_000)]
        assert {one.outcome for one in await tier.write(requests)} == {SaveOutcome.STORED}
        footers = server.footers("kvortex")
        counts = sorted(len(footer.blocks) for footer in footers.values())
        assert counts == [1, 3, 5, 5, 5, 5]  # 12 KiB each, and one that is larger than an object should be
        assert all(len(server.get(name)) <= 1 << 16 for name, footer in footers.items() if len(footer.blocks) > 1)
        reads = [read_request(n) for n in range(23)]
        assert all(map(is_right, reads, await tier.read(reads)))


async def test_neighbours_are_read_by_one_request(server: Rclone) -> None:
    async with server.tier() as tier:
        await tier.write([write_request(n) for n in range(32)])
        server.proxy.asked.clear()
        requests = [read_request(n) for n in random_order(32)]
        assert all(map(is_right, requests, await tier.read(requests)))
        assert len(server.proxy.asked) == 1
        requests = [read_request(n) for n in (0, 1, 20, 21)]  # nearly 100 KiB between them
        assert all(map(is_right, requests, await tier.read(requests)))
        assert len(server.proxy.asked) == 1 + 2


def random_order(count: int) -> list[int]:
    return np.random.default_rng(0).permutation(count).tolist()


async def test_no_more_requests_at_a_time_than_connections(server: Rclone) -> None:
    async with server.tier("&connections=3&segment_bytes=64KiB") as tier:
        await tier.write([write_request(n, 60_000) for n in range(24)])
        most = now = 0
        get = tier._reader._store.get

        async def counted(*arguments: Any) -> Any:
            nonlocal most, now
            now += 1
            most = max(most, now)
            try:
                return await get(*arguments)
            finally:
                now -= 1

        tier._reader._store.get = counted  # type: ignore[method-assign]
        requests = [read_request(n, 60_000) for n in range(24)]
        assert all(map(is_right, requests, await tier.read(requests)))
        assert most == 3


async def test_uploads_take_little_memory(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.s3.writer.UPLOAD_BYTES", 1 << 17)
    async with server.tier("&segment_bytes=64KiB") as tier:
        most = now = 0
        put = tier._writer._store.put

        async def counted(name: str, data: Any) -> None:
            nonlocal most, now
            now += len(data)
            most = max(most, now)
            try:
                await put(name, data)
            finally:
                now -= len(data)

        tier._writer._store.put = counted  # type: ignore[method-assign]
        await tier.write([write_request(n) for n in range(60)])
        assert 0 < most <= 1 << 17


async def test_a_capacity_is_kept_with_blocks_of_any_size(server: Rclone) -> None:
    async with server.tier("&capacity_bytes=1MiB&segment_bytes=64KiB") as tier:
        for start in range(0, 200, 20):
            await tier.write([write_request(n) for n in range(start, start + 20)])
            assert tier.used_bytes <= 1 << 20
        stored = sum(len(server.get(name)) for name in names(server))
        assert stored == tier.used_bytes
        assert tier.stats().evicted_blocks == 200 - tier.stats().num_blocks
        assert all(tier.lookup([key_of(n) for n in range(180, 200)]))
    async with server.tier("&capacity_bytes=1MiB") as tier:
        await tier.scanned()
        assert tier.used_bytes == stored


# -- removing --------------------------------------------------------------------------------------------


async def test_a_deleted_block_is_gone_for_all_and_its_neighbours_stay(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await one.write([write_request(n) for n in range(8)])
        await two.find([key_of(0)])
        assert await one.delete([key_of(2), key_of(5), key_of(77)]) == [True, True, False]
        assert await two.find([key_of(2), key_of(3)]) == [NBYTES, NBYTES]  # nothing was asked
        await two.find([key_of(99)])
        for tier in (one, two):
            assert [bool(size) for size in tier.lookup([key_of(n) for n in range(8)])] == [
                n not in (2, 5) for n in range(8)
            ]
            reads = [read_request(n) for n in (0, 1, 3, 4, 6, 7)]
            assert all(map(is_right, reads, await tier.read(reads)))
        assert len(names(server)) == 2  # the object, and one that says what is gone
    async with server.tier() as late:
        assert await late.find([key_of(2), key_of(5), key_of(7)]) == [0, 0, NBYTES]
        assert sorted([block.key async for block in late.scan()]) == sorted(key_of(n) for n in (0, 1, 3, 4, 6, 7))
        assert (await write_one(late, 2)).outcome is SaveOutcome.STORED
        assert (await read_one(late, 2)).reason is None


async def test_an_object_without_blocks_is_deleted_and_so_is_what_was_said_of_it(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await one.write([write_request(n) for n in range(4)])
        await two.find([key_of(0)])
        assert await one.delete([key_of(0)]) == [True]
        assert await two.delete([key_of(1)]) == [True]
        assert await one.delete([key_of(2), key_of(3)]) == [True, True]
        assert len(names(server)) == 2  # the last blocks took the object with them; two objects speak of it
        await one._catalogue.rescan()
        assert names(server) == []
        assert (one.used_bytes, one.stats().num_blocks) == (0, 0)


async def test_blocks_that_several_have_removed_leave_no_object_behind(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await one.write([write_request(n) for n in range(2)])
        await two.find([key_of(0)])
        namespace, segment = NAMESPACE, one._catalogue.blocks.segments()[0].id
        for position in range(2):  # at the same time, so that neither knew of the other
            number, data = encode_footer(namespace, Footer((), [Removal(segment, position)]), segment.written_ms + 1)
            server.put(f"{FOLDER}/{number.name}", data)
        await two._catalogue.rescan()
        await two._catalogue.rescan()
        assert names(server) == []


async def test_what_a_lifecycle_rule_deletes_is_a_miss_and_forgotten(server: Rclone) -> None:
    async with server.tier() as tier:
        await tier.write([write_request(n) for n in range(3)])
        server.delete(*names(server))
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.EVICTED, Cause.ABSENT)
        assert tier.lookup([key_of(n) for n in range(3)]) == [0, 0, 0]
        assert tier.used_bytes == 0
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        server.delete(*names(server))
        await tier._catalogue.rescan()
        assert tier.lookup([key_of(0)]) == [0]
        assert await tier.find([key_of(0)]) == [0]


async def test_lifecycle_rules_of_a_server_are_its_own_business() -> None:
    """The rule of docs/s3-tier.md is one that a server takes."""
    page = (Path(__file__).parents[2] / "docs" / "s3-tier.md").read_text()
    (rules,) = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if "Rules" in text]
    with keys_in_environment(), Moto() as moto, moto.boto() as client:
        client.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)
        assert client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"] == rules["Rules"]


async def test_objects_whose_time_is_over_are_deleted(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server.tier("&ttl_s=3600") as tier:
        await write_one(tier, 0)
        with monkeypatch.context() as patch:
            patch.setattr("kvortex.tiers.s3.catalogue._now_ms", lambda: int(1000 * (time.time() - 4000)))
            tier._catalogue._last_ms = 0
            await write_one(tier, 1)
        assert len(names(server)) == 2
        await tier._catalogue.rescan()
        assert len(names(server)) == 1
        assert tier.lookup([key_of(0), key_of(1)]) == [NBYTES, 0]


async def test_a_bucket_is_cleared_by_its_keys(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await one.write([write_request(n) for n in range(30)])
        keys = [block.key async for block in two.scan()]
        assert await two.delete(keys) == [True] * 30
        assert names(server) == []


# -- damage ----------------------------------------------------------------------------------------------


async def test_a_damaged_footer_is_counted_and_its_object_deleted(server: Rclone) -> None:
    async with server.tier() as one:
        await one.write([write_request(n) for n in range(3)])
        await write_one(one, 7)
    damaged, _ = names(server)
    data = bytearray(server.get(damaged))
    data[-50] ^= 1
    server.put(damaged, bytes(data))
    async with server.tier() as two:
        assert await two.find([key_of(0), key_of(7)]) == [0, NBYTES]
        assert (two.stats().removed_corrupt, two.stats().causes[Cause.CORRUPT]) == (1, 1)
        assert damaged not in names(server)
        assert (await write_one(two, 0)).outcome is SaveOutcome.STORED


async def test_an_object_that_was_cut_is_damaged_for_all_who_know_it(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await one.write([write_request(n) for n in range(3)])
        await two.find([key_of(0)])
        (name,) = names(server)
        server.put(name, server.get(name)[: NBYTES // 2])
        (outcome,) = await one.read([read_request(2)])  # its range begins behind the end
        assert (outcome.reason, outcome.cause) == (MissReason.CORRUPT, Cause.CORRUPT)
        assert one.stats().removed_corrupt == 1
        assert names(server) == []
        assert (await read_one(two, 0)).cause is Cause.ABSENT


async def test_a_damaged_payload_takes_one_block_with_it(server: Rclone) -> None:
    async with server.tier() as one, server.tier() as two:
        await one.write([write_request(n) for n in range(3)])
        await two.find([key_of(0)])
        (name,) = names(server)
        data = bytearray(server.get(name))
        data[NBYTES + 100] ^= 1
        server.put(name, bytes(data))
        reads = [read_request(n) for n in range(3)]
        outcomes = await one.read(reads)
        assert [is_right(*pair) for pair in zip(reads, outcomes, strict=True)] == [True, False, True]
        assert (outcomes[1].reason, one.stats().removed_corrupt) == (MissReason.CORRUPT, 1)
        await two.find([key_of(99)])
        assert two.lookup([key_of(1), key_of(2)]) == [0, NBYTES]
        assert (await write_one(two, 1)).outcome is SaveOutcome.STORED
        assert (await read_one(two, 1)).reason is None


async def test_an_object_of_a_later_version_is_left_as_it_is(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server.tier() as one:
        with monkeypatch.context() as patch:
            patch.setattr("kvortex.tiers.s3.segment.FORMAT_VERSION", 2)
            await write_one(one, 0)
    (name,) = names(server)
    async with server.tier("&capacity_bytes=100KiB") as two:
        assert await two.find([key_of(0)]) == [0]
        assert two.stats().causes[Cause.UNKNOWN_VERSION] == 1
        assert two.used_bytes == 0
        assert (await write_one(two, 0)).outcome is SaveOutcome.STORED
        await two._catalogue.rescan()
        assert two.stats().causes[Cause.UNKNOWN_VERSION] == 1
        await two.write([write_request(n) for n in range(20)])
        assert name in names(server)


async def test_names_that_are_not_ours_are_left_alone(server: Rclone) -> None:
    others = ["readme", f"{1:012x}-{2:016x}-{3:08x}", f"{1:012x}-{2:016x}-{1 << 30:08x}", "further/" + "0" * 38]
    for each in others:
        server.put(f"{FOLDER}/{each}", b"something")
    async with server.tier("&capacity_bytes=100KiB") as tier:
        await write_one(tier, 0)
        assert await tier.find([key_of(0), key_of(1)]) == [NBYTES, 0]
        assert {f"{FOLDER}/{each}" for each in (others[0], *others[2:])} <= set(server.names())


async def test_more_blocks_than_are_remembered(server: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.tiers.s3.catalogue.KNOWN_BLOCKS", 32)
    async with server.tier() as one:
        for start in range(0, 80, 8):
            await one.write([write_request(n) for n in range(start, start + 8)])
            assert one.stats().num_blocks <= 32
        assert all(one.lookup([key_of(n) for n in range(72, 80)]))
        used = one.used_bytes
    async with server.tier() as two:
        await two.scanned()
        assert 24 <= two.stats().num_blocks <= 32
        assert all(two.lookup([key_of(n) for n in range(72, 80)]))  # the newest first
        assert two.used_bytes == used
        assert len({block.key async for block in two.scan()}) == 80
        assert two.stats().num_blocks <= 32


async def test_many_processes_at_once_only_ever_see_right_bytes(server: Rclone) -> None:
    """Two tiers over one bucket, one of which evicts; calls that are cancelled, and deletions."""
    rng = np.random.default_rng(1)

    async def live(tier: S3Tier, seed: int) -> None:
        dice = np.random.default_rng(seed)
        for _ in range(30):
            numbers = dice.integers(0, 60, dice.integers(1, 8)).tolist()
            kind = dice.random()
            if kind < 0.4:
                work: Any = tier.write([write_request(n) for n in numbers])
            elif kind < 0.8:
                work = check_reads(tier, numbers)
            elif kind < 0.9:
                work = tier.delete([key_of(n) for n in numbers])
            else:
                work = tier.find([key_of(n) for n in numbers])
            task = asyncio.create_task(work)
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() * 0.01)
                task.cancel()
                await asyncio.wait([task])
            else:
                await task

    async def check_reads(tier: S3Tier, numbers: list[int]) -> None:
        requests = [read_request(n) for n in numbers]
        for request, outcome in zip(requests, await tier.read(requests), strict=True):
            assert is_right(request, outcome) or outcome.cause is Cause.ABSENT, outcome

    async with server.tier("&capacity_bytes=400KiB") as one, server.tier("&segment_bytes=64KiB") as two:
        seeds = rng.integers(0, 1 << 30, 6).tolist()
        await asyncio.gather(*(live((one, two)[seed % 2], seed) for seed in seeds))
        await until(lambda: one.stats().unsettled == two.stats().unsettled == 0, PATIENCE_S)
        for tier in (one, two):
            stats = tier.stats()
            assert stats.removed_corrupt == stats.misses[MissReason.CORRUPT] == 0
        await one._catalogue.rescan()
        await two._catalogue.rescan()
        known = [{n for n in range(60) if tier.lookup([key_of(n)])[0]} for tier in (one, two)]
        assert known[0] == known[1]
        await check_reads(two, list(range(60)))


async def test_every_payload_of_a_segment_has_its_place(server: Rclone) -> None:
    """Sizes that are no multiple of a word, and one object for all."""
    sizes = [1, 7, 8, 9, 4095, 4096, 5000]
    async with server.tier() as tier:
        await tier.write([write_request(n, size) for n, size in enumerate(sizes)])
        (name,) = names(server)
        data = server.get(name)
        number = SegmentId.of_name(name.rpartition("/")[2])
        assert number is not None
        footer = decode_footer(data[-number.footer_bytes :], NAMESPACE, number, len(data))
        assert isinstance(footer, Footer)
        for entry, size in zip(footer.blocks, sizes, strict=True):
            assert entry.offset % 8 == 0
            assert data[entry.offset : entry.end] == payload_of(entry.key, size)
        memory = [np.full(size + 16, 0xAA, dtype=np.uint8) for size in sizes]
        reads = [ReadRequest(key_of(n), memory[n][8 : 8 + size]) for n, size in enumerate(sizes)]
        assert all(map(is_right, reads, await tier.read(reads)))
        assert all((each[:8] == 0xAA).all() and (each[-8:] == 0xAA).all() for each in memory)


async def test_a_retried_upload_is_the_same_object(server: Rclone) -> None:
    async with server.tier() as tier:
        await tier.scanned()
        payload = payload_of(key_of(0))
        server.proxy.answers = [(PUT, b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")]
        (outcome,) = await tier.write([WriteRequest(key_of(0), payload, digest_of(payload), NBYTES)])
        assert outcome.outcome is SaveOutcome.STORED
        assert server.proxy.count(PUT) == 2
        assert len(set(server.proxy.asked) & {each for each in server.proxy.asked if each.startswith(PUT)}) == 1
        assert len(names(server)) == 1


async def test_several_objects_are_deleted_by_one_request(server: Rclone) -> None:
    async with server.tier("&segment_bytes=64KiB") as tier:
        await tier.write([write_request(n, 50_000) for n in range(10)])
        server.proxy.asked.clear()
        assert await tier.delete([key_of(n) for n in range(10)]) == [True] * 10
        assert server.proxy.count(DELETE) == 1
        assert names(server) == []
