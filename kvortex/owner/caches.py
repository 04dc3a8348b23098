"""The caches whose blocks are in one pool, and how a client describes its own."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Codec, Encodings
from kvortex.config import format_bytes
from kvortex.errors import ConfigError, KVortexError, OwnerError
from kvortex.groups import GroupSet, KVGroup
from kvortex.layout.canonical import CanonicalCache
from kvortex.owner.events import Watcher
from kvortex.owner.tiers import OpenTier, OwnerTiers, account_of
from kvortex.planes.control import ControlPlane
from kvortex.tiering import Tiering
from kvortex.types import BlockSizes

logger = logging.getLogger(__name__)

MAX_PARTS: Final = 1024


@dataclass(slots=True, eq=False)
class Cache:
    """A cache whose blocks are in the pool.

    Args:
        namespace: digest of all that must agree before bytes may be reused, `uint64 [4]`; keys are XORed with it.
        first: number of its first group in the pool.
        forms: sizes and codecs of its blocks, see `describe_forms`.
        described: its groups and the parts of a block.
        tier: its lower tier; None without one.
        num_clears: how often it was cleared; what was reserved before is not seen.
        watchers: events for its clients that publish them.
        priority: blocks of a lower one are evicted first.
        quota_bytes: what its blocks may take of the pool; None for as much as there is.
    """

    namespace: NDArray[np.uint64]
    first: int
    forms: bytes
    described: str
    num_groups: int
    tier: OpenTier | None = None
    num_clears: int = 0
    watchers: list[Watcher] = field(default_factory=list)
    priority: int = 0
    quota_bytes: int | None = None

    @property
    def account(self) -> str:
        """Name under which its extents are accounted."""
        return account_of(self.namespace)

    @property
    def tiering(self) -> Tiering | None:
        """Moves its blocks to and from its lower tier; None without one."""
        return None if self.tier is None else self.tier.tiering

    def clear(self, control: ControlPlane) -> None:
        """Drop its blocks from the pool; what is being saved, or is on its way from the tier, will not be seen."""
        self.num_clears += 1
        if self.tier is not None:
            self.tier.view.clear()
        control.clear_cache(self.first, self.num_groups)

    def written(self, key: bytes) -> None:
        """The lower tier has stored a block."""
        for watcher in self.watchers:
            watcher.add_written(key)

    def lost(self, key: bytes) -> None:
        """The lower tier could not give a block back."""
        for watcher in self.watchers:
            watcher.add_lost(key)


class Caches:
    """The caches of a pool, by namespace. Clients with the same namespace share their blocks.

    Args:
        control: the pool's index and allocator.
        tiers: opens the lower tiers of a cache; None if there are none.
    """

    def __init__(self, control: ControlPlane, tiers: OwnerTiers | None = None) -> None:
        self.control = control
        self._tiers = tiers
        self._caches: dict[bytes, Cache] = {}
        control.on_removed = self._removed

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[Cache]:
        return iter(self._caches.values())

    def add(self, namespace: NDArray[np.uint64], forms: NDArray[np.int64], described: str) -> Cache:
        """The cache of a namespace, which is new, or known with these sizes.

        Args:
            namespace: digest of all that must agree before bytes may be reused, `uint64 [4]`.
            forms: sizes and codecs of the blocks, see `describe_forms`.
            described: the groups, see `describe_groups`.

        Raises:
            ConfigError: it has other sizes or groups, its blocks do not fit the pool, or there are too many groups.
        """
        groups = groups_from(described)
        known = self._caches.get(namespace.tobytes())
        if known is None:
            known = self._add(namespace.copy(), forms, groups)
            self._caches[namespace.tobytes()] = known
        if (known.forms, known.described) != (forms.tobytes(), groups.without_canonical):
            raise ConfigError("the pool has blocks of this namespace with other sizes: are the engines of one version?")
        return known

    def rank(self, cache: Cache, priority: int | None, quota_bytes: int | None) -> None:
        """Set what a client says of its cache, whatever others have said before; None for what it does not say.

        Raises:
            ConfigError: a block of each group does not fit the quota; nothing has changed.
        """
        priority = cache.priority if priority is None else priority
        quota_bytes = cache.quota_bytes if quota_bytes is None else quota_bytes
        if (priority, quota_bytes) == (cache.priority, cache.quota_bytes):
            return
        groups = range(cache.first, cache.first + cache.num_groups)
        self.control.rank(cache.account, groups, priority=priority, quota_bytes=quota_bytes)
        before = _described_rank(cache)
        cache.priority, cache.quota_bytes = priority, quota_bytes
        logger.info("%s has %s instead of %s now", cache.account, _described_rank(cache), before)

    def _removed(self, offsets: NDArray[np.int64]) -> None:
        for cache in self._caches.values():
            for watcher in cache.watchers:
                watcher.add_removed(offsets)

    def _add(self, namespace: NDArray[np.uint64], forms: NDArray[np.int64], described: "DescribedGroups") -> Cache:
        sizes, encodings = forms_from(forms)
        groups, num_parts, canonical = described
        if len(groups) != len(sizes):
            raise OwnerError(f"a cache has {len(groups)} groups of layers, and sizes of {len(sizes)}")
        if self._tiers is not None:
            self._tiers.check(canonical, encodings, num_parts)
        first = self.control.add_cache(sizes, groups)
        cache = Cache(namespace, first, forms.tobytes(), described.without_canonical, len(sizes))
        if self._tiers is not None:
            cache.tier = self._tiers.open(namespace, cache.first, cache.num_groups, encodings, num_parts, canonical)
            if cache.tiering is not None:
                cache.tiering.backing.on_written, cache.tiering.backing.on_lost = cache.written, cache.lost
        return cache


def _described_rank(cache: Cache) -> str:
    quota = "no quota" if cache.quota_bytes is None else f"a quota of {format_bytes(cache.quota_bytes)}"
    return f"priority {cache.priority} and {quota}"


def describe_forms(extents: Sequence[int], encodings: Encodings) -> NDArray[np.int64]:
    """Sizes and codecs of blocks, `int64 [3 * forms]`: for each form bytes of an extent and of a payload, and codec.

    Args:
        extents: bytes of an extent, by form.
        encodings: payloads and codecs, by form.
    """
    rows = list(zip(extents, encodings.payloads, encodings.codecs, strict=True))
    return np.array(rows, dtype=np.int64).ravel()


def forms_from(field: NDArray[np.int64]) -> tuple[tuple[BlockSizes, ...], Encodings]:
    """What `describe_forms` has described: bytes of an extent for each group, and how blocks are encoded.

    Raises:
        OwnerError: this is no such description.
    """
    if not field.size or field.size % 6:
        raise OwnerError(f"{field.size} numbers are no sizes of blocks")
    extents, payloads, codecs = field.reshape(-1, 3).T
    packed_is_larger = (extents[1::2] > extents[::2]).any()
    if (payloads < 1).any() or (payloads > extents).any() or packed_is_larger or not set(codecs.tolist()) <= set(Codec):
        raise OwnerError(f"{field.tolist()} are no sizes and codecs of blocks")
    sizes = tuple(BlockSizes(*pair) for pair in extents.reshape(-1, 2).tolist())
    return sizes, Encodings(payloads.tolist(), map(Codec, codecs.tolist()))


class DescribedGroups(NamedTuple):
    """What a client says of its cache.

    Attributes:
        groups: all that decides which blocks belong together.
        num_parts: how many parts a block has.
        canonical: how blocks become canonical, or why they do not.
    """

    groups: GroupSet
    num_parts: int
    canonical: CanonicalCache | str

    @property
    def without_canonical(self) -> str:
        """What all clients of one namespace say alike."""
        return json.dumps(_plain(self.groups, self.num_parts))


def describe_groups(groups: GroupSet, num_parts: int = 1, canonical: CanonicalCache | str = "") -> str:
    """The groups of a cache as JSON, see `DescribedGroups`."""
    told = canonical if isinstance(canonical, str) else canonical.as_plain()
    return json.dumps({**_plain(groups, num_parts), "canonical": told}, separators=(",", ":"))


def _plain(groups: GroupSet, num_parts: int) -> dict[str, Any]:
    of_groups = [[g.name, list(g.layers), g.block_size, g.kind.value, g.reach, g.exact] for g in groups.groups]
    return {"hash_block_size": groups.hash_block_size, "groups": of_groups, "parts": num_parts}


def groups_from(described: str) -> DescribedGroups:
    """What `describe_groups` has described.

    Raises:
        OwnerError: this is no such description.
    """
    try:
        document = json.loads(described)
        groups = GroupSet([KVGroup(*group) for group in document["groups"]], document["hash_block_size"])
        num_parts = int(document["parts"])
        if not 1 <= num_parts <= MAX_PARTS:
            raise ValueError(f"a block of {num_parts} parts")
        told = document.get("canonical", "the engine has not said how: it is of an earlier version")
        return DescribedGroups(groups, num_parts, told if isinstance(told, str) else CanonicalCache.from_plain(told))
    except (KVortexError, ValueError, TypeError, KeyError) as error:
        raise OwnerError(f"the groups of a cache are not described as they should be: {error}") from error
