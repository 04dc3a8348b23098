"""The CUDA gather and scatter kernels and their launchers."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.config import EXTENT_ALIGNMENT_BYTES
from kvortex.driver import Device, KernelArguments, Stream, align_up
from kvortex.kernels._cuda import DEVICE_OPS, SIMULATED, compile_ptx, cuda, device_function, int32, simulate
from kvortex.kernels.digest import LENGTH, MASK
from kvortex.kernels.tables import (
    LANE_BYTES,
    TILE_LANES,
    arena_base,
    arena_nbytes,
    array_at,
    tile_table,
    validate_block_ids,
)
from kvortex.layout import KVLayout

THREADS: Final = 64 if SIMULATED else 512
MAX_BATCH_BLOCKS: Final = 4096
"""Blocks of one launch: their ids are kept in shared memory."""


def copy_kernel(to_staging: bool) -> Callable[..., None]:
    """The kernel body: gather (`to_staging`) or scatter. One launch moves all segments of all blocks.

    A warp moves a tile of up to 256 16-byte lanes with eight accesses a thread, all loads before the first
    store so that they are in flight together, and adds the tile's part of the digest to its block's sum. The
    warp that finishes a block last writes the sum to host memory and clears the block's scratch words, so
    that nothing has to be set or fetched by further operations on the stream.

    Arguments of the kernel, sizes in 16-byte lanes: arena and staging; the tile table and its length; block
    ids in host memory and their number; a block's distance in staging; scratch, two words a block, zero; the
    digests in host memory.
    """
    ops = DEVICE_OPS
    load, store, key, mix, fetch_add = ops.load, ops.store, ops.key, ops.mix, ops.fetch_add
    warp_sum, as_int32, as_word = ops.warp_sum, ops.int32, ops.word
    key_step, lane_step, adders = ops.key_step, ops.lane_step, ops.adders
    zero, one = (0, 1) if SIMULATED else (np.uint64(0), np.uint64(1))
    last_lane = TILE_LANES - 1

    @device_function
    def put(target: Any, lane: Any, words: Any, key_low: Any) -> Any:
        store(target, lane, words[0], words[1])
        return mix(words[0], key_low) + mix(words[1], key_low + key_step)

    @device_function
    def copy_full_tile(source: Any, start: Any, target: Any, into: Any, first_key: Any) -> Any:
        a, b, c, d = load(source, start), load(source, start + 32), load(source, start + 64), load(source, start + 96)
        e, f, g, h = (
            load(source, start + 128),
            load(source, start + 160),
            load(source, start + 192),
            load(source, start + 224),
        )
        k = first_key
        total = put(target, into, a, k)
        k += lane_step
        total += put(target, into + 32, b, k)
        k += lane_step
        total += put(target, into + 64, c, k)
        k += lane_step
        total += put(target, into + 96, d, k)
        k += lane_step
        total += put(target, into + 128, e, k)
        k += lane_step
        total += put(target, into + 160, f, k)
        k += lane_step
        total += put(target, into + 192, g, k)
        k += lane_step
        total += put(target, into + 224, h, k)
        return total

    @device_function
    def copy_tile(source: Any, start: Any, target: Any, into: Any, first_key: Any, count: Any) -> Any:
        total = zero
        k = first_key
        step = 0
        while count - step > 96:
            a, b = load(source, start + step), load(source, start + step + 32)
            c, d = load(source, start + step + 64), load(source, start + step + 96)
            total += put(target, into + step, a, k)
            k += lane_step
            total += put(target, into + step + 32, b, k)
            k += lane_step
            total += put(target, into + step + 64, c, k)
            k += lane_step
            total += put(target, into + step + 96, d, k)
            k += lane_step
            step += 128
        while count > step:
            total += put(target, into + step, load(source, start + step), k)
            k += lane_step
            step += 32
        return total

    def kernel(
        arena: Any,
        staging: Any,
        tiles: Any,
        num_tiles: Any,
        ids: Any,
        num_blocks: Any,
        block_lanes: Any,
        scratch: Any,
        digests: Any,
    ) -> None:
        block_ids = cuda.shared.array(MAX_BATCH_BLOCKS, int32)
        for i in range(cuda.threadIdx.x, num_blocks, cuda.blockDim.x):
            block_ids[i] = ids[i]
        cuda.syncthreads()
        lane = cuda.threadIdx.x % 32
        warps = as_int32(cuda.gridDim.x * cuda.blockDim.x // 32)
        item = as_int32((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // 32)
        tile_count = as_int32(num_tiles)
        step_b, step_t = warps // tile_count, warps % tile_count
        b, t = item // tile_count, item % tile_count
        while b < num_blocks:
            paged = tiles[4 * t] + block_ids[b] * tiles[4 * t + 1] + lane
            payload = tiles[4 * t + 2] + lane
            dense = b * block_lanes + payload
            count = tiles[4 * t + 3]
            first_key = key(2 * payload)
            if to_staging:
                if count > last_lane:
                    total = copy_full_tile(arena, paged, staging, dense, first_key)
                else:
                    total = copy_tile(arena, paged, staging, dense, first_key, count - lane)
            else:
                if count > last_lane:
                    total = copy_full_tile(staging, dense, arena, paged, first_key)
                else:
                    total = copy_tile(staging, dense, arena, paged, first_key, count - lane)
            total = warp_sum(total)
            if lane < adders:
                fetch_add(scratch, 2 * b, total)
                cuda.threadfence()
                finished = fetch_add(scratch, 2 * b + 1, one) + one
                if finished == as_word(num_tiles * adders):
                    digests[b] = fetch_add(scratch, 2 * b, zero)
                    scratch[2 * b] = zero
                    scratch[2 * b + 1] = zero
            b += step_b
            t += step_t
            if t >= tile_count:
                t -= tile_count
                b += 1

    kernel.__name__ = kernel.__qualname__ = "kvortex_gather" if to_staging else "kvortex_scatter"
    return kernel


GATHER: Final = copy_kernel(to_staging=True)
SCATTER: Final = copy_kernel(to_staging=False)
ARGUMENTS: Final = "uulninnuu"
_STAGING, _IDS, _COUNT, _SCRATCH, _DIGESTS = 1, 4, 5, 7, 8


def staging_block_nbytes(layout: KVLayout) -> int:
    """A block's distance from the next in staging: its payload, rounded up as an extent is."""
    return align_up(layout.block_nbytes, EXTENT_ALIGNMENT_BYTES)


