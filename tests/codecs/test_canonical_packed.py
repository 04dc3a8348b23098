"""Packed payloads of ranks of any number have the same canonical bytes, where groups of a scale lie in one head."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.codecs import Codec, Encodings, Pages, packing_for
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import LayoutError
from kvortex.kernels import HostPackKernels
from kvortex.kernels.digest import digest_reference
from kvortex.layout import KVLayout
from kvortex.layout.canonical import BlockShard, CanonicalCache, Heads, runs_of, shards_of
from kvortex.tiering.canonical_blocks import CanonicalBlock, canonical_blocks, shards_by_form

HEADS, TOKENS, BLOCKS = 4, 16, 2
NHD, HND = (0, 1, 2, 3, 4), (0, 1, 3, 2, 4)


def model(codec: str, size: int = 128, seed: int = 0) -> dict[str, torch.Tensor]:
    """`[blocks, K and V, tokens, heads, head size]`, values whose magnitudes differ widely from row to row."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if codec == "bf16" else torch.bfloat16
    shape = (BLOCKS, 2, TOKENS, HEADS, size)
    spread = 2.0 ** torch.randint(-12, 13, (*shape[:-1], 1), generator=generator)
    return {f"layers.{i}": (torch.randn(shape, generator=generator) * spread).to(dtype) for i in range(2)}


def shard(tensors: dict[str, torch.Tensor], rank: int, ranks: int, order: tuple[int, ...]) -> dict[str, torch.Tensor]:
    back = [order.index(dim) for dim in range(5)]
    return {
        name: tensor.chunk(ranks, 3)[rank].permute(order).contiguous().permute(back) for name, tensor in tensors.items()
    }


