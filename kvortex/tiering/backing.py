"""One tier as a pool uses it: what writing and fetching share."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Encodings
from kvortex.config import UNNAMED_MODEL, KVortexConfig
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.planes.control import ControlPlane
from kvortex.stats import EngineStats
from kvortex.tiering.guard import CLOSE_TIMEOUT_S, GuardedTier
from kvortex.tiering.keys import key_as_is, keys_as_is, split_keys
from kvortex.tiers import Tier
from kvortex.tiers.uses import UseClock
from kvortex.types import Direction

logger = logging.getLogger(__name__)

NOT_KNOWN: Final = 0
PACKED: Final = 1  # or as they are, where nothing is packed
AS_IS: Final = 2


class TierLink:
    """A pool and a tier, and whether there is anything to be had from it.

    Args:
        config: the engine's settings.
        control: decides what is in the pool.
        pool: its bytes.
        encodings: how blocks are encoded, and their sizes.
        namespace: what the blocks' bytes belong to.
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
        encodings: Encodings,
        namespace: Namespace,
        tier: Tier,
        stats: EngineStats,
    ) -> None:
        check_model_is_named(tier, namespace)
        self.config = config
        self.control = control
        self.encodings = encodings
        self.tier = tier
        self.guard = GuardedTier(tier, config.tier_timeout_s, asyncio.get_running_loop().time)
        self.opened = asyncio.Event()
        """The tier is open, cannot be used, or has not opened in time."""
        self.usable = False
        self.closing = False
        self.uses = UseClock()
        self.pool = pool
        self._tasks: dict[asyncio.Task[None], None] = {}  # in the order of their start
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
        """Cancel what runs, and wait for it, unless it does not let itself be cancelled."""
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            _, running = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            if running:
                logger.warning("%d calls of the %s tier cannot be cancelled", len(running), self.tier.name)
                return

    async def aclose(self) -> None:
        """Close the tier; no task may be left. Raises what the tier raises, and lets the pool go nevertheless."""
        try:
            await self.guard.aclose()
        finally:
            self.pool = self.pool[:0].copy()  # the pool can be unmapped unless a late read still holds a part of it

    # -- keys --------------------------------------------------------------------------------------

    def key_of(self, block_hash: bytes, packed: bool) -> bytes:
        """Under which key the tier has a block in one of its encodings."""
        return key_as_is(block_hash) if self.encodings.payloads.packs and not packed else block_hash

    def encodings_known(self, hashes: NDArray[np.uint64]) -> NDArray[np.int8]:
        """In which encoding the tier is known to have each block: NOT_KNOWN, PACKED or AS_IS, `int8 [n]`.

        One step, from memory, from any thread.
        """
        found = self._known(hashes).astype(np.int8)
        if self.encodings.payloads.packs and not found.all():
            others = np.flatnonzero(found == NOT_KNOWN)
            found[others] = np.where(self._known(keys_as_is(hashes[others])), AS_IS, NOT_KNOWN)
        return found

    def _known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = self.tier.lookup(split_keys(keys))
        return np.array(found, dtype=np.int64) > 0 if any(found) else np.zeros(len(keys), dtype=np.bool_)

    async def ask_encodings(self, hashes: Sequence[bytes]) -> list[int]:
        """The same from the store itself, for blocks that are not known to be there."""
        packed = await self.guard.contains([self.key_of(block_hash, True) for block_hash in hashes])
        found = [PACKED if there else NOT_KNOWN for there in packed]
        others = [i for i, encoding in enumerate(found) if encoding == NOT_KNOWN]
        if self.encodings.payloads.packs and others and not self.guard.reads.refuses:
            as_is = await self.guard.contains([self.key_of(hashes[i], False) for i in others])
            for i, there in zip(others, as_is, strict=True):
                found[i] = AS_IS if there else NOT_KNOWN
        return found

    def payload(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A block's payload in the pool; `nbytes` is the size of its extent."""
        return self.pool[offset : offset + self.encodings.payload_nbytes(self.control.is_packed(nbytes))]

    async def delete(self, hashes: NDArray[np.uint64]) -> None:
        """Take blocks away from the tier, in whichever encoding."""
        keys = split_keys(hashes)
        if self.encodings.payloads.packs:
            keys += split_keys(keys_as_is(hashes))
        await self.guard.delete(keys)

    async def touch(self, hashes: NDArray[np.uint64], found: NDArray[np.int8], used_s: NDArray[np.float64]) -> None:
        """Count blocks that the tier has, in these encodings, as used at these times."""
        for encoding, of_encoding in ((PACKED, hashes), (AS_IS, keys_as_is(hashes))):
            there = found == encoding
            if there.any():
                await self.guard.touch(split_keys(of_encoding[there]), used_s[there].tolist())

    def record(self, direction: Direction, blocks: int, seconds: float) -> None:
        """Count one transfer."""
        if blocks:
            nbytes = blocks * self.encodings.payloads.packed
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
