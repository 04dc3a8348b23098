"""The public faces: an engine on the caller's loop, and a blocking one."""

from kvortex.engine.engine import KVortexEngine
from kvortex.engine.sync import SyncEngine

__all__ = ["KVortexEngine", "SyncEngine"]
