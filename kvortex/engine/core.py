"""The engine: control plane and data plane in one process, as an asyncio API."""

import asyncio
import contextlib
import logging
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.config import KVortexConfig, format_bytes
from kvortex.engine.arguments import BlockHashes, BlockIds, named_blocks
from kvortex.engine.calls import CallQueue, TransferCall
from kvortex.engine.parts import EngineParts
from kvortex.errors import EngineStateError
from kvortex.hashing import Namespace
from kvortex.index import pack_keys
from kvortex.layout import KVLayout
from kvortex.memory import check_memory
from kvortex.planes.control import ControlPlane, LoadPlan, SavePlan
from kvortex.planes.data import DataPlane
from kvortex.runtime.loop_thread import running_loop
from kvortex.sched import TransferRequest
from kvortex.stats import EngineStats, StatsSnapshot
from kvortex.tiering import BackingTier, LoadFetch, TieredPool, Tiering
from kvortex.tiers import Tier
from kvortex.types import BlockHash, Direction, LoadResult, MissReason, SaveOutcome, SaveResult

logger = logging.getLogger(__name__)


class EngineCore:
    """The control plane and the data plane of one paged cache, on the event loop that it was made on.

    `KVortexEngine` is what programs use: it adds how an engine is made, and its blocking face.
    """

    def __init__(self, config: KVortexConfig, parts: EngineParts | None = None) -> None:
        self.config = config
        self._parts = parts or EngineParts()
        self.stats = EngineStats()
        self._loop = asyncio.get_running_loop()
        self._queue = CallQueue(config.transfer.max_outstanding_requests)
        self._control: ControlPlane | None = None
        self._data: DataPlane | None = None
        self._namespace: Namespace | None = None
        self._tiering: Tiering | None = None
        self._shutdown: asyncio.Task[None] | None = None
        self._released = False

    def __repr__(self) -> str:
        state = "shut down" if self._shutdown is not None else "no caches registered yet"
        if self._shutdown is None and self._data is not None:
            state = self._data.layout.describe()
        return f"<KVortexEngine: {state}; a pool of {format_bytes(self.config.pool.bytes)}>"

    # -- caches ------------------------------------------------------------------------------------

    def register_kv_caches(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
    ) -> KVLayout:
        """Register the paged cache: derive its layout, allocate memory, write a test pattern and read it back.

        Args:
            kv_caches: layer name -> tensor, CUDA or CPU, all on one device; they must outlive the engine.
            block_size: tokens per block.
            num_blocks: number of blocks in the cache; needed if the shape is ambiguous.
            block_dim: index of the tensor dimension that counts blocks, one for all layers or per layer name; needed
                if the shape is ambiguous.

        Raises:
            EngineStateError: caches are already registered, the engine is shut down, or this is not its loop.
            LayoutError: not a paged cache; the message names the tensor. `LayoutSelfTestError` if the test pattern
                did not come back unchanged.
            ConfigError, OutOfPoolMemoryError, DeviceError: memory for the pool or staging cannot be allocated.

            After any error all memory is released, and the engine is in the same state as before the call.
        """
        self._check_running()
        self._check_loop()
        if self._data is not None:
            raise EngineStateError("caches are registered already; make another engine for another cache")
        layout = KVLayout.from_tensors(kv_caches, block_size, num_blocks=num_blocks, block_dim=block_dim)
        check_memory(self.config.pool.bytes)
        with contextlib.ExitStack() as undo:
            self._data = DataPlane(
                self.config,
                kv_caches,
                layout,
                wrap_executor=self._parts.wrap_executor,
                on_pinning_stopped=self._shrink,
            )
            undo.callback(self._data.close)
            undo.callback(self._unregister)
            self._control = ControlPlane.from_config(self.config, self._data.pool.capacity_bytes, self._data.sizes)
            self._namespace = self._data.namespace(self.config.identity)
            tier = self._parts.make_tier(self.config, self._namespace)
            if tier is not None:
                self._tiering = self._tiering_over(tier, self._control, self._data, self._namespace)
                self._tiering.start()
            undo.pop_all()
        logger.info("registered %s", layout.describe())
        return layout

    def _tiering_over(self, tier: Tier, control: ControlPlane, data: DataPlane, namespace: Namespace) -> Tiering:
        # No local variable: the traceback of an error would keep it, and the pool's memory with it.
        return Tiering(
            BackingTier(self.config, TieredPool(control, data.pool.bytes, data.encodings), namespace, tier, self.stats)
        )

    def _shrink(self, pinned_bytes: int) -> None:
        if self._control is not None and self._shutdown is None:
            self._control.shrink(pinned_bytes)

    def _unregister(self) -> None:
        self._data = self._control = self._namespace = self._tiering = None

    @property
    def namespace(self) -> Namespace:
        """What else must agree for this engine's bytes to be reusable."""
        if self._namespace is None:
            raise EngineStateError("no caches are registered yet: call register_kv_caches first")
        return self._namespace

    def _planes(self) -> tuple[ControlPlane, DataPlane]:
        self._check_running()
        if self._control is None or self._data is None:
            raise EngineStateError("no caches are registered yet: call register_kv_caches first")
        return self._control, self._data

    def _check_running(self) -> None:
        if self._shutdown is not None:
            raise EngineStateError("the engine has been shut down")

    def _check_loop(self) -> None:
        """Transfers, timers and tasks of the engine live on one loop: elsewhere a call would wait for ever."""
        if running_loop() is self._loop:
            return
        if self._loop.is_closed():
            raise EngineStateError(
                "the event loop that the engine was made on is closed: make the engine inside the asyncio.run that "
                "uses it, or with KVortexEngine.create_sync, on a loop of its own; shutdown() still gives memory back"
            )
        raise EngineStateError(
            "the engine lives on the event loop that it was made on, and this is not that loop: "
            "call the methods of engine.sync here, from a thread that may wait"
        )

    # -- save, check, load -------------------------------------------------------------------------

    def save_blocks(
        self, hashes: BlockHashes, block_ids: BlockIds, *, stream: object = None
    ) -> Coroutine[Any, Any, SaveResult]:
        """Copy blocks out of the paged cache. Await it; then the stored blocks can be loaded.

        Args:
            hashes: `[n]` block hashes of 32 bytes: a whole chain or any part of one, in order.
            block_ids: `[n]` block id of each block; in range, without duplicates.
            stream: CUDA stream whose queued work writes the blocks (torch, numba, or a raw handle); by default
                torch's current stream. The caller must not overwrite the blocks before this returns.

        Raises:
            InvalidHashError, InvalidBlockIdError: before any transfer starts; the latter also if a load is writing
                one of the blocks.
            EngineStateError: no caches are registered, the engine is shut down, or this is not its loop.
        """
        _, data = self._planes()
        keys, ids = named_blocks(hashes, block_ids, data.layout.num_blocks)
        return self._save(keys, ids, data.current_stream() if stream is None else stream)

    async def _save(self, keys: NDArray[np.uint64], ids: NDArray[np.int32], stream: object) -> SaveResult:
        self._check_loop()
        control, data = self._planes()
        call: TransferCall[SaveOutcome] = TransferCall(self._queue, data, self.stats, stream, Direction.SAVE, ids)
        removed_before = control.index.removed_blocks
        async with call:
            for part in call.parts(len(ids)):
                plan = control.plan_save(keys[part], ids[part], "save", chain=keys[: part.stop])
                await call.start(plan.transfer, partial(_finish_save, control, plan), more=part.stop < len(ids))
            outcomes = await call.outcomes()
            if data.packing is not None and SaveOutcome.TOO_LOSSY in outcomes:
                outcomes = await self._save_again_raw(control, call, keys, ids, outcomes)
            if call.num_parts > 1:
                control.touch(keys)
        if control.index.removed_blocks != removed_before:
            outcomes = _without_gone(outcomes, control.index.contains_mask(keys))
        if self._tiering is not None:
            stored = np.array([outcome.is_stored for outcome in outcomes], dtype=np.bool_)
            new = np.array([outcome is SaveOutcome.STORED for outcome in outcomes], dtype=np.bool_)
            self._tiering.saved(keys[stored], new[stored])
        return SaveResult(outcomes)

    async def _save_again_raw(
        self,
        control: ControlPlane,
        call: TransferCall[SaveOutcome],
        keys: NDArray[np.uint64],
        ids: NDArray[np.int32],
        outcomes: tuple[SaveOutcome, ...],
    ) -> tuple[SaveOutcome, ...]:
        """Save again, raw, the blocks that packing would change too much; returns the outcomes of all blocks."""
        lossy = np.array([outcome is SaveOutcome.TOO_LOSSY for outcome in outcomes])
        plan = control.plan_save(keys[lossy], ids[lossy], "save", as_is=True, chain=keys)
        await call.start(plan.transfer, partial(_finish_save, control, plan), more=False)
        raw_outcomes = await call.outcomes(first_part=call.num_parts - 1)
        self.stats.record_kept_as_is(raw_outcomes.count(SaveOutcome.STORED))
        merged = list(outcomes)
        for position, raw_outcome in zip(np.flatnonzero(lossy).tolist(), raw_outcomes, strict=True):
            merged[position] = raw_outcome
        return tuple(merged)

    def load_blocks(
        self,
        hashes: BlockHashes,
        block_ids: BlockIds,
        *,
        stream: object = None,
        deadline_s: float | EllipsisType | None = ...,
    ) -> Coroutine[Any, Any, LoadResult]:
        """Copy cached blocks into the paged cache; every miss has a reason. Await it.

        Blocks that only the lower tier has are first fetched into the pool, in order. Blocks before them are loaded
        meanwhile.

        Args:
            hashes: `[n]` block hashes of 32 bytes, in order.
            block_ids: `[n]` block id that each block is written to; in range, without duplicates.
            stream: CUDA stream whose queued work may still use those blocks; by default torch's current stream.
                Work queued on any stream after this returns sees the loaded bytes.
            deadline_s: seconds to wait for the lower tier. A block that comes later is a miss now, and in the pool
                for the next load. 0 does not wait; None waits without limit; the default is
                `tier.load_deadline_s` of the configuration.

        Raises:
            InvalidHashError, InvalidBlockIdError: before any transfer starts; the latter also if a save is reading
                one of the blocks, or another load is writing it.
            EngineStateError: no caches are registered, the engine is shut down, or this is not its loop.
        """
        _, data = self._planes()
        keys, ids = named_blocks(hashes, block_ids, data.layout.num_blocks)
        wait_s = self.config.tier.load_deadline_s if isinstance(deadline_s, EllipsisType) else deadline_s
        return self._load(keys, ids, data.current_stream() if stream is None else stream, wait_s)

    async def _load(
        self, keys: NDArray[np.uint64], ids: NDArray[np.int32], stream: object, deadline_s: float | None
    ) -> LoadResult:
        self._check_loop()
        self._planes()
        fetch = LoadFetch(self._tiering, keys, deadline_s) if self._tiering is not None else None
        try:
            outcomes = await self._load_arriving(keys, ids, stream, fetch)
        except BaseException:
            if fetch is not None:
                fetch.cancel()
            raise
        if self._tiering is not None and fetch is not None:
            outcomes = fetch.name_misses(outcomes)
            self._tiering.loaded(keys, outcomes)
        self.stats.record_outcomes(outcomes)
        return LoadResult(tuple(ids.tolist()), outcomes)

    async def _load_arriving(
        self, keys: NDArray[np.uint64], ids: NDArray[np.int32], stream: object, fetch: LoadFetch | None
    ) -> tuple[MissReason | None, ...]:
        control, data = self._planes()
        call: TransferCall[MissReason | None] = TransferCall(self._queue, data, self.stats, stream, Direction.LOAD, ids)
        async with call:
            for part in call.parts(len(ids)):
                if fetch is not None:
                    await fetch.wait(keys[part])
                plan = control.plan_load(keys[part], ids[part])
                await call.start(plan.transfer, partial(_finish_load, control, plan), more=part.stop < len(ids))
            outcomes = await call.outcomes()
            if call.num_parts > 1:
                control.touch(keys)
        return outcomes

    def prefetch(self, hashes: BlockHashes) -> Coroutine[Any, Any, int]:
        """Fetch blocks that only the lower tier has into the pool. Await it; it returns when all fetches have ended.

        Cancelling it drops the fetches that have not started.

        Returns:
            Length of the prefix of `hashes` that could be loaded now, in blocks.
        """
        self._planes()
        return self._prefetch(pack_keys(hashes))

    async def _prefetch(self, keys: NDArray[np.uint64]) -> int:
        self._check_loop()
        control, _ = self._planes()
        if self._tiering is not None:
            fetch = self._tiering.fetch(keys)
            try:
                await fetch.wait()
            except asyncio.CancelledError:
                fetch.cancel()
                raise
        return control.index.prefix_length(keys)

    def check_blocks(self, hashes: BlockHashes) -> NDArray[np.bool_]:
        """`bool [n]`: blocks that could be loaded from the pool or the lower tier. From any thread; does not wait."""
        return self._found(pack_keys(hashes))

    def _found(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        control, _ = self._planes()
        mask = control.index.contains_mask(keys)
        if self._tiering is not None and not mask.all():
            mask = mask.copy()
            mask[~mask] = self._tiering.known(keys[~mask])
        return mask

    def match_prefix(self, hashes: BlockHashes) -> int:
        """Length of the prefix that could be loaded, in blocks. From any thread."""
        found = self._found(pack_keys(hashes))
        missing = np.flatnonzero(~found)
        known = int(missing[0]) if missing.size else len(found)
        self.stats.record_lookup(len(found), known)
        return known

    def miss_reason(self, block_hash: BlockHash) -> MissReason | None:
        """Why a block could not be loaded now; None if it could. From any thread."""
        control, _ = self._planes()
        if control.index.prefix_length([block_hash]):
            return None
        return control.index.miss_reason(block_hash)

    # -- the rest ----------------------------------------------------------------------------------

    async def wait_pinned(self) -> None:
        """Wait until the whole pool is pinned. Not needed: transfers wait for what they touch.

        Raises:
            DeviceError: pinning stopped early; the pool is as large as what is pinned now.
        """
        self._check_loop()
        _, data = self._planes()
        await data.pool.ready(data.pool.capacity_bytes)

    async def wait_tier(self) -> bool:
        """Wait until the lower tier is open and what it holds is known; False if it cannot be used, or there is none.

        Not needed: until then blocks that it is not known to hold are misses, or asked for one by one.
        """
        self._check_loop()
        self._planes()
        return self._tiering is not None and await self._tiering.ready()

    def clear(self) -> None:
        """Forget every block of the pool; the lower tier keeps what it has.

        Transfers under way end as usual; their saves stay invisible, and say so. On the engine's loop.
        """
        control, _ = self._planes()
        control.clear()

    async def flush(self) -> None:
        """Wait until every block queued for the lower tier is written or dropped."""
        self._check_loop()
        self._planes()
        if self._tiering is not None:
            await self._tiering.flush()

    async def drain(self) -> None:
        """Wait for every transfer that was started."""
        self._check_loop()
        _, data = self._planes()
        await data.drain()

    def get_stats(self) -> StatsSnapshot:
        """Hit rate, bytes, latencies by direction and tier, miss reasons, pool figures; from any thread."""
        pools = []
        evicted = 0
        if self._control is not None and self._data is not None:
            pools = [
                self._control.allocator.figures(pinned_bytes=self._data.pool.pinned_bytes),
                *self._data.figures(),
            ]
            evicted = self._control.index.evicted_blocks
        tiering = self._tiering.figures() if self._tiering is not None else None
        block_size = self._data.layout.block_size if self._data is not None else 0
        return self.stats.snapshot(pools, evicted_blocks=evicted, tiering=tiering, block_size=block_size)

    def current_stream(self) -> int | None:
        """Handle of torch's current stream in the calling thread; None for a cache in host memory."""
        _, data = self._planes()
        return data.current_stream()

    @property
    def is_shut_down(self) -> bool:
        """True when all memory has been released."""
        return self._released

    async def shutdown(self) -> None:
        """Finish transfers in flight, refuse new ones, release all memory; idempotent, safe to cancel.

        If the engine's own loop is closed, call it on another loop: calls left on the closed loop are lost.

        Raises:
            EngineStateError: this is another loop, and the engine's own loop is not closed.
            Any error that the lower tier raises when it is closed; everything else is released all the same.
        """
        if self._released:
            return
        if self._loop.is_closed():
            self._loop, self._shutdown = asyncio.get_running_loop(), None
            self._queue = CallQueue(self.config.transfer.max_outstanding_requests)  # the old loop's calls are lost
        self._check_loop()
        if self._shutdown is None:
            self._shutdown = asyncio.create_task(self._release(), name="kvortex-shutdown")
        await asyncio.shield(self._shutdown)

    async def _release(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(setattr, self, "_released", True)
            if self._data is not None and self._control is not None:
                stack.push_async_callback(self._data.aclose)
                stack.callback(_forget_all, self._control)
            if self._tiering is not None:
                stack.push_async_callback(self._tiering.aclose)
            await self._queue.wait_empty()

    def __del__(self) -> None:
        if getattr(self, "_data", None) is not None and self._shutdown is None:
            warnings.warn(f"{type(self).__name__} was not shut down", ResourceWarning, source=self, stacklevel=1)


def _forget_all(control: ControlPlane) -> None:
    control.clear()
    if leak := control.allocator.leak_report():
        logger.error("extents still held at shutdown: %s", leak)


def _finish_save(control: ControlPlane, plan: SavePlan, request: TransferRequest) -> Sequence[SaveOutcome]:
    if request.num_succeeded == len(plan.slots):
        return control.finish_save(plan, request.digests)
    return control.finish_save(plan, request.digests, request.succeeded, request.too_lossy, request.num_tried)


def _without_gone(outcomes: Sequence[SaveOutcome], there: NDArray[np.bool_]) -> tuple[SaveOutcome, ...]:
    return tuple(
        SaveOutcome.GONE if outcome.is_stored and not kept else outcome
        for outcome, kept in zip(outcomes, there.tolist(), strict=True)
    )


def _finish_load(control: ControlPlane, plan: LoadPlan, request: TransferRequest) -> Sequence[MissReason | None]:
    digests, expected = request.digests, plan.pins.digests
    if request.num_succeeded == plan.pins.num_hits and digests.tobytes() == expected.tobytes():
        return control.finish_load(plan)
    return control.finish_load(plan, digests == expected, request.succeeded)
