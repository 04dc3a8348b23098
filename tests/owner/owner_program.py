"""Owners that are killed: for each line of its input, this program forks one and prints its process id when it listens.

It has imported everything, so an owner is there in no time. A line is JSON: the path of the socket, and the settings.

    python -m tests.owner.owner_program
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from kvortex import KVortexConfig
from kvortex.owner import Owner


async def serve(path: str, settings: dict[str, Any]) -> None:
    owner = Owner(KVortexConfig(**settings), Path(path))
    owner.start()
    print(os.getpid(), flush=True)  # noqa: T201
    await asyncio.sleep(600)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        if os.fork():
            continue
        try:
            asyncio.run(serve(*json.loads(line)))
        finally:
            os._exit(1)


if __name__ == "__main__":
    main()
