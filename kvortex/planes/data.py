"""The data plane: carries out transfer plans with a pool, an executor and a scheduler."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.codecs import block_sizes, encodings_of, packing_for
from kvortex.config import KVortexConfig, ModelIdentity
from kvortex.cuda.driver import Device, Event, stream_handle
from kvortex.errors import DeviceError, LayoutError
from kvortex.hashing import Namespace
from kvortex.kernels import HostKernels, HostPackKernels
from kvortex.kernels.claims import BlockClaims
from kvortex.layout import KVLayout
from kvortex.memory import PinnedPool, SharedMemory
from kvortex.planes.control import check_block_fits
from kvortex.planes.self_test import run_self_test
from kvortex.runtime.blocking import run_blocking
from kvortex.sched import Batcher, CudaExecutor, HostExecutor, TransferExecutor, TransferRequest, TransferScheduler
from kvortex.stats import PoolFigures
from kvortex.types import Direction, TransferPlan

logger = logging.getLogger(__name__)

SELF_TEST_BLOCKS = 2


class DataPlane:
    """Moves blocks between one registered paged cache and one pool. It belongs to the event loop that creates it.

    Args:
        config: the engine's settings.
        tensors: layer name -> tensor of the paged cache, all on one device; kept alive until `aclose`.
        layout: derived from these tensors.
        memory: shared memory for the pool, of processes whose caches have the same layout; None for a private pool. The
            self-test overwrites its first extents, so nothing may be saved before all processes have come so far.
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
        layout: KVLayout,
        *,
        memory: SharedMemory | None = None,
        wrap_executor: Callable[[TransferExecutor], TransferExecutor] | None = None,
        on_pinning_stopped: Callable[[int], None] | None = None,
    ) -> None:
        self.layout = layout
        self.packing = packing_for(layout, config.codec.name)
        self.sizes = block_sizes(layout, self.packing)
        self.encodings = encodings_of(layout, self.packing)
        # The bound on the error is a part of the name: blocks that were packed with a looser one must not be found.
        self._codec_name = (
            f"{self.packing.codec} within {config.codec.max_error}" if self.packing else self.encodings.codec
        )
        check_block_fits(self.sizes, config.pool.bytes, config.pool.pin_piece_bytes)
        self.device = _device_of(layout)
        self._tensors = dict(tensors)
        self._block_dims = {f.name: dim for f, dim in zip(layout.formats, layout.block_dims, strict=True)}
        self._events: list[Event] = []
        self._claims = BlockClaims(layout.num_blocks)
        self._on_pinning_stopped = on_pinning_stopped
        self.pool = PinnedPool(
            config.pool.bytes,
            device=self.device,
            piece_bytes=config.pool.pin_piece_bytes,
            numa_aware=config.pool.numa_aware,
            memory=memory,
            on_stopped=_on_loop(self._pinning_stopped),
        )
        with contextlib.ExitStack() as undo, self.pool.held():
            undo.callback(self._drop_callback)
            undo.callback(self.pool.close)
            executor = self._make_executor(config)
            undo.callback(executor.close)
            if config.transfer.self_test:
                with self.pool.exclusive():
                    self._self_test(executor)
            self._scheduler = TransferScheduler(
                _make_batcher(config), wrap_executor(executor) if wrap_executor else executor
            )
            self._executor: TransferExecutor | None = executor
            undo.pop_all()

    def _pinning_stopped(self, pinned_bytes: int) -> None:
        if self._on_pinning_stopped is not None:
            self._on_pinning_stopped(pinned_bytes)

    def _drop_callback(self) -> None:
        self._on_pinning_stopped = None

    def _make_executor(self, config: KVortexConfig) -> TransferExecutor:
        if self.device is None:
            packs = HostPackKernels(self.layout, self.packing, self.pool.bytes) if self.packing else None
            return HostExecutor(
                HostKernels(self.layout, self.pool.bytes),
                pack_kernels=packs,
                max_pack_error=config.codec.max_error,
            )
        return CudaExecutor(
            self.layout,
            self.pool,
            self.device,
            num_streams=config.transfer.streams,
            staging_nbytes=config.transfer.max_batch_bytes,
            packing=self.packing,
            max_pack_error=config.codec.max_error,
        )

    def _self_test(self, executor: TransferExecutor) -> None:
        piece_nbytes = min(self.pool.piece_bytes, self.pool.capacity_bytes)
        count = min(SELF_TEST_BLOCKS, self.layout.num_blocks, piece_nbytes // self.sizes.raw)
        self.pool.wait_ready(count * self.sizes.raw)
        run_self_test(
            self.layout,
            self._tensors,
            self._block_of,
            [b * (self.layout.num_blocks - 1) for b in range(count)],  # the first and the last
            executor,
            np.arange(count, dtype=np.int64) * self.sizes.raw,
            self.pool.bytes,
            self.record_event,
            self.packing,
        )

    def _block_of(self, name: str, block_id: int) -> torch.Tensor:
        tensor, dim = self._tensors[name], self._block_dims[name]
        ratio = tensor.shape[dim] // self.layout.num_blocks
        return tensor.narrow(dim, block_id * ratio, ratio)

    def namespace(self, identity: ModelIdentity) -> Namespace:
        """The namespace of this cache's blocks: what must agree, besides the tokens, before they may be reused."""
        return Namespace(
            model=identity.model,
            weights_revision=identity.weights_revision,
            kv_dtype="/".join(self.layout.dtypes),
            layout=self.layout.digest,
            block_size=self.layout.block_size,
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
        claim: "Claim | None" = None,
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

        Raises:
            EngineStateError: the data plane is shutting down.
            InvalidBlockIdError: see `claim`.
        """
        request = TransferRequest(
            plan.direction,
            plan.block_ids,
            plan.offsets,
            self.sizes.raw,
            after,
            on_settled,
            more_follows=more_follows,
            wants_source_released=wants_source_released,
            packed=plan.packed,
            packed_nbytes=self.sizes.packed,
        )
        try:
            if claim is None:
                claim = self.claim(plan.direction, plan.block_ids)
                if plan.direction is Direction.SAVE:
                    request.on_source_released = claim.release
                else:
                    request.on_settled = partial(_release_then, claim, on_settled)
            if request.num_blocks and not self.pool.is_ready(self.pool.capacity_bytes):
                end = int(plan.offsets.max()) + self.sizes.raw
                await self.pool.ready(min(end, self.pool.capacity_bytes))
            self._scheduler.submit(request)
        except DeviceError as error:
            request.fail(error)  # its extents cannot be pinned; the pool has logged that once
        except BaseException:
            request.cancel()
            raise
        return request

    def claim(self, direction: Direction, block_ids: NDArray[np.int32]) -> "Claim":
        """Claim blocks of the cache until the claim is released. A load excludes all others, a save excludes loads.

        Args:
            direction: direction of the transfer.
            block_ids: ids of the blocks, `int32 [n]`.

        Raises:
            InvalidBlockIdError: another transfer excludes one of them; none is claimed.
        """
        return Claim(self._claims, direction, block_ids)

    async def wait(self, requests: Sequence[TransferRequest]) -> None:
        """Wait until requests have settled.

        If it is cancelled, it drops blocks whose transfer has not started, and waits for the others: when it returns,
        nothing touches their blocks of the cache or their extents any more.
        """
        await self._scheduler.wait(requests)

    async def cancel_and_wait(self, requests: Sequence[TransferRequest]) -> None:
        """Cancel requests and wait for their transfers in flight; a cancellation of this call does not shorten that."""
        await self._scheduler.cancel_and_wait(requests)

    # -- figures and end ---------------------------------------------------------------------------

    def figures(self) -> list[PoolFigures]:
        """Figures of the device's staging pool; none on the host, and after it is closed."""
        executor = self._executor
        return [executor.staging.figures()] if isinstance(executor, CudaExecutor) else []

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


class Claim:
    """Blocks of the paged cache that one save or load uses. `DataPlane.claim` creates it."""

    def __init__(self, claims: BlockClaims, direction: Direction, block_ids: NDArray[np.int32]) -> None:
        claims.claim(direction, block_ids)
        self._claims: BlockClaims | None = claims
        self._direction = direction
        self._block_ids = block_ids

    def release(self) -> None:
        """Release the blocks; idempotent."""
        if self._claims is not None:
            self._claims.release(self._direction, self._block_ids)
            self._claims = None


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


def _device_of(layout: KVLayout) -> Device | None:
    kind, _, ordinal = layout.device.partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda":
        raise LayoutError(f"tensors on {layout.device!r}: KVortex serves CUDA devices and host memory only")
    return Device(int(ordinal or torch.cuda.current_device()))


def _make_batcher(config: KVortexConfig) -> Batcher:
    return Batcher(
        max_requests=config.transfer.max_batch_requests,
        max_bytes=config.transfer.max_batch_bytes,
        linger_s=config.transfer.linger_s,
        max_consecutive_loads=config.transfer.max_consecutive_loads,
    )
