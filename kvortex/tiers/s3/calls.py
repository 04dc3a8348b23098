"""Calls of a tier whose blocks move on the loop: deadlines, cancelling, closing, and the return of buffers."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, WriteOutcome, WriteRequest
from kvortex.types import MissReason, SaveOutcome

logger = logging.getLogger(__name__)


class Move:
    """One block of a call.

    Attributes:
        request: a `ReadRequest` or a `WriteRequest`.
        outcome: what came of it, of the kind that belongs to the request; the buffer is the caller's again then.
        is_begun: it goes on, and settles by itself, when its call is over.
        ended: done once there is an outcome.
        on_end: called with this move then, before anything else happens.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self.outcome: Any = None
        self.is_begun = False
        self.on_end: list[Callable[[Move], None]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, outcome: ReadOutcome | WriteOutcome) -> None:
        """Settle it, unless it has ended before."""
        if self.outcome is None:
            self.outcome = outcome
            self.request.settle(outcome)
            self.ended.set_result(None)
            for callback in self.on_end:
                callback(self)


class Calls:
    """The calls in progress of one direction."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.num_unsettled = 0

    async def run(self, moves: Sequence[Move], work: Coroutine[Any, Any, None], deadline_s: float | None) -> list[Any]:
        """Do `work`, which ends the moves, for `deadline_s` seconds at most.

        It is cancelled then, and has to return soon: only when it has, are the moves that it has not begun given up.
        """
        self.num_unsettled += len(moves)
        for move in moves:
            move.on_end.append(self._count)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        cause = Cause.CANCELLED

        def finish(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            why = Cause.CLOSED if self._is_closed else cause
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a call of a tier failed", exc_info=error)
                why = Cause.IO_ERROR
            for move in moves:
                if not move.is_begun:
                    move.end(unfinished(move.request, why))

        task.add_done_callback(finish)
        try:
            await asyncio.wait([task], timeout=deadline_s)
            cause = Cause.DEADLINE
            task.cancel()
            await asyncio.wait([task])
        finally:
            task.cancel()
        late = Cause.CLOSED if self._is_closed else cause
        return [move.outcome or unfinished(move.request, late, settled=False) for move in moves]

    async def aclose(self) -> None:
        """End all calls."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _count(self, _: object) -> None:
        self.num_unsettled -= 1


def unfinished(request: ReadRequest | WriteRequest, cause: Cause, detail: str = "", *, settled: bool = True) -> Any:
    """The outcome of a block that was not moved."""
    if isinstance(request, WriteRequest):
        outcome = SaveOutcome.NO_SPACE if cause is Cause.NO_SPACE else SaveOutcome.FAILED
        return WriteOutcome(outcome, cause=cause, detail=detail, settled=settled)
    reason = MissReason.DEADLINE if cause is Cause.DEADLINE else MissReason.TRANSFER_FAILED
    return ReadOutcome(reason, cause=cause, detail=detail, settled=settled)
