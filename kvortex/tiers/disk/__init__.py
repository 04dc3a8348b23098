"""Blocks on disk: one checked frame a file, in a directory that any number of processes share.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.config import DiskTierConfig
from kvortex.tiers.disk.tier import DiskTier

__all__ = ["DiskTier", "DiskTierConfig"]
