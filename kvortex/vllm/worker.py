"""The worker half: moves the blocks of one rank on a loop and thread of its own; never blocks a forward."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvortex.driver import Event
from kvortex.errors import EngineStateError, KVortexError
from kvortex.layout import KVLayout
from kvortex.sched import TransferRequest
from kvortex.sync import LoopThread
from kvortex.transfers import DataPlane
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.model import block_dims, only_group
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, SaveJob, WorkerHandshake
from kvortex.vllm.versions import OutcomeMessage

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


@dataclass
class _Save:
    """A save whose blocks may not have been read yet."""

    block_ids: frozenset[int]
    read: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Ended:
    """What the loop's thread tells the worker's."""

    outcome: JobOutcome
    job: SaveJob | LoadJob


class WorkerHalf:
    """Carries out the jobs of each step.

    A save is ordered behind the step's forward by an event, and then runs beside the next ones: full blocks are
    not written again while their request holds them. Only when a block is given to somebody else before it has
    been read does the next step wait for that one save.

    Digests stay here: each rank compares what it loads with what it saved.
    """

    def __init__(self, kv_cache_config: "KVCacheConfig", options: ConnectorOptions) -> None:
        self._num_blocks = int(kv_cache_config.num_blocks)
        self._block_size = int(only_group(kv_cache_config).kv_cache_spec.block_size)
        self._options = options
        self._thread: LoopThread | None = None
        self._data: DataPlane | None = None
        self._digests = np.empty(0, dtype=np.uint64)
        self._plan = ConnectorPlan()
        self._unread: deque[_Save] = deque()
        self._ended: deque[_Ended] = deque()
        self._outcomes: list[JobOutcome] = []
        self._failed_block_ids: set[int] = set()
        self._stats = ConnectorStats()

    # -- start and end -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the paged cache over: layout, pool, self-test.

        Raises:
            ConfigError, LayoutError, DeviceError, OutOfPoolMemoryError: see `DataPlane`; vLLM does not start then.
        """
        caches = _without_shared(kv_caches)
        layout = KVLayout.from_tensors(
            caches, self._block_size, num_blocks=self._num_blocks, block_dim=block_dims(caches, self._num_blocks)
        )
        thread = LoopThread()
        try:

            async def start() -> DataPlane:
                return DataPlane(self._options.engine, caches, layout)

            self._data = thread.run(start())
        except BaseException:
            thread.stop()
            raise
        self._thread = thread
        self._digests = np.zeros(self._data.pool.capacity_bytes // self._data.block_nbytes + 1, dtype=np.uint64)
        logger.info("KVortex serves %s, %d bytes of pinned memory", layout.describe(), self._data.pool.capacity_bytes)

    def handshake(self) -> WorkerHandshake | None:
        """What was registered, for the scheduler half."""
        if self._data is None:
            return None
        layout = self._data.layout
        return WorkerHandshake(
            layout.digest, self._data.block_nbytes, layout.num_blocks, self._data.pool.capacity_bytes
        )

    def shutdown(self) -> None:
        """Finish what is under way and release everything; idempotent."""
        if self._thread is None or self._data is None:
            return
        thread, data = self._thread, self._data
        self._thread = self._data = None
        thread.run(data.aclose())
        thread.stop()

    def _planes(self) -> tuple[DataPlane, asyncio.AbstractEventLoop]:
        if self._data is None or self._thread is None:
            raise EngineStateError("the connector has no caches: register_kv_caches comes first")
        return self._data, self._thread.loop

    # -- a step ------------------------------------------------------------------------------------

    def begin_step(self, plan: ConnectorPlan) -> None:
        """Before the forward: what it will overwrite must have been read by saves of earlier steps."""
        self._plan = plan
        for save in self._unread:
            if not save.read.is_set() and not save.block_ids.isdisjoint(plan.fresh_block_ids):
                save.read.wait()
        while self._unread and self._unread[0].read.is_set():
            self._unread.popleft()

    def start_loads(self) -> None:
        """Begin this step's loads, behind what the forward's stream has queued so far."""
        loads, self._plan.loads = self._plan.loads, []
        for job in loads:
            self._submit(job, None)

    def start_saves(self) -> None:
        """Begin this step's saves, behind the forward that wrote their blocks."""
        saves, self._plan.saves = self._plan.saves, []
        for job in saves:
            save = _Save(frozenset(job.transfer.block_ids.tolist()))
            self._unread.append(save)
            self._submit(job, save)

    def _submit(self, job: SaveJob | LoadJob, save: _Save | None) -> None:
        data, loop = self._planes()
        after = data.record_event()
        loop.call_soon_threadsafe(self._start, job, save, after)

    # -- on the loop's thread ----------------------------------------------------------------------

    def _start(self, job: SaveJob | LoadJob, save: _Save | None, after: Event | None) -> None:
        task = asyncio.get_running_loop().create_task(self._carry_out(job, save, after))
        task.add_done_callback(_raise_in_loop)

    async def _carry_out(self, job: SaveJob | LoadJob, save: _Save | None, after: Event | None) -> None:
        data, _ = self._planes()
        ended: list[TransferRequest] = []
        try:
            request = await data.start(job.transfer, after, ended.append, wants_source_released=save is not None)
            if save is not None:
                await request.source_released.wait()
                save.read.set()
            await data.wait([request])
        except KVortexError as error:
            logger.warning("a job could not be started: %s", error)
        finally:
            if save is not None:
                save.read.set()
            data.release_event(after)
            self._ended.append(_Ended(self._judge(job, ended[0]), job))

    def _judge(self, job: SaveJob | LoadJob, request: TransferRequest) -> JobOutcome:
        places = job.transfer.offsets // request.block_nbytes
        if isinstance(job, SaveJob):
            self._digests[places[request.succeeded]] = request.digests[request.succeeded]
            corrupt: tuple[int, ...] = ()
        else:
            wrong = request.succeeded & (request.digests != self._digests[places])
            corrupt = tuple(np.flatnonzero(wrong).tolist())
        return JobOutcome(job.job_id, tuple(np.flatnonzero(~request.succeeded).tolist()), corrupt)

    # -- what became of it -------------------------------------------------------------------------

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended since the last call; their failed blocks are reported beside them."""
        received: set[str] = set()
        while self._ended:
            ended = self._ended.popleft()
            self._outcomes.append(ended.outcome)
            if isinstance(ended.job, LoadJob):
                received.add(ended.job.request_id)
                bad = [*ended.outcome.failed, *ended.outcome.corrupt]
                self._failed_block_ids.update(ended.job.transfer.block_ids[bad].tolist(), ended.job.missing_block_ids)
        return received

    def take_failed_block_ids(self) -> set[int]:
        """Blocks that hold no KV although a load was asked to fill them."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def take_outcomes(self) -> OutcomeMessage | None:
        """Outcomes since the last call, None if there are none."""
        if not self._outcomes:
            return None
        outcomes, self._outcomes = self._outcomes, []
        return OutcomeMessage(outcomes)


def _without_shared(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers that share another one's cache are the same bytes: each tensor once."""
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in kv_caches.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: kv_caches[name] for name in seen.values()}


def _raise_in_loop(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a transfer job ended in an unexpected error", exc_info=error)
