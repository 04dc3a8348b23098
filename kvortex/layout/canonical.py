"""The canonical layout: one order of a block's bytes for every number of tensor-parallel ranks.

A rank holds a shard of each tensor of a paged cache: some of its KV heads, or all of it where all ranks hold the same.
The canonical payload of a block has, one behind the other,

- the tensors, sorted by name;
- in a tensor its KV heads, each once, in the order of the whole model;
- in a head the other dimensions of one block in the logical order of the tensor's shape, whatever its strides are.

So it depends neither on how many ranks there are, nor on whether heads or tokens come first in memory (NHD, HND). What
lies inside a head is not looked at: backends whose tensors have other shapes have other canonical layouts.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import LayoutError
from kvortex.groups import GroupSet
from kvortex.layout.layout import KVLayout

CANONICAL_VERSION: Final = 1
"""Incremented when the order of the bytes changes: then older blocks are never found."""

SCALES: Final = "scales"
"""The dtype of shards that may move byte by byte: there is one byte for many elements."""

WORD_BYTES: Final = 8
MAX_BLOCK_BYTES: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Heads:
    """Where a tensor of one rank has its KV heads.

    Args:
        axis: the dimension of the tensor that counts them; None if every rank holds the same.
        first: number of the first of them among those of the whole model.
        total: KV heads of the whole model; with more ranks than heads, several ranks hold the same head.
    """

    axis: int | None = None
    first: int = 0
    total: int = 1


@dataclass(frozen=True, slots=True)
class TensorShard:
    """One rank's shard of a tensor, in the payload of one block.

    Args:
        name: name of the tensor, the same on all ranks.
        dtype: such as "bfloat16".
        itemsize: bytes of an element.
        shape: of one block, without dimensions of size 1, except that of the heads.
        order: its axes in the order of the payload, outermost first.
        heads: its KV heads; `axis` is one of `shape`.
    """

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    heads: Heads

    def __post_init__(self) -> None:
        axis, first, total = self.heads.axis, self.heads.first, self.heads.total
        valid_axes = sorted(self.order) == list(range(len(self.shape))) and (
            axis is None or 0 <= axis < len(self.shape)
        )
        if not valid_axes or min(self.shape, default=1) < 1 or self.itemsize < 1:
            raise LayoutError(f"tensor {self.name!r}: {self.shape} in the order {self.order} is no shard of a tensor")
        if first < 0 or first + self.num_heads > total:
            raise LayoutError(
                f"tensor {self.name!r}: {self.num_heads} KV heads from number {first} on are not among {total}"
            )
        if self.nbytes > MAX_BLOCK_BYTES or self.canonical_nbytes > MAX_BLOCK_BYTES:
            raise LayoutError(f"tensor {self.name!r}: a block of {self.nbytes} bytes is too large")

    @property
    def num_heads(self) -> int:
        """KV heads of this shard; 1 if every rank holds the same."""
        return 1 if self.heads.axis is None else self.shape[self.heads.axis]

    @property
    def nbytes(self) -> int:
        """Bytes of the shard in a payload."""
        return math.prod(self.shape) * self.itemsize

    @property
    def canonical_nbytes(self) -> int:
        """Bytes of all heads of the tensor."""
        return self.nbytes // self.num_heads * self.heads.total

    @property
    def geometry(self) -> list[Any]:
        """The meaning of the tensor's canonical bytes: equal for the shards of all ranks."""
        shape = [self.heads.total if axis == self.heads.axis else size for axis, size in enumerate(self.shape)]
        return [self.name, self.dtype, self.itemsize, shape, self.heads.axis]


