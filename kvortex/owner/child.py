"""An owner as a child process: the pool of one engine with lower tiers. It ends with the process that started it."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvortex.config import KVortexConfig
from kvortex.config.config import SECTIONS
from kvortex.errors import ConfigError

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 60.0


class OwnerProcess:
    """`kvortex serve` for this process alone.

    Args:
        config: sizes and eviction of the pool, and its lower tiers.
        path: of the socket.

    Raises:
        ConfigError: it did not start; its own message, on this process's standard error, says why.
    """

    def __init__(self, config: KVortexConfig, path: Path) -> None:
        self.path = path
        command = [
            sys.executable,
            "-m",
            "kvortex",
            "serve",
            "--socket",
            str(path),
            "--child-of",
            str(os.getpid()),
            "--json",
        ]
        # A session of its own: Ctrl-C ends the engine, which still talks to its pool while it shuts down.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps(as_mapping(config)) + "\n")
            self._process.stdin.flush()
            said = self._process.stdout.readline()
        except OSError:
            said = ""
        finally:
            watchdog.cancel()
        if not said:
            self.close()
            raise ConfigError("the process that holds the pool has not started: its message stands above")
        logger.debug("process %d holds the pool of this engine", self._process.pid)

    def close(self) -> None:
        """End it, once it has written what waits for a lower tier; idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.error("the process that holds the pool does not end: it is killed")
            self._process.kill()
            self._process.communicate()


def as_mapping(config: KVortexConfig) -> dict[str, Any]:
    """The settings as plain data, for `KVortexConfig.from_mapping`."""
    return {name: _plain(dataclasses.asdict(getattr(config, name))) for name in SECTIONS}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
