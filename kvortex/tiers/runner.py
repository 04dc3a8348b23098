"""Batches of blocking work on threads, with deadlines, cancellation and the release of buffers."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from kvortex.runtime.blocking import submit_or_run
from kvortex.tiers.base import Cause

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Outcome = TypeVar("Outcome")


class BatchRunner(Generic[Request, Outcome]):
    """Runs a blocking function over the requests of a batch, each on one of `num_threads` threads.

    Requests of all batches are served in the order of their arrival.

    Args:
        name: prefix of the threads' names.
        num_threads: number of threads.
        work: called with a request, on a thread. It returns an outcome for every failure that it expects.
        unfinished: makes the outcome of a request without one, from its cause and whether its buffer is settled.
        on_settled: called on the loop, exactly once for each request, when its `work` has ended or will never start.
    """

    def __init__(
        self,
        name: str,
        num_threads: int,
        work: Callable[[Request], Outcome],
        unfinished: Callable[[Cause, bool], Outcome],
        on_settled: Callable[[Request, Outcome], None],
    ) -> None:
        self._work = work
        self._unfinished = unfinished
        self._on_settled = on_settled
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._batches: set[asyncio.Event] = set()
        self._num_unsettled = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_unsettled(self) -> int:
        """Requests whose buffers the tier owns now."""
        return self._num_unsettled

    async def run(self, requests: Sequence[Request], deadline_s: float | None) -> list[Outcome]:
        """Run a batch; returns outcomes in the order of the requests, after `deadline_s` seconds at the latest.

        An exception of `work` is raised when the batch is over.
        """
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        finished = asyncio.Event()
        self._batches.add(finished)
        self._num_unsettled += len(requests)
        self._idle.clear()
        countdown = _Countdown(len(requests), partial(_post, loop, finished.set))
        futures = [self._submit(request, countdown) for request in requests]
        cause = Cause.CANCELLED
        try:
            async with asyncio.timeout(deadline_s):
                await finished.wait()
            cause = Cause.CLOSED  # only `aclose` ends a batch with requests that have no outcome
        except TimeoutError:
            cause = Cause.DEADLINE
        finally:
            self._batches.discard(finished)
            settle = partial(self._settle, loop, cause)
            settled = [settle(request, future) for request, future in zip(requests, futures, strict=True)]
        return [
            self._outcome(future, cause) if is_settled else self._unfinished(cause, False)
            for future, is_settled in zip(futures, settled, strict=True)
        ]

    def _submit(self, request: Request, countdown: "_Countdown") -> Future[Outcome]:
        future = submit_or_run(self._executor, partial(self._work, request))
        future.add_done_callback(countdown)
        return future

    def _settle(self, loop: asyncio.AbstractEventLoop, cause: Cause, request: Request, future: Future[Outcome]) -> bool:
        """Settle a request now if its work has ended or will never start, and return True; otherwise when it ends."""
        if future.cancel() or future.done():
            self._report(request, cause, future)
            return True
        future.add_done_callback(partial(_post, loop, self._report, request, cause))
        return False

    def _report(self, request: Request, cause: Cause, future: Future[Outcome]) -> None:
        self._num_unsettled -= 1
        if not self._num_unsettled:
            self._idle.set()
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.error("a tier's thread failed", exc_info=error)
            self._on_settled(request, self._unfinished(Cause.IO_ERROR, True))
        else:
            self._on_settled(request, self._outcome(future, cause))

    def _outcome(self, future: Future[Outcome], cause: Cause) -> Outcome:
        return self._unfinished(cause, True) if future.cancelled() else future.result()

    async def aclose(self, timeout_s: float) -> None:
        """Drop waiting requests, wait `timeout_s` seconds for running ones, then end their batches; idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d blocks are still in flight %.1f s after closing", self._num_unsettled, timeout_s)
            for finished in self._batches:
                finished.set()
        else:
            self._executor.shutdown(wait=True)  # threads without work end at once


class _Countdown:
    """Calls `then` when it has been called `count` times; from any thread."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = list(range(count))  # `pop` is atomic
        self._then = then

    def __call__(self, _: object) -> None:
        if self._left.pop() == 0:
            self._then()


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        logger.warning("the loop of a tier is closed: the buffer of a late block is not given back")
