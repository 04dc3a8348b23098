"""The engine as programs use it: how it is made, and its blocking face."""

from collections.abc import Generator
from types import TracebackType
from typing import Any

from kvortex.config import KVortexConfig
from kvortex.engine.core import EngineCore
from kvortex.engine.parts import EngineParts
from kvortex.engine.sync import SyncEngine
from kvortex.runtime.loop_thread import LoopThread


class KVortexEngine(EngineCore):
    """Saves, checks and loads paged KV blocks. `create` makes one; it belongs to the event loop that made it.

        async with KVortexEngine.create(KVortexConfig(pool="16GiB")) as engine:
            engine.register_kv_caches({"layers.0": kv0, "layers.1": kv1}, block_size=16)
            hashes = hash_blocks(token_ids, block_size=16)
            await engine.save_blocks(hashes, block_ids)
            loaded = await engine.load_blocks(hashes, block_ids)

    A block is right or a miss: its digest is computed when it leaves the cache and compared when it comes back.
    A cancelled `save_blocks` or `load_blocks` returns only when no transfer touches its blocks any more.

    A method copies hashes and block ids when it is called, even if its result is awaited later. The caller may reuse
    its lists and arrays at once. Coroutines raise `EngineStateError` when they are awaited on another loop.
    """

    @classmethod
    def create(cls, config: KVortexConfig | None = None, parts: EngineParts | None = None) -> "EngineCreation":
        """`engine = await KVortexEngine.create(config)`, or `async with` it to have it shut down at the end.

        Args:
            config: the settings; None for the defaults.
            parts: makes the lower tier and the transfer executor; by default they follow the settings and the device.
        """
        return EngineCreation(config or KVortexConfig(), parts)

    @classmethod
    def create_sync(cls, config: KVortexConfig | None = None, parts: EngineParts | None = None) -> SyncEngine:
        """An engine on a loop and thread of its own, with a blocking API, for callers without an event loop.

        Args:
            config, parts: see `create`.
        """
        thread = LoopThread()

        async def create() -> KVortexEngine:
            return await cls.create(config, parts)

        try:
            return SyncEngine(thread.run(create()), thread.loop, thread)
        except BaseException:
            thread.stop()
            raise

    @property
    def sync(self) -> SyncEngine:
        """The blocking API of this engine, for threads other than the loop's."""
        return SyncEngine(self, self._loop)


class EngineCreation:
    """Makes an engine: await it, or use `async with`, which also shuts the engine down at the end."""

    def __init__(self, config: KVortexConfig, parts: EngineParts | None) -> None:
        self._config = config
        self._parts = parts
        self._engine: KVortexEngine | None = None

    async def _create(self) -> KVortexEngine:
        return KVortexEngine(self._config, self._parts)

    def __await__(self) -> Generator[Any, None, KVortexEngine]:
        return self._create().__await__()

    async def __aenter__(self) -> KVortexEngine:
        self._engine = await self._create()
        return self._engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            await self._engine.shutdown()