class PackedBlock:
    """Block 1 of a model, as some ranks have it packed."""

    def __init__(self, tensors: dict[str, torch.Tensor], ranks: int, order: tuple[int, ...], codec: str) -> None:
        parts, contents, offset = [], [], 0
        for rank in range(ranks):
            mine = shard(tensors, rank, ranks, order)
            layout = KVLayout.from_tensors(mine, TOKENS, num_blocks=BLOCKS, block_dim=0)
            heads = dict.fromkeys(mine, Heads(3, rank * HEADS // ranks, HEADS))
            shards = shards_of(layout, {name: tensor.shape for name, tensor in mine.items()}, heads)
            packing = packing_for(layout, codec)
            assert packing is not None
            pool = np.zeros(packing.block_nbytes, np.uint8)
            HostPackKernels(layout, packing, pool).gather(np.array([1], np.int32), np.zeros(1, np.int64))
            parts.append(BlockShard(offset, shards_by_form(Pages(layout, packing), shards)[1]))
            assert parts[-1].nbytes == pool.size
            contents.append(pool)
            offset = align_up(offset + pool.size, EXTENT_ALIGNMENT_BYTES)
        self.digests = [digest_reference(content) for content in contents]
        self.payload = np.zeros(offset + 8 * ranks if ranks > 1 else contents[0].size, np.uint8)
        for part, content in zip(parts, contents, strict=True):
            self.payload[part.offset :][: content.size] = content
        if ranks > 1:
            self.payload[offset:] = np.array(self.digests, np.uint64).view(np.uint8)
        self.block = CanonicalBlock(runs_of(parts, self.payload.size))

    def canonical(self) -> NDArray[np.uint8]:
        canonical = np.zeros(self.block.nbytes, np.uint8)
        assert self.block.down(self.payload, canonical, self.digests[0]) == digest_reference(canonical)
        return canonical


@pytest.mark.parametrize("codec", ["fp8", "bf16"])
def test_any_number_of_ranks_has_the_same_packed_bytes_and_gets_its_own_back(codec: str) -> None:
    tensors, found = model(codec), set[bytes]()
    for ranks in (1, 2, 4):
        for order in (NHD, HND):
            block = PackedBlock(tensors, ranks, order, codec)
            canonical = block.canonical()
            found.add(canonical.tobytes())
            back = np.zeros_like(block.payload)
            assert block.block.up(canonical, back, digest_reference(canonical)) == digest_reference(back)
            assert back.tobytes() == block.payload.tobytes()
    assert len(found) == 1


def test_scales_of_ranks_that_should_be_the_same_are_compared() -> None:
    block = PackedBlock(model("fp8"), 1, NHD, "fp8")
    shards = block.block._runs.parts[0]
    twice = CanonicalBlock(runs_of(both(block), 2 * block.payload.size + 16))
    payload = np.concatenate([block.payload, block.payload, np.array(2 * block.digests, np.uint64).view(np.uint8)])
    scratch = np.zeros(twice.nbytes, np.uint8)
    assert isinstance(twice.down(payload, scratch, 0), int)
    payload[2 * block.payload.size - 1] ^= 1
    payload[-8:].view(np.uint64)[:] = digest_reference(payload[block.payload.size : 2 * block.payload.size])
    assert twice.down(payload, scratch, 0) == "ranks that should hold the same KV do not"
    assert len(shards.bytes), "scales move byte by byte"


def both(block: PackedBlock) -> list[BlockShard]:
    """Two ranks that have all heads."""
    layout = KVLayout.from_tensors(shard(model("fp8"), 0, 1, NHD), TOKENS, num_blocks=BLOCKS, block_dim=0)
    heads = {f"layers.{i}": Heads(3, 0, HEADS) for i in range(2)}
    shards = shards_of(layout, dict.fromkeys(heads, (BLOCKS, 2, TOKENS, HEADS, 128)), heads)
    packed = shards_by_form(Pages(layout, packing_for(layout, "fp8")), shards)[1]
    return [BlockShard(0, packed), BlockShard(block.payload.size, packed)]


UNFIT: dict[str, tuple[tuple[int, ...], tuple[int, ...], int | None, str]] = {
    "heads of less than a group": ((BLOCKS, TOKENS, HEADS, 64), (0, 1, 2, 3), 2, "rows of 64 elements"),
    "heads last": ((BLOCKS, 2, TOKENS, 64, 128), (0, 1, 2, 3, 4), 4, "rows of 128 elements"),
    "a row that is not the last": ((BLOCKS, TOKENS, 128, 8), (0, 1, 3, 2), None, "rows of 128 elements"),
    "scales that are padded": ((BLOCKS, 3, HEADS, 128), (0, 1, 2, 3), 2, "no whole words of scales"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_packed_blocks_without_a_canonical_layout_are_refused(what: str) -> None:
    shape, order, axis, why = UNFIT[what]
    dense = torch.zeros([shape[dim] for dim in order], dtype=torch.bfloat16)
    tensor = dense.permute([order.index(dim) for dim in range(len(shape))])
    layout = KVLayout.from_tensors({"layer": tensor}, shape[1], num_blocks=BLOCKS, block_dim=0)
    heads = Heads() if axis is None else Heads(axis, 0, shape[axis])
    shards = shards_of(layout, {"layer": shape}, {"layer": heads})
    with pytest.raises(LayoutError, match=f"{why}.*set codec to 'raw', or leave tier.canonical_layout out"):
        shards_by_form(Pages(layout, packing_for(layout, "fp8")), shards)


def test_sizes_of_both_forms_are_told() -> None:
    tensors = shard(model("fp8"), 0, 1, NHD)
    layout = KVLayout.from_tensors(tensors, TOKENS, num_blocks=BLOCKS, block_dim=0)
    shards = shards_of(layout, {n: t.shape for n, t in tensors.items()}, dict.fromkeys(tensors, Heads(3, 0, HEADS)))
    packing = packing_for(layout, "fp8")
    assert packing is not None
    raw, packed = shards_by_form(Pages(layout, packing), shards)
    cache = CanonicalCache(bytes(32), ((BlockShard(0, raw),), (BlockShard(0, packed),)))
    encodings = Encodings([layout.block_nbytes, packing.block_nbytes], [Codec.RAW, Codec.FP8])
    blocks: list[Any] = canonical_blocks(cache, encodings, 1)
    assert [(b.payload_nbytes, b.nbytes, b.raw_nbytes) for b in blocks] == [
        (layout.block_nbytes,) * 3,
        (packing.block_nbytes, packing.block_nbytes, layout.block_nbytes),
    ]
    for parts in (2, 0):
        with pytest.raises(LayoutError, match="canonical layouts of"):
            canonical_blocks(cache, encodings, parts)
    with pytest.raises(LayoutError, match="in 1 of 2 forms"):
        canonical_blocks(cache, Encodings([layout.block_nbytes] * 2, [Codec.RAW] * 2), 1)
