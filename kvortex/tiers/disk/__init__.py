"""Blocks on disk: one checked frame a file, in a directory that any number of processes share."""

from kvortex.config import DiskTierConfig
from kvortex.tiers.disk.tier import DiskTier

__all__ = ["DiskTier", "DiskTierConfig"]
