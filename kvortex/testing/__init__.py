"""Doubles for tests, shipped so that whoever extends KVortex can use them."""

from kvortex.testing.faults import Fault, FaultInjectingExecutor

__all__ = ["Fault", "FaultInjectingExecutor"]
