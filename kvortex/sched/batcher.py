"""Decides which blocks form a batch, and when: a pure function of the queues, the clock and the busy directions."""

from collections import deque
from typing import NamedTuple

from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.sched.request import TransferRequest
from kvortex.types import Direction

_LOADS_FIRST = (Direction.LOAD, Direction.SAVE)
_SAVES_FIRST = (Direction.SAVE, Direction.LOAD)

MIN_BATCH_BYTES = 16 << 20
"""Size at which ramps start and end: 0.3 ms of the link, longer than preparing the next batch takes."""


class Slice(NamedTuple):
    """Blocks `[start, stop)` of a request."""

    request: TransferRequest
    start: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start


class Batch(NamedTuple):
    """The blocks that one gather or scatter moves: all raw, or all packed. They take `nbytes` of the pool."""

    direction: Direction
    slices: tuple[Slice, ...]
    nbytes: int
    packed: bool = False

    @property
    def num_blocks(self) -> int:
        return sum([part.stop - part.start for part in self.slices])


class Batcher:
    """One first-in-first-out queue of requests per direction; batches are cut from their heads.

    A batch holds blocks of at most `max_requests` requests and at most `max_bytes` and `max_blocks`. A larger
    request is split. Loads go before saves, because a request waits for them. After `max_consecutive_loads` load
    batches a waiting save is next.

    The link is idle while the first save batch is gathered and while the last load batch is scattered. Therefore
    the batches of a save start small and double, and the batches of a load halve towards the end of the queue.

    Args:
        max_requests: maximum number of requests in one batch.
        max_bytes: maximum bytes in one batch, padding included.
        max_blocks: maximum number of blocks in one batch.
        linger_s: seconds that a batch that is not full waits for more requests while its direction is busy.
        max_consecutive_loads: number of load batches that may go before a waiting save.
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
        """Remove the rest of a request from its queue, if it is still there."""
        queue = self._queues[request.direction]
        if request in queue:
            queue.remove(request)
            self._queued_bytes[request.direction] -= request.waiting_nbytes

    def restart_ramp(self, direction: Direction) -> None:
        """Start a new ramp: nothing is in flight in this direction, so its next batch is the first of a transfer."""
        self._last_batch_bytes[direction] = 0

    @property
    def waiting(self) -> list[Direction]:
        """Directions with queued requests."""
        return [direction for direction, queue in self._queues.items() if queue]

    def queued_bytes(self, direction: Direction) -> int:
        """Bytes queued in one direction."""
        return self._queued_bytes[direction]

    def next_batch(self, now_s: float, free: set[Direction], busy: set[Direction]) -> Batch | None:
        """The next batch to issue, or None.

        Args:
            now_s: current time in seconds, on the same clock as for `add`.
            free: directions that can take a batch now.
            busy: directions with enough batches in flight to keep the link busy; only in these may a batch that is
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
        """Time in seconds at which a waiting batch in a free direction goes even if not full; None if none waits."""
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
        packed = False
        while queue and blocks_left and bytes_left > 0 and len(slices) < self._max_requests:
            request = queue[0]
            alike, is_packed = request.next_alike()
            if slices and is_packed != packed:
                break
            packed = is_packed
            block_nbytes = request.packed_nbytes if packed else request.block_nbytes
            fitting = min(bytes_left // block_nbytes, blocks_left, alike)
            if fitting == 0 and slices:
                break
            taken = max(fitting, 1)  # a block larger than the limit still goes, alone
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
        return Batch(direction, tuple(slices), nbytes, packed)