@dataclass(frozen=True, slots=True)
class BlockShard:
    """One rank's part of the blocks of one form.

    Args:
        offset: bytes from the beginning of a block's payload to the part.
        tensors: its tensors in the order of the payload; empty if the rank has no layer of the group.
    """

    offset: int
    tensors: tuple[TensorShard, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class CanonicalCache:
    """How the blocks of a cache become canonical.

    Args:
        namespace: digest of all that must agree before canonical bytes may be reused, 32 bytes.
        parts: for each form of blocks the part of each rank, in the order of the parts; none for a form that there is
            not.
    """

    namespace: bytes
    parts: tuple[tuple[BlockShard, ...], ...]

    def as_plain(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        parts = [[[part.offset, [_plain(tensor) for tensor in part.tensors]] for part in form] for form in self.parts]
        return {"namespace": self.namespace.hex(), "parts": parts}

    @classmethod
    def from_plain(cls, plain: Any) -> "CanonicalCache":
        """What `as_plain` has made.

        Raises:
            LayoutError: this is no such description.
        """
        try:
            namespace = bytes.fromhex(plain["namespace"])
            parts = tuple(
                tuple(BlockShard(int(offset), tuple(map(_shard, tensors))) for offset, tensors in form)
                for form in plain["parts"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LayoutError(f"the canonical layout of a cache is not described as it should be: {error}") from error
        if len(namespace) != hashlib.sha256().digest_size or not parts:
            raise LayoutError("the canonical layout of a cache is not described as it should be")
        return cls(namespace, parts)


def _plain(tensor: TensorShard) -> list[Any]:
    heads = [tensor.heads.axis, tensor.heads.first, tensor.heads.total]
    return [tensor.name, tensor.dtype, tensor.itemsize, tensor.shape, tensor.order, heads]


def _shard(plain: Any) -> TensorShard:
    name, dtype, itemsize, shape, order, (axis, first, total) = plain
    heads = Heads(None if axis is None else int(axis), int(first), int(total))
    return TensorShard(str(name), str(dtype), int(itemsize), tuple(map(int, shape)), tuple(map(int, order)), heads)


# -- from tensors --------------------------------------------------------------------------------------


def shards_of(
    layout: KVLayout, shapes: Mapping[str, Sequence[int]], heads: Mapping[str, Heads]
) -> tuple[TensorShard, ...]:
    """The shards of the tensors of a layout, in the order of its payload.

    Args:
        layout: the layout of one group of layers.
        shapes: the shape of each tensor, by name.
        heads: where each tensor has its KV heads, by name; `axis` is a dimension of the whole tensor.

    Raises:
        LayoutError: a tensor has no such dimension, or its heads are not among those of the model.
    """
    nbytes = dict.fromkeys((fmt.name for fmt in layout.formats), 0)
    for segment in layout.segments:
        nbytes[segment.tensor] += segment.nbytes
    shards = []
    for fmt, block_dim in zip(layout.formats, layout.block_dims, strict=True):
        shape, of_tensor = list(shapes[fmt.name]), heads[fmt.name]
        axis = of_tensor.axis
        if axis is not None and (not -len(shape) <= axis < len(shape) or axis % len(shape) == block_dim):
            raise LayoutError(f"tensor {fmt.name!r} of shape {tuple(shape)} has no KV heads in dimension {axis}")
        axis = None if axis is None else axis % len(shape)
        shape[block_dim] //= layout.num_blocks
        kept = [dim for dim, size in enumerate(shape) if size != 1 or dim == axis]
        of_payload = [dim for dim in kept if shape[dim] != 1]
        order = [kept.index(of_payload[number]) for number in fmt.payload_order]
        if axis is not None and shape[axis] == 1:
            order.insert(0, kept.index(axis))
        shards.append(
            TensorShard(
                fmt.name,
                fmt.dtype,
                nbytes[fmt.name] // math.prod(fmt.block_shape),
                tuple(shape[dim] for dim in kept),
                tuple(order),
                Heads(None if axis is None else kept.index(axis), of_tensor.first, of_tensor.total),
            )
        )
    return tuple(shards)


def canonical_digest(groups: GroupSet, shards: Iterable[Sequence[TensorShard]]) -> bytes:
    """SHA-256 of what canonical payloads mean, 32 bytes; takes the place of the layout's digest in a namespace.

    Args:
        groups: the groups of layers.
        shards: for each group the shards of any rank.
    """
    table = {
        "canonical": CANONICAL_VERSION,
        "hash_block_size": groups.hash_block_size,
        "groups": [
            [group.kind.value, group.block_size, group.reach, sorted(shard.geometry for shard in of_group)]
            for group, of_group in zip(groups.groups, shards, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode("ascii")).digest()


# -- runs of bytes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartRuns:
    """The runs of which one part of a block consists, each `int64 [n, 4]`: where it begins in the payload and in the
    canonical payload, its length, and 1 if it is stored, 0 if an earlier part has the same.

    Args:
        place: the bytes of the payload that are the part.
        words: runs of 64-bit words.
        bytes: runs of bytes, for scales.
    """

    place: slice
    words: NDArray[np.int64]
    bytes: NDArray[np.int64]


@dataclass(frozen=True)
class BlockRuns:
    """The runs of which the blocks of one form consist.

    Args:
        payload_nbytes: bytes of the payload in the pool.
        nbytes: bytes of the canonical payload.
        parts: those of each part.
        digests: the bytes of the payload that are the digests of several parts; None for one part.
    """

    payload_nbytes: int
    nbytes: int
    parts: tuple[PartRuns, ...]
    digests: slice | None


def runs_of(parts: Sequence[BlockShard], payload_nbytes: int) -> BlockRuns:
    """The runs of a block that these parts make up.

    Args:
        parts: the parts, in their order. Behind several parts the payload has a word for the digest of each.
        payload_nbytes: bytes of the payload in the pool.

    Raises:
        LayoutError: parts overlap or are not within the payload, their tensors differ, a head is missing, or runs are
            not whole words.
    """
    end = payload_nbytes - (WORD_BYTES * len(parts) if len(parts) > 1 else 0)
    _refuse_misplaced(parts, end, payload_nbytes)
    tensors = {shard.name: shard for part in parts for shard in part.tensors}
    starts = list(accumulate((tensors[name].canonical_nbytes for name in sorted(tensors)), initial=0))
    start_of = dict(zip(sorted(tensors), starts, strict=False))
    held: dict[str, set[int]] = {name: set() for name in tensors}
    runs = []
    for part in parts:
        words, in_bytes, offset = [_NO_RUNS], [_NO_RUNS], part.offset
        for shard in part.tensors:
            if shard.geometry != tensors[shard.name].geometry:
                raise LayoutError(f"tensor {shard.name!r} has one shape on one rank and another on the next")
            found = _runs_of_shard(shard, offset, start_of[shard.name], held[shard.name])
            if shard.dtype == SCALES:
                in_bytes.append(found)
            else:
                words.append(_in_words(shard, found))
            held[shard.name].update(_head_numbers(shard))
            offset += shard.nbytes
        runs.append(PartRuns(slice(part.offset, offset), np.concatenate(words), np.concatenate(in_bytes)))
    for name, heads in held.items():
        if len(heads) < tensors[name].heads.total:
            raise LayoutError(f"tensor {name!r}: no rank has some of its {tensors[name].heads.total} KV heads")
    if starts[-1] % WORD_BYTES:
        raise LayoutError(f"a canonical payload of {starts[-1]} bytes is no whole words")
    return BlockRuns(payload_nbytes, starts[-1], tuple(runs), slice(end, payload_nbytes) if len(parts) > 1 else None)


_NO_RUNS: Final = np.empty((0, 4), dtype=np.int64)


def _in_words(shard: TensorShard, runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Runs of words from runs of bytes."""
    if (runs[:, :3] % WORD_BYTES).any():
        raise LayoutError(
            f"tensor {shard.name!r}: in memory only {runs[:, 2].max()} bytes of a KV head lie together, and "
            f"{WORD_BYTES} or a multiple are needed to lay it out canonically: leave tier.canonical_layout out"
        )
    words: NDArray[np.int64] = runs // np.array([WORD_BYTES, WORD_BYTES, WORD_BYTES, 1])
    return words


def _refuse_misplaced(parts: Sequence[BlockShard], end: int, payload_nbytes: int) -> None:
    reached = 0
    for part in sorted((part for part in parts if part.tensors), key=lambda part: part.offset):
        if part.offset < reached:
            raise LayoutError(f"a part of {part.nbytes} bytes at {part.offset} overlaps another")
        names = [shard.name for shard in part.tensors]
        if len(set(names)) < len(names):
            raise LayoutError("a part has two tensors of one name")
        reached = part.offset + part.nbytes
    if not 0 < reached <= end or payload_nbytes % WORD_BYTES or payload_nbytes > MAX_BLOCK_BYTES:
        raise LayoutError(f"parts that end at {reached} are not those of a payload of {payload_nbytes} bytes")


def _head_numbers(shard: TensorShard) -> range:
    return range(shard.heads.first, shard.heads.first + shard.num_heads)


def _runs_of_shard(shard: TensorShard, offset: int, canonical: int, held: set[int]) -> NDArray[np.int64]:
    """Runs of bytes of one shard, `int64 [n, 4]`; `offset` and `canonical` are where it and its tensor begin."""
    heads = set(_head_numbers(shard))
    if not held.isdisjoint(heads) and not held >= heads:
        raise LayoutError(f"tensor {shard.name!r}: a rank has some of the KV heads of another, and others beside")
    strides = _canonical_strides(shard)
    run, outer = 1, list(shard.order)
    while outer and (strides[outer[-1]] == run or shard.shape[outer[-1]] == 1):
        run *= shard.shape[outer.pop()]
    starts = np.zeros(1, dtype=np.int64)
    for axis in outer:
        starts = np.add.outer(starts, np.arange(shard.shape[axis], dtype=np.int64) * strides[axis]).ravel()
    rows = np.empty((starts.size, 4), dtype=np.int64)
    rows[:, 0] = offset + np.arange(starts.size, dtype=np.int64) * run * shard.itemsize
    rows[:, 1] = canonical + shard.heads.first * (shard.nbytes // shard.num_heads) + starts * shard.itemsize
    rows[:, 2] = run * shard.itemsize
    rows[:, 3] = held.isdisjoint(heads)
    return rows


def _canonical_strides(shard: TensorShard) -> dict[int, int]:
    """The stride of each axis in the canonical payload, in elements: the heads outermost, then the logical order."""
    axes = [axis for axis in range(len(shard.shape)) if axis != shard.heads.axis]
    if shard.heads.axis is not None:
        axes.insert(0, shard.heads.axis)
    strides, size = {}, 1
    for axis in reversed(axes):
        strides[axis] = size
        size *= shard.shape[axis]
    return strides
