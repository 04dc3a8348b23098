"""Device memory that batches pass through, on CUDA's stream-ordered allocator."""

from collections import Counter

from kvortex.cuda.driver import Device, Stream
from kvortex.errors import DeviceError, DoubleFreeError, ForeignExtentError, OutOfPoolMemoryError, PoolLeakError
from kvortex.stats import PoolFigures


class DeviceStagingPool:
    """A bounded pool on the device: `cuMemAllocFromPoolAsync` with accounting by owner.

    Args:
        device: where the memory lies.
        capacity_bytes: bound on what is handed out together.
    """

    def __init__(self, device: Device, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = 0
        self._device = device
        self._pool = device.create_memory_pool(release_threshold_bytes=capacity_bytes)
        self._allocated: dict[int, tuple[int, str]] = {}
        self._freed: set[int] = set()
        self._closed = False

    def allocate(self, nbytes: int, owner: str, *, stream: Stream) -> int:
        """Address of `nbytes` of device memory, usable in `stream` order.

        Raises:
            OutOfPoolMemoryError: over the pool's bound, or the device has no memory left.
        """
        if self.allocated_bytes + nbytes > self.capacity_bytes:
            raise OutOfPoolMemoryError(
                f"staging pool: {nbytes} bytes asked, {self.capacity_bytes - self.allocated_bytes} left of its bound"
            )
        try:
            address = self._device.allocate_async(nbytes, self._pool, stream)
        except DeviceError as error:
            raise OutOfPoolMemoryError(f"the device has no {nbytes} bytes for staging: {error}") from error
        self._allocated[address] = (nbytes, owner)
        self._freed.discard(address)
        self.allocated_bytes += nbytes
        return address

    def free(self, address: int, *, stream: Stream) -> None:
        """Give memory back in `stream` order.

        Raises:
            DoubleFreeError: given back before.
            ForeignExtentError: not an address of this pool.
        """
        if address not in self._allocated:
            error = DoubleFreeError if address in self._freed else ForeignExtentError
            raise error(f"staging pool does not hold address {address:#x}")
        nbytes, _ = self._allocated.pop(address)
        self._freed.add(address)
        self.allocated_bytes -= nbytes
        self._device.free_async(address, stream)

    def leak_report(self) -> str:
        """What is still handed out, by owner; empty when nothing is."""
        totals: Counter[str] = Counter()
        for nbytes, owner in self._allocated.values():
            totals[owner] += nbytes
        return ", ".join(f"{owner}: {nbytes} bytes" for owner, nbytes in totals.most_common())

    def figures(self) -> PoolFigures:
        """Occupancy now."""
        free = self.capacity_bytes - self.allocated_bytes
        return PoolFigures(
            name="staging",
            capacity_bytes=self.capacity_bytes,
            allocated_bytes=self.allocated_bytes,
            largest_free_bytes=free,
            fragmentation=0.0,
            num_extents=len(self._allocated),
            pinned_bytes=0,
        )

    def close(self) -> None:
        """Return the pool to the device; idempotent.

        Raises:
            PoolLeakError: something is still handed out; the pool stays, as freeing it could pull memory from
                under a transfer.
        """
        if self._closed:
            return
        if self._allocated:
            raise PoolLeakError(f"staging pool closed with memory out: {self.leak_report()}")
        self._device.destroy_memory_pool(self._pool)
        self._closed = True
