"""The kernels on a real device: bytes and digests equal to the NumPy references."""

import numpy as np
import pytest
import torch

from kvortex.errors import InvalidBlockIdError
from kvortex.kernels.digest import digest_reference
from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.layout import KVLayout

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "nhd two segments": ((2, 20, 16, 4, 64), None, torch.bfloat16, 16),
    "one segment": ((20, 2, 16, 4, 64), None, torch.float16, 16),
    "mla": ((20, 16, 576), None, torch.bfloat16, 16),
    "fp8 odd": ((20, 16, 9, 64), None, torch.uint8, 16),
    "tiny segments": ((20, 1, 16), 0, torch.uint8, 1),
    "fp32 block 32": ((2, 20, 32, 1, 8), None, torch.float32, 32),
}


def make(shape: tuple[int, ...], dtype: torch.dtype, layers: int) -> dict[str, torch.Tensor]:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return {
        f"layers.{i}": torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda").view(dtype).view(shape)
        for i in range(layers)
    }


def payload_of(layout: KVLayout, tensors: dict[str, torch.Tensor], block_id: int) -> bytes:
    """A block's payload by torch's own indexing; these layouts are dense, so logical order is payload order."""
    parts = []
    for tensor, dim in zip(tensors.values(), layout.block_dims, strict=True):
        block = tensor.select(dim, block_id).contiguous().view(torch.uint8)
        parts.append(block.cpu().numpy().tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("count", [1, 7, 20])
def test_gather_and_scatter_match_the_reference(name: str, count: int, gpu_bench) -> None:
    shape, block_dim, dtype, block_size = LAYOUTS[name]
    tensors = make(shape, dtype, layers=3)
    layout = KVLayout.from_tensors(tensors, block_size, num_blocks=20, block_dim=block_dim)
    bench = gpu_bench(layout)
    ids = np.random.default_rng(count).permutation(20)[:count].astype(np.int32)
    staging, digests = bench.gather(ids)
    expected = [payload_of(layout, tensors, int(b)) for b in ids]
    for row, payload, digest in zip(staging, expected, digests, strict=True):
        assert row[: layout.block_nbytes].tobytes() == payload
        assert int(digest) == digest_reference(payload)
    target = ids[::-1].copy()
    before = {b: payload_of(layout, tensors, b) for b in range(20)}
    assert (bench.scatter(target, staging) == digests).all()
    for b in range(20):
        where = np.flatnonzero(target == b)
        want = expected[int(where[0])] if where.size else before[b]
        assert payload_of(layout, tensors, b) == want


def test_a_second_launch_finds_clean_scratch(gpu_bench) -> None:
    tensors = make((64, 16, 576), torch.bfloat16, layers=2)
    layout = KVLayout.from_tensors(tensors, 16)
    bench = gpu_bench(layout)
    ids = np.arange(64, dtype=np.int32)
    _, first = bench.gather(ids)
    for _ in range(5):
        _, again = bench.gather(ids)
        assert (first == again).all()


def test_a_flipped_bit_in_staging_changes_its_block_alone(gpu_bench) -> None:
    tensors = make((8, 16, 64), torch.bfloat16, layers=2)
    layout = KVLayout.from_tensors(tensors, 16)
    bench = gpu_bench(layout)
    ids = np.arange(8, dtype=np.int32)
    staging, digests = bench.gather(ids)
    for bit in (0, 7, 8 * layout.block_nbytes - 1):
        broken = staging.copy()
        broken[3, bit // 8] ^= 1 << (bit % 8)
        different = np.flatnonzero(bench.scatter(ids, broken) != digests)
        assert different.tolist() == [3]


def test_bad_ids_are_refused_before_launch(gpu_bench) -> None:
    layout = KVLayout.from_tensors(make((8, 16, 64), torch.bfloat16, layers=1), 16)
    bench = gpu_bench(layout)
    with pytest.raises(InvalidBlockIdError, match="8 is not in"):
        bench.gather(np.array([8], dtype=np.int32))
    staging, _ = bench.gather(np.array([1, 1], dtype=np.int32))
    with pytest.raises(InvalidBlockIdError, match="twice"):
        bench.scatter(np.array([1, 1], dtype=np.int32), staging)


def test_a_batch_as_large_as_they_come(gpu_bench) -> None:
    tensors = make((MAX_BATCH_BLOCKS + 8, 16, 80), torch.uint8, layers=2)
    layout = KVLayout.from_tensors(tensors, 16)
    bench = gpu_bench(layout)
    ids = np.random.default_rng(0).permutation(layout.num_blocks)[:MAX_BATCH_BLOCKS].astype(np.int32)
    staging, digests = bench.gather(ids)
    for row, digest, block in zip(staging, digests, ids, strict=True):
        payload = payload_of(layout, tensors, int(block))
        assert row[: layout.block_nbytes].tobytes() == payload
        assert int(digest) == digest_reference(payload)
    with pytest.raises(ValueError, match="in one batch"):
        bench.gather(np.arange(MAX_BATCH_BLOCKS + 1, dtype=np.int32))
