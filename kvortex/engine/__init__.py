"""The public faces: an engine on the caller's loop, and a blocking one.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.engine.engine import EngineCreation, KVortexEngine
from kvortex.engine.leases import Lease
from kvortex.engine.parts import EngineParts
from kvortex.engine.sync import SyncEngine

__all__ = ["EngineCreation", "EngineParts", "KVortexEngine", "Lease", "SyncEngine"]
