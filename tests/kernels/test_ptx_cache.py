"""Compiled kernels on disk: found again, and compiled again whenever anything is amiss."""

from pathlib import Path

import pytest

from kvortex.kernels import ptx_cache
from kvortex.kernels.ptx_cache import cached_ptx

KERNEL = (".version 8.0\n.entry move() { ret; }\n", "move")


class Compiler:
    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> tuple[str, str]:
        self.runs += 1
        return KERNEL


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    compiler = Compiler()
    for _ in range(3):
        assert cached_ptx(("gather", (9, 0)), compiler, tmp_path) == KERNEL
    assert compiler.runs == 1


@pytest.mark.parametrize("other", [("scatter", (9, 0)), ("gather", (8, 0))])
def test_another_kernel_has_a_file_of_its_own(tmp_path: Path, other: tuple[object, ...]) -> None:
    compiler = Compiler()
    cached_ptx(("gather", (9, 0)), compiler, tmp_path)
    cached_ptx(other, compiler, tmp_path)
    assert compiler.runs == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "x", "truncated", "flipped"])
def test_a_damaged_file_is_compiled_again_and_replaced(tmp_path: Path, damage: str) -> None:
    compiler = Compiler()
    cached_ptx(("gather",), compiler, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text({"truncated": whole[:-5], "flipped": whole.replace("ret", "exi")}.get(damage, damage))
    assert cached_ptx(("gather",), compiler, tmp_path) == KERNEL
    assert compiler.runs == 2
    assert path.read_text() == whole


def test_other_sources_are_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    cached_ptx(("gather",), compiler, tmp_path)
    monkeypatch.setattr(ptx_cache, "_fingerprint", lambda: "changed")
    cached_ptx(("gather",), compiler, tmp_path)
    assert compiler.runs == 2


def test_a_place_that_cannot_be_written_is_said_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    caplog.set_level("INFO")
    assert cached_ptx(("gather",), Compiler(), tmp_path / "file" / "below") == KERNEL
    assert "every start compiles them" in caplog.text


def test_no_temporary_file_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ptx_cache.os, "replace", full)
    assert cached_ptx(("gather",), Compiler(), tmp_path) == KERNEL
    assert list(tmp_path.iterdir()) == []


def test_the_users_cache_directory_is_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_ptx(("gather",), Compiler())
    assert len(list((tmp_path / "kvortex" / "kernels").iterdir())) == 1
