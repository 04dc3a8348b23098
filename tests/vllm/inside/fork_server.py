"""One process that has imported vLLM, and forks a child for each test file: `vllm_runs.py` starts it.

    python fork_server.py MODULE ...

It imports the modules, then reads a line of JSON for each file from stdin,
``{"tests": [node ids], "log": path, "reports": path}``, and runs those tests in a child that starts with everything
imported and nothing else done. A line on stdout says that a child has ended, ``{"log": path, "status": exit status}``;
a negative status is a signal. When stdin ends, so do the children and the process.
"""

import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import random
import selectors
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

FILE_TIMEOUT_S = 900.0
freeze = gc.freeze  # `engine_support` replaces it


class Reports:
    """pytest plugin: a line of JSON for each report, written as it comes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        sections = "".join(f"\n--- {title} ---\n{text[-4000:]}" for title, text in report.sections if report.failed)
        reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        line = {
            "test": report.nodeid,
            "phase": report.when,
            "outcome": report.outcome,
            "text": report.longreprtext + sections if report.failed else reason.removeprefix("Skipped: "),
            "seconds": report.duration,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run(job: dict[str, Any]) -> int:
    """In the child: run the tests of one file."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, file in enumerate((nothing, log, log)):
        os.dup2(file, descriptor)
    faulthandler.dump_traceback_later(FILE_TIMEOUT_S, exit=True)
    random.seed()
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--color=no"]
    # Some plugins were imported with vLLM: that their asserts say less is no error.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([*options, *job["tests"]], plugins=[Reports(job["reports"])])


class Server:
    """Forks for each line of stdin, until it ends."""

    def __init__(self) -> None:
        self._children: dict[int, str] = {}
        self._jobs = io.FileIO(0, closefd=False)  # has no buffer: what was not read yet is seen by `select`
        self._answers = os.dup(1)
        os.dup2(2, 1)  # what is printed here is no answer
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._jobs, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> int:
        """Returns in each child too, with its exit status."""
        signal.set_wakeup_fd(self._wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._woken:
                    os.read(self._woken, 4096)
                    self._tell_ended()
                    continue
                line = self._jobs.readline()
                if not line:
                    for child in self._children:
                        os.kill(child, signal.SIGKILL)
                    return 0
                job = json.loads(line)
                child = os.fork()
                if child == 0:
                    self._forget()
                    return run(job)
                self._children[child] = job["log"]

    def _tell_ended(self) -> None:
        with contextlib.suppress(ChildProcessError):  # there is none left
            while True:
                child, status = os.waitpid(-1, os.WNOHANG)
                if child == 0:
                    return
                told = {"log": self._children.pop(child), "status": os.waitstatus_to_exitcode(status)}
                os.write(self._answers, (json.dumps(told) + "\n").encode())

    def _forget(self) -> None:
        """In the child: what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for descriptor in (self._answers, self._woken, self._wakes):
            os.close(descriptor)


if __name__ == "__main__":
    server = Server()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    freeze()  # a million objects: no child's collections look through them, which takes seconds
    sys.exit(server.serve())
