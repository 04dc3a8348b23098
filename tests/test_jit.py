"""What numba compiles is kept where it can be, and nothing fails where it cannot."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from kvortex.runtime import jit
from kvortex.runtime.private_folder import private_folder

PACKAGE = Path(jit.__file__).parents[1]
ROUND_TRIP = """
import asyncio, logging, torch
logging.basicConfig(level="INFO", format="%(name)s %(message)s")
from kvortex import KVortexConfig, KVortexEngine, hash_blocks
import kvortex.index
async def main():
    async with KVortexEngine.create(KVortexConfig(pool=1 << 20)) as engine:
        engine.register_kv_caches({"layer": torch.zeros(2, 8, 16, 1, 16)}, block_size=16)
        saved = await engine.save_blocks(hash_blocks(range(32)), [0, 1])
        print(kvortex.__file__, saved.ok)
asyncio.run(main())
"""


@pytest.fixture
def sealed_package(tmp_path: Path) -> Path:
    """A copy of the package that nothing can be written into, by any user: files lie where folders would be made."""
    copy = tmp_path / "site" / "kvortex"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_text("")
    return copy


def run_sealed(package: Path, temporary: str, **home: str) -> subprocess.CompletedProcess[str]:
    """A save by the sealed package, without a home and with another temporary directory."""
    hidden = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "NUMBA_CACHE_LOCATOR_CLASSES")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(package.parent), "TMPDIR": temporary, **home}
    return subprocess.run(
        [sys.executable, "-c", ROUND_TRIP],
        env=environment,
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("home", [{"XDG_CACHE_HOME": "/dev/null/cache"}, {"HOME": "~"}])  # not writable, not known
def test_a_read_only_package_without_a_home_keeps_what_it_compiles_in_a_private_folder(
    sealed_package: Path, tmp_path: Path, home: dict[str, str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    result = run_sealed(sealed_package, str(temporary), **home)
    assert result.stdout.split() == [str(sealed_package / "__init__.py"), "True"], result.stderr
    (folder,) = (path for path in temporary.iterdir() if path.name.startswith("kvortex-"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("*.nbc"))
    assert result.stderr.count("compiled functions are kept in") == 1
    assert [path.name for path in sealed_package.parent.iterdir()] == ["kvortex"]


@pytest.mark.slow
def test_where_nothing_can_be_written_at_all_everything_is_compiled(sealed_package: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (temporary / f"kvortex-{os.geteuid()}").write_text("in the way")
    result = run_sealed(sealed_package, str(temporary), XDG_CACHE_HOME="/dev/null/cache")
    assert result.stdout.split()[-1:] == ["True"], result.stderr
    assert result.stderr.count("so every start compiles them") == 1


def test_nothing_decorates_around_it() -> None:
    numbas_own = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if path.name != "jit.py"
        if "numba.njit" in (text := path.read_text()) or "from numba import njit" in text
    ]
    assert numbas_own == []


# -- the cache itself --------------------------------------------------------------------------------


def compile_in(directory: Path, source: str = "def twice(x):\n    return 2 * x\n") -> numba.core.dispatcher.Dispatcher:
    """`twice`, decorated anew, from a module below `directory`, whose `__pycache__` keeps what is compiled."""
    path = directory / "module.py"
    if not path.exists():
        path.write_text(source)
    names: dict[str, object] = {"__name__": "module"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return jit.njit(cache=True)(names["twice"])


@pytest.fixture(autouse=True)
def own_messages() -> None:
    for say_once in (jit._say_nothing_is_kept, jit._say_not_written, jit._temporary_folder):
        say_once.cache_clear()


def test_what_was_compiled_is_found_again(tmp_path: Path) -> None:
    assert compile_in(tmp_path)(21) == 42
    again = compile_in(tmp_path)
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04K\x01."])
def test_a_damaged_file_is_compiled_again_and_replaced(tmp_path: Path, suffix: str, content: bytes) -> None:
    compile_in(tmp_path)(21)
    (path,) = (tmp_path / "__pycache__").glob(f"*.{suffix}")
    path.write_bytes(content)
    assert compile_in(tmp_path)(21) == 42
    assert sum((last := compile_in(tmp_path)).stats.cache_hits.values()) == 0
    assert last(21) == 42
    assert sum(last.stats.cache_hits.values()) == 1


def test_a_full_disk_costs_a_compilation_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    twice = compile_in(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    assert (twice(21), twice(1.5)) == (42, 3.0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text


# -- the private folder ------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"kvortex-{os.geteuid()}"


def test_the_folder_is_made_for_its_user_alone(temporary: Path) -> None:
    assert private_folder() == temporary == private_folder()
    assert temporary.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["writable by others", "a link", "another user's"])
def test_a_folder_that_somebody_else_may_write_is_not_used(
    temporary: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = temporary if kind != "a link" else temporary.with_name("elsewhere")
    target.mkdir(mode=0o700)
    if kind == "writable by others":
        target.chmod(0o777)
    elif kind == "a link":
        temporary.symlink_to(target)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: int(temporary.name.removeprefix("kvortex-")) + 1)
        temporary.rename(temporary.with_name(f"kvortex-{os.geteuid()}"))
    assert private_folder() is None


def test_without_a_temporary_directory_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    assert private_folder() is None
