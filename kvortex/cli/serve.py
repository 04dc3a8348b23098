"""`kvortex serve`: hold the pool of a machine until a signal ends it."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from kvortex.config import KVortexConfig, format_bytes
from kvortex.errors import ConfigError
from kvortex.owner import Owner
from kvortex.runtime.private_folder import private_folder

SOCKET_NAME = "kvortex.sock"


def default_socket(environment: Mapping[str, str] = os.environ) -> Path:
    """Where an owner listens if nothing else is said: in the user's runtime directory, or a private folder of /tmp.

    Raises:
        ConfigError: there is no folder that only this user may write to.
    """
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / SOCKET_NAME
    folder = private_folder()
    if folder is None:
        raise ConfigError("there is no folder for the socket that only this user may write to: give --socket PATH")
    return folder / SOCKET_NAME


def run(config: KVortexConfig, path: Path, *, as_json: bool, parent: int | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Then blocks that wait for a lower tier are still written, if that is quick.

    Args:
        config: sizes and eviction of the pool.
        path: of the socket.
        as_json: say where it listens as one JSON document instead of a sentence.
        parent: number of the process whose engine alone it serves; it ends with that process.

    Raises:
        ConfigError: the pool or the socket cannot be made.
        OwnerError: another owner listens there.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    asyncio.run(_serve(config, path, as_json, parent))


async def _serve(config: KVortexConfig, path: Path, as_json: bool, parent: int | None) -> None:
    owner = Owner(config, path, is_sole=parent is not None)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    if parent is not None:
        _end_with(parent, ended)
    owner.start()
    try:
        if as_json:
            facts = {"socket": str(path), "pool_bytes": config.pool.bytes, "lower_tier": config.lower_tier}
            said = json.dumps({**facts, "pid": os.getpid()})
        else:
            behind = f", with {config.lower_tier} behind it," if config.lower_tier else ""
            pool = format_bytes(config.pool.bytes)
            said = f'{pool}{behind} for engines with KVortexConfig(owner="{path}", ...); Ctrl-C ends it'
        print(said, flush=True)
        await ended.wait()
        await owner.flush(config.tier.timeout_s)
    finally:
        await owner.aclose()


def _end_with(parent: int, ended: asyncio.Event) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        ended.set()
        return
    if os.getppid() != parent:  # it was gone before, and another process has its number
        ended.set()
        os.close(descriptor)
        return
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(descriptor)  # it stays readable
        os.close(descriptor)
        ended.set()

    loop.add_reader(descriptor, end)
