"""Device memory that stages batches, from CUDA's stream-ordered allocator."""

from collections import Counter

from kvortex.cuda.driver import Device, Stream
from kvortex.errors import DeviceError, DoubleFreeError, ForeignExtentError, OutOfPoolMemoryError, PoolLeakError
from kvortex.stats import PoolFigures


class DeviceStagingPool:
    """A bounded pool on the device: `cuMemAllocFromPoolAsync` with accounting by owner.

    Args:
        device: the device whose memory it is.
        capacity_bytes: bytes that may be allocated at a time.
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
        """Allocate device memory.

        Args:
            nbytes: size in bytes.
            owner: name under which it is accounted.
            stream: work that is queued on it from now on may use the memory.

        Returns:
            The address.

        Raises:
            OutOfPoolMemoryError: the pool's capacity is exceeded, or the device has no memory left.
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
        """Free memory, once the work that is queued on `stream` so far is done.

        Raises:
            DoubleFreeError: it was freed before.
            ForeignExtentError: the address is not from this pool.
        """
        if address not in self._allocated:
            error = DoubleFreeError if address in self._freed else ForeignExtentError
            raise error(f"staging pool does not hold address {address:#x}")
        nbytes, _ = self._allocated.pop(address)
        self._freed.add(address)
        self.allocated_bytes -= nbytes
        self._device.free_async(address, stream)

    def leak_report(self) -> str:
        """Bytes that are still allocated, by owner; empty if there are none."""
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
            PoolLeakError: memory is still allocated. The pool stays then, because a transfer could use that memory.
        """
        if self._closed:
            return
        if self._allocated:
            raise PoolLeakError(f"staging pool closed with memory out: {self.leak_report()}")
        self._device.destroy_memory_pool(self._pool)
        self._closed = True
