"""System calls that fail, hang or do less on command."""

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvortex.tiers.disk.os_calls import IoVector, OsCalls

METHODS = (
    "open",
    "close",
    "file_bytes",
    "fstat",
    "stat",
    "preadv",
    "pwritev",
    "fdatasync",
    "touch",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
    "listdir",
    "try_lock",
)


class FaultyOs(OsCalls):
    """Fails what `fail` says, holds what `hold` says, and moves at most `most_bytes` a call."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.most_bytes: int | None = None
        self.num_held = 0
        self._errors: dict[str, tuple[int, float, Callable[..., bool]]] = {}
        self._gates: dict[str, threading.Event] = {}
        self._mutex = threading.Lock()
        for method in METHODS:
            setattr(self, method, self._wrapped(method, getattr(self, method)))

    def fail(
        self, method: str, error: int, *, times: float = float("inf"), when: Callable[..., bool] = lambda *_: True
    ) -> None:
        """The next `times` calls of `method` whose arguments `when` accepts raise this errno."""
        self._errors[method] = (error, times, when)

    def hold(self, method: str) -> None:
        """Calls of `method` wait for `release`, and are carried out then."""
        self._gates[method] = threading.Event()

    def release(self) -> None:
        """Let what waits go on, and do not hold any longer."""
        gates, self._gates = self._gates, {}
        for gate in gates.values():
            gate.set()

    def heal(self) -> None:
        """No more errors."""
        self._errors.clear()

    def preadv(self, fd: int, buffers: IoVector, offset: int) -> int:
        return os.preadv(fd, self._cut(buffers), offset)

    def pwritev(self, fd: int, buffers: IoVector, offset: int) -> int:
        return os.pwritev(fd, self._cut(buffers), offset)

    def _wrapped(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self._before(method, args)
            return original(*args, **named)

        return call

    def _before(self, method: str, args: tuple[Any, ...]) -> None:
        with self._mutex:
            self.calls[method] += 1
            gate = self._gates.get(method)
            error, times, when = self._errors.get(method, (0, 0, bool))
            fails = times > 0 and when(*args)
            if fails:
                self._errors[method] = (error, times - 1, when)
            self.num_held += gate is not None
        if gate is not None:
            gate.wait()
            with self._mutex:
                self.num_held -= 1
        if fails:
            raise OSError(error, f"injected: {os.strerror(error)}")

    def _cut(self, buffers: IoVector) -> list[memoryview]:
        left = self.most_bytes if self.most_bytes is not None else 1 << 62
        taken: list[memoryview] = []
        for buffer in buffers:
            taken.append(buffer[:left])
            left -= len(taken[-1])
        return [buffer for buffer in taken if len(buffer)]
