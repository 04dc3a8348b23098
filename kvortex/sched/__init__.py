"""Transfers: requests become batches (pure), batches become kernels and copies (executors), on one loop.

Private: it may change in any release; docs/api.md lists what is public.
"""

from kvortex.sched.batcher import Batch, Batcher, Slice
from kvortex.sched.cuda import CudaExecutor
from kvortex.sched.executor import TransferExecutor
from kvortex.sched.host import HostExecutor
from kvortex.sched.request import TransferRequest
from kvortex.sched.scheduler import TransferScheduler

__all__ = [
    "Batch",
    "Batcher",
    "CudaExecutor",
    "HostExecutor",
    "Slice",
    "TransferExecutor",
    "TransferRequest",
    "TransferScheduler",
]
