"""Gather and scatter of paged blocks, packed or raw; a digest is computed on the way.

CUDA kernels, CPU kernels with the same results, NumPy references.
"""

from kvortex.kernels.device import DeviceKernels
from kvortex.kernels.digest import digest_reference
from kvortex.kernels.host import HostKernels
from kvortex.kernels.pack_host import HostPackKernels
from kvortex.kernels.tables import validate_block_ids

__all__ = ["DeviceKernels", "HostKernels", "HostPackKernels", "digest_reference", "validate_block_ids"]
