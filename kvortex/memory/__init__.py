"""Memory that stores and stages blocks: the extent allocator, the pinned host pool, device staging."""

from kvortex.memory.allocator import ExtentAllocator
from kvortex.memory.limits import check_memory
from kvortex.memory.pinned import PinnedPool
from kvortex.memory.shared import SharedMemory, SharedTicket
from kvortex.memory.staging import DeviceStagingPool

__all__ = ["DeviceStagingPool", "ExtentAllocator", "PinnedPool", "SharedMemory", "SharedTicket", "check_memory"]
