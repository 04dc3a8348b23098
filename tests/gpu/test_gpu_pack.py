"""The packing kernels on a real device: bytes, digests and errors as the NumPy reference has them."""

import numpy as np
import pytest
import torch

from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.kernels.digest import digest_reference
from kvortex.kernels.reference import gather_reference
from kvortex.layout import KVLayout
from tests.codecs.packed_caches import BLOCKS, CACHES, make_cache

pytestmark = pytest.mark.gpu


def on_the_device(tensors: dict[str, torch.Tensor], block_size: int) -> tuple[KVLayout, dict[str, torch.Tensor]]:
    cuda = {name: tensor.cuda() for name, tensor in tensors.items()}
    return KVLayout.from_tensors(cuda, block_size, num_blocks=BLOCKS), cuda


def back_on_the_host(tensors: dict[str, torch.Tensor], cuda: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(cuda[name])


@pytest.mark.parametrize("name", CACHES)
def test_pack_and_unpack_match_the_reference(name: str, gpu_bench) -> None:
    host, tensors, codec = make_cache(name, layers=3)
    layout, cuda = on_the_device(tensors, host.block_size)
    packing = packing_for(layout, codec)
    assert packing is not None
    bench = gpu_bench(layout, packing)
    for count in (1, 5, BLOCKS):
        ids = np.random.default_rng(count).permutation(BLOCKS)[:count].astype(np.int32)
        packed, errors = pack_reference(packing, gather_reference(host, ids.tolist())[0])
        staging, digests = bench.gather(ids)
        assert (staging[:, : packing.block_nbytes] == packed).all()
        assert (staging[:, packing.block_nbytes :] == 0xA5).all()
        assert digests.tolist() == [digest_reference(payload) for payload in packed]
        np.testing.assert_allclose(bench.errors(count), errors, rtol=1e-4)
        everywhere, _ = gather_reference(host, range(BLOCKS))
        target = ids[::-1].copy()
        assert (bench.scatter(target, staging) == digests).all()
        everywhere[target] = unpack_reference(packing, packed)
        back_on_the_host(tensors, cuda)
        assert (gather_reference(host, range(BLOCKS))[0] == everywhere).all()


@pytest.mark.parametrize("name", ["latent", "half", "float", "float to bfloat16"])
def test_special_values_are_told_by_block_and_forgotten_after(name: str, gpu_bench) -> None:
    host, tensors, codec = make_cache(name)
    tensors["layers.1"][2].view(-1)[-1] = float("nan")
    tensors["layers.0"][4].view(-1)[0] = float("-inf")
    layout, _cuda = on_the_device(tensors, host.block_size)
    bench = gpu_bench(layout, packing_for(layout, codec))
    for _ in range(3):
        bench.gather(np.arange(BLOCKS, dtype=np.int32))
        assert np.flatnonzero(~(bench.errors(BLOCKS) < 1)).tolist() == [2, 4]
        bench.gather(np.array([0, 1, 3], dtype=np.int32))
        assert (bench.errors(3) < 0.04).all()


def test_a_flipped_bit_changes_its_block_alone(gpu_bench) -> None:
    host, tensors, codec = make_cache("K and V apart")
    layout, _cuda = on_the_device(tensors, host.block_size)
    packing = packing_for(layout, codec)
    assert packing is not None
    bench = gpu_bench(layout, packing)
    ids = np.arange(BLOCKS, dtype=np.int32)
    staging, digests = bench.gather(ids)
    for bit in (0, 64 * packing.code_words + 3, 8 * packing.block_nbytes - 1):
        broken = staging.copy()
        broken[3, bit // 8] ^= 1 << (bit % 8)
        assert np.flatnonzero(bench.scatter(ids, broken) != digests).tolist() == [3]
