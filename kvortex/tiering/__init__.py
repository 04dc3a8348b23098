"""Between the pool and a lower tier: write-behind, fetches, deadlines.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.tiering.backing import BackingTier, TierControl, TieredPool, check_model_is_named
from kvortex.tiering.tiering import LoadFetch, Tiering, tier_of

__all__ = ["BackingTier", "LoadFetch", "TierControl", "TieredPool", "Tiering", "check_model_is_named", "tier_of"]
