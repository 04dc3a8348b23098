"""Whether the lower tier of a pool can be used, and the tasks that run for it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from kvortex.tiering.guard import CLOSE_TIMEOUT_S

logger = logging.getLogger(__name__)


class TierState:
    """From opening to closing:

        opening ──> usable ───────> closing
           │          ^               ^
           └──> unusable ─────────────┘

    A tier becomes unusable when it fails to open, or takes too long. In the second case it may still become usable.
    """

    def __init__(self) -> None:
        self.usable = False
        self.closing = False
        self._known = asyncio.Event()

    @property
    def is_known(self) -> bool:
        """True once the tier is usable, or was found unusable."""
        return self._known.is_set()

    @property
    def may_work(self) -> bool:
        """True while blocks can be offered and asked for: the tier is usable, or still opening."""
        return not self.closing and (self.usable or not self.is_known)

    def set_usable(self) -> None:
        """The tier is open."""
        self.usable = True
        self._known.set()

    def end_opening(self) -> None:
        """Nobody waits for the tier to open any longer: it has failed to open, is late, or is closing."""
        self._known.set()

    def set_closing(self) -> None:
        """Nothing may start any more."""
        self.closing = True

    async def wait_known(self) -> None:
        """Wait until `is_known`."""
        await self._known.wait()


class TierTasks:
    """Tasks that run until they end or are cancelled together.

    Args:
        name: the tier's name, for log messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: dict[asyncio.Task[None], None] = {}  # in the order of their start

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._remove)
        return task

    def _remove(self, task: "asyncio.Task[None]") -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the %s tier ended with an unexpected error", self._name, exc_info=error)

    async def cancel_all(self) -> None:
        """Cancel the running tasks and wait for their end, but not for ever: some may not react to it."""
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            _, running = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            if running:
                logger.warning("%d calls of the %s tier cannot be cancelled", len(running), self._name)
                return
