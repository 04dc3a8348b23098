"""The worker half: moves the blocks of one rank on a loop and thread of its own; never blocks a forward."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.codecs import RAW, block_sizes, packing_for
from kvortex.cuda.driver import Event
from kvortex.errors import EngineStateError, KVortexError
from kvortex.hashing import Namespace
from kvortex.layout import KVLayout
from kvortex.planes.data import DataPlane
from kvortex.runtime.loop_thread import LoopThread
from kvortex.sched import TransferRequest
from kvortex.tiering.keys import split_joined
from kvortex.types import BlockSizes, TransferPlan
from kvortex.vllm.identity.identity import identity_of
from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.model import block_dims, only_group
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import (
    ConnectorPlan,
    FetchJob,
    JobOutcome,
    LoadJob,
    PoolShrunk,
    SaveJob,
    WeightsChanged,
    WorkerHandshake,
)
from kvortex.vllm.versions import Report, WorkerReports
from kvortex.vllm.worker.places import Places, largest
from kvortex.vllm.worker.ranks import Peers, PoolShare, check_memory_of_all
from kvortex.vllm.worker.tier_mover import TierMover

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

MAX_READ_WAIT_S: Final = 30.0
"""How long a step waits for saves that still have to read blocks which it will write. A device that takes longer is
stuck: the step goes on, and what those saves read is thrown away."""


@dataclass
class _UnreadSave:
    """A save whose blocks may not have been read yet."""

    block_ids: frozenset[int]
    read: threading.Event = field(default_factory=threading.Event)
    overwritten: bool = False  # before it had read them


@dataclass(frozen=True, eq=False)
class _RankPart:
    """This rank's part of a job; `positions` are its blocks' in the job's transfer."""

    job: SaveJob | LoadJob
    transfer: TransferPlan
    positions: NDArray[np.intp]


@dataclass(frozen=True)
class _EndedJob:
    """What the loop's thread tells the worker's."""

    outcome: JobOutcome
    job: SaveJob | LoadJob | FetchJob


