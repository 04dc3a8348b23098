"""The connector inside the real vLLM, on the CPU: each supported version in an environment of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest

REPOSITORY = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside"
VERSIONS = ("0.32.0", "0.15.1")
# No CPU build: its own scheduler, with played workers.
SCHEDULER_ONLY = "0.23.0"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
}

pytestmark = pytest.mark.slow


FILES = sorted(path.name for path in INSIDE.glob("test_*.py"))
RUNS = [
    *((version, name) for version in VERSIONS for name in FILES),
    *((SCHEDULER_ONLY, f"test_{name}.py") for name in ("placement", "progress", "room", "scheduler")),
]
AT_A_TIME = 2
"""Processes. Most of what each takes is one core's."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[CompletedProcess[str]]]]:
    """Those that were asked for, under way."""
    mine = [item for item in request.session.items if item.module is request.module]
    wanted = [tuple(item.callspec.params.values()) for item in mine if hasattr(item, "callspec")]
    answers = tmp_path_factory.mktemp("expected")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        started = {run: pool.submit(run_inside, *run, answers / f"{run[0]}.json") for run in wanted}
        try:
            yield started
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_inside(version: str, name: str, runs: dict[tuple[str, str], Future[CompletedProcess[str]]]) -> None:
    done = runs[version, name].result()
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    if " passed" not in summary:
        pytest.skip(summary)


def run_inside(version: str, name: str, expected: Path) -> CompletedProcess[str]:
    """Checks of one file under one version; what an engine without a connector answers is kept for the others."""
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": f"{REPOSITORY}:{INSIDE}",
        "KVORTEX_EXPECTED": str(expected),
    }
    command = [python_with(version), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(INSIDE / "pytest.ini")]
    return subprocess.run(
        [*command, str(INSIDE / name)], env=environment, capture_output=True, text=True, timeout=900, cwd=INSIDE
    )


def python_with(version: str) -> str:
    """Python of an environment with that version; made once, kept in a cache folder."""
    script = REPOSITORY / "scripts" / "vllm_cpu_env.py"
    done = subprocess.run([sys.executable, str(script), version], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"no environment for vLLM {version}"
    return done.stdout.strip().splitlines()[-1]
