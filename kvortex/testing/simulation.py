"""An asyncio event loop whose clock is a number: what takes hours runs in milliseconds, and the same way each time."""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_CLOCK_STARTS_S = 1000.0  # not 0: code that takes a time for a truth value should be seen


class NothingLeftToDoError(RuntimeError):
    """Nothing is ready and no timer runs: whoever waits, waits for ever."""


class VirtualClockLoop(asyncio.BaseEventLoop):
    """Runs callbacks like any other loop, but never sleeps: when nothing is ready, its time is the next timer's.

    Nothing here depends on a real clock, a thread or the system, so a run is repeated exactly if what runs on the loop
    draws its chances from seeded generators and does not depend on the order of sets. There are no sockets, no
    subprocesses and no other threads: `run_in_executor`, and so `asyncio.to_thread`, calls the function on the loop.

        loop = VirtualClockLoop(shuffle=random.Random(seed))
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    Args:
        shuffle: the order in which callbacks run that are ready at the same time. First in first out without it, as
            asyncio promises; with it, orders that a real loop has only if timers and threads come in another order.
        after_pass: called whenever all callbacks that were ready have run. What it raises ends the run.

    Raises:
        NothingLeftToDoError: out of `run_until_complete`, when everybody waits for somebody else.
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
        """Nothing ever becomes readable."""

    def remove_reader(self, fd: Any) -> bool:
        return True

    def _run_once(self) -> None:
        self._forget_cancelled()
        if not self._ready and not self._stopping:
            if not self._scheduled:
                raise NothingLeftToDoError("nothing is ready and no timer runs: everybody waits for somebody else")
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
        """There is nothing that could bring events."""

    def _write_to_self(self) -> None:
        """There is no selector to wake."""


def _call_into(future: "asyncio.Future[Any]", func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return
    try:
        future.set_result(func(*args))
    except Exception as error:  # noqa: BLE001 - it is the awaiting task's
        future.set_exception(error)
