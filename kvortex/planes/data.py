"""The data plane: carries out transfer plans with a pool, an executor and a scheduler.

The pool of an owner ends with it, and the next owner has another one: then the data plane leaves its pool, and enters
the new one. Between the two it is away.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.codecs import RAW, PageEncodings, Pages, packing_for
from kvortex.config import KVortexConfig, ModelIdentity
from kvortex.cuda.driver import Device, Event, stream_handle
from kvortex.errors import DeviceError, LayoutError
from kvortex.hashing import Namespace
from kvortex.kernels import HostKernels, HostPackKernels
from kvortex.layout import KVLayout, PagedCache
from kvortex.memory import PinnedPool, SharedMemory
from kvortex.planes.claims import Claim, claims_of
from kvortex.planes.control import check_blocks_fit
from kvortex.planes.self_test import check_arrival, run_self_test
from kvortex.runtime.blocking import run_blocking, run_to_its_end
from kvortex.sched import Batcher, CudaExecutor, HostExecutor, TransferExecutor, TransferRequest, TransferScheduler
from kvortex.stats import PoolFigures
from kvortex.types import BlockSizes, Direction, TransferPlan

logger = logging.getLogger(__name__)

SELF_TEST_BLOCKS = 2


class DataPlane:
    """Moves blocks between one registered paged cache and one pool. It belongs to the event loop that creates it.

    Args:
        config: the engine's settings.
        tensors: layer name -> tensor of the paged cache, all on one device; kept alive until `aclose`.
        cache: the groups of layers and their layouts, derived from these tensors.
        memory: shared memory for the pool, of processes whose caches have the same layout; None for a private pool.
        scratch: called with a number of bytes; returns the offset of that much of the pool, which the self-test
            overwrites. By default it is the start of the pool, where nothing may be saved before all processes that
            share it have come so far.
        wrap_executor: returns another executor that wraps the device's, for tests.
        on_pinning_stopped: called on the loop, at most once, if no more of the pool can be pinned, with the number of
            bytes that are pinned, from the start of the pool. Plans must not use the rest; transfers to it fail.

    Raises:
        LayoutError: the tensors are on a device that is neither CUDA nor the host.
        ConfigError: a block does not fit the pool or a piece of it.
        LayoutSelfTestError: the self-test has failed.
        DeviceError, OutOfPoolMemoryError: the device has refused a call or memory.

        After any error everything is released.
    """

    def __init__(
        self,
        config: KVortexConfig,
        tensors: Mapping[str, torch.Tensor],
        cache: PagedCache,
        *,
        memory: SharedMemory | None = None,
        scratch: Callable[[int], int] = lambda nbytes: 0,
        wrap_executor: Callable[[TransferExecutor], TransferExecutor] | None = None,
        on_pinning_stopped: Callable[[int], None] | None = None,
    ) -> None:
        self.cache = cache
        self.pages = pages_of(cache, config.codec.name)
        self.encodings = PageEncodings(self.pages)
        self._codec_name = self._name_of_codec(config)
        check_blocks_fit(self.sizes, config.pool.bytes, config.pool.pin_piece_bytes)
        self.device = _device_of(cache.device)
        self._tensors = dict(tensors)
        self._events: list[Event] = []
        self._claims = claims_of(cache)
        self._on_pinning_stopped = on_pinning_stopped
        self._numa_aware = config.pool.numa_aware
        self._is_away = False
        self._stopped_bytes: int | None = None
        self.pool = self._make_pool(config.pool.bytes, config.pool.pin_piece_bytes, memory)
        with contextlib.ExitStack() as undo, self.pool.held():
            undo.callback(self._drop_callback)
            undo.callback(self.pool.close)
            executor = self._make_executor(config)
            undo.callback(executor.close)
            if config.transfer.self_test:
                with self.pool.exclusive():
                    self._self_test(executor, scratch)
            self._scheduler = TransferScheduler(
                _make_batcher(config), wrap_executor(executor) if wrap_executor else executor
            )
            self._executor: TransferExecutor | None = executor
            undo.pop_all()

    @cached_property
    def sizes(self) -> tuple[BlockSizes, ...]:
        """Bytes of extents, for each group."""
        return tuple(pages.sizes for pages in self.pages)

    @cached_property
    def largest_packed_nbytes(self) -> int:
        """Bytes of the largest extent of a block that is packed, if its group is."""
        return max(size.packed for size in self.sizes)

    @property
    def packs(self) -> bool:
        """True if blocks of at least one group are packed."""
        return self.encodings.pack_any

    def _name_of_codec(self, config: KVortexConfig) -> str:
        """The codec as a part of the namespace.

        It names the bound on the error: blocks that were packed with a looser one must not be found. And it names the
        groups that are packed, so that those of groups that must stay exact are not found either.
        """
        if not self.packs:
            return RAW
        name = f"{config.codec.name} within {config.codec.max_error}"
        if self.cache.groups.is_single:
            return name
        return f"{name}, groups {' '.join(str(n) for n, packs in enumerate(self.encodings.packs) if packs)}"

    def _make_pool(self, nbytes: int, piece_bytes: int, memory: SharedMemory | None) -> PinnedPool:
        pool = PinnedPool(
            nbytes,
            device=self.device,
            piece_bytes=piece_bytes,
            numa_aware=self._numa_aware,
            memory=memory,
            on_stopped=_on_loop(lambda pinned_bytes: self._pinning_stopped(pool, pinned_bytes)),
        )
        return pool

    def _pinning_stopped(self, pool: PinnedPool, pinned_bytes: int) -> None:
        if pool is not self.pool:
            return
        self._stopped_bytes = pinned_bytes
        if self._on_pinning_stopped is not None and not self._is_away:
            self._on_pinning_stopped(pinned_bytes)

    def _drop_callback(self) -> None:
        self._on_pinning_stopped = None

    def _make_executor(self, config: KVortexConfig) -> TransferExecutor:
        if self.device is None:
            return HostExecutor(self._host_kernels(), max_pack_error=config.codec.max_error)
        return CudaExecutor(
            self.pages,
            self.pool,
            self.device,
            num_streams=config.transfer.streams,
            staging_nbytes=config.transfer.max_batch_bytes,
            max_pack_error=config.codec.max_error,
        )

    def _host_kernels(self) -> list[HostKernels | HostPackKernels]:
        kernels: list[HostKernels | HostPackKernels] = []
        for layout, packing in self.pages:
            raw = HostKernels(layout, self.pool.bytes)
            kernels += [raw, HostPackKernels(layout, packing, self.pool.bytes) if packing else raw]
        return kernels

    def _self_test(self, executor: TransferExecutor, scratch: Callable[[int], int]) -> None:
        counts = self._num_test_blocks()
        nbytes = max(count * size.raw for count, size in zip(counts, self.sizes, strict=True))
        start = scratch(nbytes)
        self.pool.wait_ready(start + nbytes)
        for group, (pages, size, count) in enumerate(zip(self.pages, self.sizes, counts, strict=True)):
            run_self_test(
                pages,
                group,
                self._tensors,
                _first_and_last(pages.layout, count),
                executor,
                start + np.arange(count, dtype=np.int64) * size.raw,
                self.pool.bytes,
                self.record_event,
            )

    def _num_test_blocks(self) -> list[int]:
        piece_nbytes = min(self.pool.piece_bytes, self.pool.capacity_bytes)
        return [
            min(SELF_TEST_BLOCKS, pages.layout.num_blocks, piece_nbytes // size.raw)
            for pages, size in zip(self.pages, self.sizes, strict=True)
        ]

    def namespace(self, identity: ModelIdentity) -> Namespace:
        """The namespace of this cache's blocks: what must agree, besides the tokens, before they may be reused."""
        return Namespace(
            model=identity.model,
            weights_revision=identity.weights_revision,
            kv_dtype="/".join(self.cache.dtypes),
            layout=self.cache.digest,
            block_size=self.cache.block_size,
            tp_rank=identity.tp_rank,
            tp_size=identity.tp_size,
            pp_rank=identity.pp_rank,
            pp_size=identity.pp_size,
            codec=self._codec_name,
            fingerprint=identity.fingerprint,
        )

    # -- transfers ---------------------------------------------------------------------------------

    def current_stream(self) -> int | None:
        """Handle of torch's current stream in the calling thread; None if the cache is in host memory."""
        if self.device is None:
            return None
        return int(torch.cuda.current_stream(self.device.ordinal).cuda_stream)

    def record_event(self, stream: object | None = None) -> Event | None:
        """An event for all work that is queued so far on `stream`, by default torch's current one.

        Give it back with `release_event`. It is None if the cache is in host memory.
        """
        if self.device is None:
            return None
        handle = torch.cuda.current_stream(self.device.ordinal) if stream is None else stream
        event = self._events.pop() if self._events else self.device.create_event()
        self.device.record_event(event, stream_handle(handle))
        return event

    def release_event(self, event: Event | None) -> None:
        """Take an event back for reuse. No transfer may wait for it any more."""
        if event is not None:
            self._events.append(event)

    async def start(
        self,
        plan: TransferPlan,
        after: Event | None,
        on_settled: Callable[[TransferRequest], None],
        *,
        more_follows: bool = False,
        wants_source_released: bool = False,
        claim: Claim | None = None,
    ) -> TransferRequest:
        """Start to carry out a plan.

        Args:
            plan: the blocks to move.
            after: an event; the cache is not touched before it has fired. None for no such event.
            on_settled: called exactly once on the loop, whatever happens, with the request and its outcomes.
            more_follows: True if another request of the same call follows at once.
            wants_source_released: True if the request shall report when a save has read the cache.
            claim: the caller's claim on the plan's blocks, held until the request has settled. If it is None the blocks
                are claimed here, until a save has read them or a load has settled.

        While it is away from its pool, and if it leaves it before the transfer has begun, the request fails.

        Raises:
            EngineStateError: the data plane is shutting down.
            InvalidBlockIdError: see `claim`.
        """
        pool = self.pool
        request = TransferRequest(
            plan.direction,
            plan.block_ids,
            plan.offsets,
            self.encodings.extents,
            after,
            on_settled,
            more_follows=more_follows,
            wants_source_released=wants_source_released,
            forms=self.encodings.moved_as(plan.forms),
        )
        try:
            if claim is None:
                claim = self.claim(plan.direction, plan.block_ids, None if plan.forms is None else plan.forms // 2)
                if plan.direction is Direction.SAVE:
                    request.on_source_released = claim.release
                else:
                    request.on_settled = partial(_release_then, claim, on_settled)
            if request.num_blocks and not self._is_away and not pool.is_ready(pool.capacity_bytes):
                end = int(plan.offsets.max()) + max(self.encodings.extents)
                await pool.ready(min(end, pool.capacity_bytes))
            if self._is_away or pool is not self.pool:
                raise DeviceError("the pool that the blocks are in is not used any more")
            self._scheduler.submit(request)
        except DeviceError as error:
            request.fail(error)  # if its extents cannot be pinned, the pool has logged that once
        except BaseException:
            request.cancel()
            raise
        return request

    def claim(
        self, direction: Direction, block_ids: NDArray[np.int32], groups: NDArray[np.uint8] | None = None
    ) -> Claim:
        """Claim blocks of the cache until the claim is released. A load excludes all others, a save excludes loads.

        Args:
            direction: direction of the transfer.
            block_ids: ids of the blocks, `int32 [n]`.
            groups: the number of each block's group, `uint8 [n]`; None if all belong to the first.

        Raises:
            InvalidBlockIdError: another transfer excludes one of them; none is claimed.
        """
        if groups is None or len(set(self._claims)) == 1:
            return Claim([(self._claims[0], block_ids)], direction)
        parts = [(self._claims[group], block_ids[groups == group]) for group in np.unique(groups).tolist()]
        return Claim(parts, direction)

    async def wait(self, requests: Sequence[TransferRequest]) -> None:
        """Wait until requests have settled.

        If it is cancelled, it drops blocks whose transfer has not started, and waits for the others: when it returns,
        nothing touches their blocks of the cache or their extents any more.
        """
        await self._scheduler.wait(requests)

    async def cancel_and_wait(self, requests: Sequence[TransferRequest]) -> None:
        """Cancel requests and wait for their transfers in flight; a cancellation of this call does not shorten that."""
        await self._scheduler.cancel_and_wait(requests)

    # -- another pool ------------------------------------------------------------------------------

    @property
    def is_away(self) -> bool:
        """True while there is no pool."""
        return self._is_away

    async def leave(self) -> None:
        """Finish the transfers in flight, then unpin and unmap the pool. Claims of calls stay. Idempotent."""
        self._is_away = True
        await self._scheduler.drain()
        await self._close_pool()

    async def enter(self, memory: SharedMemory, piece_bytes: int, scratch: Callable[[int], int] | None = None) -> None:
        """Map other memory, begin to pin it, and prove that blocks arrive there. `arrive` ends being away.

        The proof reads blocks of the cache and writes none, because a model may be using them. How blocks lie in the
        cache was proven at the start.

        Args:
            memory: the memory of the new pool, all of which is used.
            piece_bytes: bytes that are pinned at a time; no block lies in two pieces.
            scratch: see `DataPlane`; called on another thread. None for no proof, which may wait for much to be pinned.

        Raises:
            ConfigError: a block does not fit the pool or a piece of it.
            LayoutSelfTestError: blocks do not arrive as they should.
            DeviceError: the memory cannot be pinned.

            After any error it is away as before.
        """
        check_blocks_fit(self.sizes, memory.ticket.nbytes, piece_bytes)
        self._stopped_bytes = None
        self.pool = self._make_pool(memory.ticket.nbytes, piece_bytes, memory)
        try:
            if isinstance(self._executor, CudaExecutor):
                self._executor.use(self.pool)
            elif isinstance(self._executor, HostExecutor):
                self._executor.use(self._host_kernels())
            if scratch is not None:
                await self._check_arrival(scratch)
        except BaseException:
            await self._close_pool()
            raise

    def arrive(self) -> None:
        """Carry out plans for the pool that was entered, from now on."""
        self._is_away = False
        if self._stopped_bytes is not None:
            self._pinning_stopped(self.pool, self._stopped_bytes)

    async def _close_pool(self) -> None:
        if isinstance(self._executor, HostExecutor):
            self._executor.use(())  # its kernels hold views of the pool
        await run_blocking(self.pool.close)

    async def _check_arrival(self, scratch: Callable[[int], int]) -> None:
        counts = self._num_test_blocks()
        nbytes = max(count * size.raw for count, size in zip(counts, self.sizes, strict=True))
        start = await run_to_its_end(partial(scratch, nbytes), lambda offset: None)
        await self.pool.ready(start + nbytes)
        for group, (pages, count) in enumerate(zip(self.pages, counts, strict=True)):
            offsets = start + np.arange(count, dtype=np.int64) * pages.sizes.raw
            block_ids = _first_and_last(pages.layout, count)
            await check_arrival(pages, group, block_ids, self._scheduler, offsets, self.pool)

    # -- figures and end ---------------------------------------------------------------------------

    def figures(self) -> list[PoolFigures]:
        """Figures of the device's staging pool; none on the host, and after it is closed."""
        executor = self._executor
        return [executor.staging.figures()] if isinstance(executor, CudaExecutor) else []

    async def wait_pinned(self) -> None:
        """Wait until the whole pool is pinned, if there is one just now.

        Raises:
            DeviceError: no more of it can be pinned.
        """
        pool = self.pool
        try:
            if not self._is_away:
                await pool.ready(pool.capacity_bytes)
        except DeviceError:
            if self._is_away:
                return
            if pool is self.pool:
                raise
            await self.wait_pinned()

    async def drain(self) -> None:
        """Wait for every transfer that was submitted."""
        await self._scheduler.drain()

    async def aclose(self) -> None:
        """Finish the transfers in flight, then release everything, whatever fails. It cannot be used afterwards."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(run_blocking, self.pool.close)
            stack.callback(self._release_objects)
            await self._scheduler.aclose()

    def close(self) -> None:
        """`aclose` for a data plane that has not been used yet; blocks."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.pool.close)
            stack.callback(self._release_objects)
            self._scheduler.close()

    def _release_objects(self) -> None:
        """Release events, tensors, and the objects that hold views of the pool."""
        self._drop_callback()
        del self._scheduler
        self._executor = None
        self._tensors.clear()
        while self._events and self.device is not None:
            self.device.destroy_event(self._events.pop())


def _first_and_last(layout: KVLayout, count: int) -> list[int]:
    return [b * (layout.num_blocks - 1) for b in range(count)]


def _release_then(claim: Claim, then: Callable[[TransferRequest], None], request: TransferRequest) -> None:
    claim.release()
    then(request)


def _on_loop(call: Callable[[int], None]) -> Callable[[int], None]:
    """A function for other threads, which has the running loop make the call."""
    loop = asyncio.get_running_loop()

    def pass_on(value: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is planned any more
            loop.call_soon_threadsafe(call, value)

    return pass_on


def pages_of(cache: PagedCache, codec: str) -> tuple[Pages, ...]:
    """How the blocks of each group lie in the cache, and how the codec packs them.

    Raises:
        ConfigError: the codec does not exist, or a segment is not a whole number of units.
    """
    return tuple(
        Pages(layout, packing_for(layout, codec if group.may_pack else RAW))
        for group, layout in zip(cache.groups.groups, cache.layouts, strict=True)
    )


def _device_of(device: str) -> Device | None:
    kind, _, ordinal = device.partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda":
        raise LayoutError(f"tensors on {device!r}: KVortex serves CUDA devices and host memory only")
    return Device(int(ordinal or torch.cuda.current_device()))


def _make_batcher(config: KVortexConfig) -> Batcher:
    return Batcher(
        max_requests=config.transfer.max_batch_requests,
        max_bytes=config.transfer.max_batch_bytes,
        linger_s=config.transfer.linger_s,
        max_consecutive_loads=config.transfer.max_consecutive_loads,
    )
