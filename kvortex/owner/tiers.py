"""The lower tiers behind an owner's pool: for each cache one tier, or chain of tiers, over the common control plane."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Encodings
from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError, LayoutError
from kvortex.index import CacheIndex, Evicted
from kvortex.layout.canonical import CanonicalCache
from kvortex.memory import SharedMemory
from kvortex.planes.control import ControlPlane, OnEvicted
from kvortex.planes.plans import FetchPlan, HeldBlocks
from kvortex.stats import EngineStats
from kvortex.tiering import BackingTier, TieredPool, Tiering, tier_of
from kvortex.tiering.canonical import CanonicalTier
from kvortex.tiering.canonical_blocks import CanonicalBlock, canonical_blocks
from kvortex.tiers import Tier
from kvortex.types import MissReason

logger = logging.getLogger(__name__)

MakeTier: TypeAlias = Callable[[KVortexConfig, bytes], Tier | None]


def account_of(namespace: NDArray[np.uint64]) -> str:
    """Name under which the extents of a cache are accounted in the pool; `namespace` is the cache's, `uint64 [4]`."""
    return f"namespace {namespace.tobytes()[:8].hex()}"


class CacheView:
    """The control plane as the tiering of one cache sees it: with the cache's own keys and forms.

    The tiers know blocks by the keys that engines give them, as they would without an owner. So what one has written,
    the other finds.

    Args:
        tiers: those of the pool; told when this cache wants eviction victims.
        control: the control plane of the pool.
        namespace: the words that keys of this cache are XORed with in the pool, `uint64 [4]`.
        first: number of the cache's first group in the pool.
        num_groups: how many it has.
    """

    def __init__(
        self, tiers: "OwnerTiers", control: ControlPlane, namespace: NDArray[np.uint64], first: int, num_groups: int
    ) -> None:
        self._tiers = tiers
        self._control = control
        self._namespace = namespace
        self._account = account_of(namespace)
        self._first_form = 2 * first
        self._stop_form = 2 * (first + num_groups)
        self._on_evicted: OnEvicted | None = None
        self._fetching: set[int] = set()  # slots of the blocks on their way to the pool
        self._cleared: set[int] = set()  # those of them that must not be seen
        self.index = _IndexView(control.index, namespace)

    @property
    def on_evicted(self) -> OnEvicted | None:
        """See `ControlPlane`; called with the victims of this cache only."""
        return self._on_evicted

    @on_evicted.setter
    def on_evicted(self, taker: OnEvicted | None) -> None:
        self._on_evicted = taker
        self._tiers.watch_evictions()

    def demote(self, evicted: Evicted, kept: NDArray[np.bool_]) -> None:
        """Offer this cache's victims to its tier; marks in `kept`, `bool [n]`, those that it takes over."""
        mine = np.flatnonzero((evicted.forms >= self._first_form) & (evicted.forms < self._stop_form))
        if self._on_evicted is None or not mine.size:
            return
        of_mine = Evicted(
            evicted.offsets[mine],
            evicted.keys[mine] ^ self._namespace,
            evicted.nbytes[mine],
            evicted.digests[mine],
            evicted.forms[mine] - self._first_form,
        )
        kept[mine] = self._on_evicted(of_mine)

    def plan_fetch(
        self,
        keys: NDArray[np.uint64],
        forms: NDArray[np.uint8],
        owner: str,
        *,
        chain: NDArray[np.uint64] | None = None,
    ) -> FetchPlan:
        # Accounted with what is saved, whatever the tiering calls it.
        front = None if chain is None else chain ^ self._namespace
        in_pool = (forms + self._first_form).astype(np.uint8)
        plan = self._control.plan_fetch(keys ^ self._namespace, in_pool, self._account, chain=front)
        own = (plan.forms - self._first_form).astype(np.uint8)
        self._fetching.update(plan.slots.tolist())
        return FetchPlan(plan.positions, plan.slots, plan.offsets, own)

    def finish_fetch(self, slot: int, offset: int, form: int, digest: int) -> None:
        if slot in self._cleared:
            self.abandon_fetch(slot, offset, MissReason.INVALIDATED)
            return
        self._fetching.discard(slot)
        self._control.finish_fetch(slot, offset, form + self._first_form, digest)

    def clear(self) -> None:
        """The cache is cleared: what is on its way from the tier will not be seen."""
        self._cleared |= self._fetching

    def abandon_fetch(self, slot: int, offset: int, reason: MissReason) -> None:
        self._fetching.discard(slot)
        self._cleared.discard(slot)
        self._control.abandon_fetch(slot, offset, reason)

    def hold(self, keys: NDArray[np.uint64]) -> HeldBlocks:
        held = self._control.hold(keys ^ self._namespace)
        own = held.forms - self._first_form
        return HeldBlocks(held.positions, held.slots, held.offsets, held.nbytes, held.digests, own)

    def release(self, slots: NDArray[np.int64]) -> None:
        self._control.release(slots)

    def free(self, offset: int) -> None:
        self._control.free(offset)


