"""The scheduler half's view of the lower tier: which blocks it has."""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from kvortex.codecs import RAW
from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.runtime.loop_thread import LoopThread
from kvortex.tiering import tier_of
from kvortex.tiering.guard import GuardedTier
from kvortex.tiering.keys import key_as_is
from kvortex.vllm.epoch import in_epoch, new_epoch

Value = TypeVar("Value")

SCAN_WAIT_S = 0.5  # enough to scan a small store before the server starts; a large one is scanned while it serves
REMEMBERED_KEYS = 1 << 20  # some 100 bytes each
LOST_S = 60.0  # a block that could not be read is tried again after this time: perhaps only the device hung


def check_supported(config: KVortexConfig) -> None:
    """Refuse settings of the lower tier that the connector does not support.

    Raises:
        ConfigError: inclusion or admission is not the default.
    """
    tier = config.tier
    for name, value, only in (("inclusion", tier.inclusion, "inclusive"), ("admission", tier.admission, "always")):
        if value != only:
            raise ConfigError(f"in vLLM tier.{name} can be {only!r} only, not {value!r}")


class BoundedMap(Generic[Value]):
    """The last `REMEMBERED_KEYS` keys that were added, with a value each."""

    def __init__(self) -> None:
        self._known: dict[bytes, Value] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def get(self, key: bytes) -> Value | None:
        return self._known.get(key)

    def add(self, keys: Iterable[bytes], value: Value) -> None:
        self._known.update(dict.fromkeys(keys, value))
        while len(self._known) > REMEMBERED_KEYS:
            del self._known[next(iter(self._known))]

    def discard(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known.pop(key, None)

    def clear(self) -> None:
        self._known.clear()


class TierIndex:
    """Which blocks the lower tier has. It looks at those of the first rank; all ranks write the same blocks.

    Args:
        config: the settings of the tier.
        namespace: the namespace of the first rank's blocks.

    Raises:
        ConfigError: the tier cannot be opened, or none is configured.
    """

    def __init__(self, config: KVortexConfig, namespace: Namespace) -> None:
        tier = tier_of(config, namespace.digest)
        if tier is None:
            raise ConfigError("no lower tier is configured")
        self._tier = tier
        self._guard = GuardedTier(tier, config.tier.timeout_s, time.monotonic)
        self._packs = namespace.codec != RAW
        self._timeout_s = config.tier.timeout_s
        self._knows_all = False
        self._epoch = b""
        # Key -> whether in its usual form, of blocks that the workers have written. The tier's own index has them
        # after its next scan.
        self._written: BoundedMap[bool] = BoundedMap()
        self._lost: BoundedMap[float] = BoundedMap()  # key -> time until which it is not asked for
        self._thread: LoopThread | None = LoopThread()
        try:
            self._thread.run(self._open())
        except BaseException:
            self._thread.stop()
            raise

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._tier.open()
        except TimeoutError:
            raise ConfigError(f"the {self._tier.name} tier has not opened in {self._timeout_s} s") from None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tier.scanned(), SCAN_WAIT_S)

    def keys_of(self, hashes: Sequence[bytes]) -> list[bytes]:
        """The tier's keys of these blocks, 32 bytes each."""
        return [in_epoch(block_hash, self._epoch) for block_hash in hashes]

    def forget_all(self) -> None:
        """The weights have changed: no block that the tier has now is found again."""
        self._epoch = new_epoch()
        self._written.clear()
        self._lost.clear()

    def known(self, keys: Sequence[bytes]) -> list[bool | None]:
        """For each key None if the tier is not known to have the block, or True if it has it in its usual form.

        False is for a block that is stored raw although those of its group are packed.
        """
        now_s = time.monotonic()
        stored = self._tier.lookup(keys)
        as_is = self._tier.lookup([key_as_is(key) for key in keys]) if self._packs else [0] * len(keys)
        found: list[bool | None] = []
        for key, nbytes, nbytes_as_is in zip(keys, stored, as_is, strict=True):
            written = self._written.get(key)
            if (self._lost.get(key) or 0.0) > now_s:
                found.append(None)
            elif nbytes or nbytes_as_is:
                found.append(bool(nbytes))
            else:
                found.append(written)
        return found

    def known_prefix(self, keys: Sequence[bytes]) -> list[bool]:
        """The same for the leading keys of blocks that the tier is known to have."""
        run: list[bool] = []
        for found in self.known(keys):
            if found is None:
                break
            run.append(found)
        return run

    @property
    def asks_store(self) -> bool:
        """True if the store may have blocks that are not known here, and answers."""
        if not self._knows_all:
            self._knows_all = not self._tier.may_have_unknown
        return not self._knows_all and not self._guard.reads.refuses

    def ask(self, hashes: Sequence[bytes]) -> "Future[None]":
        """Ask the store itself for blocks; what it has is known when the answer is there. Does not wait."""
        keys = self.keys_of(hashes)
        if self._packs:
            keys += [key_as_is(key) for key in keys]
        assert self._thread is not None
        return self._thread.submit(self._ask(keys))

    async def _ask(self, keys: Sequence[bytes]) -> None:
        if self._guard.reads.admit(1):
            await self._guard.find(keys)

    def add_written(self, keys: Sequence[bytes], usual: bool) -> None:
        """The workers have written these blocks, in their usual form or raw although their group's are packed."""
        self._written.add(keys, usual)
        self._lost.discard(keys)

    def add_lost(self, keys: Sequence[bytes]) -> None:
        """The workers could not read these blocks: do not ask for them again for `LOST_S` seconds."""
        self._written.discard(keys)
        self._lost.add(keys, time.monotonic() + LOST_S)

    def close(self) -> None:
        """Close the tier; idempotent."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            try:
                thread.run(self._tier.aclose())
            finally:
                thread.stop()
