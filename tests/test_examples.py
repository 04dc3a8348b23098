"""Every example runs, as printed, and says what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "async_api.py": ["loaded: 8 of 8", "bytes intact: True"],
    "hybrid_groups.py": [
        "found: 192 tokens",
        "needed: {'full': 12, 'window': 3, 'state': 1} blocks",
        "loaded: 16 of 16",
        "bytes intact: True",
    ],
    "shared_prefix.py": ["request 3: 4 blocks loaded, 2 new ones stored", "hit rate of what was asked for: 50%"],
    "sync_threads.py": ["thread 0: 4 stored, 4 loaded", "thread 1: 4 stored, 4 loaded"],
}


@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for promise in PROMISES[name]:
        assert promise in done.stdout


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert {name for name in names if not name.startswith("vllm_")} == set(PROMISES)
    checks = Path(__file__).parent / "vllm" / "inside"
    inside = "".join(
        (checks / name).read_text() for name in ("test_examples.py", "test_chat.py", "test_prefill_decode.py")
    )
    assert all(name in inside for name in names if name.startswith("vllm_"))
