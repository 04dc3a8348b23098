"""Tiering: blocks are written to the lower tier after their save, and fetched back when they are asked for.

Everything runs on the event loop and is bounded: blocks that wait to be written, blocks that are being fetched, and
bytes of demoted blocks. Blocks beyond the bounds are shed and counted; each is only a miss later.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.config.redaction import without_passwords
from kvortex.config.sections import TIER_ADMISSIONS, TIER_INCLUSIONS
from kvortex.errors import ConfigError, KVortexError
from kvortex.stats import LinkFigures, TieringFigures
from kvortex.tiering.backing import NOT_KNOWN, BackingTier
from kvortex.tiering.canonical import CanonicalTier
from kvortex.tiering.chain import ChainTier
from kvortex.tiering.chain_parts import Takes
from kvortex.tiering.fetches import Fetch, Fetches
from kvortex.tiering.keys import split_keys
from kvortex.tiering.write_behind import WriteBehind
from kvortex.tiers import DiskTier, Tier, TierUrl, tier_from_url
from kvortex.types import MissReason

logger = logging.getLogger(__name__)

TOUCHED_AGAIN_S: Final = 30.0
MAX_TOUCHED: Final = 1 << 16


class Tiering:
    """Moves blocks between one pool and one lower tier.

    Args:
        backing: the tier behind the pool; `start` opens it and `aclose` closes it. An exclusive tier sets the
            `on_evicted` of the control plane.
    """

    def __init__(self, backing: BackingTier) -> None:
        self.backing = backing
        self.is_exclusive = backing.config.tier.inclusion == "exclusive"
        self.writes = WriteBehind(backing)
        self.fetches = Fetches(backing, deletes_fetched=self.is_exclusive)
        self._touched_s: dict[bytes, float] = {}  # last hash of a chain -> when `touch` last counted it

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to open the tier and to write; does not wait for either."""
        self._demote_victims()
        self.backing.tasks.spawn(self._open())
        self.backing.tasks.spawn(self._wait_for_opening())

    def _demote_victims(self) -> None:
        if self.is_exclusive:
            self.backing.control.on_evicted = self.writes.demote

    async def _open(self) -> None:
        backing = self.backing
        try:
            await backing.tier.open()
        except KVortexError as error:
            logger.error("the %s tier cannot be used, blocks stay in the pool alone: %s", backing.tier.name, error)
            self._set_unusable()
        except Exception:  # tiers can be third-party code, and must not stop the pool
            logger.exception("the %s tier cannot be used, blocks stay in the pool alone", backing.tier.name)
            self._set_unusable()
        else:
            backing.state.set_usable()
            self._demote_victims()
            self.fetches.tier_opened()
            await self.writes.run()

    async def _wait_for_opening(self) -> None:
        """Go on without a tier that does not open in time. It may still open later."""
        timeout_s = self.backing.config.tier.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self.backing.state.wait_known()
        except TimeoutError:
            logger.error("the %s tier cannot be used yet: it has not opened in %s s", self.backing.tier.name, timeout_s)
            self._set_unusable()

    def _set_unusable(self) -> None:
        self.backing.state.end_opening()
        self.backing.control.on_evicted = None
        self.writes.shed_all()
        self.fetches.stop_waiting()

    async def aclose(self) -> None:
        """Shed waiting blocks, let transfers in flight settle, close the tier; idempotent."""
        self.backing.state.set_closing()
        self.backing.control.on_evicted = None
        self.writes.shed_all()
        await self.backing.tasks.cancel_all()
        # No block comes any more: end every wait.
        self.backing.state.end_opening()
        self.writes.stop_waiting()
        self.fetches.stop_waiting()
        await self.backing.aclose()

    async def ready(self) -> bool:
        """Wait until the tier is open and knows what it holds; False if it cannot be used."""
        await self.backing.state.wait_known()
        if self.backing.state.usable:
            await self.backing.tier.scanned()
        return self.backing.state.usable

    async def flush(self) -> None:
        """Wait until every block that waits to be written is written or shed."""
        await self.backing.state.wait_known()
        await self.writes.flush()

    def figures(self) -> TieringFigures:
        """Counters since the start, and the present length of the queues."""
        tier, writes, fetches = self.backing.tier.stats(), self.writes, self.fetches
        return TieringFigures(
            tier=self.backing.tier.name,
            usable=self.backing.state.usable,
            written_blocks=writes.written_blocks,
            failed_writes=writes.failed_writes,
            fetched_blocks=fetches.fetched_blocks,
            shed_blocks=writes.shed_blocks,
            demoted_blocks=writes.demoted_blocks,
            waiting_blocks=writes.num_waiting,
            arriving_blocks=fetches.num_arriving,
            used_bytes=tier.used_bytes,
            capacity_bytes=tier.capacity_bytes,
            causes={cause.value: count for cause, count in tier.causes.items()},
            breakers={"reads": self.backing.guard.reads.figures(), "writes": self.backing.guard.writes.figures()},
            links=self._links(),
        )

    def _links(self) -> tuple[LinkFigures, ...]:
        tier = self.backing.tier
        tier = tier.inner if isinstance(tier, CanonicalTier) else tier
        return tuple(link.figures() for link in tier.links) if isinstance(tier, ChainTier) else ()

    # -- blocks --------------------------------------------------------------------------------

    def saved(self, keys: NDArray[np.uint64], is_new: NDArray[np.bool_]) -> None:
        """A save has ended: offer its new blocks to the tier, and count the others as used.

        Where the tier admits only blocks that are asked for again, the new ones are not offered yet.

        Args:
            keys: the save's block hashes that are in the pool, `uint64 [n, 4]`, a chain.
            is_new: which of them were not stored before, `bool [n]`.
        """
        used_s = self.backing.uses.chain(len(keys))
        if not self.is_exclusive and self.backing.config.tier.admission == "always":
            self.writes.offer(keys[is_new], used_s[is_new])
        self._used(keys[~is_new], used_s[~is_new])

    def used(self, keys: NDArray[np.uint64]) -> None:
        """Blocks of the pool, a chain of hashes `uint64 [n, 4]`, were asked for again."""
        self._used(keys, self.backing.uses.chain(len(keys)))

    def touch(self, keys: NDArray[np.uint64]) -> None:
        """Count those of a chain of hashes, `uint64 [n, 4]`, that the tier has as used, every 30 seconds at most.

        A request has ended that used them, in whichever way: so none is offered to the tier.
        """
        if not len(keys) or not self.backing.state.usable or self.backing.guard.writes.refuses:
            return
        now_s, last = self.backing.uses.now(), keys[-1].tobytes()
        if now_s - self._touched_s.get(last, 0.0) < TOUCHED_AGAIN_S:
            return
        found = self.backing.encodings_known(keys)
        if (found != NOT_KNOWN).any():
            self._touched_s[last] = now_s
            while len(self._touched_s) > MAX_TOUCHED:
                del self._touched_s[next(iter(self._touched_s))]
            self.backing.tasks.spawn(self.backing.touch(keys, found, self.backing.uses.chain(len(keys))))

    def _used(self, keys: NDArray[np.uint64], used_s: NDArray[np.float64]) -> None:
        backing = self.backing
        if self.is_exclusive or not len(keys) or not backing.state.may_work:
            return
        found = backing.encodings_known(keys)
        new = found == NOT_KNOWN
        if new.any():
            self.writes.offer(keys[new], used_s[new])
        if not new.all() and not backing.guard.writes.refuses:
            backing.tasks.spawn(backing.touch(keys, found, used_s))

    def loaded(self, keys: NDArray[np.uint64], outcomes: Sequence[MissReason | None]) -> None:
        """A load has ended: count its hits as used, and delete its corrupt blocks from the tier.

        Args:
            keys: the load's block hashes, `uint64 [n, 4]`.
            outcomes: one a block: None for a hit, or the reason of the miss.
        """
        if (num_hits := outcomes.count(None)) == len(outcomes):
            self.used(keys)
        elif num_hits or MissReason.CORRUPT in outcomes:
            self.used(keys[[outcome is None for outcome in outcomes]])
            self._delete_corrupt(keys[[outcome is MissReason.CORRUPT for outcome in outcomes]])

    def _delete_corrupt(self, keys: NDArray[np.uint64]) -> None:
        if len(keys) and self.backing.state.usable and not self.backing.state.closing:
            self.backing.tasks.spawn(self.backing.delete(keys))
            if self.backing.on_lost is not None:
                for key in split_keys(keys):
                    self.backing.on_lost(key)

    async def invalidate(self, keys: NDArray[np.uint64], forget: Callable[[], None]) -> bool:
        """Delete blocks from the tier, and those on their way to it; False if some may be left.

        Args:
            keys: their hashes, `uint64 [n, 4]`.
            forget: called at the end: drops from the pool what was read from the tier before it was deleted there.
        """
        hashes = set(split_keys(keys))
        with self.writes.barred(hashes):
            try:
                settled = await self.writes.withdraw(hashes)
                return await self._becomes_usable() and await self.backing.delete_surely(keys) and settled
            finally:
                forget()

    async def clear(self, forget: Callable[[], None]) -> bool:
        """The same for every block of the namespace."""
        with self.writes.barred():
            try:
                settled = await self.writes.withdraw()
                return await self._becomes_usable() and await self.backing.guard.delete_all() and settled
            finally:
                forget()

    async def _becomes_usable(self) -> bool:
        await self.backing.state.wait_known()
        return self.backing.state.usable and not self.backing.state.closing

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which blocks the tier is known to have; see `Fetches.known`."""
        return self.fetches.known(keys)

    @property
    def knows_all(self) -> bool:
        """True if the store has no blocks but those that are known here, or never opens."""
        state = self.backing.state
        return state.is_known and not (state.usable and self.backing.tier.may_have_unknown)

    @property
    def asks_store(self) -> bool:
        """True if the store may have blocks that are not known here, and answers, now or when it is open."""
        backing = self.backing
        if not backing.state.is_known:
            return backing.state.may_work
        return backing.state.usable and backing.tier.may_have_unknown and not backing.guard.reads.refuses

    async def ask(self, keys: NDArray[np.uint64]) -> None:
        """Ask the store itself for blocks, `uint64 [n, 4]`; what it has is known then."""
        await self.backing.state.wait_known()
        if self.asks_store and self.backing.guard.reads.admit(1):
            await self.backing.ask_encodings(split_keys(keys))

    def fetch(self, keys: NDArray[np.uint64], groups: NDArray[np.uint8] | None = None) -> Fetch:
        """Begin to fetch the blocks that the tier has and the pool has not; see `Fetches.fetch`."""
        return self.fetches.fetch(keys, groups)


class AnyFetch(Protocol):
    """The blocks that one call waits for, here or behind an owner; see `Fetch`."""

    @property
    def num_pending(self) -> int: ...

    @property
    def in_tier(self) -> set[int]: ...

    async def wait(self, keys: Sequence[bytes] | None = None, *, timeout_s: float | None = None) -> list[bytes]: ...

    def cancel(self) -> None: ...


class Fetching(Protocol):
    """Something that fetches blocks from a lower tier."""

    def fetch(self, keys: NDArray[np.uint64], groups: NDArray[np.uint8] | None = None) -> AnyFetch:
        """See `Tiering.fetch`."""
        ...


class LoadFetch:
    """One load's fetch from the lower tier, with the load's deadline.

    Args:
        tiering: the engine's, over one tier.
        keys: block hashes of the load, `uint64 [n, 4]`.
        groups: the number of each block's group, `uint8 [n]`; None if all belong to the first.
        deadline_s: seconds from now until it stops waiting; None waits as long as it takes.
    """

    def __init__(
        self,
        tiering: Fetching,
        keys: NDArray[np.uint64],
        groups: NDArray[np.uint8] | None,
        deadline_s: float | None,
    ) -> None:
        self._tiering = tiering
        self._keys = keys
        self._fetch = tiering.fetch(keys, groups)
        self._loop = asyncio.get_running_loop()
        self._due_s = None if deadline_s is None else self._loop.time() + deadline_s
        self._late: set[bytes] = set()

    async def wait(self, keys: NDArray[np.uint64]) -> None:
        """Wait for some of the load's blocks, `uint64 [n, 4]`, and remember those that are late."""
        if self._fetch.num_pending:
            timeout_s = None if self._due_s is None else max(self._due_s - self._loop.time(), 0.0)
            self._late.update(await self._fetch.wait(split_keys(keys), timeout_s=timeout_s))

    def cancel(self) -> None:
        """End the load's waits. A block that no other call wants is not fetched, unless its read has begun."""
        self._fetch.cancel()

    def name_misses(self, outcomes: tuple[MissReason | None, ...]) -> tuple[MissReason | None, ...]:
        """Add to the outcomes of a load what only the tier knows: which blocks were late, or were not fetched."""
        in_tier = self._fetch.in_tier
        if outcomes.count(None) == len(outcomes) or not (self._late or in_tier):
            return outcomes
        named = list(outcomes)
        for position in in_tier:
            if named[position] in (MissReason.NEVER_STORED, MissReason.EVICTED):
                named[position] = MissReason.NOT_FETCHED
        if self._late:
            for position, key in enumerate(split_keys(self._keys)):
                if named[position] is not None and key in self._late:
                    named[position] = MissReason.DEADLINE
        return tuple(named)


