"""All settings, and the conversion and checks of their values."""

from kvortex.config.config import KVortexConfig
from kvortex.config.fields import GIB, KIB, MIB, format_bytes, parse_bytes
from kvortex.config.sections import (
    CODECS,
    EVICTION_POLICIES,
    CodecConfig,
    DiskTierConfig,
    EvictionConfig,
    ModelIdentity,
    OwnerConfig,
    PoolConfig,
    TierConfig,
    TransferConfig,
)

__all__ = [
    "CODECS",
    "EVICTION_POLICIES",
    "GIB",
    "KIB",
    "MIB",
    "CodecConfig",
    "DiskTierConfig",
    "EvictionConfig",
    "KVortexConfig",
    "ModelIdentity",
    "OwnerConfig",
    "PoolConfig",
    "TierConfig",
    "TransferConfig",
    "format_bytes",
    "parse_bytes",
]
