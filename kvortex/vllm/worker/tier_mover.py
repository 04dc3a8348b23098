"""Writes and fetches: one worker moves blocks between its pool and the lower tier."""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Encodings
from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError, KVortexError
from kvortex.hashing import Namespace
from kvortex.tiering import tier_of
from kvortex.tiering.guard import GuardedTier
from kvortex.tiering.keys import key_as_is
from kvortex.tiers import ReadOutcome, ReadRequest, WriteOutcome, WriteRequest
from kvortex.tiers.uses import UseClock
from kvortex.types import SaveOutcome, TransferPlan
from kvortex.vllm.epoch import in_epoch, new_epoch

logger = logging.getLogger(__name__)

FETCH_BATCH = 16  # blocks of one read; a hung tier is noticed before the next one
_NOT_TRIED = WriteOutcome(SaveOutcome.FAILED)


class TierMover:
    """One worker's access to the lower tier. All of it runs on the loop of its data plane.

    Args:
        config: the settings of the tier.
        namespace: the namespace of this rank's blocks.
        pool: this rank's pool, `uint8 [capacity_bytes]`.
        encodings: how blocks are encoded, by form.

    Raises:
        ConfigError: no tier is configured, or its settings are invalid.
    """

    def __init__(
        self, config: KVortexConfig, namespace: Namespace, pool: NDArray[np.uint8], encodings: Encodings
    ) -> None:
        tier = tier_of(config, namespace.digest)
        if tier is None:
            raise ConfigError("no lower tier is configured")
        self._guard = GuardedTier(tier, config.tier.timeout_s, time.monotonic)
        self._pool = pool
        self._encodings = encodings
        self._timeout_s = config.tier.timeout_s
        self._usable = False
        self._opening: asyncio.Task[None] | None = None
        self._uses = UseClock()
        self._epoch = b""

    def forget_all(self) -> None:
        """The weights may have changed: no block that was written so far is found again."""
        self._epoch = new_epoch()

    @property
    def num_pauses(self) -> int:
        """How often the use of the tier was paused because it hung or failed; from any thread."""
        return self._guard.reads.figures().opened + self._guard.writes.figures().opened

    async def open(self) -> None:
        """Open the tier. A failure is logged, and nothing is stored there; if it takes long, do not wait for it."""
        self._opening = asyncio.create_task(self._open())
        if not (await asyncio.wait([self._opening], timeout=self._timeout_s))[0]:
            name = self._guard.tier.name
            logger.error("the %s tier cannot be used yet: it has not opened in %s s", name, self._timeout_s)

    async def _open(self) -> None:
        tier = self._guard.tier
        try:
            await tier.open()
            self._usable = True
        except KVortexError as error:
            logger.error("the %s tier cannot be used, blocks stay in the pool alone: %s", tier.name, error)
        except Exception:  # tiers can be third-party code, and must not stop the server
            logger.exception("the %s tier cannot be used, blocks stay in the pool alone", tier.name)

    async def aclose(self) -> None:
        """Close the tier."""
        self._usable = False
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening], timeout=self._timeout_s)
        try:
            await self._guard.aclose()
        finally:
            self._pool = self._pool[:0].copy()

    async def write(self, keys: Sequence[bytes], plan: TransferPlan, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Write blocks of the pool to the tier.

        Args:
            keys: 32 bytes each, one a block.
            plan: offsets and encodings of the blocks in the pool.
            digests: the digests of their payloads, `uint64 [n]`.

        Returns:
            Which blocks are stored, `bool [n]`, once nothing reads the pool any more.
        """
        stored = np.zeros(plan.num_blocks, dtype=np.bool_)
        settled = _Countdown(plan.num_blocks)

        def done(position: int, outcome: WriteOutcome) -> None:
            stored[position] = outcome.outcome.is_stored
            settled.one()

        used_s = self._uses.chain(plan.num_blocks).tolist()
        requests = [
            WriteRequest(
                self._tier_key(key, form),
                self._payload(plan, i),
                digest,
                self._encodings.raw_nbytes(form),
                self._encodings.codecs[form],
                partial(done, i),
                used_s[i],
            )
            for i, (key, digest, form) in enumerate(zip(keys, digests.tolist(), _forms(plan), strict=True))
        ]
        if not self._usable:
            return stored
        admitted = self._guard.writes.admit(len(requests))
        for request in requests[admitted:]:
            request.settle(_NOT_TRIED)
        if admitted:
            await self._guard.write(requests[:admitted])
            await settled.wait()
        return stored

    async def fetch(self, keys: Sequence[bytes], plan: TransferPlan, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Read blocks of the tier into the pool.

        Args:
            keys: 32 bytes each, one a block.
            plan: offsets and encodings of the blocks in the pool.
            digests: takes the digests of the blocks that arrive, `uint64 [n]`.

        Returns:
            Which blocks have arrived, `bool [n]`, once nothing writes to the pool any more.
        """
        arrived = np.zeros(plan.num_blocks, dtype=np.bool_)
        used_s = self._uses.chain(plan.num_blocks)
        start = 0
        while self._usable and start < plan.num_blocks:
            admitted = self._guard.reads.admit(min(FETCH_BATCH, plan.num_blocks - start))
            if not admitted:  # the breaker is open; blocks that are not read are computed
                break
            await self._fetch_batch(keys, plan, range(start, start + admitted), digests, arrived, used_s)
            start += admitted
        return arrived

    async def _fetch_batch(
        self,
        keys: Sequence[bytes],
        plan: TransferPlan,
        batch: range,
        digests: NDArray[np.uint64],
        arrived: NDArray[np.bool_],
        used_s: NDArray[np.float64],
    ) -> None:
        settled, forms = _Countdown(len(batch)), _forms(plan)

        def done(position: int, outcome: ReadOutcome) -> None:
            form = forms[position]
            expected = self._encodings.codecs[form], self._encodings.payloads[form]
            if outcome.reason is None and (outcome.codec, outcome.payload_bytes) == expected:
                digests[position] = outcome.digest
                arrived[position] = True
            settled.one()

        requests = [
            ReadRequest(self._tier_key(keys[i], forms[i]), self._payload(plan, i), partial(done, i), float(used_s[i]))
            for i in batch
        ]
        await self._guard.read(requests)
        await settled.wait()

    async def touch(self, keys: Sequence[bytes]) -> None:
        """Count the blocks of a chain, from its head, as used now, in whichever encoding the tier has them."""
        if not self._usable or self._guard.writes.refuses:
            return
        used_s = self._uses.chain(len(keys)).tolist()
        named = [in_epoch(key, self._epoch) for key in keys]
        await self._guard.touch(named, used_s)
        if self._encodings.pack_any:
            await self._guard.touch([key_as_is(key) for key in named], used_s)

    def _payload(self, plan: TransferPlan, position: int) -> NDArray[np.uint8]:
        offset = int(plan.offsets[position])
        form = 0 if plan.forms is None else int(plan.forms[position])
        return self._pool[offset : offset + self._encodings.payloads[form]]

    def _tier_key(self, key: bytes, form: int) -> bytes:
        key = in_epoch(key, self._epoch)
        return key_as_is(key) if self._encodings.is_kept_as_is(form) else key


class _Countdown:
    """An event that is set after `count` calls of `one`."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._event = asyncio.Event()

    def one(self) -> None:
        self._left -= 1
        if not self._left:
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


def _forms(plan: TransferPlan) -> list[int]:
    """The form of each block of a plan."""
    forms: list[int] = [0] * plan.num_blocks if plan.forms is None else plan.forms.tolist()
    return forms
