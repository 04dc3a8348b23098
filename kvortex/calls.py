"""One save or load of many blocks: planned in parts, carried out as requests, ended as one."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from kvortex.driver import Event
from kvortex.sched import TransferRequest
from kvortex.transfers import DataPlane
from kvortex.types import TransferPlan

FIRST_PART_BYTES = 32 << 20
BATCHES_OF_A_PART = 8
"""A long call is planned in parts: a little first, then twice as much each time, up to eight batches, and towards the
end half of what is left, down to one batch. The first makes the link wait for its plan, the last makes the caller wait
for its commit; what is between costs nobody anything, and the less the fewer they are."""

T = TypeVar("T")


class Call(Generic[T]):
    """The transfers that one `save_blocks` or `load_blocks` is made of."""

    def __init__(self, data: DataPlane, after: Event | None, max_batch_bytes: int) -> None:
        self.requests: list[TransferRequest] = []
        self._data = data
        self._after = after
        self._first_part_bytes = min(FIRST_PART_BYTES, max_batch_bytes)
        self._block_nbytes = data.sizes.packed
        self._batch = max(max_batch_bytes // self._block_nbytes, 1)
        self._outcomes: list[Sequence[T]] = []
        self.started_s = time.perf_counter()

    @property
    def num_parts(self) -> int:
        return len(self.requests)

    def parts(self, num_blocks: int) -> Iterator[slice]:
        """A long call is planned piece by piece, so that the first blocks move while the last are looked up."""
        start, step = 0, max(self._first_part_bytes // self._block_nbytes, 1)
        while start < num_blocks:
            yield slice(start, start + step)
            start += step
            rest = max((num_blocks - start) // 2, self._batch)
            step = min(2 * step, rest, BATCHES_OF_A_PART * self._batch)

    async def start(self, plan: TransferPlan, finish: Callable[[TransferRequest], Sequence[T]], *, more: bool) -> None:
        """Begin a part; `finish` turns what came of it into outcomes, once, whatever happens.

        `more` says that another part follows: the loop then has its turn first, for what has ended meanwhile.
        """
        number = len(self._outcomes)
        self._outcomes.append(())

        def settled(request: TransferRequest) -> None:
            self._outcomes[number] = finish(request)

        self.requests.append(await self._data.start(plan, self._after, settled, more_follows=more))
        if more:
            await asyncio.sleep(0)

    async def outcomes(self) -> tuple[T, ...]:
        """Those of all parts, in order, once everything has settled."""
        await self._data.wait(self.requests)
        return tuple(itertools.chain.from_iterable(self._outcomes))
