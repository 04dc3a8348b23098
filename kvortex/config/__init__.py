"""Every setting, and how a value becomes one."""

from kvortex.config.config import (
    CHOICES,
    CODECS,
    EVICTION_POLICIES,
    EXTENT_ALIGNMENT_BYTES,
    UNNAMED_MODEL,
    KVortexConfig,
    ModelIdentity,
)
from kvortex.config.fields import GIB, KIB, MIB, format_bytes, parse_bytes

__all__ = [
    "CHOICES",
    "CODECS",
    "EVICTION_POLICIES",
    "EXTENT_ALIGNMENT_BYTES",
    "GIB",
    "KIB",
    "MIB",
    "UNNAMED_MODEL",
    "KVortexConfig",
    "ModelIdentity",
    "format_bytes",
    "parse_bytes",
]
