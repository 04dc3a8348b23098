"""One directory, many tiers: restarts, other processes, other namespaces, other versions, dead writers."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvortex.errors import ConfigError, InvalidHashError
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    OTHER_NAMESPACE,
    digest_of,
    key_of,
    payload_of,
    until,
    write_request,
)
from kvortex.tiers import Cause, DiskTierConfig, ReadRequest, WriteOutcome
from kvortex.tiers.disk.layout import DiskLayout
from kvortex.tiers.frame import FrameHeader, encode_header, frame_bytes
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.disk_support import disk_tier, file_of, read_one, temp_files
from tests.tiers.faulty_os import FaultyOs

FRAME = frame_bytes(NBYTES)
STORED = WriteOutcome(SaveOutcome.STORED)


# -- restarts --------------------------------------------------------------------------------------------


async def test_modes_and_names(tmp_path: Path) -> None:
    root = tmp_path / "a" / "tier"
    async with disk_tier(root) as tier:
        await tier.write([write_request(0)])
        key = key_of(0).hex()
        file = root / "blocks" / NAMESPACE.hex() / key[:2] / f"{key}.kv1"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.stat().st_size == FRAME
        for directory in (file.parent, root / "blocks" / NAMESPACE.hex(), root / "blocks", root / "tmp", root):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, touch_interval_s=0.0) as tier:
        for number in range(4):
            await tier.write([write_request(number)])
            await asyncio.sleep(0.01)  # the file system's clock is coarse
        await read_one(tier, 0)
    async with disk_tier(tmp_path, capacity_bytes=4 * FRAME) as tier:
        await tier.scanned()
        assert await tier.write([write_request(4), write_request(5)]) == [STORED] * 2
        assert [bool(room) for room in tier.lookup([key_of(n) for n in range(6)])] == [True, False, False, True] + [
            True
        ] * 2


async def test_files_are_touched_at_most_once_an_interval(tmp_path: Path) -> None:
    calls = FaultyOs()
    async with disk_tier(tmp_path, calls=calls, touch_interval_s=3600.0) as tier:
        await tier.write([write_request(0)])
        written = calls.calls["touch"]
        await read_one(tier, 0)
        assert calls.calls["touch"] == written  # it was written just now
    old = 1_000_000_000
    os.utime(file_of(tmp_path, key_of(0)), (old, old))
    async with disk_tier(tmp_path, calls=calls, touch_interval_s=3600.0) as tier:
        await tier.scanned()
        await read_one(tier, 0)
        await read_one(tier, 0)
        assert calls.calls["touch"] == written + 1
    assert file_of(tmp_path, key_of(0)).stat().st_mtime > old + 1e6


async def test_a_smaller_capacity_is_kept_after_the_scan(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(n) for n in range(20)])
    async with disk_tier(tmp_path, capacity_bytes=5 * FRAME) as tier:
        await tier.scanned()
        assert tier.used_bytes == 5 * FRAME
        assert len(list((tmp_path / "blocks").rglob("*.kv1"))) == 5
        assert tier.stats().evicted_blocks == 15


async def test_blocks_are_served_before_the_scan_has_come_to_them(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(n) for n in range(50)])
    calls = FaultyOs()
    calls.hold("listdir")
    async with disk_tier(tmp_path, calls=calls) as tier:
        assert tier.lookup([key_of(0), key_of(1)]) == [0, 0]
        assert not tier.stats().scan.complete
        assert (await read_one(tier, 0)).reason is None
        assert list(map(bool, await tier.find([key_of(1), key_of(60)]))) == [True, False]
        assert tier.lookup([key_of(0), key_of(1), key_of(2)]) == [NBYTES, NBYTES, 0]
        assert (await tier.write([write_request(2)]))[0].outcome is SaveOutcome.ALREADY_STORED
        assert await tier.write([write_request(60)]) == [STORED]
        calls.release()
        await tier.scanned()
        progress = tier.scan_progress
        assert progress.complete
        assert progress.parts_done == progress.parts_total == len({key_of(n)[0] for n in [*range(50), 60]})
        assert tier.used_bytes == 51 * FRAME
        assert all(tier.lookup([key_of(n) for n in [*range(50), 60]]))


async def test_what_is_deleted_while_the_scan_looks_at_it_stays_deleted(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(0)])
    calls = FaultyOs()
    async with disk_tier(tmp_path, rescan_interval_s=None) as watcher:
        await watcher.scanned()
        original = calls.stat

        def look_and_then_delete(path: str, dir_fd: int | None = None) -> os.stat_result:
            status = original(path, dir_fd)
            if dir_fd is not None and path.endswith(".kv1"):
                assert watched._files.delete(key_of(0))
            return status

        calls.stat = look_and_then_delete  # type: ignore[method-assign]
        watched = disk_tier(tmp_path, calls=calls)
        async with watched:
            await watched.scanned()
            assert watched.lookup([key_of(0)]) == [0]
            assert watched.used_bytes == 0


# -- several tiers at once -------------------------------------------------------------------------------


async def test_one_tier_finds_what_another_writes_and_deletes(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as one, disk_tier(tmp_path) as two:
        await asyncio.gather(one.scanned(), two.scanned())
        await one.write([write_request(0), write_request(1)])
        assert two.lookup([key_of(0)]) == [0]
        assert all(await two.find([key_of(0)]))
        assert (await read_one(two, 1)).reason is None
        assert two.used_bytes == 2 * FRAME
        assert (await two.write([write_request(0)]))[0].outcome is SaveOutcome.ALREADY_STORED
        assert await two.delete([key_of(0)]) == [True]
        outcome = await read_one(one, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.EVICTED, Cause.ABSENT)
        assert one.lookup([key_of(0)]) == [0]


async def test_a_rescan_brings_index_and_directory_together(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as one, disk_tier(tmp_path, rescan_interval_s=0.02) as two:
        await one.write([write_request(n) for n in range(3)])
        await until(lambda: all(two.lookup([key_of(n) for n in range(3)])))
        assert two.used_bytes == 3 * FRAME
        await one.delete([key_of(1)])
        await until(lambda: two.lookup([key_of(1)]) == [0])
        assert two.used_bytes == 2 * FRAME


async def test_a_block_deleted_while_it_is_read_is_still_whole(tmp_path: Path) -> None:
    calls = FaultyOs()
    async with disk_tier(tmp_path, calls=calls) as one, disk_tier(tmp_path) as two:
        await one.write([write_request(0)])
        calls.hold("preadv")
        task = asyncio.create_task(read_one(one, 0))
        await until(lambda: calls.num_held == 1)
        assert await two.delete([key_of(0)]) == [True]
        calls.release()
        assert (await task).reason is None


async def test_other_namespaces_count_and_make_room(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, namespace=OTHER_NAMESPACE) as other:
        await other.write([write_request(n) for n in range(3)])
    await asyncio.sleep(0.01)
    async with disk_tier(tmp_path, capacity_bytes=4 * FRAME) as tier:
        await tier.scanned()
        assert tier.used_bytes == 3 * FRAME
        assert tier.lookup([key_of(n) for n in range(3)]) == [0, 0, 0]
        assert await tier.write([write_request(n) for n in range(3)]) == [STORED] * 3
        assert tier.used_bytes == 4 * FRAME
    assert len(list((tmp_path / "blocks" / OTHER_NAMESPACE.hex()).rglob("*.kv1"))) == 1


WORKER = """
import asyncio, random, sys
from pathlib import Path
from kvortex.testing.tier_conformance import is_right, key_of, read_request, write_request
from kvortex.tiers import Cause
from kvortex.tiers.frame import frame_bytes
from tests.tiers.disk_support import disk_tier

