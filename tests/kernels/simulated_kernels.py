"""Run by test_simulated_kernels.py with NUMBA_ENABLE_CUDASIM=1."""

import numpy as np
import pytest

from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.errors import InvalidBlockIdError
from kvortex.kernels.cuda_ops import SIMULATED
from kvortex.kernels.device import SimulatedKernels, staging_block_nbytes
from kvortex.kernels.digest import digest_reference
from kvortex.kernels.reference import gather_reference, scatter_reference
from kvortex.layout import KVLayout
from tests.codecs.packed_caches import BLOCKS, CACHES, make_cache

# (shape of a layer, dimension of blocks): segments of a full tile, of several, of a rest, of less than a warp
SHAPES = {
    "full tile": ((2, 5, 16, 256), 1),
    "tile and a quarter": ((5, 16, 320), 0),
    "three even tiles": ((5, 16, 576), 0),
    "less than a warp": ((5, 1, 48), 0),
    "a rest of one lane": ((5, 1, 16 * 33), 0),
}


def make(name: str, layers: int = 2) -> tuple[KVLayout, dict[str, np.ndarray]]:
    shape, dim = SHAPES[name]
    rng = np.random.default_rng(7)
    tensors = {f"layers.{i}": rng.integers(0, 256, shape, dtype=np.uint8) for i in range(layers)}
    return KVLayout.from_tensors(tensors, 16, num_blocks=5, block_dim=dim), tensors


def test_this_is_the_simulator() -> None:
    assert SIMULATED


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ids", [[3], [4, 0, 2]])
def test_gather(name: str, ids: list[int]) -> None:
    layout, _tensors = make(name)
    size = staging_block_nbytes(layout)
    staging = np.full((len(ids), size), 0xA5, dtype=np.uint8)
    digests = SimulatedKernels(layout).gather(np.array(ids, dtype=np.int32), staging.reshape(-1))
    payloads, expected = gather_reference(layout, ids)
    assert (staging[:, : layout.block_nbytes] == payloads).all()
    assert (staging[:, layout.block_nbytes :] == 0xA5).all()
    assert (digests == expected).all()


@pytest.mark.parametrize("name", SHAPES)
def test_scatter(name: str) -> None:
    layout, tensors = make(name)
    other, other_tensors = make(name)
    ids = [1, 4, 2]
    rng = np.random.default_rng(8)
    staging = rng.integers(0, 256, (3, staging_block_nbytes(layout)), dtype=np.uint8)
    digests = SimulatedKernels(layout).scatter(np.array(ids, dtype=np.int32), staging.reshape(-1))
    expected = scatter_reference(other, ids, staging[:, : layout.block_nbytes])
    assert (digests == expected).all()
    for key, tensor in tensors.items():
        assert (tensor == other_tensors[key]).all()


def test_an_empty_batch_does_nothing() -> None:
    layout, _tensors = make("full tile")
    digests = SimulatedKernels(layout).gather(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint8))
    assert digests.shape == (0,)


def test_bad_ids_are_refused() -> None:
    layout, _tensors = make("full tile")
    kernels = SimulatedKernels(layout)
    staging = np.zeros(2 * staging_block_nbytes(layout), dtype=np.uint8)
    with pytest.raises(InvalidBlockIdError, match="5 is not in"):
        kernels.gather(np.array([5], dtype=np.int32), staging)
    with pytest.raises(InvalidBlockIdError, match="twice"):
        kernels.scatter(np.array([1, 1], dtype=np.int32), staging)


@pytest.mark.parametrize("name", CACHES)
def test_pack_and_unpack(name: str) -> None:
    layout, _tensors, codec = make_cache(name)
    packing = packing_for(layout, codec)
    assert packing is not None
    ids = np.array([4, 0, 5], dtype=np.int32)
    size = staging_block_nbytes(layout, packing)
    staging = np.full((3, size), 0xA5, dtype=np.uint8)
    kernels = SimulatedKernels(layout, packing=packing)
    digests = kernels.gather(ids, staging.reshape(-1))
    packed, errors = pack_reference(packing, gather_reference(layout, ids.tolist())[0])
    assert (staging[:, : packing.block_nbytes] == packed).all()
    assert (staging[:, packing.block_nbytes :] == 0xA5).all()
    assert digests.tolist() == [digest_reference(payload) for payload in packed]
    np.testing.assert_allclose(kernels.errors, errors, rtol=1e-4)

    everywhere, _ = gather_reference(layout, range(BLOCKS))
    assert (kernels.scatter(ids[::-1].copy(), staging.reshape(-1)) == digests).all()
    everywhere[ids[::-1]] = unpack_reference(packing, packed)
    assert (gather_reference(layout, range(BLOCKS))[0] == everywhere).all()
