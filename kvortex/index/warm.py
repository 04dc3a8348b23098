"""Compiles the index's steps before the first request needs them."""

import numpy as np

from kvortex.index.cache_index import CacheIndex
from kvortex.index.keys import pack_keys
from kvortex.index.policy_choice import make_policy
from kvortex.types import BLOCK_HASH_BYTES, MissReason


def warm_up(eviction_policy: str = "lru") -> None:
    """Compile the steps of the index and of a policy, or load them from numba's cache. Takes seconds the first time.

    Args:
        eviction_policy: name of the policy, as for `make_policy`.

    Raises:
        ConfigError: no policy has that name.
    """
    index = CacheIndex(make_policy(eviction_policy), ghost_entries=1, expected_entries=16)
    keys = pack_keys([bytes(BLOCK_HASH_BYTES - 1) + bytes([i]) for i in range(40)])
    slots = index.reserve(keys).slots
    index.commit(slots[:30], np.arange(30, dtype=np.int64), 1, np.zeros(30, dtype=np.uint64))
    index.abort(slots[30:], None)
    index.contains_mask(keys)
    index.prefix_length(keys)
    index.states(keys)
    index.miss_reason(bytes(BLOCK_HASH_BYTES))
    pinned = index.pin(keys[:1]).slots
    index.touch(keys[:1])
    index.drop(pinned, MissReason.CORRUPT)
    index.unpin(pinned)
    index.invalidate(keys[1:2])
    index.evict(1)
    index.rank(range(2), priority=1, is_bounded=True)
    index.evict_of(0, 1)
    index.evict(1)
    index.clear()