class BatchSlot:
    """Memory of one batch in flight: ids in and digests out in pinned host memory, scratch words on the device."""

    def __init__(self, device: Device, max_blocks: int, scratch: int, stream: Stream) -> None:
        self._device = device
        self._address = device.allocate_host(max_blocks * 16)
        words = array_at(self._address, max_blocks * 16)
        self.ids: NDArray[np.int32] = words[max_blocks:].view(np.int32)
        self.digests: NDArray[np.uint64] = words[:max_blocks]
        self.scratch = scratch
        device.fill_async(scratch, 0, max_blocks * 16, stream)

    def close(self) -> None:
        """Free the host memory; the batch must have finished."""
        self._device.free_host(self._address)


class DeviceKernels:
    """Launcher of gather and scatter for one layout on a CUDA device.

    Args:
        layout: of tensors that stay alive as long as this object.
        device: where they lie.
        tiles: device address of `tile_table(layout)`.
        thread_blocks: grid size, in thread blocks of 512 threads.
    """

    def __init__(self, layout: KVLayout, device: Device, tiles: int, thread_blocks: int) -> None:
        self._device = device
        self._num_blocks = layout.num_blocks
        self._thread_blocks = thread_blocks
        self._length_term = np.uint64(layout.block_nbytes // 8 * LENGTH & MASK)
        capability = device.compute_capability
        self._gather, self._scatter = (
            device.load_kernel(*compile_ptx(body, ARGUMENTS, capability)) for body in (GATHER, SCATTER)
        )
        lanes = staging_block_nbytes(layout) // LANE_BYTES
        self._arguments = KernelArguments(arena_base(layout), 0, tiles, len(tile_table(layout)), 0, 0, lanes, 0, 0)

    def gather(self, block_ids: NDArray[np.int32], staging: int, slot: BatchSlot, *, stream: Stream) -> None:
        """Start copying blocks to `staging` (device address, 16-byte aligned), one after the other.

        When the work is done, `digests(slot, n)` has their digests.

        Raises:
            InvalidBlockIdError: an id out of range (a block may be read twice).
            ValueError: more blocks than `MAX_BATCH_BLOCKS`.
        """
        ids = validate_block_ids(block_ids, self._num_blocks, allow_duplicates=True)
        self._launch(self._gather, ids, staging, slot, stream)

    def scatter(self, block_ids: NDArray[np.int32], staging: int, slot: BatchSlot, *, stream: Stream) -> None:
        """Start copying blocks out of `staging`; the digests are of what was read, to be compared.

        Raises as `gather`, and `InvalidBlockIdError` for an id named twice.
        """
        self._launch(self._scatter, validate_block_ids(block_ids, self._num_blocks), staging, slot, stream)

    def _launch(self, kernel: Any, ids: NDArray[np.int32], staging: int, slot: BatchSlot, stream: Stream) -> None:
        if ids.size > min(MAX_BATCH_BLOCKS, slot.ids.size):
            raise ValueError(f"{ids.size} blocks in one batch; it holds {min(MAX_BATCH_BLOCKS, slot.ids.size)}")
        if not ids.size:
            return
        slot.ids[: ids.size] = ids
        arguments = self._arguments
        arguments[_STAGING] = staging
        arguments[_IDS] = slot.ids.ctypes.data
        arguments[_COUNT] = ids.size
        arguments[_SCRATCH] = slot.scratch
        arguments[_DIGESTS] = slot.digests.ctypes.data
        self._device.launch(kernel, self._thread_blocks, THREADS, arguments, stream)

    def digests(self, slot: BatchSlot, count: int) -> NDArray[np.uint64]:
        """Digests `uint64 [count]` of the slot's finished batch."""
        result: NDArray[np.uint64] = slot.digests[:count] + self._length_term
        return result


class SimulatedKernels:
    """The same kernels in numba's simulator, on host memory: for tests without a GPU, small shapes only."""

    def __init__(self, layout: KVLayout, thread_blocks: int = 2) -> None:
        self._num_blocks = layout.num_blocks
        self._thread_blocks = thread_blocks
        self._tiles = tile_table(layout)
        self._arena = array_at(arena_base(layout), arena_nbytes(layout))
        self._lanes = staging_block_nbytes(layout) // LANE_BYTES
        self._length_term = np.uint64(layout.block_nbytes // 8 * LENGTH & MASK)

    def gather(self, block_ids: NDArray[np.int32], staging: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Copy blocks to `staging`, a padded block after the other; returns digests. Raises as `DeviceKernels`."""
        ids = validate_block_ids(block_ids, self._num_blocks, allow_duplicates=True)
        return self._run(GATHER, ids, staging)

    def scatter(self, block_ids: NDArray[np.int32], staging: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Copy blocks out of `staging`; returns the digests of what was read. Raises as `DeviceKernels`."""
        return self._run(SCATTER, validate_block_ids(block_ids, self._num_blocks), staging)

    def _run(
        self, kernel: Callable[..., None], ids: NDArray[np.int32], staging: NDArray[np.uint8]
    ) -> NDArray[np.uint64]:
        scratch, digests = np.zeros(2 * ids.size + 2, np.uint64), np.zeros(ids.size, np.uint64)
        tiles = self._tiles
        words = staging.view(np.uint64)
        tail = (self._lanes, scratch, digests)
        if ids.size:
            simulate(
                kernel, self._thread_blocks, THREADS,
                self._arena, words, tiles.reshape(-1), len(tiles), ids, ids.size, *tail,
            )  # fmt: skip
        result: NDArray[np.uint64] = digests + self._length_term
        return result
