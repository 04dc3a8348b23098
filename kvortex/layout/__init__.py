"""The layout of a paged cache: the segments of its blocks, derived from the strides of its tensors.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.layout.cache import PagedCache
from kvortex.layout.layout import KVLayout, Segment, TensorFormat, TensorLike, TensorView

__all__ = ["KVLayout", "PagedCache", "Segment", "TensorFormat", "TensorLike", "TensorView"]
