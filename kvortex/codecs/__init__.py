"""How a block is encoded outside of the paged cache: unchanged (`raw`) or packed (`fp8`, `bf16`)."""

from kvortex.codecs.packing import RAW, Codec, Encodings, Packing, block_sizes, encodings_of, packed_nbytes, packing_for
from kvortex.codecs.reference import pack_reference, unpack_reference

__all__ = [
    "RAW",
    "Codec",
    "Encodings",
    "Packing",
    "block_sizes",
    "encodings_of",
    "pack_reference",
    "packed_nbytes",
    "packing_for",
    "unpack_reference",
]
