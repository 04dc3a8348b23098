"""What the disk tier touches in its directory: its own files, and nothing that others put there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NBYTES, key_of, write_request
from kvortex.tiers import Cause
from kvortex.tiers.disk.temp_space import LOCK_CONTENT
from tests.tiers.disk_support import disk_tier, file_of, read_one
from tests.tiers.faulty_os import FaultyOs

ID = "0123456789abcdef" * 2


def a_folder_of_a_job(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / "my_job").mkdir()
    return [temp / "my_job" / "results.csv"]


def a_folder_of_a_job_with_a_lock(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / "my_job").mkdir()
    return [temp / "my_job.lock", temp / "my_job" / "0.tmp"]


def a_file(temp: Path, elsewhere: Path) -> list[Path]:
    return [temp / "notes.txt", temp / ID]


def the_lock_of_the_directory_above(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / "...lock").touch()
    return [temp.parent / "README", temp.parent / "0.tmp"]


def a_link_of_another_name(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / "x").symlink_to(elsewhere)
    return [elsewhere / "0.tmp"]


def a_link_in_the_place_of_a_writer(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / f"{ID}.lock").write_bytes(LOCK_CONTENT)
    (temp / ID).symlink_to(elsewhere)
    return [elsewhere / "0.tmp"]


def a_link_in_the_place_of_a_lock(temp: Path, elsewhere: Path) -> list[Path]:
    (elsewhere / "lock").write_bytes(LOCK_CONTENT)
    (temp / f"{ID}.lock").symlink_to(elsewhere / "lock")
    (temp / ID).mkdir()
    return [temp / ID / "0.tmp"]


def a_lock_that_says_something_else(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / ID).mkdir()
    return [temp / f"{ID}.lock", temp / ID / "0.tmp"]


def a_writer_without_a_lock(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / ID).mkdir()
    return [temp / ID / "0.tmp"]


def a_writer_with_an_empty_lock(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / f"{ID}.lock").touch()
    (temp / ID).mkdir()
    return [temp / ID / "0.tmp"]


def other_files_beside_temporary_ones(temp: Path, elsewhere: Path) -> list[Path]:
    (temp / f"{ID}.lock").write_bytes(LOCK_CONTENT)
    (temp / ID).mkdir()
    (temp / ID / "1.tmp").symlink_to(elsewhere / "kept")
    return [temp / ID / "0.tmp.bak", temp / ID / "data", elsewhere / "kept"]


def a_pipe_in_the_place_of_a_lock(temp: Path, elsewhere: Path) -> list[Path]:
    os.mkfifo(temp / f"{ID}.lock")
    (temp / ID).mkdir()
    return [temp / ID / "0.tmp"]


FOREIGN = [
    a_folder_of_a_job,
    a_folder_of_a_job_with_a_lock,
    a_file,
    the_lock_of_the_directory_above,
    a_link_of_another_name,
    a_link_in_the_place_of_a_writer,
    a_link_in_the_place_of_a_lock,
    a_lock_that_says_something_else,
    a_writer_without_a_lock,
    a_writer_with_an_empty_lock,
    other_files_beside_temporary_ones,
    a_pipe_in_the_place_of_a_lock,
]


@pytest.mark.parametrize("make", FOREIGN)
async def test_what_others_put_into_the_temporary_directory_stays_and_the_scan_ends(
    tmp_path: Path, make: Callable[[Path, Path], list[Path]]
) -> None:
    root, elsewhere = tmp_path / "tier", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    async with disk_tier(root) as tier:
        await tier.write([write_request(0)])
    files = make(root / "tmp", elsewhere)
    for file in files:
        file.write_bytes(b"precious")
    async with disk_tier(root) as tier:
        await tier.scanned()
        assert tier.scan_progress.complete
        assert tier.lookup([key_of(0)]) == [NBYTES]
    assert [file.read_bytes() for file in files] == [b"precious"] * len(files)


async def test_a_dead_writer_that_cannot_be_looked_at_stops_neither_the_sweep_nor_the_scan(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(0)])
    owners = [f"{n:032x}" for n in range(3)]
    for owner in owners:
        (tmp_path / "tmp" / f"{owner}.lock").write_bytes(LOCK_CONTENT)
        (tmp_path / "tmp" / owner).mkdir()
        (tmp_path / "tmp" / owner / "0.tmp").write_bytes(b"half a block")
    calls = FaultyOs()
    calls.fail("open", errno.EACCES, when=lambda path, *_: path == owners[1])
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        assert tier.scan_progress.complete
        assert tier.stats().causes[Cause.PERMISSION] == 1
    left = sorted(path.name for path in (tmp_path / "tmp").iterdir())
    assert left == [owners[1], f"{owners[1]}.lock"]


async def test_a_namespace_that_cannot_be_read_does_not_end_the_scan(tmp_path: Path) -> None:
    other = b"o" * 32
    for namespace in (None, other):
        async with disk_tier(tmp_path, **({"namespace": namespace} if namespace else {})) as tier:
            await tier.write([write_request(n) for n in range(3)])
    calls = FaultyOs()
    calls.fail("open", errno.EACCES, when=lambda path, *_: path.endswith(f"/{other.hex()}"))
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        assert tier.scan_progress.complete
        assert all(tier.lookup([key_of(n) for n in range(3)]))


async def test_a_file_that_cannot_be_looked_at_does_not_hide_those_beside_it(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(n) for n in range(30)])
    calls = FaultyOs()
    bad = file_of(tmp_path, key_of(7)).name
    calls.fail("stat", errno.EIO, when=lambda path, *_: path == bad)
    async with disk_tier(tmp_path, calls=calls) as tier:
        await tier.scanned()
        assert tier.lookup([key_of(n) for n in range(30)]) == [NBYTES * (n != 7) for n in range(30)]
        assert tier.stats().causes[Cause.IO_ERROR] == 1


@pytest.mark.parametrize("place", ["namespace", "fan-out"])
async def test_blocks_behind_a_link_are_neither_counted_nor_evicted(tmp_path: Path, place: str) -> None:
    other, root, elsewhere = b"o" * 32, tmp_path / "tier", tmp_path / "elsewhere"
    async with disk_tier(root, namespace=other) as tier:
        await tier.write([write_request(0)])
    file = file_of(root, key_of(0), other)
    moved = file.parent.parent if place == "namespace" else file.parent
    moved.rename(elsewhere)
    moved.symlink_to(elsewhere)
    size = file.stat().st_size
    async with disk_tier(root, capacity_bytes=size) as tier:
        await tier.scanned()
        assert (tier.scan_progress.complete, tier.used_bytes) == (True, 0)
        for number in (1, 2):
            await tier.write([write_request(number)])
    assert file.stat().st_size == size


@pytest.mark.parametrize("below", ["", "blocks", "tmp", "namespace"])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
async def test_a_directory_that_others_may_write_to_is_refused_with_the_way_out(
    tmp_path: Path, below: str, mode: int
) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(0)])
    path = file_of(tmp_path, key_of(0)).parent.parent if below == "namespace" else tmp_path / below
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod go-w {path}"):
        await disk_tier(tmp_path).open()
    async with disk_tier(path / "kvortex") as tier:  # as the message says
        await tier.write([write_request(0)])
    path.chmod(0o700)
    async with disk_tier(tmp_path) as tier:
        assert (await read_one(tier, 0)).reason is None


async def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.write([write_request(0)])
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    with pytest.raises(ConfigError, match=f"belongs to user {somebody - 1}, not to {somebody}"):
        await disk_tier(tmp_path).open()


@pytest.mark.parametrize("place", ["blocks", "tmp"])
async def test_a_link_in_the_place_of_a_directory_is_refused(tmp_path: Path, place: str) -> None:
    root, elsewhere = tmp_path / "tier", tmp_path / "elsewhere"
    root.mkdir(mode=0o700)
    elsewhere.mkdir(mode=0o700)
    (root / place).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="cannot keep blocks"):
        await disk_tier(root).open()
    assert list(elsewhere.glob("*.lock")) == []


async def test_the_directory_itself_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "big_disk").mkdir(mode=0o700)
    (tmp_path / "tier").symlink_to(tmp_path / "big_disk")
    async with disk_tier(tmp_path / "tier") as tier:
        await tier.write([write_request(0)])
        assert (await read_one(tier, 0)).reason is None
    assert file_of(tmp_path / "big_disk", key_of(0)).exists()


@pytest.mark.parametrize("depth", [0, 1])
async def test_a_block_behind_a_linked_directory_is_neither_read_nor_removed(tmp_path: Path, depth: int) -> None:
    async with disk_tier(tmp_path / "tier") as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        linked = file_of(tmp_path / "tier", key_of(0)).parents[depth]
        linked.rename(tmp_path / "elsewhere")
        linked.symlink_to(tmp_path / "elsewhere")
        (file,) = (tmp_path / "elsewhere").rglob("*.kv1")
        file.write_bytes(b"damaged, and somebody else's")
        assert await tier.delete([key_of(0)]) == [False]
        assert await tier.find([key_of(0)]) == [0]
        assert (await read_one(tier, 0)).reason is not None
    assert file.read_bytes() == b"damaged, and somebody else's"


async def test_a_linked_directory_of_blocks_is_not_written_into(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "tier", tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with disk_tier(root) as tier:
        file_of(root, key_of(0)).parent.symlink_to(elsewhere)
        (outcome,) = await tier.write([write_request(0)])
        assert not outcome.outcome.is_stored
    assert list(elsewhere.iterdir()) == []
