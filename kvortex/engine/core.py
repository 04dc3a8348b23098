"""The engine: control plane and data plane in one process, as an asyncio API."""

import asyncio
import contextlib
import logging
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import EllipsisType
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.config import KVortexConfig, format_bytes
from kvortex.config.sections import require_named_model
from kvortex.engine.arguments import BlockHashes, BlockTables, NamedBlocks, named_blocks
from kvortex.engine.calls import CallQueue, TransferCall
from kvortex.engine.canonical import Canonical, canonical_of, lower_tier
from kvortex.engine.leases import Lease, Leases, leading_in_pool
from kvortex.engine.parts import EngineParts
from kvortex.errors import ConfigError, EngineStateError
from kvortex.groups import KVGroup, Match
from kvortex.hashing import Namespace
from kvortex.index import pack_keys
from kvortex.layout import KVLayout, PagedCache
from kvortex.memory import check_memory
from kvortex.owner import Control, OwnerClient, OwnerFollower, RemoteControl, RemoteTiering
from kvortex.owner.control import scratch_of
from kvortex.owner.protocol import Kind
from kvortex.planes.control import ControlPlane
from kvortex.planes.data import DataPlane
from kvortex.planes.plans import LoadPlan, SavePlan
from kvortex.runtime.loop_thread import running_loop
from kvortex.sched import TransferRequest
from kvortex.stats import EngineStats, StatsSnapshot
from kvortex.tiering import BackingTier, LoadFetch, TieredPool, Tiering, check_model_is_named
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
        self._control: Control | None = None
        self._data: DataPlane | None = None
        self._namespace: Namespace | None = None
        self._tiering: Tiering | RemoteTiering | None = None
        self._leases: Leases | None = None
        self._follower: OwnerFollower | None = None
        self._shutdown: asyncio.Task[None] | None = None
        self._released = False

    def __repr__(self) -> str:
        state = "shut down" if self._shutdown is not None else "no caches registered yet"
        if self._shutdown is None and self._data is not None:
            state = self._data.cache.describe()
        return f"<KVortexEngine: {state}; a pool of {format_bytes(self.config.pool.bytes)}>"

    # -- caches ------------------------------------------------------------------------------------

    @overload
    def register_kv_caches(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
        heads_dim: int | Mapping[str, int] | None = None,
    ) -> KVLayout: ...

    @overload
    def register_kv_caches(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
        groups: Sequence[KVGroup] | None,
        heads_dim: int | Mapping[str, int] | None = None,
    ) -> KVLayout | PagedCache: ...

    def register_kv_caches(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
        groups: Sequence[KVGroup] | None = None,
        heads_dim: int | Mapping[str, int] | None = None,
    ) -> KVLayout | PagedCache:
        """Register the paged cache: derive its layout, allocate memory, write a test pattern and read it back.

        Args:
            kv_caches: layer name -> tensor, CUDA or CPU, all on one device; they must outlive the engine.
            block_size: tokens per block; with `groups`, tokens per block hash.
            num_blocks: number of blocks in the cache; needed if the shape is ambiguous.
            block_dim: index of the tensor dimension that counts blocks, one for all layers or per layer name; needed
                if the shape is ambiguous.
            groups: for a model that mixes kinds of KV, its groups of layers; together they name every layer once. By
                default all layers have full attention.
            heads_dim: index of the tensor dimension that counts KV heads, one for all layers or per layer name; needed
                for `tier.canonical_layout`. A layer that a mapping leaves out has no such dimension (latents).

        Returns:
            The layout of the cache; with `groups`, all groups with the layout of each.

        Raises:
            EngineStateError: caches are already registered, the engine is shut down, or this is not its loop.
            LayoutError: not a paged cache; the message names the tensor. `LayoutSelfTestError` if the test pattern
                did not come back unchanged.
            ConfigError, OutOfPoolMemoryError, DeviceError: memory for the pool or staging cannot be allocated, or the
                groups contradict each other.

            After any error all memory is released, and the engine is in the same state as before the call.
        """
        self._check_running()
        self._check_loop()
        if self._data is not None:
            raise EngineStateError("caches are registered already; make another engine for another cache")
        cache = PagedCache.from_tensors(
            kv_caches, block_size, num_blocks=num_blocks, block_dim=block_dim, groups=groups
        )
        with contextlib.ExitStack() as undo:
            owner = self._connect_owner(undo)
            self._data = self._make_data(kv_caches, cache, owner)
            undo.callback(self._data.close)
            undo.callback(self._unregister)
            self._namespace = self._data.namespace(self.config.identity)
            shapes = {name: tensor.shape for name, tensor in kv_caches.items()}
            canonical = canonical_of(self.config, cache, self._data.pages, shapes, heads_dim, self._namespace)
            if owner is not None:
                owner.tell(Kind.SCRATCH_DONE)
                namespace = self._namespace.digest
                settings = self.config.owner
                self._control = RemoteControl(
                    owner,
                    namespace,
                    self._data.sizes,
                    self._data.encodings,
                    cache.groups,
                    canonical=canonical if isinstance(canonical, str) else canonical.cache,
                    priority=settings.priority,
                    quota_bytes=settings.quota,
                )
            else:
                self._control = ControlPlane.from_config(
                    self.config, self._data.pool.capacity_bytes, self._data.sizes, cache.groups
                )
            self._leases = Leases(self._control, cache.groups, self.config.pool.lease_share)
            self._tiering = self._make_tiering(self._control, self._data, self._namespace, canonical)
            if isinstance(self._control, RemoteControl):
                deadline_s, end_leases = self.config.owner.deadline_s, self._leases.end_all
                self._follower = OwnerFollower(self._control, self._data, deadline_s, end_leases)
            undo.pop_all()
        logger.info("registered %s", cache.describe())
        return cache if groups is not None else cache.layouts[0]

    def _connect_owner(self, undo: contextlib.ExitStack) -> OwnerClient | None:
        settings = self.config.owner
        if not settings.socket:
            check_memory(self.config.pool.bytes)
            return None
        require_named_model("the owner of a shared pool", self.config.identity.model)
        owner = OwnerClient(settings.socket, settings.deadline_s)
        undo.callback(owner.close)
        return owner

    def _make_data(
        self, kv_caches: Mapping[str, torch.Tensor], cache: PagedCache, owner: OwnerClient | None
    ) -> DataPlane:
        make = partial(DataPlane, wrap_executor=self._parts.wrap_executor, on_pinning_stopped=self._shrink)
        if owner is None:
            return make(self.config, kv_caches, cache)
        pool = {"bytes": owner.pool_bytes, "pin_piece_bytes": owner.piece_bytes}
        return make(
            self.config.replace(pool=pool), kv_caches, cache, memory=owner.memory, scratch=partial(scratch_of, owner)
        )

    def _make_tiering(
        self, control: Control, data: DataPlane, namespace: Namespace, canonical: Canonical | str
    ) -> Tiering | RemoteTiering | None:
        tier = lower_tier(self._parts, self.config, data.encodings, namespace, canonical)
        if isinstance(control, RemoteControl):
            if tier is not None:
                raise ConfigError("lower tiers are set where the owner is started, as in `kvortex serve --disk PATH`")
            return RemoteTiering(control) if control.tier else None
        if tier is None:
            return None
        check_model_is_named(tier, namespace)
        # No local variable: the traceback of an error would keep it, and the pool's memory with it.
        tiering = Tiering(
            BackingTier(self.config, TieredPool(control, data.pool.bytes, data.encodings), tier, self.stats)
        )
        tiering.start()
        return tiering

    def _shrink(self, pinned_bytes: int) -> None:
        if self._control is not None and self._shutdown is None:
            self._control.shrink(pinned_bytes)

    def _unregister(self) -> None:
        self._data = self._control = self._namespace = self._tiering = self._leases = None

    @property
    def namespace(self) -> Namespace:
        """What else must agree for this engine's bytes to be reusable."""
        if self._namespace is None:
            raise EngineStateError("no caches are registered yet: call register_kv_caches first")
        return self._namespace

    def _planes(self) -> tuple[Control, DataPlane]:
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
        self, hashes: BlockHashes, block_ids: BlockTables, *, stream: object = None
    ) -> Coroutine[Any, Any, SaveResult]:
        """Copy blocks out of the paged cache. Await it; then the stored blocks can be loaded.

        Args:
            hashes: `[n]` block hashes of 32 bytes: a whole chain or any part of one, in order.
            block_ids: `[n]` block id of each block; in range, without duplicates. For a cache with groups a dict:
                for each group the ids of its blocks, in order, -1 for each block that the request does not have. The
                hashes are then those of the request from its beginning; of a group whose blocks span several hashes,
                a block has the last one.
            stream: CUDA stream whose queued work writes the blocks (torch, numba, or a raw handle); by default
                torch's current stream. The caller must not overwrite the blocks before this returns.

        Raises:
            InvalidHashError, InvalidBlockIdError: before any transfer starts; the latter also if a load is writing
                one of the blocks.
            EngineStateError: no caches are registered, the engine is shut down, or this is not its loop.
        """
        _, data = self._planes()
        blocks = named_blocks(hashes, block_ids, data.cache)
        return self._save(blocks, data.current_stream() if stream is None else stream)

    async def _save(self, blocks: NamedBlocks, stream: object) -> SaveResult:
        self._check_loop()
        control, data = self._planes()
        keys, ids, groups = blocks.keys, blocks.block_ids, blocks.groups
        call: TransferCall[SaveOutcome] = TransferCall(
            self._queue, data, self.stats, stream, Direction.SAVE, ids, groups
        )
        removed_before = control.index.removed_blocks
        async with call:
            for part in call.parts(len(ids)):
                plan = control.plan_save(
                    keys[part],
                    ids[part],
                    "save",
                    groups=None if groups is None else groups[part],
                    chain=keys[: part.stop],
                )
                await call.start(plan.transfer, partial(_finish_save, control, plan), more=part.stop < len(ids))
            outcomes = await call.outcomes()
            if data.packs and SaveOutcome.TOO_LOSSY in outcomes:
                outcomes = await self._save_again_raw(control, call, blocks, outcomes)
            if call.num_parts > 1:
                control.touch(keys)
        if control.index.removed_blocks != removed_before:
            outcomes = _without_gone(outcomes, control.index.contains_mask(keys))
        if isinstance(self._tiering, Tiering):  # an owner knows
            stored = np.array([outcome.is_stored for outcome in outcomes], dtype=np.bool_)
            new = np.array([outcome is SaveOutcome.STORED for outcome in outcomes], dtype=np.bool_)
            self._tiering.saved(keys[stored], new[stored])
        return SaveResult(blocks.in_order_of_call(outcomes), blocks.names)

    async def _save_again_raw(
        self,
        control: Control,
        call: TransferCall[SaveOutcome],
        blocks: NamedBlocks,
        outcomes: tuple[SaveOutcome, ...],
    ) -> tuple[SaveOutcome, ...]:
        """Save again, raw, the blocks that packing would change too much; returns the outcomes of all blocks."""
        lossy = np.array([outcome is SaveOutcome.TOO_LOSSY for outcome in outcomes])
        keys, ids, groups = blocks.keys, blocks.block_ids, blocks.groups
        of_groups = None if groups is None else groups[lossy]
        plan = control.plan_save(keys[lossy], ids[lossy], "save", groups=of_groups, as_is=True, chain=keys)
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
        block_ids: BlockTables,
        *,
        stream: object = None,
        deadline_s: float | EllipsisType | None = ...,
    ) -> Coroutine[Any, Any, LoadResult]:
        """Copy cached blocks into the paged cache; every miss has a reason. Await it.

        Blocks that only the lower tier has are first fetched into the pool, in order. Blocks before them are loaded
        meanwhile.

        Args:
            hashes: `[n]` block hashes of 32 bytes, in order.
            block_ids: `[n]` block id that each block is written to; in range, without duplicates. For a cache with
                groups a dict, as in `save_blocks`; `match_request` says which blocks are needed.
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
        blocks = named_blocks(hashes, block_ids, data.cache)
        wait_s = self.config.tier.load_deadline_s if isinstance(deadline_s, EllipsisType) else deadline_s
        return self._load(blocks, data.current_stream() if stream is None else stream, wait_s)

    async def _load(self, blocks: NamedBlocks, stream: object, deadline_s: float | None) -> LoadResult:
        self._check_loop()
        self._planes()
        keys, tiering = blocks.keys, self._tiering
        fetch = LoadFetch(tiering, keys, blocks.groups, deadline_s) if tiering is not None else None
        try:
            outcomes = await self._load_arriving(blocks, stream, fetch)
        except BaseException:
            if fetch is not None:
                fetch.cancel()
            raise
        if self._tiering is not None and fetch is not None:
            outcomes = fetch.name_misses(outcomes)
            if isinstance(self._tiering, Tiering):
                self._tiering.loaded(keys, outcomes)
        self.stats.record_outcomes(outcomes)
        ids = blocks.in_order_of_call(tuple(blocks.block_ids.tolist()))
        return LoadResult(ids, blocks.in_order_of_call(outcomes), blocks.names)

    async def _load_arriving(
        self, blocks: NamedBlocks, stream: object, fetch: LoadFetch | None
    ) -> tuple[MissReason | None, ...]:
        control, data = self._planes()
        keys, ids = blocks.keys, blocks.block_ids
        call: TransferCall[MissReason | None] = TransferCall(
            self._queue, data, self.stats, stream, Direction.LOAD, ids, blocks.groups
        )
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

        Of a cache with groups, only blocks that are needed to resume as late as possible are fetched. Cancelling it
        drops the fetches that have not started.

        Returns:
            Length of the prefix of `hashes` that could be loaded now, in blocks.
        """
        self._planes()
        return self._prefetch(pack_keys(hashes))

    async def _prefetch(self, hashes: NDArray[np.uint64]) -> int:
        self._check_loop()
        control, data = self._planes()
        groups = data.cache.groups
        if self._tiering is not None:
            keys, numbers = hashes, None
            if not groups.is_single:
                keys, numbers = groups.needed_keys(hashes, self._match(hashes).num_tokens)
            fetch = self._tiering.fetch(keys, numbers)
            try:
                await fetch.wait()
            except asyncio.CancelledError:
                fetch.cancel()
                raise
        return leading_in_pool(control, groups, hashes)[0]

    def check_blocks(self, hashes: BlockHashes, group: str | None = None) -> NDArray[np.bool_]:
        """Blocks that could be loaded from the pool or the lower tier. From any thread; does not wait.

        Args:
            hashes: `[n]` block hashes.
            group: name of the group whose blocks are meant. If it is left out, and the cache has several, the answer is
                for the whole request: whether it could resume behind each hash.

        Returns:
            `bool`: `[n]`, or with `group` one for each block of the group.
        """
        _, data = self._planes()
        keys, groups = pack_keys(hashes), data.cache.groups
        if group is not None:
            return self._found(groups.keys(keys, groups.number_of(group)))
        if groups.is_single:
            return self._found(keys)
        boundaries = groups.resumable(self._found_by_group(keys), len(keys) * data.cache.block_size)
        return np.isin(np.arange(1, len(keys) + 1) * data.cache.block_size, boundaries)

    def _found(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        control, _ = self._planes()
        mask = control.index.contains_mask(keys)
        if self._tiering is not None and not mask.all():
            mask = mask.copy()
            mask[~mask] = self._tiering.known(keys[~mask])
        return mask

    def _found_by_group(self, hashes: NDArray[np.uint64]) -> list[NDArray[np.bool_]]:
        _, data = self._planes()
        groups = data.cache.groups
        return [self._found(groups.keys(hashes, number)) for number in range(len(groups))]

    def match_prefix(self, hashes: BlockHashes) -> int:
        """Length of the prefix that could be loaded, in blocks. From any thread.

        Of a cache with groups, the prefix ends where every group has what it needs to resume.
        """
        _, data = self._planes()
        keys = pack_keys(hashes)
        if data.cache.groups.is_single:
            found = self._found(keys)
            missing = np.flatnonzero(~found)
            known = int(missing[0]) if missing.size else len(found)
        else:
            known = self._match(keys).num_tokens // data.cache.block_size
        self.stats.record_lookup(len(keys), known)
        return known

    def match_request(self, hashes: BlockHashes) -> Match:
        """How far a request could resume now, and which block of which group keeps it from getting further.

        From any thread. `KVGroup.needed` says which blocks a load needs at `num_tokens`.
        """
        return self._match(pack_keys(hashes))

    def _match(self, hashes: NDArray[np.uint64]) -> Match:
        control, data = self._planes()
        groups = data.cache.groups
        match = groups.longest_match(self._found_by_group(hashes), len(hashes) * data.cache.block_size)
        if match.missing is None:
            return match
        key = groups.keys(hashes, groups.number_of(match.missing.group))[match.missing.block]
        reason = control.index.miss_reason(key.tobytes())
        return match._replace(missing=match.missing._replace(reason=reason))

    def miss_reason(self, block_hash: BlockHash, group: str | None = None) -> MissReason | None:
        """Why a block could not be loaded now; None if it could. From any thread.

        Args:
            block_hash: the block's hash.
            group: name of its group; may be left out if the cache has one.
        """
        control, data = self._planes()
        groups = data.cache.groups
        if group is None and not groups.is_single:
            raise ConfigError(f"the cache has several groups: name one of {', '.join(g.name for g in groups.groups)}")
        key = groups.tagged(pack_keys([block_hash]), 0 if group is None else groups.number_of(group))
        if control.index.prefix_length(key):
            return None
        return control.index.miss_reason(key.tobytes())

    # -- the rest ----------------------------------------------------------------------------------

    async def wait_pinned(self) -> None:
        """Wait until the whole pool is pinned. Not needed: transfers wait for what they touch.

        Raises:
            DeviceError: pinning stopped early; the pool is as large as what is pinned now.
        """
        self._check_loop()
        _, data = self._planes()
        await data.wait_pinned()

    async def wait_tier(self) -> bool:
        """Wait until the lower tier is open and what it holds is known; False if it cannot be used, or there is none.

        Not needed: until then blocks that it is not known to hold are misses, or asked for one by one.
        """
        self._check_loop()
        self._planes()
        return self._tiering is not None and await self._tiering.ready()

    def pin(self, hashes: BlockHashes, *, ttl_s: float) -> Lease:
        """Keep the leading blocks of `hashes` that are in the pool from eviction. On the engine's loop.

        Blocks that only the lower tier has are not leased: `prefetch` brings them. Of a cache with groups, the lease
        has what is needed to resume as late as possible. All leases together keep at most `pool.lease_share` of the
        pool; what is beyond that is left out, and `Lease.num_blocks` says so.

        Args:
            hashes: `[n]` block hashes from the beginning of a request.
            ttl_s: seconds after which the lease ends by itself.

        Raises:
            ConfigError: `ttl_s` is not a positive number.
        """
        self._check_loop()
        self._planes()
        assert self._leases is not None
        return self._leases.pin(pack_keys(hashes), ttl_s)

    def invalidate(self, hashes: BlockHashes) -> Coroutine[Any, Any, bool]:
        """Forget blocks, in the pool and in the lower tier. Await it: from then on none that was saved before is found.

        Blocks that are being saved meanwhile, or on their way to or from the lower tier, are forgotten as well; such a
        save says `GONE`. Leases do not keep them. Blocks behind them in a chain stay, and are of no use.

        Args:
            hashes: `[n]` block hashes; of a cache with groups, those of a request from its beginning, and the blocks of
                all groups are forgotten.

        Returns:
            False if the lower tier may have some of them still, because it does not answer or cannot be used.
        """
        self._planes()
        return self._invalidate(pack_keys(hashes))

    async def _invalidate(self, hashes: NDArray[np.uint64]) -> bool:
        self._check_loop()
        control, data = self._planes()
        groups = data.cache.groups
        keys = np.concatenate([groups.keys(hashes, number) for number in range(len(groups))])
        control.invalidate(keys)
        if self._tiering is None:
            return True
        return await self._tiering.invalidate(keys, lambda: control.invalidate(keys))

    @overload
    def clear(self) -> None: ...

    @overload
    def clear(self, *, tiers: Literal[True]) -> Coroutine[Any, Any, bool]: ...

    def clear(self, *, tiers: bool = False) -> Coroutine[Any, Any, bool] | None:
        """Forget every block of the pool, at once. On the engine's loop.

        Transfers under way end as usual; their saves stay invisible, and say so.

        Args:
            tiers: forget the blocks of the lower tier, too: await the result, which is as that of `invalidate`. By
                default the lower tier keeps what it has.
        """
        control, _ = self._planes()
        control.clear()
        return self._clear_tiers(control) if tiers else None

    async def _clear_tiers(self, control: Control) -> bool:
        self._check_loop()
        if self._tiering is None:
            return True
        return await self._tiering.clear(control.clear)

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
            figures = self._control.allocator.figures(pinned_bytes=self._data.pool.pinned_bytes)
            pools = [
                replace(figures, leased_bytes=self._leases.nbytes if self._leases is not None else 0),
                *self._data.figures(),
            ]
            evicted = self._control.index.evicted_blocks
        tiering = self._tiering.figures() if self._tiering is not None else None
        block_size = self._data.cache.block_size if self._data is not None else 0
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
                stack.callback(self._control.close)
                if self._leases is not None:
                    stack.callback(self._leases.end_all)
            if self._tiering is not None:
                stack.push_async_callback(self._tiering.aclose)
            if self._follower is not None:
                await self._follower.aclose()
            await self._queue.wait_empty()

    def __del__(self) -> None:
        if getattr(self, "_data", None) is not None and self._shutdown is None:
            warnings.warn(f"{type(self).__name__} was not shut down", ResourceWarning, source=self, stacklevel=1)


def _finish_save(control: Control, plan: SavePlan, request: TransferRequest) -> Sequence[SaveOutcome]:
    if request.num_succeeded == len(plan.slots):
        return control.finish_save(plan, request.digests)
    return control.finish_save(plan, request.digests, request.succeeded, request.too_lossy, request.tried)


def _without_gone(outcomes: Sequence[SaveOutcome], there: NDArray[np.bool_]) -> tuple[SaveOutcome, ...]:
    return tuple(
        SaveOutcome.GONE if outcome.is_stored and not kept else outcome
        for outcome, kept in zip(outcomes, there.tolist(), strict=True)
    )


def _finish_load(control: Control, plan: LoadPlan, request: TransferRequest) -> Sequence[MissReason | None]:
    digests, expected = request.digests, plan.pins.digests
    if request.num_succeeded == plan.pins.num_hits and digests.tobytes() == expected.tobytes():
        return control.finish_load(plan)
    return control.finish_load(plan, digests == expected, request.succeeded)
