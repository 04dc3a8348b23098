"""How tests inside vLLM are run and what is said of them, with processes that do without vLLM."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_runs import FileRun, ForkServer, NoEnvironment
from vllm_settings import REPOSITORY

PYTHON = Path(sys.executable)
FUNCTIONS = ["test_passes", "test_fails", "test_skips", "test_some"]
TESTS = """
import os, pytest

def test_passes(tmp_path): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no such thing here")

@pytest.mark.parametrize("number", [0, 1, 2])
def test_some(number):
    if number == 1:
        pytest.skip("not this one")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("not torn down")

def test_teardown(broken): pass
def test_dies(): os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(PYTHON, ["json"], tmp_path_factory.mktemp("server"), dict(os.environ))
    yield server
    server.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"test_{tmp_path.name}.py"
    path.write_text(TESTS)
    return path


def outcomes(run: FileRun, function: str) -> list[tuple[str, str]]:
    return [(case.outcome, case.text) for case in run.cases[function]]


def test_each_test_says_what_came_of_it(server: ForkServer, file: Path) -> None:
    run = server.run(file, FUNCTIONS)
    assert run.status == 1
    assert [function for function in FUNCTIONS if run.problem_of(function)] == ["test_fails"]
    assert "assert 1 == 2" in run.problem_of("test_fails")
    assert outcomes(run, "test_skips") == [("skipped", "no such thing here")]
    assert outcomes(run, "test_some") == [("passed", ""), ("skipped", "not this one"), ("passed", "")]


def test_a_failed_teardown_fails_its_test(server: ForkServer, file: Path) -> None:
    assert "not torn down" in server.run(file, ["test_teardown"]).problem_of("test_teardown")


def test_a_process_that_dies_fails_all_its_tests(server: ForkServer, file: Path) -> None:
    run = server.run(file, ["test_passes", "test_dies", "test_skips"])
    assert run.status == -9
    for function in ("test_passes", "test_skips"):
        assert "ended with -9" in run.problem_of(function)
    assert "it was running when its process ended" in run.problem_of("test_dies")
    assert server.run(file, ["test_passes"]).problem_of("test_passes") == "", "the next one is not concerned"


def test_a_file_that_cannot_be_imported_fails_all_its_tests(server: ForkServer, file: Path) -> None:
    file.write_text("import no_such_module\n" + TESTS)
    run = server.run(file, FUNCTIONS)
    assert all("No module named 'no_such_module'" in run.problem_of(function) for function in FUNCTIONS)


def test_a_test_that_is_not_there_fails(server: ForkServer, file: Path) -> None:
    assert "not found" in server.run(file, ["test_gone"]).problem_of("test_gone")


def test_an_environment_without_what_is_imported_says_so(tmp_path: Path, file: Path) -> None:
    server = ForkServer(PYTHON, ["no_such_module"], tmp_path, dict(os.environ))
    for _ in range(2):
        with pytest.raises(NoEnvironment, match="No module named 'no_such_module'"):
            server.run(file, ["test_passes"])
    server.close()


def test_tests_that_run_end_with_the_session(tmp_path: Path) -> None:
    file = tmp_path / "test_endless.py"
    file.write_text("import time, pathlib\ndef test_endless():\n    (pathlib.Path(__file__).parent / 'began').touch()\n"
                    "    time.sleep(3600)\n")  # fmt: skip
    server = ForkServer(PYTHON, ["json"], tmp_path, dict(os.environ))
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(NoEnvironment):
            server.run(file, ["test_endless"])
        ended.append("with an error")

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not (tmp_path / "began").exists():
        assert waiting.is_alive()
        threading.Event().wait(0.01)
    server.close()
    waiting.join()
    assert ended == ["with an error"]


def test_without_an_environment_one_test_fails_and_the_others_are_skipped() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no xdist's worker
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/vllm/inside/test_packing.py", "-k", "0.15"],
        env={**own, "KVORTEX_CACHE_DIR": "/dev/null/no folder"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no environment for vLLM 0.15.1" in done.stdout
    assert "vLLM 0.15.1 does not start: its first test says why" in done.stdout
    assert " 1 failed, " in done.stdout
    assert " passed" not in done.stdout


def test_every_test_function_is_collected_for_each_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "tests/vllm/inside"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    names = {line.removeprefix("tests/vllm/inside/") for line in done.stdout.splitlines() if "::" in line}
    for version in ("0.32.0", "0.15.1"):
        assert f"test_engine.py::test_a_conversation[{version}]" in names
    assert any(name.startswith("test_scheduler.py::") and name.endswith("[0.23.0]") for name in names)
    assert not any(name.startswith("test_engine.py::") and name.endswith("[0.23.0]") for name in names)
    assert {name.split("[")[1] for name in names if name.startswith("test_vllms_own.py::")} == {"0.33.0]"}
