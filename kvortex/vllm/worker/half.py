"""The worker half: registers the paged cache of one rank, and starts the jobs of each step without blocking it."""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvortex.codecs import RAW, PageEncodings
from kvortex.errors import ConfigError, EngineStateError, KVortexError
from kvortex.hashing import Namespace
from kvortex.layout import PagedCache
from kvortex.owner.control import scratch_of
from kvortex.owner.following import JOIN_AGAIN_S
from kvortex.owner.protocol import Kind
from kvortex.planes.data import DataPlane, pages_of
from kvortex.runtime.loop_thread import LoopThread
from kvortex.types import BlockSizes
from kvortex.vllm.identity.identity import identity_of
from kvortex.vllm.model import ServedGroups
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, OwnedHandshake, PoolShrunk, SaveJob, WeightsChanged, WorkerHandshake
from kvortex.vllm.versions import WorkerReports
from kvortex.vllm.worker.caches import LayerCache, register
from kvortex.vllm.worker.canonical import Canonical, Ranks, canonical_of
from kvortex.vllm.worker.digests import Digests, OwnersDigests, WorkersDigests
from kvortex.vllm.worker.jobs import JobRunner, RankJob
from kvortex.vllm.worker.owned import OwnedPool, join_as_writer, join_owner, uses_owner
from kvortex.vllm.worker.parts import BlockParts, PartSizes
from kvortex.vllm.worker.places import Places, RankPlaces, largest
from kvortex.vllm.worker.ranks import Peers, PoolShare, check_memory_of_all
from kvortex.vllm.worker.reports import ReportBox

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

MAX_READ_WAIT_S: Final = 30.0
"""How long a step waits for saves that have not read the blocks that it will overwrite. A device that takes longer is
stuck: then the step goes on, and these saves fail."""


