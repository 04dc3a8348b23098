"""Doubles for tests, shipped so that whoever extends KVortex can use them.

`kvortex.testing.tier_conformance` needs pytest and is imported by itself.
"""

from kvortex.testing.faults import Fault, FaultInjectingExecutor
from kvortex.testing.tier_faults import FaultInjectingTier, TierFault

__all__ = ["Fault", "FaultInjectingExecutor", "FaultInjectingTier", "TierFault"]
