"""The layout of a paged cache: the segments of its blocks, derived from the strides of its tensors."""

from kvortex.layout.layout import KVLayout, Segment, TensorFormat, TensorLike, TensorView

__all__ = ["KVLayout", "Segment", "TensorFormat", "TensorLike", "TensorView"]
