"""One pool for all engines of a machine: its owner, a process of its own, and the clients in the engines.

Private: it may change in any release; docs/api.md lists what is public.
"""

from typing import TypeAlias

from kvortex.owner.client import OwnerClient
from kvortex.owner.control import RemoteControl
from kvortex.owner.following import OwnerFollower
from kvortex.owner.server import Owner
from kvortex.owner.tiering import RemoteTiering
from kvortex.planes.control import ControlPlane

Control: TypeAlias = ControlPlane | RemoteControl
"""Plans saves and loads, in this process or in that of an owner."""

__all__ = ["Control", "Owner", "OwnerClient", "OwnerFollower", "RemoteControl", "RemoteTiering"]
