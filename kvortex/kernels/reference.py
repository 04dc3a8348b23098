"""Gather and scatter in plain NumPy, directly on the layout; tests compare the kernels with these."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.kernels.digest import digest_reference
from kvortex.kernels.tables import array_at
from kvortex.layout import KVLayout


def gather_reference(layout: KVLayout, block_ids: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Payloads `uint8 [n, block_nbytes]` and digests `uint64 [n]` of host-memory blocks."""
    payloads = np.empty((len(block_ids), layout.block_nbytes), dtype=np.uint8)
    for payload, block_id in zip(payloads, block_ids, strict=True):
        for segment, offset in zip(layout.segments, layout.payload_offsets, strict=True):
            source = array_at(segment.address + block_id * segment.block_stride, segment.nbytes)
            payload[offset : offset + segment.nbytes] = source.view(np.uint8)
    digests = np.array([digest_reference(payload) for payload in payloads], dtype=np.uint64)
    return payloads, digests


def scatter_reference(layout: KVLayout, block_ids: Sequence[int], payloads: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Write payloads `uint8 [n, block_nbytes]` into host-memory blocks; returns their digests `uint64 [n]`."""
    for payload, block_id in zip(payloads, block_ids, strict=True):
        for segment, offset in zip(layout.segments, layout.payload_offsets, strict=True):
            target = array_at(segment.address + block_id * segment.block_stride, segment.nbytes)
            target.view(np.uint8)[:] = payload[offset : offset + segment.nbytes]
    return np.array([digest_reference(payload) for payload in payloads], dtype=np.uint64)