class _IndexView:
    def __init__(self, index: CacheIndex, namespace: NDArray[np.uint64]) -> None:
        self._index = index
        self._namespace = namespace

    def contains_mask(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self._index.contains_mask(keys ^ self._namespace)


class OpenTier(NamedTuple):
    """The tier of a cache: what moves blocks to and from it, and the control plane that this sees."""

    tiering: Tiering
    view: CacheView


class OwnerTiers:
    """Opens and closes the tiers of the caches.

    Args:
        config: the owner's settings, which name the tiers.
        control: the control plane of the pool.
        memory: the pool.
        make_tier: makes the tier of a namespace, as `tier_of` does.
    """

    def __init__(
        self, config: KVortexConfig, control: ControlPlane, memory: SharedMemory, make_tier: "MakeTier" = tier_of
    ) -> None:
        self._make_tier = make_tier
        self._config = config
        self._control = control
        self._memory = memory
        self._pool: NDArray[np.uint8] | None = None
        self._views: list[CacheView] = []
        self._open: list[Tiering] = []

    def check(self, canonical: CanonicalCache | str, encodings: Encodings, num_parts: int) -> None:
        """Refuse a cache that the settings of the tiers do not fit; arguments as in `open`.

        Raises:
            ConfigError: its blocks have no canonical layout, and the tiers keep that.
        """
        if self._config.tier.canonical_layout:
            _canonical_blocks(canonical, encodings, num_parts)

    def _tier_of(
        self, namespace: bytes, encodings: Encodings, num_parts: int, canonical: CanonicalCache | str
    ) -> Tier | None:
        if not self._config.tier.canonical_layout:
            return self._make_tier(self._config, namespace)
        cache, blocks = _canonical_blocks(canonical, encodings, num_parts)
        tier = self._make_tier(self._config, cache.namespace)
        return None if tier is None else CanonicalTier(tier, blocks)

    def open(
        self,
        namespace: NDArray[np.uint64],
        first: int,
        num_groups: int,
        encodings: Encodings,
        num_parts: int,
        canonical: CanonicalCache | str = "",
    ) -> OpenTier | None:
        """Open the tiers of a cache, without waiting for them; None if the settings name none.

        Args:
            namespace: the cache's, `uint64 [4]`.
            first: number of its first group in the pool.
            num_groups: how many it has.
            encodings: how its blocks are encoded, by its own forms.
            num_parts: how many parts a block has.
            canonical: how blocks become canonical, or why they do not.

        Raises:
            ConfigError: the settings of a tier are invalid, or the cache does not fit them.
        """
        tier = self._tier_of(namespace.tobytes(), encodings, num_parts, canonical)
        if tier is None:
            return None
        view = CacheView(self, self._control, namespace, first, num_groups)
        if self._pool is None:
            self._pool = np.frombuffer(self._memory.map(0, self._memory.ticket.nbytes), dtype=np.uint8)
        pool = TieredPool(view, self._pool, encodings, num_parts)
        tiering = Tiering(BackingTier(self._config, pool, tier, EngineStats()))
        self._views.append(view)
        self._open.append(tiering)
        tiering.start()
        return OpenTier(tiering, view)

    def watch_evictions(self) -> None:
        """A cache wants its victims, or does not want them any more."""
        wanted = any(view.on_evicted is not None for view in self._views)
        self._control.on_evicted = self._demote if wanted else None

    def _demote(self, evicted: Evicted) -> NDArray[np.bool_]:
        kept = np.zeros(len(evicted.offsets), dtype=np.bool_)
        for view in self._views:
            view.demote(evicted, kept)
        return kept

    async def flush(self) -> None:
        """Wait until no block waits to be written."""
        await asyncio.gather(*(tiering.flush() for tiering in self._open))

    async def aclose(self) -> None:
        """Close all tiers; what waits to be written is dropped."""
        await close_all(self._open)
        self._pool = None


def _canonical_blocks(
    canonical: CanonicalCache | str, encodings: Encodings, num_parts: int
) -> tuple[CanonicalCache, list[CanonicalBlock | None]]:
    if isinstance(canonical, str):
        raise ConfigError(f"the lower tier keeps the canonical layout, and this cache has none: {canonical}")
    try:
        return canonical, canonical_blocks(canonical, encodings, num_parts)
    except LayoutError as error:
        raise ConfigError(f"the lower tier keeps the canonical layout, and this cache has none: {error}") from error


async def close_all(open_tiers: Iterable[Tiering]) -> None:
    """Close tiers one after another; an error of one is logged, and the others are closed all the same."""
    for tiering in open_tiers:
        try:
            await tiering.aclose()
        except Exception:  # tiers can be third-party code
            logger.exception("the %s tier could not be closed", tiering.backing.tier.name)
