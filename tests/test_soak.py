"""A short soak; the long run is `python -m tests.soak`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS, RESTART_S = 120, 8


@pytest.mark.slow
def test_two_minutes_of_load_over_servers_that_fail() -> None:
    command = [
        sys.executable,
        "-m",
        "tests.soak",
        "--minutes",
        str(SECONDS / 60),
        "--restart-s",
        str(RESTART_S),
        "--json",
    ]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-6000:]
    found = json.loads(run.stdout)
    assert sum(found["harmed"].values()) >= SECONDS / RESTART_S / 3
    assert len(found["hosts"]) == 4
