"""Programs in processes of their own that need not import vLLM: forks of a process that has done nothing else yet.

A new Python takes some seconds to import vLLM, and so does each process that an engine spawns.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch._dynamo
from engine_support import freeze_imports

START_TIMEOUT_S = 60.0
_MAX_REQUEST_BYTES = 1 << 16


class Template:
    """A process that forks a child for each program. Start it before engines, threads or locks are there.

    It ends with this process, and its programs with whoever started them.
    """

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            self._requests.close()
            _never_return(_serve, theirs)
        theirs.close()

    def start(self, request: dict[str, Any], descriptors: Sequence[int]) -> socket.socket:
        """Returns a connection that says the program's number, and its exit status later."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [theirs.fileno(), *descriptors])
        return mine


_template: Template | None = None


def start_template() -> None:
    """Make the template, if there is none yet."""
    global _template
    if _template is None:
        _template = Template()


class Program:
    """A script that runs as `__main__` in a session of its own.

    Args:
        script: its path.
        arguments: what it finds in `sys.argv` behind its path.
        environment: variables to set; None unsets one.
        output: where standard error goes, and standard output if there is no pipe.
        has_pipes: `stdin` and `stdout` are pipes.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str | None] | None = None,
        *,
        output: Path | None = None,
        has_pipes: bool = False,
    ) -> None:
        assert _template is not None
        request = {"argv": [str(script), *arguments], "environment": dict(environment or {})}
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        log = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        theirs = [log]
        if has_pipes:
            (reads, stdin), (stdout, writes) = os.pipe(), os.pipe()
            self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
            theirs += [reads, writes]
        try:
            self._line = _template.start(request, theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._line.settimeout(START_TIMEOUT_S)
        self.pid = int(self._line.recv(32))

    def wait(self, timeout_s: float) -> int:
        """Its exit status; negative: the signal that ended it. `subprocess.TimeoutExpired` kills it."""
        self._line.settimeout(timeout_s)
        try:
            status = self._line.recv(32)
        except TimeoutError:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout_s) from None
        self._close()
        return int(status)

    def kill(self) -> None:
        """End it and the processes that it has started."""
        self._line.settimeout(None)
        os.killpg(self.pid, signal.SIGKILL)
        self._line.recv(32)
        self._close()

    def _close(self) -> None:
        self._line.close()
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _never_return(work: Any, *arguments: Any) -> None:
    status = 1
    try:
        status = work(*arguments) or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - printed, and the process ends
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _MAX_REQUEST_BYTES, 4)
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            _never_return(_keep, json.loads(data), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(request: dict[str, Any], descriptors: list[int]) -> None:
    """Wait for one program, or for the end of who has started it."""
    line = socket.socket(fileno=descriptors[0])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    leads, told = os.pipe()
    program = os.fork()
    if program == 0:
        line.close()
        os.setsid()
        os.close(leads)
        os.close(told)
        _never_return(_run, request, *descriptors[1:])
    os.close(told)
    os.read(leads, 1)  # ends when it leads a group of its own
    for descriptor in (leads, *descriptors[1:]):
        os.close(descriptor)
    line.send(str(program).encode())
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([ended, line], [], [])
    if ended not in ready:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with contextlib.suppress(OSError):
        line.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(request: dict[str, Any], log: int, reads: int = -1, writes: int = -1) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, wanted in enumerate((nothing if reads < 0 else reads, log if writes < 0 else writes, log)):
        os.dup2(wanted, descriptor)
    for wanted in {nothing, log, reads, writes} - {-1}:
        os.close(wanted)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name, value in request["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE") == "1"  # read when it was imported
    freeze_imports()
    warnings.resetwarnings()  # pytest makes errors of them
    real = multiprocessing.get_context
    # vLLM's CPU platform wants its processes spawned, each with an import of its own.
    multiprocessing.get_context = lambda method=None: real("fork")  # type: ignore[assignment]
    sys.argv[:] = request["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")
