"""The index of cached blocks, the eviction policies and the pace of eviction. No I/O, no GPU.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.index.cache_index import FORM_0, CacheIndex, Evicted, Pins, Reservation
from kvortex.index.keys import as_packed, pack_keys
from kvortex.index.pacing import EvictionPacer
from kvortex.index.policy import EvictionPolicy, LRUPolicy
from kvortex.index.policy_adaptive import ARCPolicy, S3FIFOPolicy
from kvortex.index.policy_choice import make_policy
from kvortex.index.table import BUSY, COMMITTED, MISS_REASONS, PENDING, RESERVED, STORED
from kvortex.index.warm import warm_up

__all__ = [
    "BUSY",
    "COMMITTED",
    "FORM_0",
    "MISS_REASONS",
    "PENDING",
    "RESERVED",
    "STORED",
    "ARCPolicy",
    "CacheIndex",
    "Evicted",
    "EvictionPacer",
    "EvictionPolicy",
    "LRUPolicy",
    "Pins",
    "Reservation",
    "S3FIFOPolicy",
    "as_packed",
    "make_policy",
    "pack_keys",
    "warm_up",
]
