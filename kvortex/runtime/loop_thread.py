"""An event loop on a thread of its own."""

import asyncio
import sys
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from kvortex.errors import EngineStateError

T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread, for callers on other threads."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # Not the loop's default executor: its shutdown needs a thread, and none can start when the interpreter ends.
        self._workers = ThreadPoolExecutor(thread_name_prefix="kvortex-loop-worker")
        self.loop.set_default_executor(self._workers)
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvortex-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(_end_other_tasks())
        finally:
            self._workers.shutdown()
            self.loop.close()

    def submit(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop. Its future always ends: `stop` cancels coroutines that still run.

        Raises:
            EngineStateError: the loop has been stopped.
        """
        with self._lock:
            if not self._stopping and not sys.is_finalizing():  # at finalization no other thread runs any more
                return asyncio.run_coroutine_threadsafe(call, self.loop)
        call.close()
        raise EngineStateError("the engine has been shut down")

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and return its result. Raises as `submit`, and what the coroutine raises."""
        return self.submit(call).result()

    def stop(self) -> None:
        """Stop the loop and the thread; idempotent. Call it from any thread but the loop's."""
        if sys.is_finalizing():
            return  # no other thread runs any more
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


async def _end_other_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread; None if there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
