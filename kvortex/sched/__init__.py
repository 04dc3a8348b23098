"""Transfers: the batcher makes batches of requests, an executor makes kernels and copies of batches."""

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
