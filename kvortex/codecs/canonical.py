"""The shards of packed payloads, for their canonical layout: codes lie as the elements do, and so do scales.

A scale belongs to a group of consecutive elements of a segment. Blocks have a canonical layout if each group lies in
one row of the last dimension, so in one KV head, and if the scales of each segment are whole words. Then these are a
tensor whose last dimension is shorter by the size of a group.
"""

from collections.abc import Sequence
from dataclasses import replace

from kvortex.codecs.packing import GROUP_UNITS, Packing
from kvortex.errors import LayoutError
from kvortex.layout import KVLayout
from kvortex.layout.canonical import SCALES, WORD_BYTES, TensorShard


def packed_shards(layout: KVLayout, shards: Sequence[TensorShard], packing: Packing) -> tuple[TensorShard, ...]:
    """The shards of a packed payload, in its order: codes of all tensors, then their scales.

    Args:
        layout: the layout of the blocks.
        shards: those of the raw payload.
        packing: how blocks are packed.

    Raises:
        LayoutError: a group is not within a row, or the scales of a segment are not whole words.
    """
    code_nbytes = WORD_BYTES // packing.format.elements
    codes = tuple(replace(shard, itemsize=code_nbytes, dtype=packing.codec) for shard in shards)
    if not packing.format.has_scales:
        return codes
    elements = GROUP_UNITS * packing.format.elements
    itemsizes = {shard.name: shard.itemsize for shard in shards}
    for segment in layout.segments:
        if segment.nbytes // itemsizes[segment.tensor] % (elements * WORD_BYTES):
            raise _unfit(segment.tensor, f"segments of {segment.nbytes} bytes have no whole words of scales", packing)
    return codes + tuple(_scales(shard, elements, packing) for shard in shards)


def _scales(shard: TensorShard, elements: int, packing: Packing) -> TensorShard:
    row = shard.order[-1]
    if row != len(shard.shape) - 1 or row == shard.heads.axis or shard.shape[row] % elements:
        size = shard.shape[row]
        raise _unfit(shard.name, f"rows of {size} elements are not made of groups of {elements}", packing)
    shape = (*shard.shape[:-1], shard.shape[-1] // elements)
    return replace(shard, name=f"{shard.name} scales", dtype=SCALES, itemsize=1, shape=shape)


def _unfit(name: str, why: str, packing: Packing) -> LayoutError:
    return LayoutError(
        f"tensor {name!r} packed with {packing.codec!r}: {why}: set codec to 'raw', or leave tier.canonical_layout out"
    )
