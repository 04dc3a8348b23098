"""The lower tier of a server: what the scheduler half knows of it, and what a worker half moves."""

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Forms
from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError, KVortexError
from kvortex.hashing import Namespace, cache_key
from kvortex.sync import LoopThread
from kvortex.tiering import tier_of
from kvortex.tiers import ReadOutcome, ReadRequest, Tier, WriteOutcome, WriteRequest
from kvortex.types import BlockHash, TransferPlan

logger = logging.getLogger(__name__)

KEY_BYTES = 32
EPOCH_BYTES = 16
SCAN_WAIT_S = 0.5  # a small store is known when the server starts, a large one becomes so while it serves
REMEMBERED_KEYS = 1 << 20  # some 100 bytes each
FETCH_BATCH = 16  # blocks that a tier is asked for at once: they come in order, and none waits for the last


def check_supported(config: KVortexConfig) -> None:
    """Refuse what the connector does not do with a lower tier.

    Raises:
        ConfigError: another inclusion or admission than the default.
    """
    for name, value in (("tier_inclusion", "inclusive"), ("tier_admission", "always")):
        if getattr(config, name) != value:
            raise ConfigError(f"in vLLM {name} can be {value!r} only, not {getattr(config, name)!r}")


class _Memory:
    """The last keys that were added, up to `REMEMBERED_KEYS`."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[bytes]) -> None:
        self._keys.update(dict.fromkeys(keys))
        while len(self._keys) > REMEMBERED_KEYS:
            del self._keys[next(iter(self._keys))]

    def discard(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._keys.pop(key, None)

    def clear(self) -> None:
        self._keys.clear()


class TierIndex:
    """Which blocks the lower tier has, as the scheduler half knows: the first rank's, all ranks write the same blocks.

    Args:
        config: names the tier.
        namespace: of the first rank.
    """

    def __init__(self, config: KVortexConfig, namespace: Namespace) -> None:
        tier = tier_of(config, namespace)
        if tier is None:
            raise ConfigError("no lower tier is configured")
        self._tier = tier
        self._namespace = namespace
        self._epoch = b""
        self._written = _Memory()  # by this server's workers; the tier's own index knows of it after its next scan
        self._lost = _Memory()
        self._thread: LoopThread | None = LoopThread()
        self._thread.run(self._open())

    async def _open(self) -> None:
        await self._tier.open()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tier.scanned(), SCAN_WAIT_S)

    def keys_of(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Under which keys the workers keep these blocks."""
        return [_in_epoch(block_hash, self._epoch) for block_hash in hashes]

    def forget_all(self) -> None:
        """What is there belongs to other weights from now on: it is not asked for again."""
        self._epoch = os.urandom(EPOCH_BYTES)
        self._written.clear()
        self._lost.clear()

    def known_run(self, keys: Sequence[bytes]) -> list[int]:
        """For the leading keys that are known to be there, the bytes that reading them takes; 0 where only the workers
        can know."""
        run = []
        sizes = self._tier.lookup([cache_key(self._namespace, BlockHash(key)) for key in keys])
        for key, nbytes in zip(keys, sizes, strict=True):
            if key in self._lost or not (nbytes or key in self._written):
                break
            run.append(nbytes)
        return run

    def written(self, keys: Sequence[bytes]) -> None:
        """The workers have written these blocks."""
        self._written.add(keys)
        self._lost.discard(keys)

    def lost(self, keys: Sequence[bytes]) -> None:
        """The workers could not read these blocks."""
        self._written.discard(keys)
        self._lost.add(keys)

    def close(self) -> None:
        """Close the tier; idempotent."""
        if self._thread is not None:
            self._thread.run(self._tier.aclose())
            self._thread.stop()
            self._thread = None


