"""An asyncio event loop with a virtual clock: hours pass in milliseconds, and every run is the same."""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_CLOCK_STARTS_S = 1000.0  # not 0, so that tests find code that uses a time as a truth value


class NothingLeftToDoError(RuntimeError):
    """No callback is ready and no timer is set, so the tasks that wait would wait forever."""


class VirtualClockLoop(asyncio.BaseEventLoop):
    """An event loop that never sleeps: when no callback is ready, its clock jumps to the next timer.

    The loop does not depend on a real clock, on threads or on the system. So a run can be repeated exactly if the code
    on the loop uses seeded random generators and does not depend on the order of sets. There are no sockets, no
    subprocesses and no other threads: `run_in_executor`, and so `asyncio.to_thread`, calls the function on the loop.

        loop = VirtualClockLoop(shuffle=random.Random(seed))
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    Args:
        shuffle: generator that shuffles the callbacks that are ready at the same time. A real loop has such orders only
            if timers and threads happen to come in another order. None: first in, first out, as asyncio guarantees.
        after_pass: called each time when all ready callbacks have run. An exception that it raises ends the run.

    Raises:
        NothingLeftToDoError: raised from `run_until_complete` when all tasks wait for each other.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, *, shuffle: random.Random | None = None, after_pass: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._now_s = _CLOCK_STARTS_S
        self._shuffle = shuffle
        self._after_pass = after_pass

    def time(self) -> float:
        return self._now_s

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        self.call_soon(_call_into, future, func, args)
        return future

    def add_reader(self, fd: Any, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        """Do nothing: no file descriptor ever becomes readable."""

    def remove_reader(self, fd: Any) -> bool:
        return True

    def _run_once(self) -> None:
        self._forget_cancelled()
        if not self._ready and not self._stopping:
            if not self._scheduled:
                raise NothingLeftToDoError("no callback is ready and no timer is set: all tasks wait for each other")
            self._now_s = max(self._now_s, self._scheduled[0].when())
        while self._scheduled and self._scheduled[0].when() <= self._now_s:
            self._ready.append(heapq.heappop(self._scheduled))
        ready = list(self._ready)
        self._ready.clear()
        if self._shuffle is not None:
            self._shuffle.shuffle(ready)
        for handle in ready:
            if not handle.cancelled():
                handle._run()
        if self._after_pass is not None:
            self._after_pass()

    def _forget_cancelled(self) -> None:
        while self._scheduled and self._scheduled[0].cancelled():
            heapq.heappop(self._scheduled)

    def _process_events(self, event_list: Any) -> None:
        """Do nothing: there are no event sources."""

    def _write_to_self(self) -> None:
        """Do nothing: there is no selector to wake."""


def _call_into(future: "asyncio.Future[Any]", func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return
    try:
        future.set_result(func(*args))
    except Exception as error:  # noqa: BLE001 - raised in the task that awaits the future
        future.set_exception(error)
