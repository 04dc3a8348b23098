"""The lower tier behind one pool: how the blocks of the pool are named, found and counted in the tier."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Encodings
from kvortex.config import KVortexConfig
from kvortex.config.sections import require_named_model
from kvortex.hashing import Namespace
from kvortex.planes.control import OnEvicted
from kvortex.planes.plans import FetchPlan, HeldBlocks
from kvortex.stats import EngineStats
from kvortex.tiering.guard import GuardedTier
from kvortex.tiering.keys import key_as_is, keys_as_is, split_keys
from kvortex.tiering.state import TierState, TierTasks
from kvortex.tiers import Tier, WriteRequest
from kvortex.tiers.payload import payload_digest
from kvortex.tiers.uses import UseClock
from kvortex.types import Direction, MissReason, form_of

NOT_KNOWN: Final = 0
USUAL: Final = 1  # packed, or raw where the blocks of its group are never packed
AS_IS: Final = 2  # raw, although the blocks of its group are packed

WORD_BYTES: Final = 8  # of the digest behind each part of a block


class HasContains(Protocol):
    """What a tier needs to know of the index."""

    def contains_mask(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """See `CacheIndex.contains_mask`."""
        ...


class TierControl(Protocol):
    """The calls of a control plane that move blocks between a pool and its lower tier; see `ControlPlane`."""

    on_evicted: OnEvicted | None

    @property
    def index(self) -> HasContains: ...

    def plan_fetch(
        self,
        keys: NDArray[np.uint64],
        forms: NDArray[np.uint8],
        owner: str,
        *,
        chain: NDArray[np.uint64] | None = None,
    ) -> FetchPlan: ...

    def finish_fetch(self, slot: int, offset: int, form: int, digest: int) -> None: ...

    def abandon_fetch(self, slot: int, offset: int, reason: MissReason) -> None: ...

    def hold(self, keys: NDArray[np.uint64]) -> HeldBlocks: ...

    def release(self, slots: NDArray[np.int64]) -> None: ...

    def free(self, offset: int) -> None: ...


@dataclass(eq=False)
class TieredPool:
    """The pool above the tier.

    Args:
        control: decides which blocks are in the pool, and where.
        bytes: the pool, `uint8 [capacity_bytes]`.
        encodings: how blocks are encoded, and the size of each encoding.
        num_parts: how many parts a block has. If there are several, their digests stand at the end of its payload as
            words of 64 bits, and the digest of the block in the pool is that of these words. That in the tier is always
            the digest of the whole payload.
    """

    control: TierControl
    bytes: NDArray[np.uint8]
    encodings: Encodings
    num_parts: int = 1

    def payload(self, offset: int, form: int) -> NDArray[np.uint8]:
        """The payload of the block at an offset, `uint8 [n]`, as a view of the pool."""
        return self.bytes[offset : offset + self.encodings.payloads[form]]

    def digest_in_tier(self, request: WriteRequest) -> WriteRequest:
        """A write with the digest that the tier has to know; it reads the payload of a block with several parts."""
        return replace(request, digest=payload_digest(np.frombuffer(request.payload, dtype=np.uint8)))

    def digest_in_pool(self, offset: int, form: int, digest: int) -> int:
        """The digest that the index has to know of a payload which has arrived.

        Args:
            offset: of its extent.
            form: of the block.
            digest: of its whole payload.
        """
        if self.num_parts == 1:
            return digest
        payload = self.payload(offset, form)
        return payload_digest(payload[len(payload) - WORD_BYTES * self.num_parts :])

    def release(self) -> None:
        """Let go of the pool's memory, so that it can be unmapped once no late read holds a view of it."""
        self.bytes = self.bytes[:0].copy()


