"""Tests inside vLLM, `inside/test_*.py`.

Where this Python has vLLM they are tests like others. Where it has not, each of their functions is an item for each
version, `test_engine.py::test_reset[0.32.0]`, which runs in that version's environment and hands back what came of it.
"""

import ast
import importlib
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_runs import Case, NoEnvironment, Runs, versions_of
from vllm_settings import INSIDE, is_vllm_here, set_paths, set_variables

IS_VLLM_HERE = is_vllm_here()
RUNS = pytest.StashKey[Runs]()
VERSIONS_WITHOUT = pytest.StashKey[set[str]]()

if IS_VLLM_HERE:
    set_variables(os.environ, sys.prefix)  # now: torch and vLLM read them when they are imported
    set_paths()


def pytest_configure(config: pytest.Config) -> None:
    if IS_VLLM_HERE:
        config.addinivalue_line("filterwarnings", "default")  # vLLM's own are many
        config.pluginmanager.register(importlib.import_module("inside_fixtures"))
        importlib.import_module("forked").start_template()  # now, while this process has done nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == INSIDE:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.leaves_extents)  # engines outlive a test and check themselves at their end


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if IS_VLLM_HERE or module_path.parent != INSIDE:
        return None
    return InsideFile.from_parent(parent, path=module_path)


class InsideFile(pytest.File):
    """A file of tests that this Python cannot import."""

    def collect(self) -> Iterator["InsideItem"]:
        for node in ast.parse(self.path.read_text(), str(self.path)).body:
            name = getattr(node, "name", "")
            if isinstance(node, ast.ClassDef) and name.startswith("Test"):
                raise self.CollectError(f"{self.path.name}: {name} is not collected here; write functions")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name.startswith("test_"):
                for version in versions_of(self.path.name):
                    item_name = f"{name}[{version}]"
                    yield InsideItem.from_parent(self, name=item_name, function=name, version=version, line=node.lineno)


class InsideFailure(Exception):
    """A test inside vLLM failed; the message is what it said."""


class InsideItem(pytest.Item):
    """One test function under one version, with all its parameters."""

    def __init__(self, *, function: str, version: str, line: int, **options: Any) -> None:
        super().__init__(**options)
        self.name_inside, self.version, self._line = function, version, line
        self.seconds = 0.0

    def runtest(self) -> None:
        without = self.session.stash.setdefault(VERSIONS_WITHOUT, set())
        if self.version in without:
            pytest.skip(f"vLLM {self.version} does not start: its first test says why")
        try:
            run = runs_of(self.session).result(self.version, self.path)
        except NoEnvironment as error:
            without.add(self.version)
            raise InsideFailure(str(error)) from None
        problem = run.problem_of(self.name_inside)
        cases = run.cases.get(self.name_inside, [])
        self.seconds = sum(case.seconds for case in cases)
        if problem:
            raise InsideFailure(problem)
        skipped = [case for case in cases if case.outcome == "skipped"]
        if len(skipped) == len(cases):
            pytest.skip(f"{self.path.name}, {self.version}: {skipped[0].text}")
        for case in skipped:
            self._report_skipped(case)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, InsideFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self._line - 1, self.name

    def _report_skipped(self, case: Case) -> None:
        """Say of a set of parameters that it was skipped, where others were not."""
        report = pytest.TestReport(
            nodeid=f"{self.parent.nodeid}::{case.name}[{self.version}]" if self.parent else case.name,
            location=self.location,
            keywords={},
            outcome="skipped",
            longrepr=(str(self.path), self._line, f"Skipped: {self.version}: {case.text}"),
            when="call",
        )
        self.ihook.pytest_runtest_logreport(report=report)


def runs_of(session: pytest.Session) -> Runs:
    """The session's runs inside vLLM, started when they are first asked for."""
    if RUNS not in session.stash:
        if "PYTEST_XDIST_WORKER" in os.environ:
            raise InsideFailure("tests inside vLLM make their own processes: run them without -n")
        wanted: dict[tuple[str, Path], list[str]] = {}
        for item in session.items:
            if isinstance(item, InsideItem):
                wanted.setdefault((item.version, item.path), []).append(item.name_inside)
        work = session.config._tmp_path_factory.mktemp("vllm")  # type: ignore[attr-defined]
        session.stash[RUNS] = Runs(work, wanted)
    return session.stash[RUNS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isinstance(item, InsideItem) and report.when == "call":
        report.duration = item.seconds  # its own, not how long it was waited for
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RUNS in session.stash:
        session.stash[RUNS].close()
