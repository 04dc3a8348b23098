"""A self-test at start-up, which proves that the layout is right: it saves and loads a pattern.

The pattern is written and compared with torch's own indexing, which does not use segments; the transfers in between are
the same as later. If blocks are packed, a second pattern, which packing does not change, is saved and loaded packed. At
the end the blocks get their previous contents back.
"""

import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.codecs import Packing
from kvortex.cuda.driver import Event
from kvortex.errors import LayoutSelfTestError
from kvortex.kernels import digest_reference
from kvortex.layout import KVLayout
from kvortex.sched import Batch, Slice, TransferExecutor, TransferRequest
from kvortex.types import Direction

BlockBytes = Callable[[str, int], torch.Tensor]
"""`(tensor name, block id)` -> that block of the tensor, a view, any shape."""


def run_self_test(
    layout: KVLayout,
    tensors: Mapping[str, torch.Tensor],
    block_of: BlockBytes,
    block_ids: Sequence[int],
    executor: TransferExecutor,
    offsets: NDArray[np.int64],
    pool: NDArray[np.uint8],
    after: Callable[[], Event | None],
    packing: Packing | None = None,
) -> None:
    """Write a pattern into `block_ids`, save it, wipe the blocks, load it, compare; then restore the blocks.

    Args:
        layout: the layout to test.
        tensors: the registered tensors by name.
        block_of: returns torch's view of a block.
        block_ids: `n` blocks of the cache to use.
        executor: carries out the transfers; it must be idle, and nothing else may poll it.
        offsets: byte offsets of `n` extents of the pool, `int64 [n]`.
        pool: the pool, `uint8 [capacity_bytes]`.
        after: returns an event for all work that torch has queued on the device so far; None on the host.
        packing: how blocks of the layout are packed; None if they are not.

    Raises:
        LayoutSelfTestError: the loaded bytes differ from the pattern; the message names the tensor.
    """
    # In this mode the cache may be written, even if its tensors require gradients.
    with torch.inference_mode():
        _run(
            layout,
            tensors,
            block_of,
            block_ids,
            _Path(executor, np.array(block_ids, np.int32), offsets, pool, after),
            packing,
        )


def _run(
    layout: KVLayout,
    tensors: Mapping[str, torch.Tensor],
    block_of: BlockBytes,
    block_ids: Sequence[int],
    path: "_Path",
    packing: Packing | None,
) -> None:
    blocks = {(name, b): block_of(name, b) for name in tensors for b in block_ids}
    before = {place: block.clone() for place, block in blocks.items()}
    try:
        _round_trip(blocks, _random_bytes, path, layout.block_nbytes, packed=False)
        if packing is not None:
            _round_trip(blocks, _small_integers, path, packing.block_nbytes, packed=True)
    finally:
        for place, block in blocks.items():
            block.copy_(before[place])


@dataclass(frozen=True)
class _Path:
    executor: TransferExecutor
    block_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    pool: NDArray[np.uint8]
    after: Callable[[], Event | None]


def _round_trip(
    blocks: Mapping[tuple[str, int], torch.Tensor],
    pattern: Callable[[torch.Tensor, int], torch.Tensor],
    path: _Path,
    payload_nbytes: int,
    *,
    packed: bool,
) -> None:
    patterns = {place: pattern(block, seed) for seed, (place, block) in enumerate(blocks.items())}
    for place, block in blocks.items():
        block.copy_(patterns[place])
    saved = _transfer(path, Direction.SAVE, packed)
    for digest, offset in zip(saved.tolist(), path.offsets.tolist(), strict=True):
        if digest_reference(path.pool[offset : offset + payload_nbytes]) != digest:
            raise LayoutSelfTestError("self-test: the kernel's digest is not that of the bytes it has written")
    for block in blocks.values():
        block.copy_(_random_bytes(block, -1))
    if not np.array_equal(saved, _transfer(path, Direction.LOAD, packed)):
        raise LayoutSelfTestError("self-test: a block's digest changed between save and load")
    for (name, block_id), block in blocks.items():
        if not torch.equal(_as_bytes(block), _as_bytes(patterns[name, block_id])):
            raise LayoutSelfTestError(
                f"self-test: {name!r}, block {block_id}, did not come back as written; "
                "pass block_dim= if the wrong dimension was taken as that of the blocks"
            )


def _small_integers(block: torch.Tensor, seed: int) -> torch.Tensor:
    values = np.random.default_rng(seed + 1).integers(-8, 9, tuple(block.shape)).astype(np.float32)
    return torch.from_numpy(values).to(block.device, block.dtype)


def _random_bytes(block: torch.Tensor, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed + 1)
    data = generator.integers(0, 256, block.numel() * block.element_size(), dtype=np.uint8)
    return torch.from_numpy(data).view(block.dtype).reshape(block.shape).to(block.device)


def _as_bytes(block: torch.Tensor) -> torch.Tensor:
    return block.contiguous().reshape(-1).view(torch.uint8)


def _transfer(path: _Path, direction: Direction, packed: bool) -> NDArray[np.uint64]:
    offsets, executor = path.offsets, path.executor
    size = int(offsets[1] - offsets[0]) if len(offsets) > 1 else path.pool.size
    encoding = np.full(len(offsets), packed)
    request = TransferRequest(
        direction, path.block_ids, offsets, size, path.after(), packed=encoding, packed_nbytes=size
    )
    batch = Batch(direction, (Slice(request, 0, len(offsets)),), len(offsets) * size, packed)
    outcomes: list[NDArray[np.uint64] | Exception] = []

    def done(outcome: NDArray[np.uint64] | Exception, _too_lossy: NDArray[np.bool_] | None = None, /) -> None:
        outcomes.append(outcome)

    executor.issue(batch, done, lambda: None)
    ready = select.poll()
    ready.register(executor.fd, select.POLLIN)
    while not outcomes:
        ready.poll()
        executor.poll()
    outcome = outcomes[0]
    if isinstance(outcome, Exception):
        raise LayoutSelfTestError(f"self-test: the transfer failed: {outcome}") from outcome
    return outcome
