"""Runs test files inside vLLM: a process for each version, which forks a child for each file."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vllm_settings import INSIDE, REPOSITORY, set_variables

VERSIONS = ("0.32.0", "0.15.1")
# No CPU build: its own scheduler, with played workers.
SCHEDULER_ONLY = "0.23.0"
SCHEDULER_FILES = tuple(
    f"test_{name}.py"
    for name in ("hybrid_lives", "hybrid_scheduler", "lookup", "placement", "progress", "room", "scheduler")
)
# No CPU build either, but it runs on 0.32.0's operators: what sees a difference between versions.
NEWEST = "0.33.0"
NEWEST_FILES = tuple(
    f"test_{name}.py"
    for name in (
        *("engine", "hybrid_lives", "hybrid_scheduler", "interface", "lookup", "models", "parts", "placement"),
        *("pressure", "room", "scheduler", "sleep"),
    )
)
NEWEST_ONLY = ("test_vllms_own.py",)
"""vLLM's own tests are those of this version."""
AT_A_TIME = 3
"""Files. Most of what each takes is one core's, and a quarter of its time it waits for something."""
LONGEST_FIRST = tuple(
    f"test_{name}.py"
    for name in (
        *(
            "models",
            "benchmark",
            "uneven",
            "canonical",
            "progress",
            "examples",
            "chat",
            "tensor_parallel",
            "mismatch",
            "owner",
            "disk",
        ),
        *("fleet", "prefill_decode", "multi", "vllms_own", "hybrid_lives", "placement", "not_reused", "adapters"),
    )
)
"""So that no long file is left when all others have ended."""
LOG_TAIL = 8000
"""Characters of a process's output that a failure shows."""

_OF_SCHEDULERS = ("scheduler_harness", "engine_support")
_OF_ENGINES = (*_OF_SCHEDULERS, "vllm.v1.worker.cpu_worker")


class NoEnvironment(Exception):
    """A version's environment could not be made, or does not start."""


@dataclass
class Case:
    """What one test, or one set of its parameters, came to."""

    name: str
    outcome: str
    """passed, skipped or failed."""
    text: str = ""
    """Why, unless it passed."""
    seconds: float = 0.0


@dataclass
class FileRun:
    """What one file came to, in a process of its own."""

    status: int
    """The process's exit status; negative: the signal that ended it."""
    log: str
    cases: dict[str, list[Case]] = field(default_factory=dict)
    """By function."""

    def problem_of(self, function: str) -> str:
        """What is wrong with a function's tests, or "". Where a process died, nothing that it said counts."""
        cases = self.cases.get(function, [])
        failed = [f"{case.name}\n{case.text}" for case in cases if case.outcome == "failed"]
        if failed:
            return "\n\n".join(failed)
        is_explained = self.status == 0 or (self.status == 1 and "failed" in self._outcomes())
        if is_explained and cases:
            return ""
        return f"no result of {function}: its process ended with {self.status}\n{self.log[-LOG_TAIL:]}"

    def _outcomes(self) -> set[str]:
        return {case.outcome for cases in self.cases.values() for case in cases}


def versions_of(file_name: str) -> tuple[str, ...]:
    if file_name in NEWEST_ONLY:
        return (NEWEST,)
    some = ((SCHEDULER_ONLY, SCHEDULER_FILES), (NEWEST, NEWEST_FILES))
    return (*VERSIONS, *(version for version, files in some if file_name in files))


