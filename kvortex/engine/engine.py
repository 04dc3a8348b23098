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
    """Saves, checks and loads paged KV blocks. Made with `create`, bound to the event loop it was made on.

        async with KVortexEngine.create(KVortexConfig(pool="16GiB")) as engine:
            engine.register_kv_caches({"layers.0": kv0, "layers.1": kv1}, block_size=16)
            hashes = hash_blocks(token_ids, block_size=16)
            await engine.save_blocks(hashes, block_ids)
            loaded = await engine.load_blocks(hashes, block_ids)

    A block is right or missed: its digest is computed as it leaves the cache and compared as it comes back.
    Cancelling `save_blocks` or `load_blocks` returns only when no transfer touches the named blocks any more.

    Hashes and block ids are copied when a method is called, also when what it returns is awaited later: lists and
    arrays may be used for something else at once. Calls that are awaited raise `EngineStateError` on another loop.
    """

    @classmethod
    def create(cls, config: KVortexConfig | None = None, parts: EngineParts | None = None) -> "EngineCreation":
        """`engine = await KVortexEngine.create(config)`, or `async with` it to have it shut down at the end.

        Args:
            config: the settings; the defaults if there are none.
            parts: makes the tier and what carries out transfers; by default what the settings and the device say.
        """
        return EngineCreation(config or KVortexConfig(), parts)

    @classmethod
    def create_sync(cls, config: KVortexConfig | None = None, parts: EngineParts | None = None) -> SyncEngine:
        """An engine on a loop and thread of its own, behind its blocking face, for callers without a loop.

        Args:
            config, parts: as `create` takes them.
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
        """The blocking face, for other threads than the loop's."""
        return SyncEngine(self, self._loop)


class EngineCreation:
    """An engine that is about to be made: await it, or enter it with `async with` to have it shut down at the end."""

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
