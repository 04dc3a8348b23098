"""A bounded number of crashes; the long run is `python -m tests.tiers.crash`."""

import json
import subprocess
import sys
from pathlib import Path

ROUNDS = 20


def test_a_killed_process_leaves_right_bytes_or_misses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tiers.crash", "--rounds", str(ROUNDS), "--path", str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    tally = json.loads(run.stdout)
    assert tally["rounds"] == ROUNDS
    assert tally["hits"] > ROUNDS  # the writers got somewhere
    assert tally["hits_behind"] > ROUNDS
    assert tally["reported"] > 0
    assert tally["temps_left_by_the_dead"] > 0  # and were killed in the middle of it
    assert list(tmp_path.iterdir()) == []
