"""The round trip at start-up: silent when all is well, loud and named when not."""

import pytest
import torch

from kvortex import KVLayout, KVortexEngine
from kvortex.errors import LayoutSelfTestError
from kvortex.layout import Segment
from tests.engine_support import BLOCK_SIZE, contents, make_cache, small_config


async def test_it_leaves_the_cache_as_it_was() -> None:
    cache = make_cache()
    before = contents(cache, range(64))
    async with KVortexEngine.create(small_config(transfer={"self_test": True})) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert contents(cache, range(64)) == before
        assert engine.get_stats().pools[0].allocated_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
async def test_it_passes_on_one_block(dtype: torch.dtype) -> None:
    cache = {"layers.0": torch.zeros(1, BLOCK_SIZE, 64, dtype=dtype)}
    async with KVortexEngine.create(small_config(transfer={"self_test": True})) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE, block_dim=0)


def shifted(layout: KVLayout, which: int, **changes: int) -> KVLayout:
    segments = list(layout.segments)
    old = segments[which]
    values = {"address": old.address, "block_stride": old.block_stride, "nbytes": old.nbytes, **changes}
    segments[which] = Segment(old.tensor, **values)
    return KVLayout(
        layout.block_size, layout.num_blocks, layout.device, tuple(segments), layout.formats, layout.block_dims
    )


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (2, lambda s: {"address": s.address + s.block_stride}),  # off by one block
        (3, lambda s: {"block_stride": s.block_stride - 16}),  # wrong stride: the last block is elsewhere
        (2, lambda s: {"nbytes": s.nbytes - 16}),  # a tail is left out
    ],
)
async def test_a_wrong_layout_is_refused_and_named(which: int, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    before = contents(cache, (0, 63))
    right = KVLayout.from_tensors(cache, BLOCK_SIZE)
    wrong = shifted(right, which, **change(right.segments[which]))
    monkeypatch.setattr(KVLayout, "from_tensors", lambda *args, **kwargs: wrong)
    async with KVortexEngine.create(small_config(transfer={"self_test": True})) as engine:
        with pytest.raises(LayoutSelfTestError, match=r"'layers\.1'"):
            engine.register_kv_caches(cache, BLOCK_SIZE)
    assert contents(cache, (0, 63)) == before
