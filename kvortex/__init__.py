"""KVortex keeps the KV blocks of an LLM server in host memory and below, and brings them back fast and right."""

from kvortex.config import KVortexConfig, ModelIdentity
from kvortex.engine import KVortexEngine
from kvortex.errors import KVortexError
from kvortex.hashing import Namespace, cache_key, hash_blocks
from kvortex.layout import KVLayout
from kvortex.stats import StatsSnapshot
from kvortex.sync import SyncEngine
from kvortex.types import BlockHash, LoadResult, MissReason, SaveOutcome, SaveResult

__version__ = "0.1.0"

__all__ = [
    "BlockHash",
    "KVLayout",
    "KVortexConfig",
    "KVortexEngine",
    "KVortexError",
    "LoadResult",
    "MissReason",
    "ModelIdentity",
    "Namespace",
    "SaveOutcome",
    "SaveResult",
    "StatsSnapshot",
    "SyncEngine",
    "cache_key",
    "hash_blocks",
]
