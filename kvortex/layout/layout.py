"""KVLayout: the addresses of a block's bytes, for any paged KV cache.

A layout is a list of segments `(address, block stride, bytes)`: block `b` has `nbytes` bytes at
`address + b * block_stride` in every segment, and its payload is the concatenation of these runs. The layout is derived
from shapes and strides, without assumptions about the backend, so permuted (HND) and interleaved views work.
"""

import hashlib
import json
import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import LayoutError
from kvortex.layout.strides import BlockRuns, dense_runs, find_block_dim, find_overlap

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES = 16
"""Kernels move words of 16 bytes: every address, block stride and length must be a multiple of it."""

_TABLE_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorView:
    """A strided tensor as plain data. It does not keep the memory alive.

    Args:
        name: the tensor's name, for messages.
        address: address of element `[0, ..., 0]`.
        shape: entries of each dimension.
        strides: stride of each dimension, in elements.
        itemsize: bytes of an element.
        device: such as "cpu" or "cuda:0".
        dtype: such as "bfloat16".
    """

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: str
    dtype: str

    @classmethod
    def from_torch(cls, name: str, tensor: "torch.Tensor") -> "TensorView":
        """The view of a torch tensor; `LayoutError` if it is sparse."""
        if str(tensor.layout) != "torch.strided":
            raise LayoutError(f"tensor {name!r} is {tensor.layout}; pass a strided tensor")
        return cls(
            name=name,
            address=tensor.data_ptr(),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            itemsize=tensor.element_size(),
            device=str(tensor.device),
            dtype=str(tensor.dtype).removeprefix("torch."),
        )

    @classmethod
    def from_numpy(cls, name: str, array: NDArray[Any]) -> "TensorView":
        """The view of a NumPy array; `LayoutError` if it is read-only, or its strides are not whole elements."""
        if not array.flags.writeable:
            raise LayoutError(f"tensor {name!r} is read-only; a KV cache is written to, pass a writable array")
        if any(stride % array.itemsize for stride in array.strides):
            raise LayoutError(f"tensor {name!r} has strides that are not whole elements; pass a contiguous array")
        return cls(
            name=name,
            address=array.ctypes.data,
            shape=tuple(array.shape),
            strides=tuple(stride // array.itemsize for stride in array.strides),
            itemsize=array.itemsize,
            device="cpu",
            dtype=str(array.dtype),
        )


TensorLike: TypeAlias = Union["torch.Tensor", TensorView, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Segment:
    """One contiguous run of every block: block `b` has `nbytes` bytes at `address + b * block_stride`.

    Args:
        tensor: name of the tensor that contains it.
        address: address of the run of block 0.
        block_stride: bytes from a block's run to that of the next block.
        nbytes: bytes of the run.
    """

    tensor: str
    address: int
    block_stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """The meaning of a tensor's bytes in a payload; the same in every process with the same model.

    NHD and HND caches of equal size differ here only.

    Args:
        name: the tensor's name.
        dtype: such as "bfloat16".
        block_shape: shape of one block without dimensions of size 1.
        payload_order: its axes in the order of the payload, outermost first.
    """

    name: str
    dtype: str
    block_shape: tuple[int, ...]
    payload_order: tuple[int, ...]


@dataclass(frozen=True)
class KVLayout:
    """The segments of a paged KV cache on one device.

    Create it by `from_tensors`, which checks everything; the constructor checks nothing.

    Args:
        block_size: tokens of a block.
        num_blocks: blocks of the cache.
        device: such as "cpu" or "cuda:0".
        segments: the runs of a block, in the order of its payload.
        formats: one for each tensor, in the order of the tensors.
        block_dims: the dimension of each tensor that counts blocks, in the order of `formats`.
    """

    block_size: int
    num_blocks: int
    device: str
    segments: tuple[Segment, ...]
    formats: tuple[TensorFormat, ...] = ()
    block_dims: tuple[int, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, TensorLike],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
    ) -> "KVLayout":
        """Derive the layout of a cache from its tensors.

        If `block_dim` is not given, the dimension that counts blocks is the only one that is a multiple of
        `num_blocks`. If several are, or `num_blocks` is not given, the shape decides: `[nb, bs, X]`,
        `[nb, H, bs, 2D]`, `[nb, bs, H, D]`, `[nb, 1, bs, X]`, `[2, nb, bs, H, D]`, `[nb, 2, bs, H, D]`,
        `[2, L, nb, bs, H, D]`, `[nb, L, 2, bs, H, D]` or `[nb, 2, L, bs, H, D]`, with bs and H in either order. If
        that dimension has `ratio * num_blocks` entries, a block is `ratio` consecutive entries of it.

        Args:
            tensors: name -> tensor; the layout has their order.
            block_size: tokens of a block.
            num_blocks: blocks of the cache; None if the shapes show it.
            block_dim: the dimension that counts blocks, for all tensors or by name; None if the shapes show it.

        Raises:
            LayoutError: tensors have different numbers of blocks or devices, overlap themselves or each other, are not
                dense, or are not aligned to 16 bytes. The message names the tensor.
        """
        block_size = _as_int("block_size", block_size)
        num_blocks = None if num_blocks is None else _as_int("num_blocks", num_blocks)
        _check_arguments(tensors, block_size, num_blocks, block_dim)
        views = [_as_view(name, tensor) for name, tensor in tensors.items()]
        device = _common_device(views)
        dims = [_block_dim_of(view, block_size, num_blocks, block_dim) for view in views]
        count = _common_num_blocks(views, dims, num_blocks)
        segments: list[Segment] = []
        formats: list[TensorFormat] = []
        for view, dim in zip(views, dims, strict=True):
            runs, block_stride = _runs_of(view, dim, count)
            segments += _segments_of(view, runs, block_stride)
            formats.append(TensorFormat(view.name, view.dtype, runs.block_shape, runs.payload_order))
        _refuse_overlap(segments, count)
        return cls(block_size, count, device, tuple(segments), tuple(formats), tuple(dims))

    @property
    def num_segments(self) -> int:
        return len(self.segments)

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of one block's payload."""
        return sum(segment.nbytes for segment in self.segments)

    @cached_property
    def payload_offsets(self) -> tuple[int, ...]:
        """Offset of each segment in a block's payload, in bytes, in the order of `segments`."""
        return tuple(accumulate((segment.nbytes for segment in self.segments[:-1]), initial=0))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The distinct dtypes, in the order of the tensors."""
        return tuple(dict.fromkeys(fmt.dtype for fmt in self.formats))

    def segment_table(self) -> bytes:
        """The meaning of a payload's bytes, as canonical JSON. Payloads with equal tables are interchangeable.

        It contains no address, stride or number of blocks, so it is the same in every process.
        """
        table = {
            "version": _TABLE_VERSION,
            "block_size": self.block_size,
            "segments": [[segment.tensor, segment.nbytes] for segment in self.segments],
            "tensors": [[f.name, f.dtype, f.block_shape, f.payload_order] for f in self.formats],
        }
        return json.dumps(table, sort_keys=True, separators=(",", ":")).encode("ascii")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the segment table, 32 bytes. It is a part of the namespace."""
        return hashlib.sha256(self.segment_table()).digest()

    def segment_of(self, payload_offset: int) -> Segment:
        """The segment that contains byte `payload_offset` of a payload; `IndexError` if there is no such byte."""
        if not 0 <= payload_offset < self.block_nbytes:
            raise IndexError(f"payload offset {payload_offset} is outside of [0, {self.block_nbytes})")
        return self.segments[bisect_right(self.payload_offsets, payload_offset) - 1]

    def __repr__(self) -> str:
        return f"<KVLayout: {self.describe()}>"

    def describe(self) -> str:
        """The layout in one line, for logs."""
        sizes = sorted({segment.nbytes for segment in self.segments})
        span = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        return (
            f"{self.num_blocks} blocks of {self.block_size} tokens, {self.block_nbytes} bytes a block in "
            f"{self.num_segments} segment(s) of {span} bytes, {len(self.formats)} tensor(s), "
            f"{'/'.join(self.dtypes)} on {self.device}"
        )


def _as_int(name: str, value: int) -> int:
    try:
        return operator.index(value)  # accepts NumPy's integers, too, and converts them
    except TypeError:
        raise LayoutError(f"{name} is {value!r}; pass an integer") from None


def _check_arguments(
    tensors: Mapping[str, TensorLike],
    block_size: int,
    num_blocks: int | None,
    block_dim: int | Mapping[str, int] | None,
) -> None:
    if not tensors:
        raise LayoutError("no tensors; pass the KV cache of at least one layer")
    if block_size < 1:
        raise LayoutError(f"block_size is {block_size}; it counts tokens, pass 1 or more")
    if num_blocks is not None and num_blocks < 1:
        raise LayoutError(f"num_blocks is {num_blocks}; pass 1 or more, or leave it out")
    if isinstance(block_dim, Mapping) and (unknown := set(block_dim) - set(tensors)):
        raise LayoutError(f"block_dim names tensors that were not passed: {sorted(unknown)}")


def _as_view(name: str, tensor: TensorLike) -> TensorView:
    if isinstance(tensor, TensorView):
        view = replace(tensor, name=name)
    elif isinstance(tensor, np.ndarray):
        view = TensorView.from_numpy(name, tensor)
    elif hasattr(tensor, "data_ptr"):
        view = TensorView.from_torch(name, tensor)
    else:
        raise LayoutError(f"tensor {name!r} is a {type(tensor).__name__}; pass a torch tensor or a NumPy array")
    if not view.shape or len(view.shape) != len(view.strides):
        raise LayoutError(f"tensor {name!r} has shape {view.shape} and strides {view.strides}; not a paged cache")
    if 0 in view.shape:
        raise LayoutError(f"tensor {name!r} of shape {view.shape} is empty; allocate at least one block")
    if view.address == 0:
        raise LayoutError(f"tensor {name!r} has no memory (device {view.device}); pass an allocated tensor")
    if any(stride <= 0 for size, stride in zip(view.shape, view.strides, strict=True) if size > 1):
        raise LayoutError(
            f"tensor {name!r} has strides {view.strides}: zero or negative ones repeat or reverse memory; "
            "pass a tensor that was neither expanded nor flipped, or its contiguous copy"
        )
    return view


def _common_device(views: Sequence[TensorView]) -> str:
    for view in views:
        if view.device != views[0].device:
            raise LayoutError(
                f"tensor {view.name!r} is on {view.device}, {views[0].name!r} on {views[0].device}; "
                "a layout covers one device, register the tensors of each device by themselves"
            )
    return views[0].device


def _block_dim_of(
    view: TensorView, block_size: int, num_blocks: int | None, block_dim: int | Mapping[str, int] | None
) -> int:
    dim = block_dim.get(view.name) if isinstance(block_dim, Mapping) else block_dim
    if dim is None:
        return find_block_dim(view.name, view.shape, block_size, num_blocks)
    ndim = len(view.shape)
    dim = _as_int("block_dim", dim)
    if not -ndim <= dim < ndim:
        raise LayoutError(f"tensor {view.name!r} of shape {view.shape} has no block_dim {dim}")
    return dim % ndim


def _common_num_blocks(views: Sequence[TensorView], dims: Sequence[int], num_blocks: int | None) -> int:
    count = num_blocks or views[0].shape[dims[0]]
    for view, dim in zip(views, dims, strict=True):
        size = view.shape[dim]
        if num_blocks is None and size != count:
            raise LayoutError(
                f"tensor {view.name!r} of shape {view.shape} has {size} blocks, "
                f"{views[0].name!r} has {count}; pass num_blocks= if some are cut into kernel blocks, "
                "block_dim= if the dimension is wrong"
            )
        if size % count:
            raise LayoutError(
                f"tensor {view.name!r} of shape {view.shape}: dimension {dim} is {size} long, "
                f"no multiple of num_blocks = {count}"
            )
    return count


def _runs_of(view: TensorView, dim: int, num_blocks: int) -> tuple[BlockRuns, int]:
    """The runs of one block of the tensor and the distance from block to block, in elements."""
    # A block that is cut into kernel blocks spans `ratio` entries of the block dimension.
    ratio = view.shape[dim] // num_blocks
    shape = (*view.shape[:dim], ratio, *view.shape[dim + 1 :])
    min_run = -(-ALIGNMENT_BYTES // view.itemsize)
    runs = dense_runs(view.name, shape, view.strides, min_run)
    # With a single block the tensor's stride may have any value: use that of a dense cache.
    return runs, view.strides[dim] * ratio if num_blocks > 1 else sum(runs.lengths)


def _segments_of(view: TensorView, runs: BlockRuns, block_stride: int) -> list[Segment]:
    segments = [
        Segment(
            tensor=view.name,
            address=view.address + offset * view.itemsize,
            block_stride=block_stride * view.itemsize,
            nbytes=length * view.itemsize,
        )
        for offset, length in zip(runs.offsets, runs.lengths, strict=True)
    ]
    for segment in segments:
        for what in ("address", "nbytes", "block_stride"):
            if (value := getattr(segment, what)) % ALIGNMENT_BYTES:
                raise LayoutError(
                    f"tensor {view.name!r} is not aligned: a segment's {what} is {value}, no multiple of "
                    f"{ALIGNMENT_BYTES} bytes; pad the head size or the start of the view"
                )
    return segments


def _refuse_overlap(segments: Sequence[Segment], num_blocks: int) -> None:
    table = np.array([(s.address, s.block_stride, s.nbytes) for s in segments], dtype=np.int64)
    pair = find_overlap(table[:, 0], table[:, 1], table[:, 2], num_blocks)
    if pair is None:
        return
    first, second = segments[pair[0]], segments[pair[1]]
    if first is second:
        raise LayoutError(
            f"tensor {first.tensor!r}: blocks overlap, each takes {first.nbytes} bytes but the next "
            f"starts after {first.block_stride}; pass a tensor without overlapping strides, or "
            "the right block_dim="
        )
    if first.tensor == second.tensor:
        raise LayoutError(f"tensor {first.tensor!r} overlaps itself; pass a tensor without overlapping strides")
    raise LayoutError(
        f"tensor {second.tensor!r} overlaps {first.tensor!r} in memory; layers that share a cache are "
        "registered once, under one name"
    )
