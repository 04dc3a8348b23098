"""The packing twins against the NumPy reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.errors import InvalidBlockIdError
from kvortex.kernels import HostPackKernels, digest_reference
from kvortex.kernels.reference import gather_reference
from tests.codecs.packed_caches import BLOCKS, CACHES, make_cache


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(CACHES)),
    ids=st.lists(st.integers(0, BLOCKS - 1), max_size=BLOCKS, unique=True),
    gap=st.sampled_from([0, 8, 128]),
    seed=st.integers(0, 1 << 30),
)
def test_pack_and_unpack(name: str, ids: list[int], gap: int, seed: int) -> None:
    layout, _tensors, codec = make_cache(name, seed=seed)
    packing = packing_for(layout, codec)
    assert packing is not None
    size = packing.block_nbytes + gap
    pool = np.full(size * (BLOCKS + 1), 0xA5, dtype=np.uint8)
    offsets = np.array([size * (i + 1) for i in range(len(ids))], dtype=np.int64)[::-1].copy()
    kernels = HostPackKernels(layout, packing, pool)
    digests, errors = kernels.gather(np.array(ids, dtype=np.int32), offsets)
    packed, expected_errors = pack_reference(packing, gather_reference(layout, ids)[0])
    touched = np.zeros(pool.size, dtype=bool)
    for payload, offset, digest in zip(packed, offsets.tolist(), digests.tolist(), strict=True):
        assert (pool[offset : offset + packing.block_nbytes] == payload).all()
        assert digest_reference(payload) == digest
        touched[offset : offset + packing.block_nbytes] = True
    assert (pool[~touched] == 0xA5).all()
    np.testing.assert_allclose(errors, expected_errors, rtol=1e-4)

    everywhere, _ = gather_reference(layout, range(BLOCKS))
    target = ids[::-1]
    assert (kernels.scatter(np.array(target, dtype=np.int32), offsets) == digests).all()
    everywhere[target] = unpack_reference(packing, packed)
    assert (gather_reference(layout, range(BLOCKS))[0] == everywhere).all()


def test_infinite_errors_are_told_by_block() -> None:
    layout, tensors, codec = make_cache("latent")
    packing = packing_for(layout, codec)
    assert packing is not None
    tensors["layers.1"][2, 15, 575] = float("nan")
    pool = np.zeros(BLOCKS * packing.block_nbytes, dtype=np.uint8)
    kernels = HostPackKernels(layout, packing, pool)
    _, errors = kernels.gather(np.arange(BLOCKS, dtype=np.int32), np.arange(BLOCKS) * packing.block_nbytes)
    assert np.flatnonzero(~(errors < 1)).tolist() == [2]


def test_a_flipped_bit_changes_its_block_alone() -> None:
    layout, _tensors, codec = make_cache("K and V apart")
    packing = packing_for(layout, codec)
    assert packing is not None
    size = packing.block_nbytes
    pool = np.zeros(BLOCKS * size, dtype=np.uint8)
    kernels = HostPackKernels(layout, packing, pool)
    ids, offsets = np.arange(BLOCKS, dtype=np.int32), np.arange(BLOCKS) * size
    digests, _ = kernels.gather(ids, offsets)
    for bit in (0, 8 * packing.code_words * 8 + 3, 8 * size - 1):
        pool[3 * size + bit // 8] ^= 1 << (bit % 8)
        assert np.flatnonzero(kernels.scatter(ids, offsets) != digests).tolist() == [3]
        pool[3 * size + bit // 8] ^= 1 << (bit % 8)


def test_bad_calls_touch_nothing() -> None:
    layout, _tensors, codec = make_cache("latent")
    packing = packing_for(layout, codec)
    assert packing is not None
    pool = np.zeros(2 * packing.block_nbytes, dtype=np.uint8)
    kernels = HostPackKernels(layout, packing, pool)
    before, _ = gather_reference(layout, range(BLOCKS))
    with pytest.raises(InvalidBlockIdError, match="6 is not in"):
        kernels.gather(np.array([6], dtype=np.int32), np.array([0]))
    with pytest.raises(InvalidBlockIdError, match="twice"):
        kernels.scatter(np.array([1, 1], dtype=np.int32), np.array([0, packing.block_nbytes]))
    with pytest.raises(ValueError, match="does not fit"):
        kernels.gather(np.array([1], dtype=np.int32), np.array([packing.block_nbytes + 8]))
    assert not pool.any()
    assert (gather_reference(layout, range(BLOCKS))[0] == before).all()
