"""Packing as the NumPy reference has it, against torch's own conversions and against what it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.codecs.packing import GROUP_UNITS
from kvortex.codecs.reference import from_e4m3, pack_factor, scale_exponents, to_bf16, to_e4m3, unpack_factor
from kvortex.errors import ConfigError
from kvortex.kernels.reference import gather_reference
from kvortex.layout import KVLayout
from tests.codecs.packed_caches import BLOCKS, CACHES, make_cache

FLOAT32 = st.floats(-448, 448, width=32)


def test_every_code_means_what_torch_says() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    finite = np.isfinite(expected)
    assert finite.sum() == 254
    assert (from_e4m3(codes)[finite] == expected[finite]).all()
    assert (to_e4m3(expected[finite]) == codes[finite]).all()


def test_midpoints_go_to_even_as_in_torch() -> None:
    grid = from_e4m3(np.arange(0x7F, dtype=np.uint8))
    middles = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([middles, -middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    assert (to_e4m3(values) == torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, 64, elements=FLOAT32))
def test_rounding_is_that_of_torch(values: np.ndarray) -> None:
    tensor = torch.from_numpy(values)
    assert (to_e4m3(values) == tensor.to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()
    assert (to_bf16(values) == tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 0x7F600000))
def test_a_scale_brings_the_largest_to_the_upper_end(bits: int) -> None:
    largest = np.array([bits], dtype=np.int32)
    exponents = scale_exponents(largest)
    scaled = float(largest.view(np.float32)[0]) * float(pack_factor(exponents)[0])
    assert scaled <= 448
    assert scaled > 224 or exponents[0] == 9
    assert pack_factor(exponents)[0] * unpack_factor(exponents)[0] == 1


@pytest.mark.parametrize("name", CACHES)
def test_what_was_packed_comes_back_within_the_error_and_then_loses_nothing_more(name: str) -> None:
    layout, _tensors, codec = make_cache(name)
    packing = packing_for(layout, codec)
    assert packing is not None
    raw, _ = gather_reference(layout, range(BLOCKS))
    packed, errors = pack_reference(packing, raw)
    assert packed.shape == (BLOCKS, packing.block_nbytes)
    assert (errors > 0).all()
    assert (errors < 0.04).all()  # half a unit in the last of three bits, at most, in the mean of squares
    back = unpack_reference(packing, packed)
    again, errors = pack_reference(packing, back)
    assert not errors.any()
    assert (unpack_reference(packing, again) == back).all()


@pytest.mark.parametrize("name", CACHES)
def test_tiles_cover_units_and_scales_once(name: str) -> None:
    layout, _tensors, codec = make_cache(name)
    packing = packing_for(layout, codec)
    assert packing is not None
    unit = scale = 0
    for _lane, _stride, first, count, scale_word in packing.tiles.tolist():
        assert first == unit
        assert 1 <= count <= 256
        assert scale_word == packing.code_words + scale
        unit += count
        scale += -(-count // (8 * GROUP_UNITS))
    assert unit == packing.code_words == layout.block_nbytes // (16 * packing.format.lanes)
    assert packing.scale_words == (scale if packing.format.has_scales else 0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["latent", "half", "float", "float to bfloat16"])
def test_what_is_not_finite_has_an_infinite_error(name: str, value: float) -> None:
    layout, tensors, codec = make_cache(name)
    packing = packing_for(layout, codec)
    assert packing is not None
    list(tensors.values())[-1][(3, *[-1] * (len(CACHES[name][0]) - 1))] = value
    raw, _ = gather_reference(layout, range(BLOCKS))
    _, errors = pack_reference(packing, raw)
    assert np.flatnonzero(np.isinf(errors)).tolist() == [3]


@pytest.mark.parametrize(("name", "value"), [("latent", 3.3e38), ("half", 65504.0), ("float to bfloat16", 3.4e38)])
def test_what_could_round_up_to_infinity_counts_as_infinite(name: str, value: float) -> None:
    layout, tensors, codec = make_cache(name)
    packing = packing_for(layout, codec)
    assert packing is not None
    tensors["layers.0"].view(-1)[0] = value
    raw, _ = gather_reference(layout, [0])
    assert np.isinf(pack_reference(packing, raw)[1]).all()


def test_the_smallest_numbers_survive() -> None:
    values = torch.zeros(BLOCKS, 1, 128, dtype=torch.bfloat16)
    values.view(torch.int16)[:, 0, :4] = torch.tensor([1, 2, 3, -32767], dtype=torch.int16)
    layout = KVLayout.from_tensors({"layers.0": values}, 1, num_blocks=BLOCKS)
    packing = packing_for(layout, "fp8")
    assert packing is not None
    raw, _ = gather_reference(layout, [0])
    packed, errors = pack_reference(packing, raw)
    assert (unpack_reference(packing, packed) == raw).all()
    assert not errors.any()


def test_what_is_left_as_it_is() -> None:
    fp8 = KVLayout.from_tensors({"layers.0": torch.zeros(4, 16, 64, dtype=torch.uint8)}, 16)
    bf16 = KVLayout.from_tensors({"layers.0": torch.zeros(4, 16, 64, dtype=torch.bfloat16)}, 16)
    assert packing_for(fp8, "fp8") is None
    assert packing_for(bf16, "bf16") is None
    assert packing_for(bf16, "raw") is None


def test_bad_choices_are_refused() -> None:
    odd = KVLayout.from_tensors({"layers.0": torch.zeros(4, 1, 12, dtype=torch.float32)}, 1, num_blocks=4)
    with pytest.raises(ConfigError, match="unknown codec 'zip'; there are raw, fp8, bf16"):
        packing_for(odd, "zip")
    with pytest.raises(ConfigError, match="not segments of 48: set codec to 'raw'"):
        packing_for(odd, "fp8")