class TierMover:
    """A worker's side of the lower tier; all on the loop of its data plane.

    Args:
        config: names the tier.
        namespace: of this rank.
        pool: its bytes.
        forms: of the blocks.
    """

    def __init__(self, config: KVortexConfig, namespace: Namespace, pool: NDArray[np.uint8], forms: Forms) -> None:
        tier = tier_of(config, namespace)
        if tier is None:
            raise ConfigError("no lower tier is configured")
        self._tier: Tier = tier
        self._namespace = namespace
        self._pool = pool
        self._forms = forms
        self._timeout_s = config.tier_timeout_s
        self._usable = False
        self._epoch = b""

    def forget_all(self) -> None:
        """Other weights may follow: what was written so far is not found again."""
        self._epoch = os.urandom(EPOCH_BYTES)

    async def open(self) -> None:
        """Open the tier; one that cannot be opened is logged and takes nothing."""
        try:
            await self._tier.open()
            self._usable = True
        except KVortexError as error:
            logger.error("the %s tier cannot be used, blocks stay in the pool alone: %s", self._tier.name, error)

    async def aclose(self) -> None:
        """Close it; nothing may be under way."""
        self._usable = False
        await self._tier.aclose()
        self._pool = self._pool[:0].copy()

    async def write(self, keys: Sequence[bytes], plan: TransferPlan, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Write blocks of the pool; returns which are stored, `bool [n]`, when nothing reads the pool any more."""
        stored = np.zeros(plan.num_blocks, dtype=np.bool_)
        settled = _Countdown(plan.num_blocks)

        def done(position: int, outcome: WriteOutcome) -> None:
            stored[position] = outcome.outcome.is_stored
            settled.one()

        requests = [
            WriteRequest(
                self._tier_key(key),
                self._payload(plan, i),
                digest,
                self._forms.payloads.raw,
                self._forms.codec_number(_is_packed(plan, i)),
                partial(done, i),
            )
            for i, (key, digest) in enumerate(zip(keys, digests.tolist(), strict=True))
        ]
        if requests and self._usable:
            await self._tier.write(requests, deadline_s=self._timeout_s)
            await settled.wait()
        return stored

    async def fetch(self, keys: Sequence[bytes], plan: TransferPlan, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Read blocks into the pool and their digests into `digests` (`uint64 [n]`).

        Returns:
            Which have arrived, `bool [n]`, when nothing writes to the pool any more.
        """
        arrived = np.zeros(plan.num_blocks, dtype=np.bool_)
        for start in range(0, plan.num_blocks, FETCH_BATCH):
            batch = range(start, min(start + FETCH_BATCH, plan.num_blocks))
            await self._fetch_batch(keys, plan, batch, digests, arrived)
        return arrived

    async def _fetch_batch(
        self,
        keys: Sequence[bytes],
        plan: TransferPlan,
        batch: range,
        digests: NDArray[np.uint64],
        arrived: NDArray[np.bool_],
    ) -> None:
        settled = _Countdown(len(batch))

        def done(position: int, outcome: ReadOutcome) -> None:
            packed = _is_packed(plan, position)
            expected = self._forms.codec_number(packed), self._forms.payload_nbytes(packed)
            if outcome.reason is None and (outcome.codec, outcome.payload_bytes) == expected:
                digests[position] = outcome.digest
                arrived[position] = True
            settled.one()

        requests = [ReadRequest(self._tier_key(keys[i]), self._payload(plan, i), partial(done, i)) for i in batch]
        if self._usable:
            await self._tier.read(requests, deadline_s=self._timeout_s)
            await settled.wait()

    def _payload(self, plan: TransferPlan, position: int) -> NDArray[np.uint8]:
        offset = int(plan.offsets[position])
        return self._pool[offset : offset + self._forms.payload_nbytes(_is_packed(plan, position))]

    def _tier_key(self, key: bytes) -> bytes:
        return cache_key(self._namespace, BlockHash(_in_epoch(key, self._epoch)))


class _Countdown:
    """An event that is set after so many calls."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._event = asyncio.Event()

    def one(self) -> None:
        self._left -= 1
        if not self._left:
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


def split_keys(joined: bytes) -> list[bytes]:
    """The keys of a job."""
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


def _in_epoch(key: bytes, epoch: bytes) -> bytes:
    return hashlib.sha256(epoch + key).digest() if epoch else key


def _is_packed(plan: TransferPlan, position: int) -> bool:
    return plan.packed is not None and bool(plan.packed[position])
