"""One tier as a pool uses it: what writing and fetching share."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Forms
from kvortex.config import UNNAMED_MODEL, KVortexConfig
from kvortex.control import ControlPlane
from kvortex.errors import ConfigError, EngineStateError
from kvortex.hashing import Namespace, cache_key
from kvortex.stats import EngineStats
from kvortex.tiers import Tier
from kvortex.types import BlockHash, Direction

logger = logging.getLogger(__name__)


class TierLink:
    """A pool and a tier, and whether there is anything to be had from it.

    Args:
        config: of the engine.
        control: of the pool.
        pool: its bytes.
        forms: of the blocks.
        namespace: of the blocks.
        tier: the tier.
        stats: counts what moves.

    Raises:
        ConfigError: blocks of the tier outlive the process, and nothing says of which model they are.
    """

    def __init__(
        self,
        config: KVortexConfig,
        control: ControlPlane,
        pool: NDArray[np.uint8],
        forms: Forms,
        namespace: Namespace,
        tier: Tier,
        stats: EngineStats,
    ) -> None:
        check_model_is_named(tier, namespace)
        self.config = config
        self.control = control
        self.forms = forms
        self.tier = tier
        self.opened = asyncio.Event()
        self.usable = False
        self.closing = False
        self._tasks: dict[asyncio.Task[None], None] = {}  # in the order of their start
        self.pool = pool
        self._namespace = namespace
        self._stats = stats

    @property
    def may_work(self) -> bool:
        """The tier is there, or is not known yet not to be."""
        return not self.closing and (self.usable or not self.opened.is_set())

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something until it ends, or `end_tasks` ends it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a tier's task ended in an unexpected error", exc_info=error)

    async def end_tasks(self) -> None:
        """Cancel what runs, and wait for it."""
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def aclose(self) -> None:
        """Close the tier; no task may be left."""
        await self.tier.aclose()
        self.pool = self.pool[:0].copy()  # the pool can be unmapped unless a late read still holds a part of it

    def key_of(self, block_hash: bytes) -> bytes:
        """Under which key the tier has a block."""
        return cache_key(self._namespace, BlockHash(block_hash))

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """For each block the bytes that reading it takes, 0 where the tier is not known to have it."""
        return self.tier.lookup([self.key_of(block_hash) for block_hash in hashes])

    def payload(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A block's payload in the pool; `nbytes` is the size of its extent."""
        return self.pool[offset : offset + self.forms.payload_nbytes(self.control.is_packed(nbytes))]

    async def delete(self, hashes: Sequence[bytes]) -> None:
        """Take blocks away from the tier."""
        with contextlib.suppress(EngineStateError):  # closed meanwhile
            keys = [self.key_of(block_hash) for block_hash in hashes]
            await self.tier.delete(keys, deadline_s=self.config.tier_timeout_s)

    def record(self, direction: Direction, blocks: int, seconds: float) -> None:
        """Count one transfer."""
        if blocks:
            nbytes = blocks * self.forms.payloads.packed
            self._stats.record_transfer(direction, self.tier.name, blocks=blocks, nbytes=nbytes, seconds=seconds)


def check_model_is_named(tier: Tier, namespace: Namespace) -> None:
    """Refuse to keep blocks of a model without a name where another model's may lie: their keys would be the same.

    Raises:
        ConfigError: the message says what to set.
    """
    if tier.outlives_process and namespace.model == UNNAMED_MODEL:
        raise ConfigError(
            f"the {tier.name} tier keeps blocks for other processes, which may run another model: name this one, e.g. "
            'KVortexConfig(..., identity=ModelIdentity(model="meta-llama/Llama-3.1-8B", weights_revision="0e9e39f"))'
        )


def split_keys(keys: NDArray[np.uint64]) -> list[bytes]:
    """Packed keys, `uint64 [n, 4]`, one by one."""
    joined = np.ascontiguousarray(keys).tobytes()
    return [joined[start : start + 32] for start in range(0, len(joined), 32)]


def join_keys(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Keys of 32 bytes as `uint64 [n, 4]`."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(len(keys), 4)
