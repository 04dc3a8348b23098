"""A disk that fails, fills up, hangs or goes away: a miss with its reason, counted, and the tier goes on."""

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ConfigError, EngineStateError
from kvortex.testing.tier_conformance import NBYTES, is_right, key_of, read_request, until, write_request
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, WriteOutcome
from kvortex.tiers.frame import frame_bytes
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.disk_support import disk_tier, file_of, read_one, temp_files
from tests.tiers.faulty_os import FaultyOs


@pytest.fixture
def calls() -> Iterator[FaultyOs]:
    faulty = FaultyOs()
    yield faulty
    faulty.release()  # no thread outlives its test


def is_block(path: str, *_: Any) -> bool:
    return path.endswith(".kv1")


READ_FAULTS = [
    ("open", errno.EMFILE, Cause.OPEN_FILES),
    ("open", errno.ENFILE, Cause.OPEN_FILES),
    ("open", errno.EACCES, Cause.PERMISSION),
    ("open", errno.EIO, Cause.IO_ERROR),
    ("open", errno.ELOOP, Cause.IO_ERROR),
    ("file_bytes", errno.EIO, Cause.IO_ERROR),
    ("preadv", errno.EIO, Cause.IO_ERROR),
    ("preadv", errno.EINVAL, Cause.IO_ERROR),
]


@pytest.mark.parametrize(("method", "error", "cause"), READ_FAULTS)
async def test_a_read_that_fails(tmp_path: Path, calls: FaultyOs, method: str, error: int, cause: Cause) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        await tier.write([write_request(0), write_request(1)])
        calls.fail(method, error, times=1)
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, cause)
        assert os.strerror(error) in outcome.detail
        assert tier.stats().causes[cause] == 1
        assert tier.stats().misses[MissReason.TRANSFER_FAILED] == 1
        assert (await read_one(tier, 1)).reason is None
        assert (await read_one(tier, 0)).reason is None  # nothing was lost


