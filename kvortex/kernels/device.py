"""Launchers of the CUDA kernels."""

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs.packing import Packing, block_sizes
from kvortex.codecs.reference import relative_errors
from kvortex.cuda.driver import Device, Kernel, KernelArguments, Launch, Stream
from kvortex.kernels import pack
from kvortex.kernels._cuda import SIMULATED, ArgumentKind, compile_ptx, nvvm_version, simulate
from kvortex.kernels.copy import GATHER, SCATTER
from kvortex.kernels.digest import LENGTH, MASK
from kvortex.kernels.ptx_cache import load_cached
from kvortex.kernels.tables import (
    LANE_BYTES,
    MAX_BATCH_BLOCKS,
    arena_base,
    arena_nbytes,
    array_at,
    tile_table,
    validate_block_ids,
)
from kvortex.kernels.tiles import grid_size, scratch_words
from kvortex.layout import KVLayout

THREADS: Final = 32 if SIMULATED else 512
_RESULT_WORDS: Final = 3  # of a block: digest, what was lost, what there was
_ARGUMENTS: Final = {
    "arena": ArgumentKind.WORDS,
    "staging": ArgumentKind.WORDS,
    "tiles": ArgumentKind.INTEGERS,
    "num_tiles": ArgumentKind.INTEGER,
    "ids": ArgumentKind.TABLE,
    "num_blocks": ArgumentKind.INTEGER,
    "distance": ArgumentKind.INTEGER,
    "scratch": ArgumentKind.WORDS,
    "results": ArgumentKind.WORDS,
}
"""The arguments of every kernel of `kvortex.kernels.tiles.tile_kernel`, in its order."""

# Positions of those that change from launch to launch.
_STAGING, _NUM_BLOCKS, _SCRATCH, _RESULTS = map(list(_ARGUMENTS).index, ("staging", "num_blocks", "scratch", "results"))


def staging_block_nbytes(layout: KVLayout, packing: Packing | None = None) -> int:
    """Bytes from one block to the next in staging: the payload, rounded up like an extent."""
    return block_sizes(layout, packing).packed


def device_table(layout: KVLayout, packing: Packing | None = None) -> NDArray[np.int64]:
    """The tile table that the kernels read on the device."""
    return packing.tiles if packing else tile_table(layout)


class BatchSlot:
    """Memory of one batch in flight: results in pinned memory, scratch on the device.

    Args:
        device: device of the scratch memory.
        max_blocks: maximum number of blocks in a batch.
        scratch: device address of `8 * scratch_words(max_blocks)` bytes, set to zero on `stream`.
    """

    def __init__(self, device: Device, max_blocks: int, scratch: int, stream: Stream) -> None:
        self._device = device
        nbytes = 8 * _RESULT_WORDS * max_blocks
        self._address = device.allocate_host(nbytes)
        self.results: NDArray[np.uint64] = array_at(self._address, nbytes).reshape(max_blocks, _RESULT_WORDS)
        self.max_blocks = min(max_blocks, MAX_BATCH_BLOCKS)
        self.addresses = ((_SCRATCH, scratch), (_RESULTS, self._address))
        device.fill_async(scratch, 0, 8 * scratch_words(max_blocks), stream)

    def close(self) -> None:
        """Free the host memory; the batch must have finished."""
        self._device.free_host(self._address)


