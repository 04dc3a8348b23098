"""Between the pool and a lower tier: write-behind, fetches, deadlines."""

from kvortex.tiering.link import TierLink
from kvortex.tiering.tiering import LoadFetch, Tiering, tier_of

__all__ = ["LoadFetch", "TierLink", "Tiering", "tier_of"]
