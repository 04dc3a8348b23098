"""Blocking work beside an event loop. It works at the end of the interpreter, too, when no thread can be started."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def interpreter_ends() -> bool:
    """True if no thread can be started any more: the main thread is over, and exit handlers run."""
    with ThreadPoolExecutor(max_workers=1) as probe:
        try:
            probe.submit(int)
        except RuntimeError:
            return True
    return False


async def run_blocking(work: Callable[[], T]) -> T:
    """Run `work` on a thread; if no thread can be started, run it here, as the loop has nothing else to do then."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:  # the interpreter ends, or the loop's own executor has ended
        return work()
    return await done


async def run_to_its_end(work: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Run `work` on a thread; see `run_blocking`. If this call is cancelled, it waits for the end of the work.

    Args:
        work: what to run.
        undo: called with the result of the work if nobody takes it any more.
    """
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:  # the interpreter ends, or the loop's own executor has ended
        return work()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        while not done.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([done])
        if not done.cancelled() and done.exception() is None:
            undo(done.result())
        raise


def submit_or_run(executor: ThreadPoolExecutor, work: Callable[[], T]) -> "Future[T]":
    """Run `work` on a thread of `executor`; if the interpreter ends and no thread can be started, run it here.

    Returns:
        A future with the result or the exception of `work`, in both cases.
    """
    try:
        return executor.submit(work)
    except RuntimeError:
        if not interpreter_ends():
            raise
        future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - the future of a thread keeps it, too
        future.set_exception(error)
    return future
