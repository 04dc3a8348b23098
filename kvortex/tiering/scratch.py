"""A bounded number of buffers of one size, in host memory, for blocks on their way."""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.types import PAGE_BYTES

SCRATCH_BYTES: Final = 64 << 20
"""Bytes of all buffers together, if these are enough for `MIN_BUFFERS`."""
MIN_BUFFERS: Final = 16
MAX_BUFFERS: Final = 256


class Scratch:
    """Buffers for one event loop. Memory is taken when a buffer is first used, and kept.

    Args:
        nbytes: bytes of a buffer.
        count: number of buffers; None for what `SCRATCH_BYTES` is enough for.
    """

    def __init__(self, nbytes: int, count: int | None = None) -> None:
        self.nbytes = nbytes
        self.count = max(min(SCRATCH_BYTES // nbytes, MAX_BUFFERS), MIN_BUFFERS) if count is None else count
        self._unused = self.count
        self._free: list[NDArray[np.uint8]] = []
        self._waiting: deque[tuple[int, asyncio.Future[list[NDArray[np.uint8]]]]] = deque()

    @property
    def num_taken(self) -> int:
        """Buffers that were not given back."""
        return self.count - self._unused - len(self._free)

    async def take(self, count: int) -> list[NDArray[np.uint8]]:
        """Wait for some buffers, `uint8 [nbytes]` each, no more than there are. Who comes first is served first."""
        taken: asyncio.Future[list[NDArray[np.uint8]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, taken))
        self._serve()
        try:
            return await taken
        except asyncio.CancelledError:
            if taken.done() and not taken.cancelled():
                self.give(taken.result())
            raise

    def give(self, buffers: Iterable[NDArray[np.uint8]]) -> None:
        """Give buffers back, which nobody writes to any more."""
        self._free += buffers
        self._serve()

    def abandon(self) -> None:
        """A buffer does not come back, because nobody knows who still writes to it: another may take its place."""
        self._unused += 1
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            count, taken = self._waiting[0]
            if not taken.done() and count > len(self._free) + self._unused:
                return
            self._waiting.popleft()
            if not taken.done():
                taken.set_result([self._next() for _ in range(count)])

    def _next(self) -> NDArray[np.uint8]:
        if self._free:
            return self._free.pop()
        self._unused -= 1
        memory = np.empty(align_up(self.nbytes, PAGE_BYTES) + PAGE_BYTES, dtype=np.uint8)
        start = -memory.__array_interface__["data"][0] % PAGE_BYTES
        return memory[start : start + self.nbytes]
