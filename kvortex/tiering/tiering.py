"""Between the pool and a lower tier: blocks are written behind their save, and fetched back when they are asked for.

All on the event loop, and all of it bounded: blocks that wait to be written, blocks on their way back, bytes that were
evicted and are not written yet. What is too much is shed and counted; a block that is not written is only a miss later.
"""

import asyncio
import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.config import KVortexConfig
from kvortex.errors import KVortexError
from kvortex.hashing import Namespace
from kvortex.stats import TieringFigures
from kvortex.tiering.fetches import Fetch, Fetches
from kvortex.tiering.keys import split_keys
from kvortex.tiering.link import NOT_KNOWN, TierLink
from kvortex.tiering.write_behind import WriteBehind
from kvortex.tiers import DiskTier, Tier
from kvortex.types import MissReason

logger = logging.getLogger(__name__)


class Tiering:
    """Moves blocks between one pool and one lower tier.

    Args:
        link: to the tier, which `start` opens and `aclose` closes; the `on_evicted` of its control plane is taken for
            an exclusive tier.
    """

    def __init__(self, link: TierLink) -> None:
        self.link = link
        self.is_exclusive = link.config.tier.inclusion == "exclusive"
        self.writes = WriteBehind(link)
        self.fetches = Fetches(link, takes_away=self.is_exclusive)

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the tier and begin to write; nothing has to wait for it."""
        self._take_what_is_evicted()
        self.link.spawn(self._open())
        self.link.spawn(self._wait_for_opening())

    def _take_what_is_evicted(self) -> None:
        if self.is_exclusive:
            self.link.control.on_evicted = self.writes.take_over

    async def _open(self) -> None:
        link = self.link
        try:
            await link.tier.open()
        except KVortexError as error:
            logger.error("the %s tier cannot be used, blocks stay in the pool alone: %s", link.tier.name, error)
            self._do_without()
        except Exception:  # a tier may be anybody's code, and must not stop the pool
            logger.exception("the %s tier cannot be used, blocks stay in the pool alone", link.tier.name)
            self._do_without()
        else:
            link.usable = True
            link.opened.set()
            self._take_what_is_evicted()
            self.fetches.tier_is_open()
            await self.writes.run()

    async def _wait_for_opening(self) -> None:
        """Nobody waits longer for the tier to open than for anything else of it; it may come later."""
        timeout_s = self.link.config.tier.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self.link.opened.wait()
        except TimeoutError:
            logger.error("the %s tier cannot be used yet: it has not opened in %s s", self.link.tier.name, timeout_s)
            self._do_without()

    def _do_without(self) -> None:
        self.link.opened.set()
        self.link.control.on_evicted = None
        self.writes.give_up()
        self.fetches.end()

    async def aclose(self) -> None:
        """Drop what waits, let what moves settle, close the tier; idempotent."""
        self.link.closing = True
        self.link.control.on_evicted = None
        self.writes.give_up()
        await self.link.end_tasks()
        # Whoever waits for one of them need not wait any longer.
        self.link.opened.set()
        self.writes.end()
        self.fetches.end()
        await self.link.aclose()

    async def ready(self) -> bool:
        """Wait until the tier is open and knows what it holds; False if it cannot be used."""
        await self.link.opened.wait()
        if self.link.usable:
            await self.link.tier.scanned()
        return self.link.usable

    async def flush(self) -> None:
        """Wait until everything that waits to be written is written or given up."""
        await self.link.opened.wait()
        await self.writes.flush()

    def figures(self) -> TieringFigures:
        """Counters since the start, and what waits now."""
        tier, writes, fetches = self.link.tier.stats(), self.writes, self.fetches
        return TieringFigures(
            tier=self.link.tier.name,
            usable=self.link.usable,
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
            breakers={"reads": self.link.guard.reads.figures(), "writes": self.link.guard.writes.figures()},
        )

    # -- what moves --------------------------------------------------------------------------------

    def saved(self, keys: NDArray[np.uint64], is_new: NDArray[np.bool_]) -> None:
        """A chain is in the pool, some of it new, `bool [n]`: that is offered to the tier, the rest counts as used.

        Where the tier admits only what is asked for again the new blocks are not offered yet.
        """
        used_s = self.link.uses.chain(len(keys))
        if not self.is_exclusive and self.link.config.tier.admission == "always":
            self.writes.offer(keys[is_new], used_s[is_new])
        self._used(keys[~is_new], used_s[~is_new])

    def used(self, keys: NDArray[np.uint64]) -> None:
        """Blocks of the pool, a chain, were asked for again."""
        self._used(keys, self.link.uses.chain(len(keys)))

    def _used(self, keys: NDArray[np.uint64], used_s: NDArray[np.float64]) -> None:
        link = self.link
        if self.is_exclusive or not len(keys) or not link.may_work:
            return
        found = link.encodings_known(keys)
        new = found == NOT_KNOWN
        if new.any():
            self.writes.offer(keys[new], used_s[new])
        if not new.all() and not link.guard.writes.refuses:
            link.spawn(link.touch(keys, found, used_s))

    def loaded(self, keys: NDArray[np.uint64], outcomes: Sequence[MissReason | None]) -> None:
        """A load is over: what it found is in use, and what was wrong is taken away from the tier."""
        if (num_hits := outcomes.count(None)) == len(outcomes):
            self.used(keys)
        elif num_hits or MissReason.CORRUPT in outcomes:
            self.used(keys[[outcome is None for outcome in outcomes]])
            self._damaged(keys[[outcome is MissReason.CORRUPT for outcome in outcomes]])

    def _damaged(self, keys: NDArray[np.uint64]) -> None:
        if len(keys) and self.link.usable and not self.link.closing:
            self.link.spawn(self.link.delete(keys))

    def known(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """`bool [n]`: what the tier is known to have. From memory, from any thread."""
        return self.fetches.known(keys)

    def fetch(self, keys: NDArray[np.uint64]) -> Fetch:
        """Begin to bring what the pool has not, and the tier has, into the pool: in order, within the bounds."""
        return self.fetches.fetch(keys)


class LoadFetch:
    """What one load waits for: the lower tier's blocks, until its deadline.

    Args:
        tiering: the engine's, over one tier.
        keys: block hashes of the load, `uint64 [n, 4]`.
        deadline_s: seconds from now; None waits as long as it takes.
    """

    def __init__(self, tiering: Tiering, keys: NDArray[np.uint64], deadline_s: float | None) -> None:
        self._tiering = tiering
        self._keys = keys
        self._fetch = tiering.fetch(keys)
        self._loop = asyncio.get_running_loop()
        self._due_s = None if deadline_s is None else self._loop.time() + deadline_s
        self._late: set[bytes] = set()

    async def wait(self, keys: NDArray[np.uint64]) -> None:
        """Wait for some of the call's blocks; what is late is remembered."""
        if self._fetch.num_left:
            timeout_s = None if self._due_s is None else max(self._due_s - self._loop.time(), 0.0)
            self._late.update(await self._fetch.wait(split_keys(keys), timeout_s=timeout_s))

    def cancel(self) -> None:
        """The load is given up: what only it wanted is not fetched any more."""
        self._fetch.cancel()

    def name_misses(self, outcomes: tuple[MissReason | None, ...]) -> tuple[MissReason | None, ...]:
        """The call's outcomes, with the reason that the tier gives: a block was late, or was not fetched at all."""
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


def tier_of(config: KVortexConfig, namespace: Namespace) -> Tier | None:
    """The lower tier that a configuration names, not opened; None if it names none.

    Raises:
        ConfigError: it cannot be made like that.
    """
    if not config.disk.path:
        return None
    return DiskTier(config.disk, namespace=namespace.digest)