class WorkerHalf:
    """Carries out the jobs of each step.

    An event orders a save behind the forward of its step. Then the save runs beside the next steps, because nothing
    writes a full block again while its request holds it. A step waits for a save in one case only: if it gives a block
    of this save to another request before the save has read it.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes of the paged cache.
        options: the connector's options.
        peers: the other workers of the engine, with which this one has to agree; None if there are none.
        handshake_in_step: True where vLLM does not ask for the handshake: then it is reported with the first step.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
        options: ConnectorOptions,
        peers: Peers | None = None,
        *,
        handshake_in_step: bool = False,
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._groups = ServedGroups(kv_cache_config)
        self._rank = int(vllm_config.parallel_config.rank)
        self._num_blocks = int(kv_cache_config.num_blocks)
        self._options = options
        self._peers = peers or Peers()
        self._handshake_in_step = handshake_in_step
        self._thread: LoopThread | None = None
        self._data: DataPlane | None = None
        self._jobs: JobRunner | None = None
        self._share: PoolShare | OwnedPool = PoolShare(options.engine, np.empty(0, dtype=np.uint64), 1)
        self._places: Places | BlockParts = Places(1, (BlockSizes(1, 1),), (BlockSizes(1, 1),))
        self._namespace: Namespace | None = None
        self._canonical: Canonical | str = ""
        self._plan = ConnectorPlan()
        self._asleep = False
        self._caches: tuple[dict[str, Any], PagedCache, list[int]]
        self._join_after_s = 0.0
        self._unread: deque[RankJob] = deque()  # saves whose blocks may not have been read yet
        self._reports = ReportBox(by_request=not self._groups.is_one_of_full_attention)

    # -- start and end -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, LayerCache]) -> None:
        """Register the paged cache: derive its layout, allocate the pool, run the self-test.

        Args:
            kv_caches: the cache of each layer, by the layer's name: a tensor, or the tensors of a state.

        Raises:
            ConfigError, LayoutError, DeviceError, OutOfPoolMemoryError: see `DataPlane`; vLLM does not start then.
        """
        self._caches = register(kv_caches, self._groups, self._num_blocks)
        _, cache, here = self._caches
        share = self._make_share(cache, here)
        self._thread = thread = LoopThread()
        try:
            data = self._begin(thread, share)
        except BaseException:
            self._thread = None
            thread.stop()
            share.close()
            raise
        if self._handshake_in_step:
            self._reports.add(self._make_handshake(data))
        logger.debug(
            "rank %d serves %s, %d bytes of pinned memory%s",
            self._rank,
            cache.describe(),
            data.pool.capacity_bytes,
            f", shared by {share.size} ranks" if share.memory is not None else "",
        )

    def _begin(self, thread: LoopThread, share: PoolShare | OwnedPool) -> DataPlane:
        """Make the data plane over a pool, and what carries out its jobs."""
        tensors, cache, _ = self._caches

        async def start() -> DataPlane:
            make = partial(
                DataPlane,
                share.config,
                dict(tensors),
                cache,
                memory=share.memory,
                on_pinning_stopped=self._pinning_stopped,
            )
            if isinstance(share, PoolShare):
                return make()
            data = make(scratch=partial(scratch_of, share.client))
            share.client.tell(Kind.SCRATCH_DONE)
            return data

        data = thread.run(start())
        try:
            self._begin_jobs(thread, share, data)
        except BaseException:
            thread.run(data.aclose())
            raise
        return data

    def _begin_jobs(self, thread: LoopThread, share: PoolShare | OwnedPool, data: DataPlane) -> None:
        digests: Digests
        pool, part = "", 0
        if isinstance(share, OwnedPool):
            identity = self._options.engine.identity
            described = identity_of(self._vllm_config, self._groups.is_latent, self._rank, identity)
            self._namespace = data.namespace(described)
            self._canonical = self._describe_canonical(share, data)
            digests, part, pool = OwnersDigests(share.parts, data.pool.bytes), share.parts.number, share.client.label
            join_as_writer(share)
        else:
            digests = WorkersDigests(share)
        num_weights = 0 if self._jobs is None else self._jobs.num_weights
        placed = RankPlaces(self._places, share, self._caches[2])
        self._share, self._data = share, data
        self._jobs = JobRunner(data, thread.loop, digests, placed, part, self._reports, pool=pool)
        self._jobs.num_weights = num_weights

    def _describe_canonical(self, share: OwnedPool, data: DataPlane) -> "Canonical | str":
        tensors, cache, here = self._caches
        assert self._namespace is not None
        ranks = Ranks(share.shard, share.num_shards)
        canonical = canonical_of(self._vllm_config, self._groups, cache, tensors, here, ranks, share.parts, data.pages)
        if isinstance(canonical, str) and self._options.engine.tier.canonical_layout:
            raise ConfigError(f"blocks have no canonical layout: {canonical}")
        return canonical

    def _follow_owner(self) -> None:
        """Join the owner again if it was started anew: then it has another pool."""
        share, thread, data = self._share, self._thread, self._data
        if not isinstance(share, OwnedPool) or thread is None or data is None or self._asleep:
            return
        share.client.probe()
        if not (share.client.is_replaced or data.is_away) or time.monotonic() < self._join_after_s:
            return
        self._settle(thread)
        self._runner().release()
        thread.run(data.leave())
        try:
            self._share = share = share.again()
            thread.run(data.enter(share.memory, share.client.piece_bytes))
            self._begin_jobs(thread, share, data)
        except KVortexError as error:
            self._join_after_s = time.monotonic() + JOIN_AGAIN_S
            logger.warning("the new owner of the pool cannot be used yet: %s", error)
            return

        async def arrive() -> None:
            data.arrive()

        thread.run(arrive())
        self._reports.add(self._make_handshake(data))

    def _pinning_stopped(self, pinned_bytes: int) -> None:
        self._reports.shrink_pool(PoolShrunk(self._places.planned_bytes(pinned_bytes)))

    def _make_share(self, cache: PagedCache, here: Sequence[int]) -> PoolShare | OwnedPool:
        config = self._options.engine
        pages = pages_of(cache, config.codec.name)
        own = [BlockSizes(0, 0)] * len(self._groups.set)
        for number, of_group in zip(here, pages, strict=True):
            own[number] = of_group.sizes
        if config.codec.name != RAW and self._rank == 0 and not any(p.packing for p in pages):
            logger.warning(
                "codec %r does not take a cache of %s: blocks are stored raw", config.codec.name, cache.dtypes
            )
        if uses_owner(config):
            sizes = [of_group.sizes for of_group in pages]
            mine = PartSizes.of_groups(PageEncodings(pages), sizes, here, len(own))
            pool = join_owner(self._vllm_config, config, self._peers, mine)
            self._places = pool.parts
            return pool
        stages = self._peers.stages
        planned = largest(stages.exchange(tuple(own))) if stages is not None else tuple(own)
        self._places = Places(config.pool.pin_piece_bytes, planned, tuple(own))
        check_memory_of_all(self._peers, config.pool.bytes, self._num_pools_here())
        config = self._places.config(config)
        if self._peers.replicas is None:
            return PoolShare.own(config, own)
        return PoolShare.of_group(self._peers.replicas, config, cache.digest, own)

    def _num_pools_here(self) -> int:
        parallel = self._vllm_config.parallel_config
        sharing = self._peers.replicas.size if self._peers.replicas is not None else 1
        ranks = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        return max(ranks // sharing // int(getattr(parallel, "nnodes", 1)), 1)

    def handshake(self) -> WorkerHandshake | None:
        """The registered cache, for the scheduler half; None if it is reported with the first step."""
        return None if self._data is None or self._handshake_in_step else self._make_handshake(self._data)

    def _make_handshake(self, data: DataPlane) -> WorkerHandshake:
        return WorkerHandshake(
            data.cache.digest,
            self._places.planned,
            self._num_blocks,
            self._places.planned_bytes(data.pool.capacity_bytes),
            self._owned_handshake(),
        )

    def _owned_handshake(self) -> OwnedHandshake | None:
        share = self._share
        if not isinstance(share, OwnedPool) or self._namespace is None:
            return None
        encodings = share.parts.encodings
        return OwnedHandshake(
            socket=str(share.client.path),
            pool=share.client.label,
            namespace=self._namespace,
            part=share.parts.number,
            num_parts=share.parts.count,
            writer=share.writer,
            payloads=encodings.payloads,
            codecs=tuple(map(int, encodings.codecs)),
            canonical=self._canonical if isinstance(self._canonical, str) else self._canonical.parts,
            canonical_namespace=None
            if isinstance(self._canonical, str)
            else self._namespace.canonical(self._canonical.layout),
        )

    def shutdown(self) -> None:
        """Finish the jobs in flight and release everything; idempotent."""
        if self._thread is None or self._jobs is None:
            return
        thread, data, jobs = self._thread, self._data, self._jobs
        self._thread = self._data = self._jobs = None

        async def close() -> None:
            await jobs.settle()
            jobs.release()
            if data is not None:
                await data.aclose()

        thread.run(close())
        thread.stop()
        self._share.close()

    # -- sleep mode --------------------------------------------------------------------------------

    def fall_asleep(self, keeps_weights: bool) -> None:
        """The memory of the paged cache is about to go: finish every transfer; jobs fail until `wake`. Idempotent.

        Args:
            keeps_weights: False if the weights may be others afterwards: then all that is stored so far is dropped.
        """
        if self._thread is None:
            return
        self._asleep = True
        if keeps_weights:
            self._settle(self._thread)
        else:
            self.forget()

    def forget(self) -> None:
        """The weights have changed: drop all that is stored or in flight. It will fail its check if it is loaded."""
        if self._thread is None:
            return
        self._settle(self._thread)
        self._share.forget()
        if self._jobs is not None:
            self._jobs.num_weights += 1
        self._reports.add(WeightsChanged(self._plan.number))

    def _settle(self, thread: LoopThread) -> None:
        if self._jobs is not None:
            thread.run(self._jobs.settle())

    def wake(self) -> None:
        """The paged cache has memory again, at the same addresses; idempotent."""
        self._asleep = False

    def _runner(self) -> JobRunner:
        if self._jobs is None:
            raise EngineStateError("the connector has no caches: call register_kv_caches first")
        return self._jobs

    # -- a step ------------------------------------------------------------------------------------

    def wait_for_reads(self, plan: ConnectorPlan) -> None:
        """Before a step changes anything: wait until saves of earlier steps have read the blocks that it overwrites."""
        early, plan.early_saves = plan.early_saves, []
        self._start_all(early)
        due_s = time.monotonic() + MAX_READ_WAIT_S
        for save in self._unread:
            if not save.read.is_set() and not save.device_blocks.isdisjoint(plan.fresh_block_ids):
                save.overwritten = not save.read.wait(max(due_s - time.monotonic(), 0.0))
                if save.overwritten:
                    logger.error("a save has not read its blocks for %g s: it counts as failed", MAX_READ_WAIT_S)
                    save.read.set()
        while self._unread and self._unread[0].read.is_set():
            self._unread.popleft()

    def begin_step(self, plan: ConnectorPlan) -> None:
        """Take a step's plan."""
        self._plan = plan
        self._follow_owner()
        self.wait_for_reads(plan)

    def start_loads(self) -> None:
        """Start this step's loads, behind what the forward's stream has queued so far."""
        loads, self._plan.loads = self._plan.loads, []
        for load in loads:
            self._start(self._runner().whole(load))

    def start_saves(self) -> None:
        """Start this rank's part of the step's saves, behind the forward that wrote their blocks."""
        saves, self._plan.saves = self._plan.saves, []
        self._start_all(saves)

    def _start_all(self, saves: Sequence[SaveJob]) -> None:
        for save in saves:
            part = self._runner().part_of(save)
            if not part.transfer.num_blocks:
                self._runner().skip(save)
                continue
            self._unread.append(part)
            self._start(part)

    def _start(self, part: RankJob) -> None:
        if self._asleep or self._data is None or self._data.is_away or part.job.pool != self._runner().pool:
            self._runner().refuse(part)
        else:
            self._runner().start(part)

    # -- reports -----------------------------------------------------------------------------------

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended since the last call."""
        if not self._plan.has_forward:
            self.start_saves()  # some versions do not tell of the end of a step without a forward
        return self._reports.take_finished()

    def take_failed_requests(self) -> set[str]:
        """Requests whose loads have failed since the last call; empty for one group of full attention."""
        return self._reports.take_failed_requests()

    def take_failed_block_ids(self) -> set[int]:
        """Device blocks that a load should have filled, and that hold no KV, since the last call."""
        return self._reports.take_failed_block_ids()

    def take_reports(self) -> WorkerReports | None:
        """Reports for the scheduler half since the last call, None if there are none."""
        return self._reports.take()
