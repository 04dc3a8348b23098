"""Blocks in Redis or Valkey, which a fleet of hosts shares: one value a block, straight from and into the pool.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.tiers.redis.tier import RedisTier

__all__ = ["RedisTier"]
