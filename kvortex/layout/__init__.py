"""Where the bytes of a block lie in the paged cache: segments, derived from the tensors' strides."""

from kvortex.layout.layout import KVLayout, Segment, TensorFormat, TensorLike, TensorView

__all__ = ["KVLayout", "Segment", "TensorFormat", "TensorLike", "TensorView"]
