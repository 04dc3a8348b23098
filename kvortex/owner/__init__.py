"""One pool for all engines of a machine: its owner, a process of its own, and the clients in the engines.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.owner.client import OwnerClient
from kvortex.owner.control import RemoteControl
from kvortex.owner.server import Owner

__all__ = ["Owner", "OwnerClient", "RemoteControl"]
