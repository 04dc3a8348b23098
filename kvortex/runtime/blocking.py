"""Blocking work beside an event loop. It works at the end of the interpreter, too, when no thread can be started."""

import asyncio
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


async def run_blocking(work: Callable[[], None]) -> None:
    """Run `work` on a thread; if no thread can be started, run it here, as the loop has nothing else to do then."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:  # the interpreter ends, or the loop's own executor has ended
        work()
    else:
        await done


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