async def test_a_block_with_a_bad_sector_is_not_offered_again(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        calls.fail("preadv", errno.EIO)
        await read_one(tier, 0)
        assert tier.lookup([key_of(0)]) == [0]


WRITE_FAULTS = [
    ("open", errno.ENOSPC, SaveOutcome.NO_SPACE, Cause.NO_SPACE),
    ("open", errno.EMFILE, SaveOutcome.FAILED, Cause.OPEN_FILES),
    ("open", errno.EACCES, SaveOutcome.FAILED, Cause.PERMISSION),
    ("open", errno.EROFS, SaveOutcome.FAILED, Cause.READ_ONLY),
    ("pwritev", errno.ENOSPC, SaveOutcome.NO_SPACE, Cause.NO_SPACE),
    ("pwritev", errno.EDQUOT, SaveOutcome.NO_SPACE, Cause.NO_SPACE),
    ("pwritev", errno.EFBIG, SaveOutcome.NO_SPACE, Cause.NO_SPACE),
    ("pwritev", errno.EIO, SaveOutcome.FAILED, Cause.IO_ERROR),
    ("fdatasync", errno.EIO, SaveOutcome.FAILED, Cause.IO_ERROR),
    ("fdatasync", errno.ENOSPC, SaveOutcome.NO_SPACE, Cause.NO_SPACE),
    ("replace", errno.EIO, SaveOutcome.FAILED, Cause.IO_ERROR),
    ("replace", errno.EROFS, SaveOutcome.FAILED, Cause.READ_ONLY),
    ("mkdir", errno.EACCES, SaveOutcome.FAILED, Cause.PERMISSION),
]


@pytest.mark.parametrize(("method", "error", "outcome", "cause"), WRITE_FAULTS)
async def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, calls: FaultyOs, method: str, error: int, outcome: SaveOutcome, cause: Cause
) -> None:
    async with disk_tier(tmp_path, calls=calls, fsync=True) as tier:
        await tier.scanned()
        calls.fail(method, error, when=lambda path, *_: method != "open" or str(path).endswith(".tmp"))
        (written,) = await tier.write([write_request(0)])
        assert (written.outcome, written.cause) == (outcome, cause)
        assert tier.stats().causes[cause] == tier.stats().writes[outcome] == 1
        assert tier.used_bytes == 0
        assert temp_files(tmp_path) == []
        assert not file_of(tmp_path, key_of(0)).exists()
        assert (await read_one(tier, 0)).reason is MissReason.NEVER_STORED
        calls.heal()
        assert await tier.write([write_request(0)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert (await read_one(tier, 0)).reason is None


async def test_a_file_system_smaller_than_the_capacity_trades_one_block_for_another(
    tmp_path: Path, calls: FaultyOs
) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.write([write_request(0)])
        await tier.write([write_request(1)])
        calls.fail("pwritev", errno.ENOSPC, times=1)
        assert await tier.write([write_request(2)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert tier.lookup([key_of(n) for n in range(3)]) == [0, NBYTES, NBYTES]
        assert not file_of(tmp_path, key_of(0)).exists()
        assert temp_files(tmp_path) == []
        assert tier.stats().evicted_blocks == 1


async def test_where_no_victim_can_be_removed_all_of_them_stay(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls, capacity_bytes=2 * frame_bytes(NBYTES)) as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        await tier.write([write_request(1)])
        calls.fail("unlink", errno.EROFS)
        (outcome,) = await tier.write([write_request(2)])
        assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.READ_ONLY)
        assert tier.used_bytes == 2 * frame_bytes(NBYTES)
        assert tier.stats().evicted_blocks == 0
        calls.heal()
        assert (await read_one(tier, 0)).reason is None
        assert (await read_one(tier, 1)).reason is None
        assert await tier.write([write_request(2)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert not file_of(tmp_path, key_of(0)).exists()
        assert tier.stats().evicted_blocks == 1


@pytest.mark.parametrize("error", [errno.EPERM, errno.EIO, errno.EBUSY])
async def test_one_victim_that_cannot_be_removed_does_not_stop_the_others(
    tmp_path: Path, calls: FaultyOs, error: int
) -> None:
    async with disk_tier(tmp_path, calls=calls, capacity_bytes=3 * frame_bytes(NBYTES)) as tier:
        await tier.scanned()
        for number in range(3):
            await tier.write([write_request(number)])
        stuck = file_of(tmp_path, key_of(0)).name
        calls.fail("unlink", error, when=lambda path, *_: path.endswith(stuck))
        for number in (3, 4, 5, 6):
            assert await tier.write([write_request(number)]) == [WriteOutcome(SaveOutcome.STORED)]
            assert tier.used_bytes == 3 * frame_bytes(NBYTES)
        assert (await read_one(tier, 0)).reason is None


async def test_a_damaged_file_that_cannot_be_removed_is_not_known_any_more(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        file = file_of(tmp_path, key_of(0))
        file.write_bytes(bytes(frame_bytes(NBYTES)))
        calls.fail("unlink", errno.EROFS)
        assert (await read_one(tier, 0)).reason is MissReason.CORRUPT
        assert tier.lookup([key_of(0)]) == [0]
        assert tier.stats().causes[Cause.READ_ONLY] == 1
        assert tier.stats().removed_corrupt == 0
        calls.heal()
        assert await tier.write([write_request(0)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert (await read_one(tier, 0)).reason is None


@pytest.mark.parametrize("direct", [None, False])
async def test_short_reads_and_writes_are_continued(tmp_path: Path, calls: FaultyOs, direct: bool | None) -> None:
    async with disk_tier(tmp_path, calls=calls, direct=direct) as tier:
        calls.most_bytes = 4096 if tier.direct_io.is_direct else 1000
        assert await tier.write([write_request(0)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert (await read_one(tier, 0)).reason is None
        assert calls.calls["preadv"] > 2


async def test_a_write_that_stops_short_is_refused(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        calls.most_bytes = 0
        (outcome,) = await tier.write([write_request(0)])
        assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.IO_ERROR)
        assert temp_files(tmp_path) == []


# -- what hangs ------------------------------------------------------------------------------------------


async def test_a_hung_read_is_a_miss_in_time_and_arrives_later(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.write([write_request(0)])
        calls.hold("preadv")
        settled: list[ReadOutcome] = []
        request = read_request(0)
        request = ReadRequest(request.key, request.buffer, settled.append)
        started = time.monotonic()
        (outcome,) = await tier.read([request], deadline_s=0.05)
        assert time.monotonic() - started < 5
        assert (outcome.reason, outcome.cause) == (MissReason.DEADLINE, Cause.DEADLINE)
        assert not outcome.settled
        assert settled == []
        assert tier.stats().unsettled == 1
        calls.release()
        await until(lambda: bool(settled))
        assert is_right(request, settled[0])
        assert tier.stats().unsettled == 0
        assert tier.stats().misses[MissReason.DEADLINE] == 1


async def test_what_waits_behind_a_hung_read_settles_at_the_deadline(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls, read_threads=2) as tier:
        await tier.write([write_request(n) for n in range(10)])
        calls.hold("preadv")
        settled: list[ReadOutcome] = []
        requests = [ReadRequest(key_of(n), bytearray(NBYTES), settled.append) for n in range(10)]
        outcomes = await tier.read(requests, deadline_s=0.05)
        assert {outcome.reason for outcome in outcomes} == {MissReason.DEADLINE}
        assert sorted(outcome.settled for outcome in outcomes) == [False] * 2 + [True] * 8
        assert len(settled) == 8
        assert (await read_one(tier, 3, deadline_s=0.05)).settled  # all threads hang: it never starts
        assert tier.lookup([key_of(3)]) == [NBYTES]
        calls.release()
        await until(lambda: len(settled) == 10)
        assert (await read_one(tier, 3)).reason is None


async def test_cancelling_a_hung_read_keeps_the_buffer_until_it_ends(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.write([write_request(0)])
        calls.hold("preadv")
        settled: list[ReadOutcome] = []
        memory = bytearray(b"\xaa" * NBYTES)
        task = asyncio.create_task(tier.read([ReadRequest(key_of(0), memory, settled.append)]))
        await until(lambda: calls.num_held == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.02)
        assert settled == []
        assert memory == b"\xaa" * NBYTES
        calls.release()
        await until(lambda: len(settled) == 1)
        assert settled[0].reason is None
        assert memory != b"\xaa" * NBYTES  # the read did land: freeing it at the cancel would have been wrong


async def test_a_hung_write_keeps_its_payload_and_ends_stored(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        calls.hold("pwritev")
        settled: list[WriteOutcome] = []
        (outcome,) = await tier.write([write_request(0, on_settled=settled.append)], deadline_s=0.05)
        assert outcome == WriteOutcome(SaveOutcome.FAILED, Cause.DEADLINE, settled=False)
        assert settled == []
        (second,) = await tier.write([write_request(0)], deadline_s=1.0)
        assert second.outcome is SaveOutcome.PENDING
        assert (await read_one(tier, 0)).reason is MissReason.NEVER_STORED  # not visible before it is whole
        calls.release()
        await until(lambda: settled == [WriteOutcome(SaveOutcome.STORED)])
        assert (await read_one(tier, 0)).reason is None


async def test_closing_does_not_wait_for_ever_for_what_hangs(tmp_path: Path, calls: FaultyOs) -> None:
    tier = disk_tier(tmp_path, calls=calls, close_timeout_s=0.05)
    await tier.open()
    await tier.write([write_request(0)])
    calls.hold("preadv")
    settled: list[ReadOutcome] = []
    task = asyncio.create_task(tier.read([ReadRequest(key_of(0), bytearray(NBYTES), settled.append)]))
    await until(lambda: calls.num_held == 1)
    async with asyncio.timeout(5):
        await tier.aclose()
    (outcome,) = await task
    assert (outcome.cause, outcome.settled) == (Cause.CLOSED, False)
    assert settled == []
    calls.release()
    await until(lambda: len(settled) == 1)


@pytest.mark.parametrize("method", ["stat", "unlink"])
async def test_asking_and_deleting_keep_deadlines(tmp_path: Path, calls: FaultyOs, method: str) -> None:
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.write([write_request(0)])
        await tier.scanned()
        calls.hold(method)
        ask: Callable[..., Any] = tier.find if method == "stat" else tier.delete
        assert not any(await ask([key_of(0)], deadline_s=0.05))
        assert tier.stats().causes[Cause.DEADLINE] == 1
        calls.release()


# -- directories -----------------------------------------------------------------------------------------


async def test_the_directory_is_removed_under_us(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    async with disk_tier(root) as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        shutil.rmtree(root)
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.EVICTED, Cause.ABSENT)
        assert tier.used_bytes == 0
        assert await tier.write([write_request(n) for n in range(4)]) == [WriteOutcome(SaveOutcome.STORED)] * 4
        assert (await read_one(tier, 3)).reason is None
        assert temp_files(root) == []


async def test_a_fan_out_directory_is_removed_under_us(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        shutil.rmtree(file_of(tmp_path, key_of(0)).parent)
        assert (await read_one(tier, 0)).reason is MissReason.EVICTED
        assert await tier.write([write_request(0)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert (await read_one(tier, 0)).reason is None


async def test_a_directory_that_cannot_be_used_is_an_error_at_start(tmp_path: Path, calls: FaultyOs) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ConfigError, match="cannot keep blocks"):
        await disk_tier(tmp_path / "file").open()
    calls.fail("open", errno.EROFS)
    tier = disk_tier(tmp_path / "tier", calls=calls)
    with pytest.raises(ConfigError, match="Read-only"):
        await tier.open()
    with pytest.raises(EngineStateError):
        await tier.read([read_request(0)])
    calls.heal()
    await tier.open()  # it was all or nothing: the same object may try again
    await tier.aclose()
    assert list((tmp_path / "tier" / "tmp").iterdir()) == []


async def test_a_part_that_cannot_be_scanned_does_not_stop_the_scan(tmp_path: Path, calls: FaultyOs) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(n) for n in range(30)])
    bad = file_of(tmp_path, key_of(7)).parent
    calls.fail("open", errno.EIO, when=lambda path, *_: path == str(bad))
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        expected = [NBYTES * (file_of(tmp_path, key_of(n)).parent != bad) for n in range(30)]
        assert tier.lookup([key_of(n) for n in range(30)]) == expected
        assert tier.stats().causes[Cause.IO_ERROR] == 1
        assert (await read_one(tier, 7)).reason is None  # the file itself is fine
        assert len([block async for block in tier.scan()]) == sum(map(bool, expected))


# -- the probe -------------------------------------------------------------------------------------------


def refuses_direct_open(path: str, flags: int, *_: Any) -> bool:
    return bool(flags & os.O_DIRECT)


async def test_without_direct_io_files_are_buffered(tmp_path: Path, calls: FaultyOs) -> None:
    calls.fail("open", errno.EINVAL, when=refuses_direct_open)
    async with disk_tier(tmp_path, calls=calls) as tier:
        assert not tier.direct_io.is_direct
        await tier.write([write_request(0)])
        assert (await read_one(tier, 0)).reason is None
    with pytest.raises(ConfigError, match="O_DIRECT"):
        await disk_tier(tmp_path, calls=calls, direct=True).open()


@pytest.mark.parametrize("least", [512, 4096])
async def test_the_probe_finds_the_alignment_that_works(tmp_path: Path, calls: FaultyOs, least: int) -> None:
    def is_misaligned(fd: int, buffers: list[memoryview], *_: Any) -> bool:
        return any(address(buffer) % least for buffer in buffers)

    calls.fail("pwritev", errno.EINVAL, when=is_misaligned)
    async with disk_tier(tmp_path, calls=calls) as tier:
        assert tier.direct_io.memory_alignment >= least
        assert await tier.write([write_request(0)]) == [WriteOutcome(SaveOutcome.STORED)]
        assert (await read_one(tier, 0)).reason is None
    assert list((tmp_path / "tmp").iterdir()) == []


def address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
