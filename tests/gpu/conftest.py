"""A bench for kernels alone: staging, tables and one slot."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvortex.codecs import Packing
from kvortex.cuda.driver import Device
from kvortex.kernels import DeviceKernels
from kvortex.kernels.device import BatchSlot, device_table, staging_block_nbytes
from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.kernels.tiles import scratch_words
from kvortex.layout import KVLayout


class KernelBench:
    """Runs one launch at a time and brings staging to the host."""

    def __init__(self, layout: KVLayout, undo: contextlib.ExitStack, packing: Packing | None = None) -> None:
        self._device = Device(0)
        self._stream = self._device.create_stream()
        undo.callback(self._device.destroy_stream, self._stream)
        self._size = staging_block_nbytes(layout, packing)
        tiles = torch.from_numpy(device_table(layout, packing)).cuda()
        self._scratch = torch.zeros(8 * scratch_words(MAX_BATCH_BLOCKS), dtype=torch.uint8, device="cuda")
        self._tiles = tiles
        self._kernels = DeviceKernels(layout, self._device, tiles.data_ptr(), packing)
        self._slot = BatchSlot(self._device, MAX_BATCH_BLOCKS, self._scratch.data_ptr(), self._stream)
        undo.callback(self._slot.close)
        torch.cuda.synchronize()

    def gather(self, ids: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        staging = torch.full((len(ids), self._size), 0xA5, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self._kernels.gather(ids, staging.data_ptr(), self._slot, stream=self._stream)
        self._device.synchronize_stream(self._stream)
        return staging.cpu().numpy(), self._kernels.digests(self._slot, len(ids))

    def errors(self, count: int) -> NDArray[np.float32]:
        errors = self._kernels.errors(self._slot, count)
        assert errors is not None
        return errors

    def scatter(self, ids: NDArray[np.int32], payloads: NDArray[np.uint8]) -> NDArray[np.uint64]:
        staging = torch.from_numpy(payloads).cuda()
        torch.cuda.synchronize()
        self._kernels.scatter(ids, staging.data_ptr(), self._slot, stream=self._stream)
        self._device.synchronize_stream(self._stream)
        return self._kernels.digests(self._slot, len(ids))


@pytest.fixture
def gpu_bench() -> Iterator[Callable[..., KernelBench]]:
    with contextlib.ExitStack() as undo:
        yield lambda layout, packing=None: KernelBench(layout, undo, packing)
