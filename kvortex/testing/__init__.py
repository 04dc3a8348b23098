"""Test doubles, shipped for everybody who extends KVortex.

The module `kvortex.testing.tier_conformance` needs pytest, so import it separately.
"""

from kvortex.testing.faults import Fault, FaultInjectingExecutor
from kvortex.testing.tier_faults import FaultInjectingTier, TierFault

__all__ = ["Fault", "FaultInjectingExecutor", "FaultInjectingTier", "TierFault"]
