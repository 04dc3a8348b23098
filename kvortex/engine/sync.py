"""The blocking API of an engine, for callers without an event loop, from any thread."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Final, Self, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.engine.arguments import BlockHashes, BlockTables
from kvortex.engine.core import EngineCore
from kvortex.engine.leases import Lease
from kvortex.errors import EngineStateError
from kvortex.groups import KVGroup, Match
from kvortex.layout import KVLayout, PagedCache
from kvortex.runtime.loop_thread import LoopThread, running_loop
from kvortex.stats import StatsSnapshot
from kvortex.types import BlockHash, LoadResult, MissReason, SaveResult

T = TypeVar("T")

LOOK_AT_LOOP_S: Final = 1.0
"""Interval in seconds at which a waiting caller checks that the engine's loop still runs."""


def _shut_down(face: "weakref.ref[SyncEngine]") -> None:
    if (engine := face()) is not None:
        engine.shutdown()


class SyncEngine:
    """Runs an engine's calls on its loop and waits for them. Thread-safe.

    `engine.sync` gives one for an engine on a loop of yours; `KVortexEngine.create_sync` makes an engine on a
    loop and thread of its own:

        with KVortexEngine.create_sync(KVortexConfig(pool="1GiB")) as engine:
            engine.register_kv_caches(kv_caches, block_size=16)
            engine.save_blocks(hashes, block_ids)

    When `timeout_s` has passed, the call is cancelled, transfers in flight end, and `TimeoutError` is raised.
    All methods raise `EngineStateError` on the loop's own thread, because they would block it for ever.
    """

    def __init__(self, engine: EngineCore, loop: asyncio.AbstractEventLoop, thread: LoopThread | None = None) -> None:
        self._engine = engine
        self._loop = loop
        self._thread = thread
        self._one_ends = threading.Lock()
        self._at_exit: Callable[[], None] | None = None
        if thread is not None:  # a thread that simply stopped would leave tasks and the pool behind
            self._at_exit = partial(_shut_down, weakref.ref(self))
            atexit.register(self._at_exit)

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
        """As `KVortexEngine.register_kv_caches`."""

        def register() -> KVLayout | PagedCache:
            return self._engine.register_kv_caches(
                kv_caches, block_size, num_blocks=num_blocks, block_dim=block_dim, groups=groups, heads_dim=heads_dim
            )

        return self._wait(_on_loop(register), None)

    def save_blocks(
        self,
        hashes: BlockHashes,
        block_ids: BlockTables,
        *,
        stream: object = None,
        timeout_s: float | None = None,
    ) -> SaveResult:
        """As `KVortexEngine.save_blocks`; the default stream is torch's current one in this thread."""
        return self._wait(self._engine.save_blocks(hashes, block_ids, stream=stream), timeout_s)

    def load_blocks(
        self,
        hashes: BlockHashes,
        block_ids: BlockTables,
        *,
        stream: object = None,
        deadline_s: float | EllipsisType | None = ...,
        timeout_s: float | None = None,
    ) -> LoadResult:
        """As `KVortexEngine.load_blocks`; the default stream is torch's current one in this thread."""
        call = self._engine.load_blocks(hashes, block_ids, stream=stream, deadline_s=deadline_s)
        return self._wait(call, timeout_s)

    def prefetch(self, hashes: BlockHashes, *, timeout_s: float | None = None) -> int:
        """As `KVortexEngine.prefetch`."""
        return self._wait(self._engine.prefetch(hashes), timeout_s)

    def check_blocks(self, hashes: BlockHashes, group: str | None = None) -> NDArray[np.bool_]:
        """As `KVortexEngine.check_blocks`; does not go through the loop."""
        return self._engine.check_blocks(hashes, group)

    def match_request(self, hashes: BlockHashes) -> Match:
        """As `KVortexEngine.match_request`; does not go through the loop."""
        return self._engine.match_request(hashes)

    def match_prefix(self, hashes: BlockHashes) -> int:
        """As `KVortexEngine.match_prefix`; does not go through the loop."""
        return self._engine.match_prefix(hashes)

    def miss_reason(self, block_hash: BlockHash, group: str | None = None) -> MissReason | None:
        """As `KVortexEngine.miss_reason`; does not go through the loop."""
        return self._engine.miss_reason(block_hash, group)

    def wait_pinned(self, *, timeout_s: float | None = None) -> None:
        """As `KVortexEngine.wait_pinned`."""
        self._wait(self._engine.wait_pinned(), timeout_s)

    def pin(self, hashes: BlockHashes, *, ttl_s: float) -> Lease:
        """As `KVortexEngine.pin`."""
        return self._wait(_on_loop(partial(self._engine.pin, hashes, ttl_s=ttl_s)), None)

    def invalidate(self, hashes: BlockHashes, *, timeout_s: float | None = None) -> bool:
        """As `KVortexEngine.invalidate`."""
        return self._wait(self._engine.invalidate(hashes), timeout_s)

    def get_stats(self) -> StatsSnapshot:
        """As `KVortexEngine.get_stats`."""
        return self._engine.get_stats()

    def clear(self, *, tiers: bool = False, timeout_s: float | None = None) -> bool:
        """As `KVortexEngine.clear`; True if nothing that was to be forgotten may be left."""
        return self._wait(_clear(self._engine, tiers), timeout_s)

    def wait_tier(self, *, timeout_s: float | None = None) -> bool:
        """As `KVortexEngine.wait_tier`."""
        return self._wait(self._engine.wait_tier(), timeout_s)

    def flush(self, *, timeout_s: float | None = None) -> None:
        """As `KVortexEngine.flush`."""
        self._wait(self._engine.flush(), timeout_s)

    def drain(self, *, timeout_s: float | None = None) -> None:
        """As `KVortexEngine.drain`."""
        self._wait(self._engine.drain(), timeout_s)

    def shutdown(self) -> None:
        """As `KVortexEngine.shutdown`; also ends the thread of `create_sync`. Several threads may call it at once."""
        if sys.is_finalizing():
            return  # the thread of the loop has been stopped for good, and all memory is about to go
        self._refuse_to_block_a_loop(self._loop if not self._loop.is_closed() else running_loop())
        with self._one_ends:
            if self._at_exit is not None:
                atexit.unregister(self._at_exit)
            if sys.is_finalizing():
                return  # no other thread runs any more, and the process takes everything along
            if not self._engine.is_shut_down:
                if self._loop.is_closed():
                    asyncio.run(self._engine.shutdown())
                else:
                    self._wait(self._engine.shutdown(), None)
            if self._thread is not None:
                self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _wait(self, call: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        try:
            self._refuse_to_block_a_loop(self._loop)
            if self._loop.is_closed():
                raise EngineStateError("the engine has been shut down, or the loop that it was made on is closed")
        except EngineStateError:
            call.close()
            raise
        limited = asyncio.wait_for(call, timeout_s) if timeout_s is not None else call
        if self._thread is not None:
            return self._result(self._thread.submit(limited))
        return self._result(asyncio.run_coroutine_threadsafe(limited, self._loop))

    def _result(self, future: Future[T]) -> T:
        """The result of a call. A loop of the caller's may be closed before the call ends."""
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(LOOK_AT_LOOP_S)
                if future.done():
                    return future.result()  # the call's own TimeoutError, unless it has just ended
                if self._loop.is_closed() or sys.is_finalizing():
                    raise EngineStateError("the engine's loop was closed while the call was under way")
        except concurrent.futures.CancelledError:
            raise EngineStateError("the engine's loop ended while the call was under way") from None
        except KeyboardInterrupt:
            future.cancel()
            raise

    @staticmethod
    def _refuse_to_block_a_loop(loop: asyncio.AbstractEventLoop | None) -> None:
        if loop is not None and running_loop() is loop:
            raise EngineStateError("cannot wait for the engine here: await the engine's own method on its loop")


async def _on_loop(function: Callable[[], T]) -> T:
    return function()


async def _clear(engine: EngineCore, tiers: bool) -> bool:
    if tiers:
        return await engine.clear(tiers=True)
    engine.clear()
    return True
