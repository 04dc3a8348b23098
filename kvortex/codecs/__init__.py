"""How a block rests outside of the paged cache: as it is (`raw`), or packed (`fp8`, `bf16`)."""

from kvortex.codecs.packing import GROUP_UNITS, RAW, Packing, packing_for
from kvortex.codecs.reference import pack_reference, unpack_reference

__all__ = ["GROUP_UNITS", "RAW", "Packing", "pack_reference", "packing_for", "unpack_reference"]
