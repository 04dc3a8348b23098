"""Blocking work beside an event loop, also while the interpreter ends and no thread can be had any more."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def interpreter_ends() -> bool:
    """Whether executors take nothing on any more, not even new ones: the main thread is over, exit handlers run."""
    with ThreadPoolExecutor(max_workers=1) as probe:
        try:
            probe.submit(int)
        except RuntimeError:
            return True
    return False


async def run_blocking(work: Callable[[], None]) -> None:
    """Run `work` on a thread, or here and now where threads are refused: a loop that ends has nobody else to serve."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:  # the interpreter ends, or the loop's own executor has ended
        work()
    else:
        await done


def submit_or_run(executor: ThreadPoolExecutor, work: Callable[[], T]) -> "Future[T]":
    """Run `work` on a thread of `executor`, or here and now where an interpreter that ends gives no threads any more.

    The future has what became of it, as that of a thread.
    """
    try:
        return executor.submit(work)
    except RuntimeError:
        if not interpreter_ends():
            raise
        future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - as a thread's future would keep it
        future.set_exception(error)
    return future
