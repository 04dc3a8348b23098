"""Eviction policies by name."""

from collections.abc import Callable

from kvortex.errors import ConfigError
from kvortex.index.policy import EvictionPolicy, LRUPolicy
from kvortex.index.policy_adaptive import ARCPolicy, S3FIFOPolicy

_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"arc": ARCPolicy, "lru": LRUPolicy, "s3fifo": S3FIFOPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """Make a new, empty policy from its name: "arc", "lru" or "s3fifo".

    Raises:
        ConfigError: no policy has that name; the message lists the names that exist.
    """
    if name not in _POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
