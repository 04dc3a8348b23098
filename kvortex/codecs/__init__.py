"""How a block rests outside of the paged cache: as it is (`raw`), or packed (`fp8`, `bf16`)."""

from kvortex.codecs.packing import RAW, Codec, Forms, Packing, block_sizes, forms_of, packed_nbytes, packing_for
from kvortex.codecs.reference import pack_reference, unpack_reference

__all__ = [
    "RAW",
    "Codec",
    "Forms",
    "Packing",
    "block_sizes",
    "forms_of",
    "pack_reference",
    "packed_nbytes",
    "packing_for",
    "unpack_reference",
]