class ForkServer:
    """A Python that has imported vLLM; see `inside/fork_server.py`."""

    def __init__(self, python: Path, modules: Sequence[str], work: Path, environment: dict[str, str]) -> None:
        command = [str(python), str(INSIDE / "fork_server.py"), *modules]
        self._work = work
        self._output = work / "server.txt"
        self._running: dict[str, Future[int]] = {}
        self._lock = threading.Lock()
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                bufsize=1,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, file: Path, functions: Iterable[str]) -> FileRun:
        """Run some of a file's tests. Raises `NoEnvironment` if the server has ended."""
        log, reports = self._work / f"{file.stem}.txt", self._work / f"{file.stem}.jsonl"
        reports.touch()
        job = {"tests": [f"{file}::{name}" for name in functions], "log": str(log), "reports": str(reports)}
        ended: Future[int] = Future()
        with self._lock:
            self._running[str(log)] = ended
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
        except OSError:
            self._reader.join()
        if not self._reader.is_alive():
            self._fail_all()
        status = ended.result()
        return FileRun(status, log.read_text(errors="replace"), cases_in(reports.read_text()))

    def close(self) -> None:
        """End what still runs."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and not read all
            self._process.stdin.close()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            with self._process.stdout as answers:
                for line in answers:
                    told = json.loads(line)
                    with self._lock:
                        self._running.pop(told["log"]).set_result(told["status"])
        finally:
            self._process.kill()
            self._fail_all()

    def _fail_all(self) -> None:
        """The process has ended: nobody will say more."""
        status = self._process.wait()
        with self._lock:
            for ended in self._running.values():
                text = self._output.read_text(errors="replace")[-LOG_TAIL:]
                ended.set_exception(NoEnvironment(f"the process that imports vLLM ended with {status}:\n{text}"))
            self._running.clear()


def cases_in(lines: str) -> dict[str, list[Case]]:
    """Reports of phases (setup, call, teardown) as cases by function. A case without a teardown has not ended."""
    cases: dict[str, Case] = {}
    ended = set()
    for line in lines.splitlines():
        told = json.loads(line)
        case = cases.setdefault(told["test"], Case(told["test"].split("::", 1)[1], "passed"))
        case.seconds += told["seconds"]
        if told["outcome"] != "passed":
            case.outcome = told["outcome"] if case.outcome != "failed" else "failed"
            case.text += told["text"]
        if told["phase"] == "teardown":
            ended.add(told["test"])
    by_function: dict[str, list[Case]] = {}
    for test, case in cases.items():
        if test not in ended and case.outcome != "failed":
            case.outcome, case.text = "failed", "it was running when its process ended"
        by_function.setdefault(case.name.split("[")[0], []).append(case)
    return by_function


class Runs:
    """The runs of one session: some files at a time, the longest first."""

    def __init__(self, work: Path, wanted: dict[tuple[str, Path], list[str]]) -> None:
        self._work = work
        self._servers: dict[str, Future[ForkServer]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        longest = {name: place for place, name in enumerate(LONGEST_FIRST)}
        ordered = sorted(wanted, key=lambda run: longest.get(run[1].name, len(longest)))
        self._started = {run: self._pool.submit(self._run, *run, wanted[run]) for run in ordered}

    def result(self, version: str, file: Path) -> FileRun:
        """Wait for a file. Raises `NoEnvironment`."""
        return self._started[version, file].result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for server in self._servers.values():
            if server.done() and server.exception() is None:
                server.result().close()
        self._pool.shutdown()

    def _run(self, version: str, file: Path, functions: list[str]) -> FileRun:
        with self._lock:
            is_first = version not in self._servers
            server = self._servers.setdefault(version, Future())
        if is_first:
            try:
                server.set_result(self._start(version))
            except BaseException as error:
                server.set_exception(error)
                raise
        return server.result().run(file, functions)

    def _start(self, version: str) -> ForkServer:
        python = python_with(version)
        work = self._work / version
        work.mkdir()
        environment = {**os.environ, "KVORTEX_EXPECTED": str(work / "expected.json")}
        set_variables(environment, str(python.parent.parent))
        modules = _OF_SCHEDULERS if version == SCHEDULER_ONLY else _OF_ENGINES
        return ForkServer(python, modules, work, environment)


def python_with(version: str) -> Path:
    """Python of an environment with that version; made once, kept in a cache folder. Raises `NoEnvironment`."""
    script = REPOSITORY / "scripts" / "vllm_cpu_env.py"
    done = subprocess.run([sys.executable, str(script), version], capture_output=True, text=True)
    if done.returncode:
        raise NoEnvironment(f"no environment for vLLM {version}: {done.stderr[-LOG_TAIL:]}")
    return Path(done.stdout.strip().splitlines()[-1])
