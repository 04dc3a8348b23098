"""The caches whose blocks are in one pool, and how a client describes its own."""

import json
from dataclasses import dataclass

from kvortex.errors import ConfigError, KVortexError, OwnerError
from kvortex.groups import GroupSet, KVGroup
from kvortex.planes.control import ControlPlane
from kvortex.types import BlockSizes


@dataclass(slots=True, eq=False)
class Cache:
    """A cache whose blocks are in the pool.

    Args:
        first: number of its first group in the pool.
        sizes: bytes of a block, for each group.
        described: its groups, see `describe_groups`.
        num_clears: how often it was cleared; what was reserved before is not seen.
    """

    first: int
    sizes: tuple[BlockSizes, ...]
    described: str
    num_clears: int = 0

    @property
    def num_groups(self) -> int:
        return len(self.sizes)


class Caches:
    """The caches of a pool, by namespace. Clients with the same namespace share their blocks.

    Args:
        control: the pool's index and allocator.
    """

    def __init__(self, control: ControlPlane) -> None:
        self.control = control
        self._caches: dict[bytes, Cache] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def add(self, namespace: bytes, sizes: tuple[BlockSizes, ...], described: str) -> Cache:
        """The cache of a namespace, which is new, or known with these sizes.

        Args:
            namespace: digest of all that must agree before bytes may be reused.
            sizes: bytes of a block, for each group.
            described: the groups, see `describe_groups`.

        Raises:
            ConfigError: it has other sizes or groups, its blocks do not fit the pool, or there are too many groups.
        """
        known = self._caches.get(namespace)
        if known is None:
            groups = groups_from(described)
            if len(groups) != len(sizes):
                raise OwnerError(f"a cache has {len(groups)} groups of layers, and sizes of {len(sizes)}")
            known = Cache(self.control.add_cache(sizes, groups), sizes, described)
            self._caches[namespace] = known
        if (known.sizes, known.described) != (sizes, described):
            raise ConfigError("the pool has blocks of this namespace with other sizes: are the engines of one version?")
        return known


def describe_groups(groups: GroupSet) -> str:
    """The groups of a cache as JSON: all that decides which of their blocks belong together."""
    parts = [[g.name, list(g.layers), g.block_size, g.kind.value, g.reach, g.exact] for g in groups.groups]
    return json.dumps({"hash_block_size": groups.hash_block_size, "groups": parts}, separators=(",", ":"))


def groups_from(described: str) -> GroupSet:
    """The groups that `describe_groups` has described.

    Raises:
        OwnerError: this is no such description.
    """
    try:
        document = json.loads(described)
        return GroupSet([KVGroup(*group) for group in document["groups"]], document["hash_block_size"])
    except (KVortexError, ValueError, TypeError, KeyError) as error:
        raise OwnerError(f"the groups of a cache are not described as they should be: {error}") from error