def tier_of(config: KVortexConfig, namespace: bytes) -> Tier | None:
    """Make the lower tier that the configuration asks for, not opened; None if it asks for none.

    Args:
        config: the settings.
        namespace: digest of the blocks' namespace, 32 bytes.

    Raises:
        ConfigError: the settings of a tier are invalid, or say how blocks lie in a tier that there is not.
    """
    if config.tier.canonical_layout and not config.lower_tier:
        raise ConfigError("tier.canonical_layout is about a lower tier, and there is none: give tier.urls or disk.path")
    if not config.tier.urls:
        return DiskTier(config.disk, namespace=namespace) if config.disk.path else None
    tiers = []
    for number, text in enumerate(config.tier.urls):
        url, takes = _takes_of(TierUrl.parse(text), is_first=not number)
        tiers.append((tier_from_url(url, namespace), takes))
    if len(tiers) == 1:
        return tiers[0][0]
    return ChainTier(tiers, config.tier.timeout_s, copies_forward=config.tier.inclusion == "inclusive")


def _takes_of(url: TierUrl, *, is_first: bool) -> tuple[TierUrl, Takes]:
    """What a tier of a chain takes, and its URL without the options that say so."""
    shown, named = without_passwords(url.text), dict[str, str]()
    for option, choices in (("admission", TIER_ADMISSIONS), ("inclusion", TIER_INCLUSIONS)):
        url, choice = url.without(option)
        if choice is None:
            continue
        if is_first:
            raise ConfigError(f"{shown!r}: what the first tier takes is set by tier.{option}; leave the option out")
        if choice not in choices:
            raise ConfigError(f"{shown!r}: {option} must be one of {', '.join(choices)}")
        named[option] = choice
    if named.get("inclusion") != "exclusive":
        return url, Takes(named.get("admission", Takes.ALWAYS))
    if "admission" in named:
        raise ConfigError(f"{shown!r}: an exclusive tier takes what the one in front evicts; leave admission out")
    return url, Takes.EVICTED
