"""An owner as a child process: the pool of one engine with lower tiers. It ends with the process that started it."""

import contextlib
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

import kvortex
from kvortex.config import KVortexConfig
from kvortex.config.config import SECTIONS
from kvortex.errors import ConfigError

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 60.0
FIRST_RESTART_S: Final = 0.5
LAST_RESTART_S: Final = 60.0


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
        self._settings = json.dumps(as_mapping(config)) + "\n"
        self._closing = threading.Event()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._keep_alive, name="kvortex-owner-process", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def _start(self) -> "subprocess.Popen[str]":
        options = ["--socket", str(self.path), "--child-of", str(os.getpid()), "--json"]
        # This very package, and nothing from the working directory.
        package = str(Path(kvortex.__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-P", "-m", "kvortex", "serve", *options]
        # A session of its own: Ctrl-C ends the engine, which still talks to its pool while it shuts down.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        said = ""
        try:
            with process.stdout:
                with contextlib.suppress(BrokenPipeError), process.stdin:
                    process.stdin.write(self._settings)
                said = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not said:
            _end(process)
            raise ConfigError("the process that holds the pool has not started: its message stands above")
        logger.debug("process %d holds the pool of this engine", process.pid)
        return process

    def _keep_alive(self) -> None:
        """Start another one if it ends, for instance because the machine ran out of memory: the pool is empty then."""
        pause_s = FIRST_RESTART_S
        while True:
            status = self._process.wait()
            if self._closing.wait(pause_s):
                return
            logger.error("the process that held the pool has ended with status %d: starting another one", status)
            try:
                self._process = self._start()
                pause_s = FIRST_RESTART_S
            except ConfigError as error:
                logger.error("%s", error)
                pause_s = min(2 * pause_s, LAST_RESTART_S)

    def close(self) -> None:
        """End it, once it has written what waits for a lower tier; idempotent."""
        self._closing.set()
        _end(self._process)
        self._watcher.join()
        _end(self._process)  # one that was being started just then


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.error("the process that holds the pool does not end: it is killed")
        process.kill()
        process.wait()


def as_mapping(config: KVortexConfig) -> dict[str, Any]:
    """The settings as plain data, for `KVortexConfig.from_mapping`."""
    return {name: _plain(dataclasses.asdict(getattr(config, name))) for name in SECTIONS}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
