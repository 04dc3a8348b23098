"""The blocking face of an engine, for callers without an event loop, from any thread."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.errors import EngineStateError
from kvortex.layout import KVLayout
from kvortex.stats import StatsSnapshot
from kvortex.types import BlockHash, LoadResult, SaveResult

if TYPE_CHECKING:
    from kvortex.engine import KVortexEngine

T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvortex-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result()

    def stop(self) -> None:
        """End the loop and the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


class SyncEngine:
    """Runs an engine's calls on its loop and waits for them. Thread-safe.

    `engine.sync` gives one for an engine on a loop of yours; `KVortexEngine.create_sync` makes an engine on a
    loop and thread of its own:

        with KVortexEngine.create_sync(KVortexConfig(cpu_pool_bytes=1 << 30)) as engine:
            engine.register_kv_caches(kv_caches, block_size=16)
            engine.save_blocks(hashes, block_ids)

    A `timeout_s` that passes cancels the call, waits for what the device has begun, and raises `TimeoutError`.
    All methods raise `EngineStateError` on the loop's own thread, which they would block for ever.
    """

    def __init__(
        self, engine: "KVortexEngine", loop: asyncio.AbstractEventLoop, thread: LoopThread | None = None
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._thread = thread

    def register_kv_caches(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
    ) -> KVLayout:
        """As `KVortexEngine.register_kv_caches`."""

        def register() -> KVLayout:
            return self._engine.register_kv_caches(kv_caches, block_size, num_blocks=num_blocks, block_dim=block_dim)

        return self._wait(_on_loop(register), None)

    def save_blocks(
        self,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int] | NDArray[np.integer],
        *,
        stream: object = None,
        timeout_s: float | None = None,
    ) -> SaveResult:
        """As `KVortexEngine.save_blocks`; the default stream is torch's current one in this thread."""
        stream = self._engine.current_stream() if stream is None else stream
        return self._wait(self._engine.save_blocks(hashes, block_ids, stream=stream), timeout_s)

    def load_blocks(
        self,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int] | NDArray[np.integer],
        *,
        stream: object = None,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
    ) -> LoadResult:
        """As `KVortexEngine.load_blocks`; the default stream is torch's current one in this thread."""
        stream = self._engine.current_stream() if stream is None else stream
        call = self._engine.load_blocks(hashes, block_ids, stream=stream, deadline_s=deadline_s)
        return self._wait(call, timeout_s)

    def prefetch(self, hashes: Sequence[BlockHash], *, timeout_s: float | None = None) -> int:
        """As `KVortexEngine.prefetch`."""
        return self._wait(self._engine.prefetch(hashes), timeout_s)

    def check_blocks(self, hashes: Sequence[BlockHash]) -> NDArray[np.bool_]:
        """As `KVortexEngine.check_blocks`; does not go through the loop."""
        return self._engine.check_blocks(hashes)

    def match_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """As `KVortexEngine.match_prefix`; does not go through the loop."""
        return self._engine.match_prefix(hashes)

    def get_stats(self) -> StatsSnapshot:
        """As `KVortexEngine.get_stats`."""
        return self._engine.get_stats()

    def clear(self) -> None:
        """As `KVortexEngine.clear`."""
        self._wait(_on_loop(self._engine.clear), None)

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
        """As `KVortexEngine.shutdown`; ends the thread that `create_sync` made."""
        if self._loop.is_closed():
            return
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
            on_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            on_loop = False
        if on_loop or self._loop.is_closed():
            call.close()
            why = "await the engine's own method on its loop" if on_loop else "the engine has been shut down"
            raise EngineStateError(f"cannot wait for the engine here: {why}")
        limited = asyncio.wait_for(call, timeout_s) if timeout_s is not None else call
        future = asyncio.run_coroutine_threadsafe(limited, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


async def _on_loop(function: Callable[[], T]) -> T:
    return function()