class WorkerHalf:
    """Carries out the jobs of each step.

    A save is ordered behind the step's forward by an event, and then runs beside the next ones: full blocks are
    not written again while their request holds them. Only when a block is given to somebody else before it has
    been read does the next step wait for that one save.

    Digests stay with the workers: each rank compares what it loads with what it saved, or what its group saved.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes of the paged cache.
        options: the connector's.
        peers: the other workers of the engine that this one has to agree with.
        says_hello: report the handshake with the first step: nobody asks for it.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        options: ConnectorOptions,
        peers: Peers | None = None,
        *,
        says_hello: bool = False,
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_group = only_group(kv_cache_config)
        self._rank = int(vllm_config.parallel_config.rank)
        self._num_blocks = int(kv_cache_config.num_blocks)
        self._block_size = int(self._kv_group.kv_cache_spec.block_size)
        self._options = options
        self._peers = peers or Peers()
        self._says_hello = says_hello
        self._thread: LoopThread | None = None
        self._data: DataPlane | None = None
        self._mover: TierMover | None = None
        self._share = PoolShare(options.engine, np.empty(0, dtype=np.uint64), 1)
        self._places = Places(1, BlockSizes(1, 1), BlockSizes(1, 1))
        self._namespace: Namespace | None = None
        self._plan = ConnectorPlan()
        self._asleep = False
        self._unread: deque[_UnreadSave] = deque()
        self._ended: deque[_EndedJob | PoolShrunk] = deque()
        self._reports: list[Report] = []
        self._failed_block_ids: set[int] = set()
        self._pauses_told = 0
        self._tasks: set[asyncio.Task[None]] = set()  # that touch the paged cache; on the loop's thread
        self._tier_tasks: set[asyncio.Task[None]] = set()  # between pool and lower tier; likewise

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
        share = self._make_share(layout)
        thread = LoopThread()
        try:

            async def start() -> DataPlane:
                return DataPlane(
                    share.config, caches, layout, memory=share.memory, on_pinning_stopped=self._pinning_stopped
                )

            self._data = thread.run(start())
        except BaseException:
            thread.stop()
            share.close()
            raise
        self._thread = thread
        self._share = share
        if self._options.engine.disk.path:
            self._open_mover(self._data, thread)
        if self._says_hello:
            self._reports.append(self._hello(self._data))
        shared = f", shared by {share.size} ranks" if share.memory is not None else ""
        logger.debug(
            "rank %d serves %s, %d bytes of pinned memory%s",
            self._rank,
            layout.describe(),
            self._data.pool.capacity_bytes,
            shared,
        )

    def _pinning_stopped(self, pinned_bytes: int) -> None:
        self._ended.append(PoolShrunk(self._places.planned_bytes(pinned_bytes)))

    def _make_share(self, layout: KVLayout) -> PoolShare:
        config = self._options.engine
        own = block_sizes(layout, packing_for(layout, config.codec.name))
        if config.codec.name != RAW and not own.packs and self._rank == 0:
            logger.warning(
                "codec %r does not take a cache of %s: blocks rest as they are", config.codec.name, layout.dtypes
            )
        stages = self._peers.stages
        planned = largest(stages.exchange(own)) if stages is not None else own
        self._places = Places(config.pool.pin_piece_bytes, planned, own)
        check_memory_of_all(self._peers, config.pool.bytes, self._num_pools_here())
        config = self._places.config(config)
        if self._peers.equals is None:
            return PoolShare.own(config, own)
        return PoolShare.of_group(self._peers.equals, config, layout, own)

    def _num_pools_here(self) -> int:
        parallel = self._vllm_config.parallel_config
        sharing = self._peers.equals.size if self._peers.equals is not None else 1
        ranks = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        return max(ranks // sharing // int(getattr(parallel, "nnodes", 1)), 1)

    def _open_mover(self, data: DataPlane, thread: LoopThread) -> None:
        engine = self._options.engine
        self._namespace = data.namespace(identity_of(self._vllm_config, self._kv_group, self._rank, engine.identity))
        self._mover = TierMover(engine, self._namespace, data.pool.bytes, data.encodings)
        thread.run(self._mover.open())

    def handshake(self) -> WorkerHandshake | None:
        """What was registered, for the scheduler half; None where it comes with the first step."""
        return None if self._data is None or self._says_hello else self._hello(self._data)

    def _hello(self, data: DataPlane) -> WorkerHandshake:
        layout = data.layout
        return WorkerHandshake(
            layout.digest,
            self._places.planned,
            layout.num_blocks,
            self._places.planned_bytes(data.pool.capacity_bytes),
            self._namespace,
        )

    def shutdown(self) -> None:
        """Finish what is under way and release everything; idempotent."""
        if self._thread is None or self._data is None:
            return
        thread, data = self._thread, self._data
        mover = self._mover
        self._thread = self._data = self._mover = None
        thread.run(self._close(data, mover))
        thread.stop()
        self._share.close()

    async def _close(self, data: DataPlane, mover: TierMover | None) -> None:
        await self._settle()
        if mover is not None:
            await mover.aclose()
            for task in self._tier_tasks:
                task.cancel()  # what an I/O that hangs keeps waiting; its memory stays with it
            await asyncio.gather(*self._tier_tasks, return_exceptions=True)
        await data.aclose()

    # -- sleep mode --------------------------------------------------------------------------------

    def fall_asleep(self, keeps_weights: bool) -> None:
        """The paged cache's memory is about to go: finish every transfer, and let jobs fail until `wake`; idempotent.

        Args:
            keeps_weights: False if other weights may follow: then what is stored so far will fail its check.
        """
        if self._thread is None:
            return
        self._asleep = True
        if keeps_weights:
            self._thread.run(self._settle())
        else:
            self.forget()

    def forget(self) -> None:
        """The weights are others now: whatever is stored, or on its way, is not served any more."""
        if self._thread is None:
            return
        self._thread.run(self._settle())
        self._share.forget()
        if self._mover is not None:
            self._mover.forget_all()
        self._reports.append(WeightsChanged(self._plan.number))

    async def _settle(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    def wake(self) -> None:
        """The paged cache has memory again, at the same addresses; idempotent."""
        self._asleep = False

    def _planes(self) -> tuple[DataPlane, asyncio.AbstractEventLoop]:
        if self._data is None or self._thread is None:
            raise EngineStateError("the connector has no caches: register_kv_caches comes first")
        return self._data, self._thread.loop

    # -- a step ------------------------------------------------------------------------------------

    def begin_step(self, plan: ConnectorPlan) -> None:
        """Before the forward: what it will overwrite must have been read by saves of earlier steps."""
        self._plan = plan
        due_s = time.monotonic() + MAX_READ_WAIT_S
        for save in self._unread:
            if not save.read.is_set() and not save.block_ids.isdisjoint(plan.fresh_block_ids):
                save.overwritten = not save.read.wait(max(due_s - time.monotonic(), 0.0))
                if save.overwritten:
                    logger.error("a save has not read its blocks for %g s: it counts as failed", MAX_READ_WAIT_S)
                    save.read.set()
        while self._unread and self._unread[0].read.is_set():
            self._unread.popleft()

    def start_loads(self) -> None:
        """Begin this step's loads, behind what the forward's stream has queued so far, and its fetches."""
        loads, self._plan.loads = self._plan.loads, []
        fetches, self._plan.fetches = self._plan.fetches, []
        used_keys, self._plan.used_keys = self._plan.used_keys, b""
        for fetch in fetches:
            _, loop = self._planes()
            loop.call_soon_threadsafe(self._spawn, self._fetch(fetch), self._tier_tasks)
        if used_keys:
            _, loop = self._planes()
            loop.call_soon_threadsafe(self._spawn, self._touch(used_keys), self._tier_tasks)
        for job in loads:
            self._submit(_RankPart(job, self._places.place(job.transfer), np.arange(job.transfer.num_blocks)), None)

    def start_saves(self) -> None:
        """Begin this rank's part of the step's saves, behind the forward that wrote their blocks."""
        saves, self._plan.saves = self._plan.saves, []
        for job in saves:
            part = self._part_of(job)
            if not part.transfer.num_blocks:
                self._ended.append(_EndedJob(JobOutcome(job.job_id), job))
                if job.keys:
                    self._ended.append(_EndedJob(JobOutcome(job.write_id), job))
                continue
            save = _UnreadSave(frozenset(part.transfer.block_ids.tolist()))
            self._unread.append(save)
            self._submit(part, save)

    def _part_of(self, job: SaveJob) -> _RankPart:
        transfer = self._places.place(job.transfer)
        positions = self._share.part_of(transfer)
        return _RankPart(job, transfer.part(positions), positions)

    def _submit(self, part: _RankPart, save: _UnreadSave | None) -> None:
        if self._asleep:
            self._refuse(part, save)
            return
        data, loop = self._planes()
        after = data.record_event()
        loop.call_soon_threadsafe(self._start, part, save, after)

    def _refuse(self, part: _RankPart, save: _UnreadSave | None) -> None:
        if save is not None:
            save.read.set()
        failed = tuple(part.positions.tolist())
        self._ended.append(_EndedJob(JobOutcome(part.job.job_id, failed), part.job))
        if isinstance(part.job, SaveJob) and part.job.keys:
            self._ended.append(_EndedJob(JobOutcome(part.job.write_id, failed), part.job))

    # -- on the loop's thread ----------------------------------------------------------------------

    def _start(self, part: _RankPart, save: _UnreadSave | None, after: Event | None) -> None:
        self._spawn(self._carry_out(part, save, after), self._tasks)

    def _spawn(self, call: Coroutine[Any, Any, None], tasks: "set[asyncio.Task[None]]") -> None:
        task = asyncio.get_running_loop().create_task(call)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_raise_in_loop)

    async def _carry_out(self, part: _RankPart, save: _UnreadSave | None, after: Event | None) -> None:
        data, _ = self._planes()
        ended: list[TransferRequest] = []
        try:
            request = await data.start(part.transfer, after, ended.append, wants_source_released=save is not None)
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
            outcome = self._outcome_of(part, ended[0])
            if save is not None and save.overwritten:
                outcome = JobOutcome(part.job.job_id, tuple(part.positions.tolist()))
            self._ended.append(_EndedJob(outcome, part.job))
        if isinstance(part.job, SaveJob) and part.job.keys:
            overwritten = save is not None and save.overwritten
            saved = np.flatnonzero(ended[0].succeeded & (not overwritten))
            self._spawn(self._write_behind(part, part.job, ended[0], saved), self._tier_tasks)

    async def _write_behind(
        self, part: _RankPart, job: SaveJob, request: TransferRequest, saved: NDArray[np.intp]
    ) -> None:
        keys = split_joined(job.keys)
        stored = np.zeros(request.succeeded.size, dtype=np.bool_)
        if self._mover is not None:
            wanted = [keys[position] for position in part.positions[saved].tolist()]
            stored[saved] = await self._mover.write(wanted, part.transfer.part(saved), request.digests[saved])
        failed = tuple(part.positions[~stored].tolist())
        self._ended.append(_EndedJob(JobOutcome(job.write_id, failed), job))

    async def _fetch(self, job: FetchJob) -> None:
        transfer = self._places.place(job.transfer)
        positions = self._share.part_of(transfer)
        plan, keys = transfer.part(positions), split_joined(job.keys)
        digests = np.zeros(plan.num_blocks, dtype=np.uint64)
        arrived = np.zeros(plan.num_blocks, dtype=np.bool_)
        if self._mover is not None:
            arrived = await self._mover.fetch([keys[i] for i in positions.tolist()], plan, digests)
        self._share.digests[self._share.places(plan)[arrived]] = digests[arrived]
        self._ended.append(_EndedJob(JobOutcome(job.job_id, tuple(positions[~arrived].tolist())), job))

    async def _touch(self, keys: bytes) -> None:
        if self._mover is not None:
            await self._mover.touch(split_joined(keys))

    def _outcome_of(self, part: _RankPart, request: TransferRequest) -> JobOutcome:
        places, digests = self._share.places(part.transfer), self._share.digests
        wrong = np.zeros(request.num_blocks, dtype=np.bool_)
        if isinstance(part.job, SaveJob):
            digests[places[request.succeeded]] = request.digests[request.succeeded]
        else:
            wrong = request.succeeded & (request.digests != digests[places])
        kinds = (~request.succeeded, wrong, request.too_lossy)
        return JobOutcome(part.job.job_id, *(tuple(part.positions[kind].tolist()) for kind in kinds))

    # -- what became of it -------------------------------------------------------------------------

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended since the last call; their failed blocks are reported beside them."""
        received: set[str] = set()
        while self._ended:
            ended = self._ended.popleft()
            if isinstance(ended, PoolShrunk):
                self._reports.append(ended)
                continue
            self._reports.append(ended.outcome)
            if isinstance(ended.job, LoadJob):
                received.add(ended.job.request_id)
                bad = [*ended.outcome.failed, *ended.outcome.corrupt]
                self._failed_block_ids.update(ended.job.transfer.block_ids[bad].tolist(), ended.job.missing_block_ids)
        return received

    def take_failed_block_ids(self) -> set[int]:
        """Blocks that hold no KV although a load was asked to fill them."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def take_stats(self) -> ConnectorStats:
        """This rank's figures since the last call."""
        stats, pauses = ConnectorStats(), self._mover.num_pauses if self._mover is not None else 0
        if pauses > self._pauses_told:
            stats.add("tier_pauses", pauses - self._pauses_told)
            self._pauses_told = pauses
        return stats

    def take_reports(self) -> WorkerReports | None:
        """What there is to say since the last call, None if nothing."""
        if not self._reports:
            return None
        reports, self._reports = self._reports, []
        return WorkerReports(reports)


def _without_shared(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers that share another one's cache are the same bytes: each tensor once."""
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in kv_caches.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: kv_caches[name] for name in seen.values()}


def _raise_in_loop(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a transfer job ended in an unexpected error", exc_info=error)
