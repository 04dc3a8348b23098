"""Leases: blocks that stay in the pool for a time, so that what was found can be loaded."""

import asyncio
import contextlib
import math
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError
from kvortex.groups import GroupSet
from kvortex.owner import Control
from kvortex.runtime.loop_thread import running_loop


class Lease:
    """Blocks that are not evicted from the pool until the lease ends. `KVortexEngine.pin` gives one.

        with engine.pin(hashes, ttl_s=30) as lease:
            await engine.load_blocks(hashes[: lease.num_blocks], block_ids)

    Attributes:
        num_blocks: leading blocks of the call, in block hashes, with which a request can resume while the lease lasts.
        nbytes: bytes of the pool that it keeps.
    """

    def __init__(self, leases: "Leases", slots: NDArray[np.int64], sizes: dict[int, int], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.nbytes = sum(sizes.values())
        self._leases = leases
        self._slots = slots
        self._sizes = sizes
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Lease of {self.num_blocks} blocks, {'over' if self.is_over else f'{self.nbytes} bytes'}>"

    @property
    def is_over(self) -> bool:
        """True once its time has passed, it was released, the engine was shut down, or its pool was left."""
        return self not in self._leases.open

    def release(self) -> None:
        """End it before its time; idempotent, from any thread."""
        self._leases.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """All leases of an engine, which lives on the running loop.

    Args:
        control: the pool's index and allocator.
        groups: the groups of the cache.
        share: share of the pool that leases may keep together. A block that several of them have counts once.
    """

    def __init__(self, control: Control, groups: GroupSet, share: float) -> None:
        self.open: set[Lease] = set()
        self.nbytes = 0
        """Bytes of the pool that they keep."""
        self._control = control
        self._groups = groups
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._num_leases: dict[int, int] = {}  # slot -> leases that have its block

    def pin(self, hashes: NDArray[np.uint64], ttl_s: float) -> Lease:
        """Lease the leading blocks of a request that are in the pool, as many as the share allows.

        Args:
            hashes: hashes of the request, `uint64 [n, 4]`.
            ttl_s: seconds.

        Raises:
            ConfigError: `ttl_s` is not a positive number.
        """
        if not (0 < ttl_s < math.inf):
            raise ConfigError(f"ttl_s is {ttl_s}: a lease lasts a positive number of seconds, such as 30")
        num_blocks = len(hashes)
        while True:
            num_blocks, keys = leading_in_pool(self._control, self._groups, hashes[:num_blocks])
            held = self._control.hold(keys)
            sizes = dict(zip(held.slots.tolist(), held.nbytes.tolist(), strict=True))
            needed = sum(nbytes for slot, nbytes in sizes.items() if slot not in self._num_leases)
            too_many = needed + self.nbytes - int(self._share * self._control.allocator.capacity_bytes)
            if needed == 0 or too_many <= 0:
                break
            self._control.release(held.slots)
            num_blocks = max(num_blocks - max(too_many * num_blocks // sum(sizes.values()), 1), 0)
        self._control.touch(keys)
        lease = Lease(self, held.slots, sizes, num_blocks)
        for slot in sizes:
            self._num_leases[slot] = self._num_leases.get(slot, 0) + 1
        self.nbytes += needed
        self.open.add(lease)
        lease._timer = self._loop.call_later(ttl_s, self._end, lease)
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease; idempotent, from any thread."""
        if running_loop() is self._loop:
            self._end(lease)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine has no pool any more
            self._loop.call_soon_threadsafe(self._end, lease)

    def end_all(self) -> None:
        """End all leases."""
        for lease in list(self.open):
            self._end(lease)

    def _end(self, lease: Lease) -> None:
        if lease not in self.open:
            return
        self.open.remove(lease)
        if lease._timer is not None:
            lease._timer.cancel()
        for slot, nbytes in lease._sizes.items():
            self._num_leases[slot] -= 1
            if not self._num_leases[slot]:
                del self._num_leases[slot]
                self.nbytes -= nbytes
        self._control.release(lease._slots)


def leading_in_pool(control: Control, groups: GroupSet, hashes: NDArray[np.uint64]) -> tuple[int, NDArray[np.uint64]]:
    """How far a request can resume with what is in the pool.

    Args:
        control: the pool's index.
        groups: the groups of the cache.
        hashes: hashes of the request, `uint64 [n, 4]`.

    Returns:
        Leading block hashes, and the keys of the blocks that are needed there, `uint64 [m, 4]`.
    """
    if groups.is_single:
        num_blocks = control.index.prefix_length(hashes)
        return num_blocks, hashes[:num_blocks]
    found = [control.index.contains_mask(groups.keys(hashes, number)) for number in range(len(groups))]
    num_tokens = groups.longest_match(found, len(hashes) * groups.hash_block_size).num_tokens
    return num_tokens // groups.hash_block_size, groups.needed_keys(hashes, num_tokens)[0]
