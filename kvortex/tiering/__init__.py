"""Between the pool and a lower tier: write-behind, fetches, deadlines.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.tiering.backing import BackingTier, TieredPool
from kvortex.tiering.tiering import LoadFetch, Tiering, tier_of

__all__ = ["BackingTier", "LoadFetch", "TieredPool", "Tiering", "tier_of"]
