"""A model's KV as the ranks of any number hold it: their tensors, the payloads of blocks, and the canonical bytes."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.groups import GroupSet, KVGroup
from kvortex.kernels.digest import digest_reference
from kvortex.layout import KVLayout
from kvortex.layout.canonical import BlockShard, Heads, canonical_digest, shards_of

Bytes = NDArray[np.uint8]
NUM_BLOCKS = 3
BLOCK = 1
"""The block that is looked at."""


@dataclass(frozen=True)
class Layer:
    """A layer's KV in a model.

    Args:
        name: of the layer.
        shape: of the tensor with all KV heads.
        block_dim: the dimension that counts blocks.
        heads_dim: the dimension that counts KV heads; None if there is none.
        memory: the dimensions in the order in which they lie in memory, outermost first.
        dtype: of the elements.
    """

    name: str
    shape: tuple[int, ...]
    block_dim: int
    heads_dim: int | None
    memory: tuple[int, ...]
    dtype: str

    @property
    def num_heads(self) -> int:
        return 1 if self.heads_dim is None else self.shape[self.heads_dim]

    def values(self) -> NDArray[np.generic]:
        """The values of all blocks and heads, the same whenever asked for."""
        nbytes = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        seed = np.frombuffer(f"{self.name} {self.shape}".encode(), np.uint8)
        data = np.random.default_rng(seed.tolist()).integers(0, 256, nbytes, dtype=np.uint8)
        return data.view(self.dtype).reshape(self.shape)

    def heads_of(self, rank: int, size: int) -> range:
        """The KV heads that a rank has, as in vLLM: a part of them, or one that further ranks have too."""
        if size >= self.num_heads:
            return range(first := rank // (size // self.num_heads), first + 1)
        count = self.num_heads // size
        return range(rank * count, (rank + 1) * count)

    def shard(self, rank: int, size: int) -> NDArray[np.generic]:
        """The tensor that a rank has, with the strides of its order in memory."""
        values = self.values()
        if self.heads_dim is not None:
            values = values.take(list(self.heads_of(rank, size)), axis=self.heads_dim)
        dense = np.ascontiguousarray(values.transpose(self.memory))
        return dense.transpose([self.memory.index(dim) for dim in range(values.ndim)])

    def canonical(self) -> bytes:
        """What the canonical payload of the block has of this layer, by the definition."""
        block = self.values().take(BLOCK, axis=self.block_dim)
        if self.heads_dim is None:
            return block.tobytes()
        axis = self.heads_dim - (self.block_dim < self.heads_dim)
        return b"".join(block.take(head, axis=axis).tobytes() for head in range(self.num_heads))


class RankedBlock:
    """One block as some ranks have it together.

    Args:
        layers: the layers of the model.
        size: number of ranks.
        block_size: tokens of a block.
    """

    def __init__(self, layers: Sequence[Layer], size: int, block_size: int) -> None:
        self.tensors = [{layer.name: layer.shard(rank, size) for layer in layers} for rank in range(size)]
        dims = {layer.name: layer.block_dim for layer in layers}
        self.parts: list[BlockShard] = []
        self.contents: list[Bytes] = []
        offset = 0
        for rank, tensors in enumerate(self.tensors):
            layout = KVLayout.from_tensors(tensors, block_size, num_blocks=NUM_BLOCKS, block_dim=dims)
            heads = {layer.name: heads_in(layer, rank, size) for layer in layers}
            shards = shards_of(layout, {name: tensor.shape for name, tensor in tensors.items()}, heads)
            self.parts.append(BlockShard(offset, shards))
            self.contents.append(
                np.frombuffer(
                    b"".join(ctypes.string_at(s.address + BLOCK * s.block_stride, s.nbytes) for s in layout.segments),
                    np.uint8,
                )
            )
            offset += align_up(layout.block_nbytes, EXTENT_ALIGNMENT_BYTES)
        self.digests = [digest_reference(content) for content in self.contents]
        tails = np.array(self.digests if size > 1 else [], np.uint64).view(np.uint8)
        end = offset if size > 1 else len(self.contents[0])
        self.payload = np.full(end + len(tails), 0xA5, np.uint8)
        for part, content in zip(self.parts, self.contents, strict=True):
            self.payload[part.offset : part.offset + len(content)] = content
        self.payload[end:] = tails
        groups = GroupSet([KVGroup("full", tuple(layer.name for layer in layers), block_size)], block_size)
        self.namespaces = {canonical_digest(groups, [part.tensors]) for part in self.parts}


def heads_in(layer: Layer, rank: int, size: int) -> Heads:
    if layer.heads_dim is None:
        return Heads()
    return Heads(layer.heads_dim, layer.heads_of(rank, size).start, layer.num_heads)
