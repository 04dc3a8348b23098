"""Blocking work beside an event loop, also while the interpreter ends and no thread can be had any more."""

import asyncio
from collections.abc import Callable


async def run_blocking(work: Callable[[], None]) -> None:
    """Run `work` on a thread, or here and now where threads are refused: a loop that ends has nobody else to serve."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:  # the interpreter ends, or the loop's own executor has ended
        work()
    else:
        await done
