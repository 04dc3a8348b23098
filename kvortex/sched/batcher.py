"""Cuts queued requests into batches. Pure: a batch follows from the queues, the clock and what is in flight."""

from collections import deque
from typing import NamedTuple

from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.sched.request import TransferRequest
from kvortex.types import Direction

_LOADS_FIRST = (Direction.LOAD, Direction.SAVE)
_SAVES_FIRST = (Direction.SAVE, Direction.LOAD)

MIN_BATCH_BYTES = 16 << 20
"""Ramps start and end here: 0.3 ms of the link, more than it takes to prepare the next batch."""


class Slice(NamedTuple):
    """Blocks `[start, stop)` of a request."""

    request: TransferRequest
    start: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start


class Batch(NamedTuple):
    """Blocks that one gather or scatter moves. All have one form; they take `nbytes` of the pool."""

    direction: Direction
    slices: tuple[Slice, ...]
    nbytes: int
    form: int = 0

    @property
    def num_blocks(self) -> int:
        return sum([part.stop - part.start for part in self.slices])


class Batcher:
    """Two queues of requests, one for each direction, first in first out; cuts batches from their heads.

    A batch holds blocks of at most `max_requests` requests, and at most `max_bytes` and `max_blocks`. A larger request
    is split. Loads go before saves, because a caller waits for them; but after `max_consecutive_loads` load batches a
    queued save is next.

    The link idles while the first save batch of a transfer is gathered, and while the last load batch is scattered. So
    the batches of a save start small and double, and the batches of a load halve towards the end of the queue.

    Args:
        max_requests: requests that one batch may serve.
        max_bytes: bytes, padding included, that one batch may move.
        max_blocks: blocks that one batch may move.
        linger_s: how many seconds a batch that is not full waits for more requests while its direction is busy.
        max_consecutive_loads: number of load batches that may go before a queued save.
    """

    def __init__(
        self,
        *,
        max_requests: int = 32,
        max_bytes: int = 128 << 20,
        max_blocks: int = MAX_BATCH_BLOCKS,
        linger_s: float = 0.0005,
        max_consecutive_loads: int = 4,
    ) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_blocks = max_blocks
        self._linger_s = linger_s
        self._max_consecutive_loads = max_consecutive_loads
        self._queues: dict[Direction, deque[TransferRequest]] = {d: deque() for d in Direction}
        self._queued_bytes = dict.fromkeys(Direction, 0)
        self._last_batch_bytes = dict.fromkeys(Direction, 0)
        self._consecutive_loads = 0

    def add(self, request: TransferRequest, now_s: float) -> None:
        """Queue a request that has at least one block."""
        request.queued_at_s = now_s
        self._queues[request.direction].append(request)
        self._queued_bytes[request.direction] += request.waiting_nbytes

    def remove(self, request: TransferRequest) -> None:
        """Remove the blocks of a request that no batch has taken. Nothing happens if the request is not queued."""
        queue = self._queues[request.direction]
        if request in queue:
            queue.remove(request)
            self._queued_bytes[request.direction] -= request.waiting_nbytes

    def restart_ramp(self, direction: Direction) -> None:
        """Nothing is in flight in the direction any more: its next batch is the first of a transfer."""
        self._last_batch_bytes[direction] = 0

    @property
    def waiting(self) -> list[Direction]:
        """Directions in which a request is queued."""
        return [direction for direction, queue in self._queues.items() if queue]

    def queued_bytes(self, direction: Direction) -> int:
        """Bytes that are queued in one direction."""
        return self._queued_bytes[direction]

    def next_batch(self, now_s: float, free: set[Direction], busy: set[Direction]) -> Batch | None:
        """The next batch to issue, or None.

        Args:
            now_s: the clock that `add` was given.
            free: directions that can take a batch now.
            busy: directions with enough batches in flight to keep the link busy; only in these does a batch that is
                not full wait for more requests.
        """
        saves_first = self._consecutive_loads >= self._max_consecutive_loads
        for direction in _SAVES_FIRST if saves_first else _LOADS_FIRST:
            queue = self._queues[direction]
            if queue and direction in free and self._is_due(direction, now_s, direction in busy):
                saves_wait = bool(self._queues[Direction.SAVE])
                self._consecutive_loads = (
                    self._consecutive_loads + 1 if direction is Direction.LOAD and saves_wait else 0
                )
                return self._cut(direction)
        return None

    def next_due_s(self, free: set[Direction]) -> float | None:
        """When the linger time of the oldest request in a free direction ends; None if none is queued there."""
        heads = [queue[0].queued_at_s for d, queue in self._queues.items() if queue and d in free]
        return min(heads) + self._linger_s if heads else None

    def _is_due(self, direction: Direction, now_s: float, busy: bool) -> bool:
        queue = self._queues[direction]
        return (
            not busy
            or self._queued_bytes[direction] >= self._max_bytes
            or len(queue) >= self._max_requests
            or now_s >= queue[0].queued_at_s + self._linger_s
        )

    def _byte_limit(self, direction: Direction) -> int:
        queued, last = self._queued_bytes[direction], self._last_batch_bytes[direction]
        if direction is Direction.LOAD and self._queues[direction][-1].more_follows:
            return self._max_bytes
        ramp = 2 * last if direction is Direction.SAVE else queued // 2
        return min(max(ramp, MIN_BATCH_BYTES), self._max_bytes)

    def _cut(self, direction: Direction) -> Batch:
        queue = self._queues[direction]
        bytes_left, blocks_left = self._byte_limit(direction), self._max_blocks
        slices: list[Slice] = []
        nbytes = 0
        form = 0
        while queue and blocks_left and bytes_left > 0 and len(slices) < self._max_requests:
            request = queue[0]
            alike, next_form = request.next_alike()
            if slices and next_form != form:
                break
            form = next_form
            block_nbytes = request.extents[form]
            fitting = min(bytes_left // block_nbytes, blocks_left, alike)
            if fitting == 0 and slices:
                break
            taken = max(fitting, 1)  # a block that is larger than the limit goes alone
            start = request.next_block
            request.next_block = start + taken
            request.blocks_in_flight += taken
            slices.append(Slice(request, start, start + taken))
            moved = taken * block_nbytes
            nbytes, bytes_left, blocks_left = nbytes + moved, bytes_left - moved, blocks_left - taken
            if request.blocks_waiting == 0:
                queue.popleft()
        self._queued_bytes[direction] -= nbytes
        self._last_batch_bytes[direction] = nbytes
        return Batch(direction, tuple(slices), nbytes, form)
