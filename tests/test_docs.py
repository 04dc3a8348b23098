"""What the documentation says is what the code says, and what it shows runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = [
    (path.relative_to(REPOSITORY).as_posix(), number)
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    for number, program in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    if "asyncio.run(" in program
]


def test_the_api_page_is_up_to_date() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "api_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "number"), PROGRAMS)
def test_a_program_in_a_page_runs_as_printed(page: str, number: int, tmp_path: Path) -> None:
    program = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)[number]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in re.findall(r"print\(.*\)  # (.*)", program):
        assert line in done.stdout