class BackingTier:
    """One pool's lower tier, as both write-behind and fetches use it.

    Args:
        config: the engine's settings.
        pool: the pool above the tier.
        tier: the tier, not opened.
        stats: counts the transfers.

    Attributes:
        on_written: called with the hash of each block that the tier has stored.
        on_lost: called with the hash of each block that the tier could not give back.
    """

    def __init__(self, config: KVortexConfig, pool: TieredPool, tier: Tier, stats: EngineStats) -> None:
        self.config = config
        self.pool = pool
        self.control = pool.control
        self.encodings = pool.encodings
        self.tier = tier
        self.guard = GuardedTier(tier, config.tier.timeout_s, asyncio.get_running_loop().time)
        self.state = TierState()
        self.tasks = TierTasks(tier.name)
        self.uses = UseClock()
        self.on_written: Callable[[bytes], None] | None = None
        self.on_lost: Callable[[bytes], None] | None = None
        self._stats = stats

    async def aclose(self) -> None:
        """Close the tier; no task may be left. The pool's memory is released even if the tier raises.

        Raises:
            Exception: whatever the tier raises.
        """
        try:
            await self.guard.aclose()
        finally:
            self.pool.release()

    # -- keys --------------------------------------------------------------------------------------

    def key_of(self, block_hash: bytes, form: int) -> bytes:
        """The tier's key of a block in one of its forms, 32 bytes."""
        return key_as_is(block_hash) if self.encodings.is_kept_as_is(form) else block_hash

    def form_of(self, group: int, encoding: int) -> int:
        """The form of a block of a group that the tier has in an encoding."""
        return form_of(group, False) if encoding == AS_IS else self.encodings.usual_form(group)

    def encodings_known(self, hashes: NDArray[np.uint64]) -> NDArray[np.int8]:
        """The encoding in which the tier is known to have each block. One step, from memory, from any thread.

        Args:
            hashes: block hashes, `uint64 [n, 4]`.

        Returns:
            NOT_KNOWN, USUAL or AS_IS, `int8 [n]`.
        """
        found = self._known(hashes).astype(np.int8)
        if self.encodings.pack_any and not found.all():
            others = np.flatnonzero(found == NOT_KNOWN)
            found[others] = np.where(self._known(keys_as_is(hashes[others])), AS_IS, NOT_KNOWN)
        return found

    def _known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = self.tier.lookup(split_keys(keys))
        return np.array(found, dtype=np.int64) > 0 if any(found) else np.zeros(len(keys), dtype=np.bool_)

    async def ask_encodings(self, hashes: Sequence[bytes]) -> list[int]:
        """The same as `encodings_known`, from the store itself, for blocks that are not known to be there."""
        usual = await self.guard.find(hashes)
        found = [USUAL if there else NOT_KNOWN for there in usual]
        others = [i for i, encoding in enumerate(found) if encoding == NOT_KNOWN]
        if self.encodings.pack_any and others and not self.guard.reads.refuses:
            as_is = await self.guard.find([key_as_is(hashes[i]) for i in others])
            for i, there in zip(others, as_is, strict=True):
                found[i] = AS_IS if there else NOT_KNOWN
        return found

    # -- calls that move no blocks -----------------------------------------------------------------

    async def delete(self, hashes: NDArray[np.uint64]) -> None:
        """Delete blocks, `uint64 [n, 4]`, from the tier in both encodings."""
        await self.guard.delete(self._in_both_encodings(hashes))

    async def delete_surely(self, hashes: NDArray[np.uint64]) -> bool:
        """The same; False if the tier may have some of them still."""
        return await self.guard.delete_surely(self._in_both_encodings(hashes))

    def _in_both_encodings(self, hashes: NDArray[np.uint64]) -> list[bytes]:
        keys = split_keys(hashes)
        return keys + split_keys(keys_as_is(hashes)) if self.encodings.pack_any else keys

    async def touch(self, hashes: NDArray[np.uint64], found: NDArray[np.int8], used_s: NDArray[np.float64]) -> None:
        """Count blocks as used.

        Args:
            hashes: block hashes, `uint64 [n, 4]`.
            found: the encoding in which the tier has each of them, `int8 [n]`; those that are NOT_KNOWN are left out.
            used_s: times of their use, `float64 [n]`.
        """
        for encoding, of_encoding in ((USUAL, hashes), (AS_IS, keys_as_is(hashes))):
            there = found == encoding
            if there.any():
                await self.guard.touch(split_keys(of_encoding[there]), used_s[there].tolist())

    def record(self, direction: Direction, blocks: int, nbytes: int, seconds: float) -> None:
        """Count one transfer of `blocks` blocks."""
        if blocks:
            self._stats.record_transfer(direction, self.tier.name, blocks=blocks, nbytes=nbytes, seconds=seconds)


def check_model_is_named(tier: Tier, namespace: Namespace) -> None:
    """Refuse a tier that other processes share if the model has no name: blocks of two models would have equal keys.

    Raises:
        ConfigError: the message says what to set.
    """
    if tier.outlives_process:
        require_named_model(f"the {tier.name} tier", namespace.model)
