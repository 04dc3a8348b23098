"""Which blocks are cached, which go next, and when: the control plane's book-keeping. No I/O, no GPU."""

from kvortex.index.cache_index import CacheIndex
from kvortex.index.entry import Entry
from kvortex.index.pacing import EvictionPacer
from kvortex.index.policy import EvictionPolicy, LRUPolicy, make_policy

__all__ = ["CacheIndex", "Entry", "EvictionPacer", "EvictionPolicy", "LRUPolicy", "make_policy"]
