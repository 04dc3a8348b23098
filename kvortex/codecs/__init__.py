"""How a block is encoded outside of the paged cache: as it is (`raw`), or packed (`fp8`, `bf16`).

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.codecs.canonical import packed_shards
from kvortex.codecs.packing import (
    RAW,
    Codec,
    Encodings,
    Packing,
    PageEncodings,
    Pages,
    block_sizes,
    packed_nbytes,
    packing_for,
)
from kvortex.codecs.reference import pack_reference, too_lossy, unpack_reference

__all__ = [
    "RAW",
    "Codec",
    "Encodings",
    "Packing",
    "PageEncodings",
    "Pages",
    "block_sizes",
    "pack_reference",
    "packed_nbytes",
    "packed_shards",
    "packing_for",
    "too_lossy",
    "unpack_reference",
]
