"""Compiled kernels on disk: found again, and compiled again whenever anything is amiss."""

import os
from pathlib import Path

import pytest

from kvortex.errors import UnsupportedKernelError
from kvortex.kernels import device as device_kernels
from kvortex.kernels import ptx_cache
from kvortex.kernels.ptx_cache import load_cached

KERNEL = (".version 8.0\n.entry move() { ret; }\n", "move")


class Compiler:
    """Gives PTX of one version and counts."""

    def __init__(self, ptx_version: str = "8.0") -> None:
        self.kernel = (KERNEL[0].replace("8.0", ptx_version), KERNEL[1])
        self.runs = 0

    def __call__(self) -> tuple[str, str]:
        self.runs += 1
        return self.kernel


def load(ptx: str, name: str) -> tuple[str, str]:
    """A driver that takes everything."""
    return ptx, name


def load_by_an_old_driver(ptx: str, name: str) -> tuple[str, str]:
    if ".version 9" in ptx:
        raise UnsupportedKernelError("cuModuleLoadData failed: CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    return ptx, name


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    compiler = Compiler()
    for _ in range(3):
        assert load_cached(("gather", (9, 0)), compiler, load, tmp_path) == KERNEL
    assert compiler.runs == 1


@pytest.mark.parametrize("other", [("scatter", (9, 0)), ("gather", (8, 0))])
def test_another_kernel_has_a_file_of_its_own(tmp_path: Path, other: tuple[object, ...]) -> None:
    compiler = Compiler()
    load_cached(("gather", (9, 0)), compiler, load, tmp_path)
    load_cached(other, compiler, load, tmp_path)
    assert compiler.runs == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "x", "truncated", "flipped"])
def test_a_damaged_file_is_compiled_again_and_replaced(tmp_path: Path, damage: str) -> None:
    compiler = Compiler()
    load_cached(("gather",), compiler, load, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text({"truncated": whole[:-5], "flipped": whole.replace("ret", "exi")}.get(damage, damage))
    assert load_cached(("gather",), compiler, load, tmp_path) == KERNEL
    assert compiler.runs == 2
    assert path.read_text() == whole


def test_other_sources_are_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    load_cached(("gather",), compiler, load, tmp_path)
    monkeypatch.setattr(ptx_cache, "_fingerprint", lambda: "changed")
    load_cached(("gather",), compiler, load, tmp_path)
    assert compiler.runs == 2


# -- drivers and compilers that differ ---------------------------------------------------------------


def test_what_a_newer_nvvm_compiled_is_compiled_again_for_an_older_driver(tmp_path: Path) -> None:
    newer, older = Compiler("9.1"), Compiler("8.4")
    load_cached(("gather",), newer, load, tmp_path)
    for _ in range(2):
        assert load_cached(("gather",), older, load_by_an_old_driver, tmp_path) == older.kernel
    assert (newer.runs, older.runs) == (1, 1)


def test_what_this_driver_does_not_take_is_an_error_and_not_kept(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UnsupportedKernelError):
            load_cached(("gather",), Compiler("9.1"), load_by_an_old_driver, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [(2, 0, 3, 3, "libnvvm.so.4.0.0", 7), (2, 0, 3, 2, "libnvvm.so.4.0.0", 8), ()])
def test_every_nvvm_has_kernels_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[object, ...]
) -> None:
    """Two machines with one home: each compiles for itself, once."""

    class FakeDevice:
        compute_capability = (9, 0)

        def load_kernel(self, ptx: str, name: str) -> int:
            return len(ptx)

    compiler = Compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_kernels, "compile_ptx", lambda *arguments, **options: compiler())
    for nvvm in ((2, 0, 3, 2, "libnvvm.so.4.0.0", 7), other) * 2:
        monkeypatch.setattr(device_kernels, "nvvm_version", lambda version=nvvm: version)
        assert device_kernels._load_kernels(FakeDevice(), None) == (len(KERNEL[0]),) * 2  # type: ignore[arg-type]
    assert compiler.runs == 4


# -- where it lies -----------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_said_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    caplog.set_level("INFO")
    assert load_cached(("gather",), Compiler(), load, tmp_path / "file" / "below") == KERNEL
    assert "every start compiles them" in caplog.text


def test_no_temporary_file_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ptx_cache.os, "replace", full)
    assert load_cached(("gather",), Compiler(), load, tmp_path) == KERNEL
    assert list(tmp_path.iterdir()) == []


def test_the_users_cache_directory_is_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_cached(("gather",), Compiler(), load)
    assert len(list((tmp_path / "kvortex" / "kernels").iterdir())) == 1


@pytest.mark.parametrize("home", ["none", "read-only"])
def test_without_a_home_to_write_to_a_private_folder_is_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    compiler = Compiler()
    for _ in range(2):
        assert load_cached(("gather",), compiler, load) == KERNEL
    assert compiler.runs == 1
    assert len(list((tmp_path / f"kvortex-{os.geteuid()}" / "kernels").iterdir())) == 1


def test_with_no_place_at_all_every_start_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    caplog.set_level("INFO")
    compiler = Compiler()
    for _ in range(2):
        assert load_cached(("gather",), compiler, load) == KERNEL
    assert compiler.runs == 2
    assert "every start compiles them" in caplog.text
