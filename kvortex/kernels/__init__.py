"""Gather and scatter of paged blocks with a digest on the way, packed or as they are.

CUDA kernels, their CPU twins, NumPy references.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.kernels.device import DeviceKernels
from kvortex.kernels.digest import digest_reference
from kvortex.kernels.host import HostKernels
from kvortex.kernels.pack_host import HostPackKernels
from kvortex.kernels.tables import validate_block_ids

__all__ = ["DeviceKernels", "HostKernels", "HostPackKernels", "digest_reference", "validate_block_ids"]
