"""Encodings: the payloads, extents and codecs of all forms of a cache with several groups of layers."""

import numpy as np
import pytest
import torch

from kvortex.codecs import PageEncodings, packing_for
from kvortex.codecs.packing import Codec
from kvortex.config import KVortexConfig
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.groups import KVGroup
from kvortex.layout import PagedCache
from kvortex.planes.control import ControlPlane
from kvortex.planes.data import pages_of
from kvortex.types import MAX_GROUPS, form_of
from tests.groups_support import GROUPS, GroupedCache, apart

EXACT = KVGroup("exact", ("exact",), 16, exact=True)
NUMBERS = KVGroup("numbers", ("numbers",), 16, "window", 40)
BYTES = KVGroup("bytes", ("bytes",), 16)
FULL, WINDOW, STATE, IS_EXACT, FLOATS, IS_BYTES = range(6)


def six_groups() -> GroupedCache:
    """Bfloat16, float16, a state of both and float32, what must stay exact, float32, and bytes."""
    cache = apart((*GROUPS, EXACT, NUMBERS, BYTES))
    cache.tensors["exact"] = torch.zeros(20, 16, 2, 64, dtype=torch.bfloat16)
    cache.tensors["numbers"] = torch.zeros(20, 16, 2, 72, dtype=torch.float32)
    cache.tensors["bytes"] = torch.zeros(20, 16, 656, dtype=torch.uint8)
    cache.block_dims |= dict.fromkeys(("exact", "numbers", "bytes"), 0)
    return cache


def paged() -> PagedCache:
    cache = six_groups()
    return PagedCache.from_tensors(cache.tensors, 16, block_dim=cache.block_dims, groups=tuple(cache.groups.values()))


PACKED = {"raw": [], "fp8": [FULL, WINDOW, FLOATS], "bf16": [FLOATS]}


@pytest.mark.parametrize("codec", PACKED)
def test_a_form_has_the_size_and_the_codec_of_its_group(codec: str) -> None:
    cache = paged()
    pages = pages_of(cache, codec)
    encodings = PageEncodings(pages)
    assert [number for number, packs in enumerate(encodings.packs) if packs] == PACKED[codec]
    assert encodings.pack_any == bool(PACKED[codec])
    for number, layout in enumerate(cache.layouts):
        raw, packed = form_of(number, False), form_of(number, True)
        assert (raw, packed) == (2 * number, 2 * number + 1)
        packs = number in PACKED[codec]
        packing = packing_for(layout, codec) if packs else None
        assert encodings.payloads[raw] == encodings.raw_nbytes(raw) == encodings.raw_nbytes(packed)
        assert encodings.payloads[raw] == layout.block_nbytes
        assert encodings.payloads[packed] == (packing.block_nbytes if packing else layout.block_nbytes)
        assert encodings.codecs[raw] is Codec.RAW
        assert encodings.codecs[packed] is (Codec[codec.upper()] if packs else Codec.RAW)
        assert encodings.usual_form(number) == (packed if packs else raw)
        assert encodings.is_kept_as_is(raw) == packs
        assert not encodings.is_kept_as_is(packed)
        sizes = pages[number].sizes
        assert (encodings.extents[raw], encodings.extents[packed]) == (sizes.raw, sizes.packed)
        assert sizes.packs == packs
    assert all(extent % EXTENT_ALIGNMENT_BYTES == 0 for extent in encodings.extents)
    assert all(0 <= e - p < EXTENT_ALIGNMENT_BYTES for e, p in zip(encodings.extents, encodings.payloads, strict=True))


@pytest.mark.parametrize("codec", PACKED)
def test_the_control_plane_counts_in_the_same_forms(codec: str) -> None:
    cache = paged()
    encodings = PageEncodings(pages_of(cache, codec))
    sizes = [pages.sizes for pages in pages_of(cache, codec)]
    control = ControlPlane.from_config(KVortexConfig(pool=1 << 22), 1 << 22, sizes, cache.groups)
    assert control.extents.tolist() == list(encodings.extents)
    assert control.usual_forms.tolist() == [encodings.usual_form(number) for number in range(6)]
    assert control.usual_forms.dtype == np.uint8
    assert control.has_forms


def test_the_forms_of_most_groups_fit_a_byte() -> None:
    layers = {str(n): torch.zeros(4, 16, 64, dtype=torch.bfloat16) for n in range(MAX_GROUPS)}
    groups = [KVGroup(name, (name,), 16) for name in layers]
    cache = PagedCache.from_tensors(layers, 16, groups=groups)
    encodings = PageEncodings(pages_of(cache, "fp8"))
    assert len(encodings.payloads) == len(encodings.extents) == 2 * MAX_GROUPS
    assert encodings.usual_form(MAX_GROUPS - 1) == 255


@pytest.mark.parametrize("codec", ["raw", "fp8"])
def test_groups_in_the_same_memory_move_together(codec: str) -> None:
    """Windows over the same pages are one kind of transfer, whatever their reach; a smaller block is another."""
    pages = torch.zeros(8, 1 << 14, dtype=torch.uint8)
    whole = pages.view(torch.bfloat16).unflatten(1, (2, 16, 2, 128))
    tensors = {
        "full": whole,
        "near": whole.clone(),  # elsewhere
        "window": whole,
        "wide": whole,
        "short": pages[:, : 1 << 13].view(torch.bfloat16).unflatten(1, (2, 16, 2, 64)),
    }
    groups = [
        KVGroup(name, (name,), 16, *(() if name == "full" else ("window", 32 + n))) for n, name in enumerate(tensors)
    ]
    encodings = PageEncodings(pages_of(PagedCache.from_tensors(tensors, 16, block_dim=0, groups=groups), codec))
    forms = np.arange(10, dtype=np.uint8)
    raw, packed = ([0, 0], [0, 1])
    of_group = raw if codec == "raw" else packed
    moved = encodings.moved_as(forms)
    assert moved is not None
    assert moved.dtype == np.uint8
    assert moved.reshape(5, 2).tolist() == [[first + n for n in of_group] for first in (0, 2, 0, 0, 8)]
    assert [encodings.extents[form] for form in moved.tolist()] == list(encodings.extents)
    assert encodings.moved_as(None) is None
