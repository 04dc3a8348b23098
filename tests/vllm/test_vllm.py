"""The connector inside the real vLLM, on the CPU: each supported version in an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

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
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=VERSIONS)
def vllm_python(request: pytest.FixtureRequest) -> str:
    """Python of an environment with that version; made once, kept in a cache folder."""
    return python_with(request.param)


def python_with(version: str) -> str:
    script = REPOSITORY / "scripts" / "vllm_cpu_env.py"
    done = subprocess.run([sys.executable, str(script), version], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"no environment for vLLM {version}"
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def expected(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the answers of an engine without a connector are kept for all files of one version."""
    return tmp_path_factory.mktemp("expected") / "answers.json"


@pytest.mark.parametrize("name", sorted(path.name for path in INSIDE.glob("check_*.py")))
def test_inside(vllm_python: str, name: str, expected: Path) -> None:
    run_inside(vllm_python, name, expected)


@pytest.mark.parametrize("name", ["check_scheduler.py", "check_placement.py", "check_progress.py", "check_room.py"])
def test_scheduler_without_workers(name: str, tmp_path: Path) -> None:
    run_inside(python_with(SCHEDULER_ONLY), name, tmp_path / "answers.json")


def run_inside(vllm_python: str, name: str, expected: Path) -> None:
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": f"{REPOSITORY}:{INSIDE}",
        "KVORTEX_EXPECTED": str(expected),
    }
    command = [vllm_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(INSIDE / "pytest.ini")]
    done = subprocess.run(
        [*command, str(INSIDE / name)], env=environment, capture_output=True, text=True, timeout=900, cwd=INSIDE
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    if " passed" not in summary:
        pytest.skip(summary)
