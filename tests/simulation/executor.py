"""An executor that moves real bytes at times of the virtual clock and fails at random."""

import asyncio
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import DeviceError
from kvortex.sched import HostExecutor, TransferExecutor
from kvortex.sched.batcher import Batch
from kvortex.sched.executor import Completion, SourceRead, batch_arrays
from kvortex.testing import Fault
from kvortex.types import Direction
from tests.simulation.harm import Harm
from tests.simulation.ledger import Ledger

GARBAGE = 0xA5
DEPTH = 2  # batches under way in a direction


@dataclass(frozen=True, slots=True)
class ExecutorFaults:
    """Chances of a batch, 0 to 1."""

    refuse: float = 0.0
    fail: float = 0.0
    corrupt: float = 0.0
    stall: float = 0.0  # it takes a hundred times as long


class SimulatedExecutor(TransferExecutor):
    """Between `issue` and its end a batch has garbage where it writes, then moves, then waits a little more.

    Args:
        inner: moves the bytes, on the loop.
        dice: seeded.
        faults: what goes wrong, and how often.
        harm: is told whose bytes suffer.
    """

    def __init__(self, inner: HostExecutor, dice: random.Random, faults: ExecutorFaults, harm: Harm) -> None:
        self._inner = inner
        self._dice = dice
        self.faults = faults
        self._harm = harm
        self._in_flight = dict.fromkeys(Direction, 0)
        self._busy_block_ids: list[set[int]] = []
        self.fd = inner.fd

    def watch(self, pool: NDArray[np.uint8], cache: NDArray[np.uint8], ledger: Ledger, sizes: tuple[int, ...]) -> None:
        """What it moves between: the pool, the cache as `[num_blocks, bytes]`; payload sizes by form."""
        self._pool, self._cache, self._ledger, self._sizes = pool, cache, ledger, sizes

    def touches(self, block_ids: list[int]) -> bool:
        """Whether a batch is under way from or to one of these blocks of the cache."""
        return any(not ids.isdisjoint(block_ids) for ids in self._busy_block_ids)

    def free_slots(self, direction: Direction) -> int:
        return DEPTH - self._in_flight[direction]

    def issue(self, batch: Batch, on_done: Completion, on_source_read: SourceRead) -> None:
        fault = self._draw()
        ids, offsets = batch_arrays(batch)
        keys = self._harm.hashes_at(ids.tolist())
        if fault is Fault.REFUSE:
            self._harm.fail(keys)
            raise DeviceError("injected: the batch cannot be started")
        self._in_flight[batch.direction] += 1
        saves = batch.direction is Direction.SAVE
        nbytes = self._sizes[batch.form]
        who = f"a {batch.direction.value} batch"
        uses = [self._ledger.begin(who, offset, nbytes, writes=saves) for offset in offsets.tolist()]
        if saves:
            for offset in offsets.tolist():
                self._pool[offset : offset + nbytes] = GARBAGE
        else:
            self._cache[ids] = GARBAGE
        busy = set(ids.tolist())
        self._busy_block_ids.append(busy)
        loop = asyncio.get_running_loop()
        slow = 100 if self._dice.random() < self.faults.stall else 1

        def move() -> None:
            moved = self._inner._move(batch)
            if saves:
                on_source_read()
            loop.call_later(slow * self._dice.uniform(0.0001, 0.002), end, *moved)

        def end(digests: NDArray[np.uint64], too_lossy: NDArray[np.bool_] | None) -> None:
            self._in_flight[batch.direction] -= 1
            self._busy_block_ids.remove(busy)
            for use in uses:
                self._ledger.end(use)
            if not saves:
                on_source_read()
            if fault is Fault.FAIL:
                self._harm.fail(keys)
                on_done(DeviceError("injected: the batch failed on the device"))
                return
            if fault is Fault.CORRUPT:
                self._harm.corrupt(keys[:1])
                digests = digests.copy()
                digests[0] ^= np.uint64(1)
            on_done(digests, too_lossy)

        loop.call_later(slow * self._dice.uniform(0.0001, 0.002), move)

    def poll(self) -> None:
        self._inner.poll()

    def _draw(self) -> Fault | None:
        roll, faults = self._dice.random(), self.faults
        for fault, chance in (
            (Fault.REFUSE, faults.refuse),
            (Fault.FAIL, faults.fail),
            (Fault.CORRUPT, faults.corrupt),
        ):
            if roll < chance:
                return fault
            roll -= chance
        return None

    def close(self) -> None:
        self._inner.close()
        self.__dict__.pop("_pool", None)  # a view of the pool
