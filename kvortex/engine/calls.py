"""One save or load of many blocks: planned in parts, carried out as requests, ended as one."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvortex.planes.control import CPU_TIER
from kvortex.planes.data import DataPlane
from kvortex.sched import TransferRequest
from kvortex.stats import EngineStats
from kvortex.types import Direction, TransferPlan

FIRST_PART_BYTES = 16 << 20
FIRST_PART_BLOCKS = 64
PART_GROWTH = 8
MAX_PART_BYTES = 1 << 30
MAX_PART_BLOCKS = 4096
"""A long call is planned in parts. The link is idle until the first part is planned, so that part is small.
Planning a part that is `PART_GROWTH` times as long takes less time than moving it. Parts are bounded, because all
blocks of a part become visible together and because planning blocks the loop."""

T = TypeVar("T")


class CallQueue:
    """The fair wait queue of an engine's saves and loads: a bounded number of them run, others wait in order.

    Args:
        max_running: calls that run at a time.
    """

    def __init__(self, max_running: int) -> None:
        self._places = asyncio.Semaphore(max_running)
        self._count = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    async def acquire(self) -> None:
        """Wait for a place; give it back with `release`."""
        self._count += 1
        self._is_empty.clear()
        try:
            await self._places.acquire()
        except BaseException:
            self._forget_one()
            raise

    def release(self) -> None:
        """Give a place back; the next waiting call gets it."""
        self._places.release()
        self._forget_one()

    def _forget_one(self) -> None:
        self._count -= 1
        if not self._count:
            self._is_empty.set()

    async def wait_empty(self) -> None:
        """Wait until no call is left, neither running nor waiting."""
        await self._is_empty.wait()


class TransferCall(Generic[T]):
    """The transfers of one `save_blocks` or `load_blocks`; when its `async with` block ends, none is in flight.

    Args:
        queue: the queue in which the call waits for a place.
        data: carries out the transfers.
        stats: counters of moved blocks and bytes.
        stream: CUDA stream whose queued work the transfers wait for, see `DataPlane.record_event`.
        direction: direction of all its transfers.
        block_ids: `int32 [n]`, all blocks of the cache that the transfers use; no other call may use them meanwhile.
        groups: the number of each block's group, `uint8 [n]`; None if all belong to the first.
    """

    def __init__(
        self,
        queue: CallQueue,
        data: DataPlane,
        stats: EngineStats,
        stream: object,
        direction: Direction,
        block_ids: NDArray[np.int32],
        groups: NDArray[np.uint8] | None = None,
    ) -> None:
        self._queue = queue
        self._data = data
        self._stats = stats
        self._stream = stream
        self._direction = direction
        self._block_ids = block_ids
        self._groups = groups
        self._requests: list[TransferRequest] = []
        self._outcomes: list[Sequence[T]] = []

    async def __aenter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._claim = self._data.claim(self._direction, self._block_ids, self._groups)
            undo.callback(self._claim.release)
            self._after = self._data.record_event(self._stream)
            undo.callback(self._data.release_event, self._after)
            await self._queue.acquire()
            undo.callback(self._queue.release)
            self._resources = undo.pop_all()
        self._started_s = time.perf_counter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            if kind is not None:
                await self._data.cancel_and_wait(self._requests)
            self._record()

    @property
    def num_parts(self) -> int:
        return len(self._requests)

    def parts(self, num_blocks: int) -> Iterator[slice]:
        """Ranges of blocks to plan one after another, so that the first blocks move while the last are looked up."""
        block_nbytes = self._data.largest_packed_nbytes
        start, step = 0, max(FIRST_PART_BYTES // block_nbytes, FIRST_PART_BLOCKS)
        longest = max(min(MAX_PART_BYTES // block_nbytes, MAX_PART_BLOCKS), step)
        while start < num_blocks:
            yield slice(start, start + step)
            start += step
            step = min(PART_GROWTH * step, longest)

    async def start(self, plan: TransferPlan, finish: Callable[[TransferRequest], Sequence[T]], *, more: bool) -> None:
        """Start a part; `finish` turns its settled request into outcomes and is called exactly once.

        `more` says that another part follows: then the loop first runs the callbacks of transfers that have ended.
        """
        number = len(self._outcomes)
        self._outcomes.append(())

        def settled(request: TransferRequest) -> None:
            self._outcomes[number] = finish(request)

        request = await self._data.start(plan, self._after, settled, more_follows=more, claim=self._claim)
        self._requests.append(request)
        if more:
            await asyncio.sleep(0)

    async def outcomes(self, *, first_part: int = 0) -> tuple[T, ...]:
        """Wait until all parts have settled; returns the outcomes of the parts from `first_part` on, in order."""
        await self._data.wait(self._requests)
        return tuple(itertools.chain.from_iterable(self._outcomes[first_part:]))

    def _record(self) -> None:
        """Count the moved and failed blocks after all parts have settled; cancelled blocks are neither."""
        wanted = moved = nbytes = lossy = 0
        for request in self._requests:
            wanted += request.num_tried
            moved += request.num_succeeded
            nbytes += self._raw_nbytes(request)
            if request.forms is not None:
                lossy += int(np.count_nonzero(request.too_lossy))
        if wanted:
            self._stats.record_transfer(
                self._requests[0].direction,
                CPU_TIER,
                blocks=moved,
                nbytes=nbytes,
                seconds=time.perf_counter() - self._started_s,
                failures=wanted - moved - lossy,
            )

    def _raw_nbytes(self, request: TransferRequest) -> int:
        """Bytes of the moved blocks in the paged cache."""
        of_group = self._data.cache.block_nbytes
        if len(of_group) == 1 or (forms := request.succeeded_forms) is None:
            return request.num_succeeded * of_group[0]
        counts = np.bincount(forms // 2)
        return sum(count * nbytes for count, nbytes in zip(counts.tolist(), of_group, strict=False))
