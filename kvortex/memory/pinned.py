"""The pool in host memory: one mapping of exactly the requested size, pinned piece by piece."""

import asyncio
import contextlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config import MIB
from kvortex.cuda.driver import Device
from kvortex.errors import ConfigError, DeviceError
from kvortex.memory.numa import make_present, prefer_node
from kvortex.memory.shared import SharedMemory
from kvortex.types import Extent

logger = logging.getLogger(__name__)


class PinnedPool:
    """Host memory that is pinned for a device in the background, from its start on.

    Pinning takes about half a second a GiB, so the start-up does not wait for it: `ready(nbytes)` waits until the first
    `nbytes` are pinned. Without a device the memory is not pinned, and is ready at once. Forked children do not inherit
    the mapping: with copy-on-write, a page could move during a transfer.

    While the driver pins, every other call into it waits. So pages are allocated before that, which is most of the
    work. After each piece the thread pauses as long as the piece took, unless a transfer waits for the next one.

    Args:
        capacity_bytes: size in bytes, rounded up to whole pages.
        device: the device whose transfers use the memory; None for host memory that is not pinned.
        piece_bytes: bytes that are pinned at a time, a multiple of the page size.
        numa_aware: prefer pages on the device's NUMA node. A shared pool has several devices and no preference.
        memory: shared memory whose first `capacity_bytes` are mapped; None for memory of this process alone.
        on_stopped: called at most once, on the thread that pins, if no more can be pinned, with the number of bytes
            that are pinned, from the start of the pool. Calls that wait for more fail after that.

    Raises:
        ConfigError: that much memory cannot be mapped.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        device: Device | None = None,
        piece_bytes: int = 256 * MIB,
        numa_aware: bool = True,
        memory: SharedMemory | None = None,
        on_stopped: Callable[[int], None] | None = None,
    ) -> None:
        self.capacity_bytes = align_up(capacity_bytes, mmap.PAGESIZE)
        self.piece_bytes = piece_bytes
        self.pinned_bytes = 0
        self.numa_node: int | None = None
        self._device = device
        self._memory = memory
        self._on_stopped = on_stopped
        self._mapping = _map_private(self.capacity_bytes) if memory is None else memory.map(0, self.capacity_bytes)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel built without transparent huge pages
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8)
        self.address: int = self.bytes.ctypes.data
        self._condition = threading.Condition()
        self._one_closes = threading.Lock()
        self._stopping = False
        self._held = 0
        self._wanted_bytes = 0
        self._error: DeviceError | None = None
        self._registered: list[int] = []
        self._thread: threading.Thread | None = None
        if device is None:
            self.pinned_bytes = self.capacity_bytes
        else:
            self._start_pinning(device, numa_aware and memory is None)

    def _start_pinning(self, device: Device, numa_aware: bool) -> None:
        node = device.numa_node() if numa_aware else None
        if prefer_node(self.address, self.capacity_bytes, node):
            self.numa_node = node
        self._thread = threading.Thread(target=self._pin_all, name="kvortex-pin", args=(device,), daemon=True)
        self._thread.start()

    def _pin_all(self, device: Device) -> None:
        started, pause_s = time.perf_counter(), 0.0
        try:
            device.enter_thread()
            for start in range(0, self.capacity_bytes, self.piece_bytes):
                nbytes = min(self.piece_bytes, self.capacity_bytes - start)
                make_present(self.address + start, nbytes)
                self._await_turn(start, pause_s)
                if self._stopping:
                    return
                began = time.perf_counter()
                device.register_host(self.address + start, nbytes)
                pause_s = time.perf_counter() - began
                self._registered.append(self.address + start)
                self._advance(start + nbytes)
        except DeviceError as error:
            logger.warning(
                "no more than %d of the pool's %d bytes can be pinned, the rest is not used (%s): "
                "raise the limit on locked memory, or lower pool.bytes",
                self.pinned_bytes,
                self.capacity_bytes,
                error,
            )
            self._fail(error)
        else:
            elapsed_s = time.perf_counter() - started
            logger.info("pinned %d bytes in %.2f s, NUMA node %s", self.capacity_bytes, elapsed_s, self.numa_node)

    def _await_turn(self, start: int, pause_s: float) -> None:
        def is_wanted() -> bool:
            return self._stopping or self._wanted_bytes > start

        with self._condition:
            self._condition.wait_for(lambda: is_wanted() or not self._held)
            self._condition.wait_for(is_wanted, timeout=pause_s)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Pause the pinning, except of pieces that a transfer waits for, while the caller makes calls to the driver."""
        self._held += 1
        try:
            yield
        finally:
            with self._condition:
                self._held -= 1
                self._condition.notify_all()

    def _advance(self, pinned_bytes: int) -> None:
        with self._condition:
            self.pinned_bytes = pinned_bytes
            self._condition.notify_all()

    def _fail(self, error: DeviceError) -> None:
        if self._on_stopped is not None:
            self._on_stopped(self.pinned_bytes)
        with self._condition:
            self._error = error
            self._condition.notify_all()

    # -- use ---------------------------------------------------------------------------------------

    def is_ready(self, nbytes: int) -> bool:
        """True if the first `nbytes` of the pool can be used in a transfer."""
        return self.pinned_bytes >= nbytes

    def wait_ready(self, nbytes: int) -> None:
        """Block until the first `nbytes` are pinned.

        Raises:
            DeviceError: pinning has failed before, or the pool was closed.
            ValueError: the pool is smaller.
        """
        if nbytes > self.capacity_bytes:
            raise ValueError(f"cannot wait for {nbytes} bytes of a pool of {self.capacity_bytes}")
        with self._condition:
            self._wanted_bytes = max(self._wanted_bytes, nbytes)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self.is_ready(nbytes) or self._error or self._stopping)
            if not self.is_ready(nbytes):
                raise self._error or DeviceError("the pool was closed while memory was being pinned")

    async def ready(self, nbytes: int) -> None:
        """Wait until the first `nbytes` are pinned, without blocking the loop. Raises as `wait_ready`."""
        if not self.is_ready(nbytes):
            await asyncio.to_thread(self.wait_ready, nbytes)

    def view(self, extent: Extent, nbytes: int | None = None) -> NDArray[np.uint8]:
        """The bytes of an extent, `uint8 [n]`, as a view of the pool; `nbytes` leaves out the padding at its end."""
        return self.bytes[extent.offset : extent.offset + (extent.nbytes if nbytes is None else nbytes)]

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Exclude the other processes that share the pool, as long as they use this, too."""
        return self._memory.exclusive() if self._memory is not None else contextlib.nullcontext()

    # -- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unpin and unmap, whatever fails; idempotent, from any thread. No transfer may be in flight."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._one_closes)
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            stack.callback(self._unmap)
            if self._device is not None and self._registered:
                self._device.make_current()
                while self._registered:
                    stack.callback(self._device.unregister_host, self._registered.pop())

    def _unmap(self) -> None:
        self.pinned_bytes = 0
        self.bytes = np.empty(0, dtype=np.uint8)
        try:
            self._mapping.close()
        except BufferError:
            # A caller still holds a view of the pool. The mapping lives as long as that view, so no pointer dangles.
            logger.warning("a view of the pool is still alive; its memory is released with it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map_private(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot map a pool of {nbytes} bytes: {error}") from error