async def main(root, seed):
    rng, hits = random.Random(seed), 0
    async with disk_tier(Path(root), capacity_bytes=40 * frame_bytes(12288), rescan_interval_s=0.05) as tier:
        for _ in range(150):
            numbers = [rng.randrange(80) for _ in range(4)]
            if rng.random() < 0.5:
                for outcome in await tier.write([write_request(n) for n in numbers]):
                    assert outcome.cause in (None, Cause.ABSENT), outcome
            elif rng.random() < 0.1:
                await tier.delete([key_of(n) for n in numbers])
            else:
                requests = [read_request(n) for n in numbers]
                for request, outcome in zip(requests, await tier.read(requests)):
                    assert is_right(request, outcome) or outcome.cause is Cause.ABSENT, outcome
                    hits += outcome.reason is None
    print(hits)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_several_processes_share_a_directory(tmp_path: Path) -> None:
    arguments = [[sys.executable, "-c", WORKER, str(tmp_path), str(seed)] for seed in range(3)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for command in arguments]
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err.decode()
        assert int(out) > 20
    assert temp_files(tmp_path) == []
    assert list((tmp_path / "tmp").iterdir()) == []


# -- dead writers ----------------------------------------------------------------------------------------

DIE = """
import os, signal, sys
from kvortex.tiers.disk.os_calls import OsCalls
from kvortex.tiers.disk.temp_space import TempSpace
space = TempSpace(sys.argv[1], OsCalls())
space.open()
for _ in range(3):
    open(space.new_path(), "wb").write(b"half a block")
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_a_dead_writer(directory: Path, alive: Path) -> None:
    alive.write_bytes(b"being written")
    died = subprocess.run([sys.executable, "-c", DIE, str(directory)], check=False)
    assert died.returncode == -signal.SIGKILL


async def test_temporary_files_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as living:
        alive = Path(living._temp.new_path())
        await asyncio.to_thread(leave_a_dead_writer, tmp_path / "tmp", alive)
        assert len(temp_files(tmp_path)) == 4
        async with disk_tier(tmp_path) as tier:
            await tier.scanned()
            assert temp_files(tmp_path) == [alive]
        assert len(list((tmp_path / "tmp").glob("*.lock"))) == 1
        assert await living.write([write_request(0)]) == [STORED]
        os.unlink(alive)
    assert list((tmp_path / "tmp").iterdir()) == []


# -- what belongs to somebody else -----------------------------------------------------------------------


async def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(0)])
    fan_out = file_of(tmp_path, key_of(0)).parent
    later = [
        fan_out / f"{key_of(0).hex()}.kv2",
        fan_out / f"{key_of(0).hex()}.kv1.bak",
        fan_out / "short.kv1",
        fan_out / f"{'zz' * 32}.kv1",
        fan_out / f"{key_of(1).hex()}.kv1",  # in another key's directory
        fan_out.parent / "index",
        tmp_path / "blocks" / "v2",
        tmp_path / "README",
    ]
    for path in later:
        path.write_bytes(b"x" * 100)
    (fan_out / f"{key_of(0)[:1].hex()}{'00' * 31}.kv1").symlink_to(tmp_path / "README")
    async with disk_tier(tmp_path, capacity_bytes=2 * FRAME) as tier:
        await tier.scanned()
        assert tier.stats().num_blocks == 1
        await tier.write([write_request(n) for n in (2, 3, 4)])
    assert all(path.read_bytes() == b"x" * 100 for path in later)


async def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    async with disk_tier(tmp_path / "tier") as tier:
        await tier.write([write_request(0)])
        file = file_of(tmp_path / "tier", key_of(0))
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        assert (await read_one(tier, 0)).reason is MissReason.TRANSFER_FAILED


async def test_a_frame_of_a_later_version_is_ignored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = payload_of(key_of(0))
    header = FrameHeader(NAMESPACE, key_of(0), 0, NBYTES, NBYTES, digest_of(payload))
    monkeypatch.setattr("kvortex.tiers.frame.FORMAT_VERSION", 3)
    later = encode_header(header) + payload
    monkeypatch.undo()
    file = file_of(tmp_path, key_of(0))
    async with disk_tier(tmp_path) as tier:
        file.parent.mkdir(parents=True)
        file.write_bytes(later)
        outcome = await read_one(tier, 0)
        assert (outcome.reason, outcome.cause) == (MissReason.NEVER_STORED, Cause.UNKNOWN_VERSION)
        (written,) = await tier.write([write_request(0)])
        assert (written.outcome, written.cause) == (SaveOutcome.FAILED, Cause.UNKNOWN_VERSION)
        assert tier.stats().removed_corrupt == 0
    async with disk_tier(tmp_path, rescan_interval_s=0.01, capacity_bytes=FRAME) as tier:
        assert (await read_one(tier, 0)).cause is Cause.UNKNOWN_VERSION
        before = tier.scan_progress
        await until(lambda: tier.scan_progress is not before and tier.scan_progress.complete)
        assert tier.lookup([key_of(0)]) == [0]
        for number in (1, 2):
            assert await tier.write([write_request(number)]) == [STORED]
    assert file.read_bytes() == later
    file.write_bytes(encode_header(replace(header)) + payload)  # and the test itself is sound
    async with disk_tier(tmp_path) as tier:
        assert (await read_one(tier, 0)).reason is None


async def test_a_damaged_file_of_another_process_is_written_over(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.scanned()  # which would take a file's name for a block's until it is read
        file = file_of(tmp_path, key_of(0))
        file.parent.mkdir(parents=True)
        for data in (b"", b"short", bytes(FRAME)):
            file.write_bytes(data)
            assert await tier.write([write_request(0)]) == [STORED]
            assert (await read_one(tier, 0)).reason is None
            await tier.delete([key_of(0)])


# -- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity_bytes": 0},
        {"read_threads": 0},
        {"write_threads": -1},
        {"touch_interval_s": -1.0},
        {"rescan_interval_s": 0.0},
        {"close_timeout_s": -0.1},
    ],
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DiskTierConfig(**{"path": "/nowhere", "capacity_bytes": FRAME, **settings})  # type: ignore[arg-type]


def test_a_disk_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk\.path must name a directory"):
        disk_tier("")


def test_a_namespace_is_a_digest() -> None:
    with pytest.raises(InvalidHashError, match="namespace"):
        DiskLayout("/nowhere", b"short")


async def test_verification_may_be_left_to_the_caller(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, verify=False) as tier:
        await tier.write([write_request(0)])
        file = file_of(tmp_path, key_of(0))
        data = bytearray(file.read_bytes())
        data[5000] ^= 1
        file.write_bytes(data)
        request = write_request(0)
        buffer = bytearray(NBYTES)
        (outcome,) = await tier.read([ReadRequest(key_of(0), buffer)])
        assert outcome.reason is None
        assert outcome.digest == request.digest != digest_of(bytes(buffer))
