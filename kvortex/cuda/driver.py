"""The calls of the CUDA driver that KVortex needs, on raw handles.

Handles and addresses are plain ints. The context is the device's primary context, which torch and numba use too. Every
method raises `DeviceError` if the driver reports an error. `cuda.bindings` is imported when a `Device` is made, so a
machine without a driver can import KVortex.

The functions that every batch needs have their addresses in `Device.calls`, for compiled code that makes many calls at
once. Python calls some of them too, through ctypes and with the GIL held: a call takes a microsecond, and during each
call that released the GIL another thread could take it.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import DeviceError, DeviceUnavailableError, UnsupportedKernelError

NOT_READY = 600  # CUDA_ERROR_NOT_READY: an answer, not an error
_UNSUPPORTED_PTX = (218, 222)  # CUDA_ERROR_INVALID_PTX, CUDA_ERROR_UNSUPPORTED_PTX_VERSION
RECORD, WAIT, QUERY, SYNCHRONIZE, COPY, LAUNCH = range(6)  # positions in `Device.calls`
_CALLS = (
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuMemcpyAsync",
    "cuLaunchKernel",
)

Stream: TypeAlias = int
Event: TypeAlias = int
Kernel: TypeAlias = int
MemoryPool: TypeAlias = int


class HasCudaStream(Protocol):
    """Anything that follows the `__cuda_stream__` protocol, such as a `cuda.core` stream."""

    def __cuda_stream__(self) -> tuple[int, int]: ...


def stream_handle(stream: object) -> int:
    """Return the raw handle of a CUDA stream.

    Args:
        stream: a raw handle, or a stream of torch, numba, cupy or `cuda.core`.

    Raises:
        TypeError: `stream` is none of these.
    """
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(getattr(handle, "value", handle) or 0)
    raise TypeError(f"{type(stream).__name__} is no CUDA stream: pass a torch.cuda.Stream or a raw handle")


class Device:
    """One CUDA device, used through its primary context.

    Args:
        ordinal: CUDA's number of the device.

    Attributes:
        ordinal: CUDA's number of the device.
        calls: addresses of driver functions, `int64 [6]`, at the positions RECORD, WAIT, QUERY, SYNCHRONIZE, COPY
            and LAUNCH.

    Raises:
        DeviceUnavailableError: the driver, the device or the package `cuda-bindings` is missing.
    """

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DeviceUnavailableError(
                "cuda-bindings is not installed: pip install 'kvortex[cu13]' (or cu12)"
            ) from error
        self._driver: Any = driver
        self.ordinal = ordinal
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", ordinal)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        except (DeviceError, RuntimeError) as error:
            raise DeviceUnavailableError(f"CUDA device {ordinal} cannot be used: {error}") from error
        self._bind_calls()
        self.make_current()

    def _bind_calls(self) -> None:
        pointer, word = ctypes.c_void_p, ctypes.c_uint
        library = ctypes.PyDLL("libcuda.so.1")
        addresses = [ctypes.cast(getattr(library, name), pointer).value for name in _CALLS]
        self.calls: NDArray[np.int64] = np.array(addresses, dtype=np.int64)
        self._record, self._copy, self._launch = library.cuEventRecord, library.cuMemcpyAsync, library.cuLaunchKernel
        self._record.argtypes = (pointer, pointer)
        self._copy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, pointer)
        self._launch.argtypes = (pointer, *[word] * 7, pointer, pointer, pointer)

    def _call(self, name: str, *args: Any) -> Any:
        status, *values = getattr(self._driver, name)(*args)
        if status:
            raise self._error(name, status)
        return values[0] if values else None

    def error(self, call: int, status: int) -> DeviceError:
        """The error for `status`, returned by the function at position `call` of `calls`."""
        return self._error(_CALLS[call], status)

    def _error(self, name: str, status: Any) -> DeviceError:
        meaning = str(int(status))
        with contextlib.suppress(ValueError):  # a driver newer than its bindings may return a status that they lack
            meaning = self._driver.CUresult(int(status)).name
        return DeviceError(f"{name} failed: {meaning}")

    def make_current(self) -> None:
        """Bind the context to the calling thread. Every thread needs this once before its first CUDA call."""
        self._call("cuCtxSetCurrent", self._context)

    def enter_thread(self) -> None:
        """`make_current` for a thread of KVortex, whose calls must not break a CUDA graph that another thread captures.

        While torch captures a graph, a call such as pinning breaks the capture, unless its thread has asked for the
        thread-local capture mode (CUDA driver API, cuThreadExchangeStreamCaptureMode).
        """
        self.make_current()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuThreadExchangeStreamCaptureMode", mode)

    def close(self) -> None:
        """Release the primary context."""
        self._call("cuDevicePrimaryCtxRelease", self._device)

    # -- what the device is ------------------------------------------------------------------------

    def _attribute(self, name: str) -> int:
        enum = self._driver.CUdevice_attribute
        return int(self._call("cuDeviceGetAttribute", getattr(enum, f"CU_DEVICE_ATTRIBUTE_{name}"), self._device))

    @property
    def name(self) -> str:
        return str(self._call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode())

    @property
    def compute_capability(self) -> tuple[int, int]:
        return self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")

    @property
    def multiprocessors(self) -> int:
        return self._attribute("MULTIPROCESSOR_COUNT")

    def numa_node(self) -> int | None:
        """NUMA node of the device's PCI slot, or None if the machine does not tell it."""
        domain, bus, slot = (self._attribute(f"PCI_{part}_ID") for part in ("DOMAIN", "BUS", "DEVICE"))
        path = Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/numa_node")
        with contextlib.suppress(OSError, ValueError):
            node = int(path.read_text())
            return node if node >= 0 else None
        return None

    # -- streams and events ------------------------------------------------------------------------

    def create_stream(self, *, high_priority: bool = True) -> Stream:
        """A non-blocking stream. With high priority, its thread blocks start before those of a model's kernels."""
        least, greatest = self._stream_priorities()
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreateWithPriority", flags, greatest if high_priority else least))

    def _stream_priorities(self) -> tuple[int, int]:
        status, least, greatest = self._driver.cuCtxGetStreamPriorityRange()
        if status:
            raise DeviceError(f"cuCtxGetStreamPriorityRange failed: {status}")
        return int(least), int(greatest)

    def destroy_stream(self, stream: Stream) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize_stream(self, stream: Stream) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self, *, timing: bool = False) -> Event:
        """An event on which a waiting thread sleeps; it does not spin."""
        flags = self._driver.CUevent_flags
        wanted = flags.CU_EVENT_BLOCKING_SYNC | (0 if timing else flags.CU_EVENT_DISABLE_TIMING)
        return int(self._call("cuEventCreate", int(wanted)))

    def destroy_event(self, event: Event) -> None:
        self._call("cuEventDestroy", event)

    def record_event(self, event: Event, stream: Stream) -> None:
        status = self._record(event, stream)
        if status:
            raise self._error("cuEventRecord", status)

    def synchronize_event(self, event: Event) -> None:
        """Block the calling thread until the event has fired. The GIL is released meanwhile."""
        self._call("cuEventSynchronize", event)

    def elapsed_s(self, start: Event, end: Event) -> float:
        """Return the seconds between two events, which must have been created with `timing=True`."""
        return float(self._call("cuEventElapsedTime", start, end)) * 1e-3

    # -- memory ------------------------------------------------------------------------------------

    def copy_async(self, destination: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy `nbytes` between two addresses; host memory must be pinned. The addresses imply the direction."""
        status = self._copy(destination, source, nbytes, stream)
        if status:
            raise self._error("cuMemcpyAsync", status)

    def copy_batch_async(
        self, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: Stream
    ) -> None:
        """Make many copies with one driver call (`cuMemcpyBatchAsync`, CUDA 12.8 and newer).

        Args:
            destinations: addresses to write to.
            sources: addresses to read from, as many as destinations.
            sizes: bytes of each copy.
            stream: stream in whose order the copies run.
        """
        d = self._driver
        attributes = d.CUmemcpyAttributes()
        attributes.srcAccessOrder = d.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        pointers = [[d.CUdeviceptr(p) for p in side] for side in (destinations, sources)]
        self._call("cuMemcpyBatchAsync", *pointers, list(sizes), len(sizes), [attributes], [0], 1, stream)

    def fill_async(self, address: int, value: int, nbytes: int, stream: Stream) -> None:
        self._call("cuMemsetD8Async", address, value, nbytes, stream)

    def register_host(self, address: int, nbytes: int) -> None:
        """Pin a page-aligned range of host memory, so that every context can copy from and to it directly."""
        self._call("cuMemHostRegister", address, nbytes, self._driver.CU_MEMHOSTREGISTER_PORTABLE)

    def unregister_host(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def allocate_host(self, nbytes: int) -> int:
        """Allocate pinned host memory, for small tables. Its address is valid on the host and on the device."""
        return int(self._call("cuMemAllocHost", nbytes))

    def free_host(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def create_memory_pool(self, *, release_threshold_bytes: int) -> MemoryPool:
        """Create a stream-ordered memory pool on this device.

        Args:
            release_threshold_bytes: bytes of freed memory that the pool keeps for reuse.
        """
        d = self._driver
        properties = d.CUmemPoolProps()
        properties.allocType = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.ordinal
        pool = self._call("cuMemPoolCreate", properties)
        threshold = d.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        self._call("cuMemPoolSetAttribute", pool, threshold, d.cuuint64_t(release_threshold_bytes))
        return int(pool)

    def destroy_memory_pool(self, pool: MemoryPool) -> None:
        self._call("cuMemPoolDestroy", pool)

    def allocate_async(self, nbytes: int, pool: MemoryPool, stream: Stream) -> int:
        """Allocate device memory from `pool`. Work that is queued in `stream` from now on may use it."""
        return int(self._call("cuMemAllocFromPoolAsync", nbytes, pool, stream))

    def free_async(self, address: int, stream: Stream) -> None:
        self._call("cuMemFreeAsync", address, stream)

    # -- kernels -----------------------------------------------------------------------------------

    def load_kernel(self, ptx: str, name: str) -> Kernel:
        """Compile PTX for this device and return one of its kernels.

        Args:
            ptx: the PTX text.
            name: name of the kernel in it.

        Raises:
            UnsupportedKernelError: the driver is too old for the version of the PTX.
        """
        status, module = self._driver.cuModuleLoadData(ptx.encode() + b"\0")
        if status in _UNSUPPORTED_PTX:
            raise UnsupportedKernelError(
                f"{self._error('cuModuleLoadData', status)}: this driver is older than the NVVM that compiled the "
                "kernel; update the driver, or install the NVVM of its CUDA (pip install 'kvortex[cu12]' for CUDA 12)"
            )
        if status:
            raise self._error("cuModuleLoadData", status)
        return int(self._call("cuModuleGetFunction", module, name.encode()))

    def launch(self, launch: "Launch", stream: Stream) -> None:
        """Start a kernel. Its arguments may be changed as soon as this method returns."""
        kernel, grid, threads, arguments = launch.words.tolist()
        status = self._launch(kernel, grid, 1, 1, threads, 1, 1, 0, stream, arguments, None)
        if status:
            raise self._error("cuLaunchKernel", status)


class KernelArguments:
    """Kernel arguments in memory that is built once: a launch only changes values.

    Args:
        values: the arguments in order. An int is passed as eight bytes. An array is passed as one argument by value,
            such as a struct, and may be changed in place before each launch.

    Attributes:
        address: address of the array of argument pointers.
    """

    def __init__(self, *values: int | NDArray[np.generic]) -> None:
        self._arrays = [value for value in values if isinstance(value, np.ndarray)]  # kept alive
        self._slots = (ctypes.c_uint64 * len(values))()
        self._pointers = (ctypes.c_void_p * len(values))()
        for i, value in enumerate(values):
            if isinstance(value, np.ndarray):
                self._pointers[i] = value.ctypes.data
            else:
                self._slots[i] = value
                self._pointers[i] = ctypes.addressof(self._slots) + 8 * i
        self.address = ctypes.addressof(self._pointers)

    def __setitem__(self, position: int, value: int) -> None:
        self._slots[position] = value


class Launch:
    """The parameters of a launch of a one-dimensional kernel.

    Args:
        kernel: handle from `Device.load_kernel`.
        threads: threads per thread block.
        arguments: arguments of the kernel.

    Attributes:
        words: the parameters for compiled code, `int64 [4]`: kernel, number of thread blocks, threads per thread
            block, address of the arguments.
    """

    def __init__(self, kernel: Kernel, threads: int, arguments: KernelArguments) -> None:
        self._arguments = arguments  # kept alive
        self.words = np.array([kernel, 0, threads, arguments.address], dtype=np.int64)

    def set_grid(self, thread_blocks: int) -> None:
        """Set the number of thread blocks."""
        self.words[1] = thread_blocks
