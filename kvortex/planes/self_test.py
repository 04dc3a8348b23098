"""A self-test at start-up, which proves that the layout is right: it saves and loads a pattern.

The pattern is written and compared with torch's own indexing, which does not use segments; the transfers in between are
the same as later. If blocks are packed, a second pattern, which packing does not change, is saved and loaded packed. At
the end the blocks get their previous contents back.

A cache that is in use is only read: `check_arrival` saves blocks of it, which proves that they arrive in another pool.
"""

import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.codecs import Pages
from kvortex.cuda.driver import Event
from kvortex.errors import LayoutSelfTestError
from kvortex.kernels import digest_reference
from kvortex.memory import PinnedPool
from kvortex.sched import Batch, Slice, TransferExecutor, TransferRequest, TransferScheduler
from kvortex.types import Direction, form_of


def run_self_test(
    pages: Pages,
    group: int,
    tensors: Mapping[str, torch.Tensor],
    block_ids: Sequence[int],
    executor: TransferExecutor,
    offsets: NDArray[np.int64],
    pool: NDArray[np.uint8],
    after: Callable[[], Event | None],
) -> None:
    """Write a pattern into `block_ids`, save it, wipe the blocks, load it, compare; then restore the blocks.

    Args:
        pages: the group's layout, which is tested, and how its blocks are packed.
        group: the group's number.
        tensors: the registered tensors by name.
        block_ids: `n` blocks of the cache to use.
        executor: carries out the transfers; it must be idle, and nothing else may poll it.
        offsets: byte offsets of `n` extents of the pool, `int64 [n]`.
        pool: the pool, `uint8 [capacity_bytes]`.
        after: returns an event for all work that torch has queued on the device so far; None on the host.

    Raises:
        LayoutSelfTestError: the loaded bytes differ from the pattern; the message names the tensor.
    """
    # In this mode the cache may be written, even if its tensors require gradients.
    with torch.inference_mode():
        _run(pages, group, tensors, _Path(executor, np.array(block_ids, np.int32), offsets, pool, after))


def _run(pages: Pages, group: int, tensors: Mapping[str, torch.Tensor], path: "_Path") -> None:
    layout, packing = pages
    dims = {fmt.name: dim for fmt, dim in zip(layout.formats, layout.block_dims, strict=True)}
    blocks = {
        (name, b): _block_of(tensors[name], dim, layout.num_blocks, b)
        for name, dim in dims.items()
        for b in path.block_ids.tolist()
    }
    before = {place: block.clone() for place, block in blocks.items()}
    try:
        _round_trip(blocks, _random_bytes, path, layout.block_nbytes, form_of(group, False))
        if packing is not None:
            _round_trip(blocks, _small_integers, path, packing.block_nbytes, form_of(group, True))
    finally:
        for place, block in blocks.items():
            block.copy_(before[place])


async def check_arrival(
    pages: Pages,
    group: int,
    block_ids: Sequence[int],
    scheduler: TransferScheduler,
    offsets: NDArray[np.int64],
    pool: PinnedPool,
) -> None:
    """Save blocks, and compare the digest that was computed on the way with that of the bytes that have arrived.

    It holds whatever else writes to the blocks meanwhile: the kernel reads each byte once.

    Args:
        pages: the group's layout, and how its blocks are packed.
        group: the group's number.
        block_ids: `n` blocks of the cache.
        scheduler: carries out the transfer.
        offsets: byte offsets of `n` extents of the pool that hold no blocks, `int64 [n]`.
        pool: the pool.

    Raises:
        LayoutSelfTestError: the transfer failed, or other bytes have arrived.
    """
    form, count, payload_nbytes = form_of(group, False), len(block_ids), pages.layout.block_nbytes
    forms, extents = np.full(count, form, np.uint8), [pages.sizes.raw] * (form + 1)
    request = TransferRequest(Direction.SAVE, np.array(block_ids, np.int32), offsets, extents, forms=forms)
    scheduler.submit(request)
    await scheduler.wait([request])
    if request.num_succeeded < count:
        raise LayoutSelfTestError(f"blocks cannot be written to the new pool: {request.errors}")
    for digest, offset in zip(request.digests.tolist(), offsets.tolist(), strict=True):
        if digest_reference(pool.bytes[offset : offset + payload_nbytes]) != digest:
            raise LayoutSelfTestError("blocks do not arrive in the new pool as they were sent")


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
    form: int,
) -> None:
    patterns = {place: pattern(block, seed) for seed, (place, block) in enumerate(blocks.items())}
    for place, block in blocks.items():
        block.copy_(patterns[place])
    saved = _transfer(path, Direction.SAVE, form)
    for digest, offset in zip(saved.tolist(), path.offsets.tolist(), strict=True):
        if digest_reference(path.pool[offset : offset + payload_nbytes]) != digest:
            raise LayoutSelfTestError("self-test: the kernel's digest is not that of the bytes it has written")
    for block in blocks.values():
        block.copy_(_random_bytes(block, -1))
    if not np.array_equal(saved, _transfer(path, Direction.LOAD, form)):
        raise LayoutSelfTestError("self-test: a block's digest changed between save and load")
    for (name, block_id), block in blocks.items():
        if not torch.equal(_as_bytes(block), _as_bytes(patterns[name, block_id])):
            raise LayoutSelfTestError(
                f"self-test: {name!r}, block {block_id}, did not come back as written; "
                "pass block_dim= if the wrong dimension was taken as that of the blocks"
            )


def _block_of(tensor: torch.Tensor, dim: int, num_blocks: int, block_id: int) -> torch.Tensor:
    """Torch's own view of one block of a tensor, any shape."""
    ratio = tensor.shape[dim] // num_blocks
    return tensor.narrow(dim, block_id * ratio, ratio)


def _small_integers(block: torch.Tensor, seed: int) -> torch.Tensor:
    values = np.random.default_rng(seed + 1).integers(-8, 9, tuple(block.shape)).astype(np.float32)
    return torch.from_numpy(values).to(block.device, block.dtype)


def _random_bytes(block: torch.Tensor, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed + 1)
    data = generator.integers(0, 256, block.numel() * block.element_size(), dtype=np.uint8)
    return torch.from_numpy(data).view(block.dtype).reshape(block.shape).to(block.device)


def _as_bytes(block: torch.Tensor) -> torch.Tensor:
    return block.contiguous().reshape(-1).view(torch.uint8)


def _transfer(path: _Path, direction: Direction, form: int) -> NDArray[np.uint64]:
    offsets, executor = path.offsets, path.executor
    size = int(offsets[1] - offsets[0]) if len(offsets) > 1 else path.pool.size
    forms = np.full(len(offsets), form, dtype=np.uint8)
    request = TransferRequest(direction, path.block_ids, offsets, [size] * (form + 1), path.after(), forms=forms)
    batch = Batch(direction, (Slice(request, 0, len(offsets)),), len(offsets) * size, form)
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
