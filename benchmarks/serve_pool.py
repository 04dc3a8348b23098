"""The owner of a pool for benchmarks: `kvortex serve` as a process that ends with the block."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def served_pool(socket: str, pool: int | str) -> Iterator[None]:
    """A process that holds a pool for engines that name its socket."""
    command = [sys.executable, "-m", "kvortex", "serve", "--pool", str(pool), "--socket", socket, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"no owner could be started: run {' '.join(command)}")
        yield
    finally:
        process.terminate()
        process.communicate()
