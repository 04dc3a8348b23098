"""Memory that stores and stages blocks: the extent allocator, the pinned host pool, device staging.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.memory.allocator import ExtentAllocator
from kvortex.memory.limits import check_memory
from kvortex.memory.pinned import PinnedPool
from kvortex.memory.shared import SharedMemory, SharedTicket
from kvortex.memory.staging import DeviceStagingPool

__all__ = ["DeviceStagingPool", "ExtentAllocator", "PinnedPool", "SharedMemory", "SharedTicket", "check_memory"]