class DeviceKernels:
    """Launcher of gather and scatter for one layout on a CUDA device, for raw or for packed blocks.

    Args:
        layout: layout of the cache; its tensors must outlive this object.
        device: device of the cache.
        tiles: device address of `device_table(layout, packing)`.
        packing: packing of the layout's blocks; None for raw blocks.
    """

    def __init__(self, layout: KVLayout, device: Device, tiles: int, packing: Packing | None = None) -> None:
        self._device = device
        self._num_blocks = layout.num_blocks
        self._block_nbytes = staging_block_nbytes(layout, packing)
        payload_nbytes = packing.block_nbytes if packing else layout.block_nbytes
        self._length_term = np.uint64(payload_nbytes // 8 * LENGTH & MASK)
        self._measures_errors = packing is not None
        self._num_tiles = len(device_table(layout, packing))
        self._ids = np.zeros(MAX_BATCH_BLOCKS, dtype=np.int32)
        distance = self._block_nbytes // (8 if packing else LANE_BYTES)
        fixed: dict[str, int | NDArray[np.int32]] = {
            "arena": arena_base(layout),
            "tiles": tiles,
            "num_tiles": self._num_tiles,
            "ids": self._ids,
            "distance": distance,
        }
        self._arguments = KernelArguments(*(fixed.get(name, 0) for name in _ARGUMENTS))
        self._gather, self._scatter = (
            Launch(kernel, THREADS, self._arguments) for kernel in _load_kernels(device, packing)
        )

    def gather(self, block_ids: NDArray[np.int32], staging: int, slot: BatchSlot, *, stream: Stream) -> None:
        """Start copying blocks to contiguous places in `staging` (device address, 16-byte aligned).

        When the work is done, `digests(slot, n)` returns their digests and `errors(slot, n)` their packing errors.

        Raises:
            InvalidBlockIdError: an id out of range (a block may be read twice).
            ValueError: more blocks than the slot holds.
        """
        self._start(self.prepare_gather(block_ids, staging, slot), len(block_ids), stream)

    def scatter(self, block_ids: NDArray[np.int32], staging: int, slot: BatchSlot, *, stream: Stream) -> None:
        """Start copying blocks out of `staging`; `digests` are those of the bytes read, for the caller to compare.

        Raises the errors of `gather`, and `InvalidBlockIdError` for a duplicate id.
        """
        self._start(self.prepare_scatter(block_ids, staging, slot), len(block_ids), stream)

    def _start(self, launch: Launch, count: int, stream: Stream) -> None:
        if count:
            self._device.launch(launch, stream)

    def prepare_gather(self, block_ids: NDArray[np.int32], staging: int, slot: BatchSlot) -> Launch:
        """The launch of `gather`; start it before another is prepared. Raises the errors of `gather`."""
        ids = validate_block_ids(block_ids, self._num_blocks, allow_duplicates=True)
        return self._filled_in(self._gather, ids, staging, slot)

    def prepare_scatter(self, block_ids: NDArray[np.int32], staging: int, slot: BatchSlot) -> Launch:
        """The launch of `scatter`, see `prepare_gather`."""
        return self._filled_in(self._scatter, validate_block_ids(block_ids, self._num_blocks), staging, slot)

    def _filled_in(self, launch: Launch, ids: NDArray[np.int32], staging: int, slot: BatchSlot) -> Launch:
        count = ids.size
        if count > slot.max_blocks:
            raise ValueError(f"{count} blocks in one batch; it holds {slot.max_blocks}")
        self._ids[:count] = ids
        arguments = self._arguments
        arguments[_STAGING] = staging
        arguments[_NUM_BLOCKS] = count
        for position, address in slot.addresses:
            arguments[position] = address
        launch.set_grid(grid_size(count, self._num_tiles, THREADS))
        return launch

    def digests(self, slot: BatchSlot, count: int) -> NDArray[np.uint64]:
        """Digests `uint64 [count]` of the slot's finished batch."""
        result: NDArray[np.uint64] = slot.results[:count, 0] + self._length_term
        return result

    def errors(self, slot: BatchSlot, count: int) -> NDArray[np.float32] | None:
        """Relative errors `float32 [count]` of the slot's finished gather; None for raw blocks."""
        results = slot.results[:count]
        return relative_errors(results[:, 1], results[:, 2]) if self._measures_errors else None


def _load_kernels(device: Device, packing: Packing | None) -> tuple[Kernel, Kernel]:
    capability = device.compute_capability
    fmt = packing.format if packing else None
    nvvm = nvvm_version()

    def compiled(scatters: bool) -> tuple[str, str]:
        if fmt is None:
            body = SCATTER if scatters else GATHER
        else:
            body = (pack.unpack_kernel if scatters else pack.pack_kernel)(fmt, capability)
        return compile_ptx(body, list(_ARGUMENTS.values()), capability, threads=THREADS, table_entries=MAX_BATCH_BLOCKS)

    gather, scatter = (
        load_cached((scatters, fmt, capability, THREADS, nvvm), partial(compiled, scatters), device.load_kernel)
        for scatters in (False, True)
    )
    return gather, scatter


class SimulatedKernels:
    """The same kernels in numba's simulator, on host memory: for tests without a GPU, small shapes only."""

    def __init__(self, layout: KVLayout, packing: Packing | None = None) -> None:
        self._num_blocks = layout.num_blocks
        self._packing = packing
        self._tiles = device_table(layout, packing)
        self._arena = array_at(arena_base(layout), arena_nbytes(layout))
        self._distance = staging_block_nbytes(layout, packing) // (8 if packing else LANE_BYTES)
        payload_nbytes = packing.block_nbytes if packing else layout.block_nbytes
        self._length_term = np.uint64(payload_nbytes // 8 * LENGTH & MASK)

    def gather(self, block_ids: NDArray[np.int32], staging: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Copy blocks to `staging`, padded and contiguous; returns digests. Raises the errors of `DeviceKernels`."""
        ids = validate_block_ids(block_ids, self._num_blocks, allow_duplicates=True)
        return self._run(pack.pack_kernel(self._packing.format, (0, 0)) if self._packing else GATHER, ids, staging)

    def scatter(self, block_ids: NDArray[np.int32], staging: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Copy blocks out of `staging`; returns digests of the bytes read. Raises the errors of `DeviceKernels`."""
        ids = validate_block_ids(block_ids, self._num_blocks)
        return self._run(pack.unpack_kernel(self._packing.format, (0, 0)) if self._packing else SCATTER, ids, staging)

    def _run(
        self, kernel: Callable[..., None], ids: NDArray[np.int32], staging: NDArray[np.uint8]
    ) -> NDArray[np.uint64]:
        scratch, results = np.zeros(scratch_words(ids.size), np.uint64), np.zeros((ids.size, _RESULT_WORDS), np.uint64)
        tiles = self._tiles
        if ids.size:
            simulate(
                kernel, grid_size(ids.size, len(tiles), THREADS), THREADS,
                self._arena, staging.view(np.uint64), tiles.reshape(-1), len(tiles), ids, ids.size, self._distance,
                scratch, results.reshape(-1),
            )  # fmt: skip
        self.errors = relative_errors(results[:, 1], results[:, 2])
        digests: NDArray[np.uint64] = results[:, 0] + self._length_term
        return digests
