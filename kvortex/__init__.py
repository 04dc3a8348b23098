"""KVortex stores the KV blocks of an LLM server in host memory and on disk, and loads them back fast and unchanged."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvortex.config import KVortexConfig, ModelIdentity
    from kvortex.engine import EngineCreation, EngineParts, KVortexEngine, Lease, SyncEngine
    from kvortex.errors import KVortexError
    from kvortex.groups import KVGroup, KVKind, Match, MissingKV
    from kvortex.hashing import Namespace, cache_key, hash_blocks
    from kvortex.layout import KVLayout, PagedCache
    from kvortex.stats import StatsSnapshot
    from kvortex.types import BlockHash, LoadResult, MissReason, SaveOutcome, SaveResult

__version__ = "0.2.0"

__all__ = [
    "BlockHash",
    "EngineCreation",
    "EngineParts",
    "KVGroup",
    "KVKind",
    "KVLayout",
    "KVortexConfig",
    "KVortexEngine",
    "KVortexError",
    "Lease",
    "LoadResult",
    "Match",
    "MissReason",
    "MissingKV",
    "ModelIdentity",
    "Namespace",
    "PagedCache",
    "SaveOutcome",
    "SaveResult",
    "StatsSnapshot",
    "SyncEngine",
    "cache_key",
    "hash_blocks",
]

# Loaded on first use: the engine imports numba and torch, which a program that only needs a hash should not wait for.
_HOME = {
    "BlockHash": "types",
    "EngineCreation": "engine",
    "EngineParts": "engine",
    "KVGroup": "groups",
    "KVKind": "groups",
    "KVLayout": "layout",
    "KVortexConfig": "config",
    "KVortexEngine": "engine",
    "Lease": "engine",
    "KVortexError": "errors",
    "LoadResult": "types",
    "Match": "groups",
    "MissReason": "types",
    "MissingKV": "groups",
    "ModelIdentity": "config",
    "Namespace": "hashing",
    "PagedCache": "layout",
    "SaveOutcome": "types",
    "SaveResult": "types",
    "StatsSnapshot": "stats",
    "SyncEngine": "engine",
    "cache_key": "hashing",
    "hash_blocks": "hashing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvortex.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
