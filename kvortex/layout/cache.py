"""The registered tensors of a paged cache: its groups of layers, with the layout of each."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property

from kvortex.errors import LayoutError
from kvortex.groups import GroupSet, KVGroup
from kvortex.layout.layout import KVLayout, TensorLike
from kvortex.layout.sharing import Sharing, block_spaces, sharing

_TABLE_VERSION = 1


class PagedCache:
    """The layouts of a cache's groups, on one device.

    Create it by `from_tensors`, which checks everything; the constructor checks nothing.

    Args:
        groups: the groups of layers.
        layouts: the layout of each group, in the order of the groups.
    """

    def __init__(self, groups: GroupSet, layouts: Sequence[KVLayout]) -> None:
        self.groups = groups
        self.layouts = tuple(layouts)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, TensorLike],
        block_size: int,
        *,
        num_blocks: int | None = None,
        block_dim: int | Mapping[str, int] | None = None,
        groups: Sequence[KVGroup] | None = None,
    ) -> "PagedCache":
        """Derive the layout of each group from its tensors, see `KVLayout.from_tensors`.

        Args:
            tensors: name -> tensor.
            block_size: tokens of a block; with groups, tokens of one block hash.
            num_blocks: blocks of the cache; None if the shapes show it.
            block_dim: the dimension that counts blocks, for all tensors or by name; None if the shapes show it.
            groups: the groups of layers, which together name every tensor once; None for one group of full attention.

        Raises:
            LayoutError: see `KVLayout.from_tensors`; or a tensor is in no group, or a group names one that is missing;
                or groups share memory, but not block by block.
            ConfigError: the groups contradict each other, see `GroupSet`.
        """
        if groups is None:
            layout = KVLayout.from_tensors(tensors, block_size, num_blocks=num_blocks, block_dim=block_dim)
            return cls.of_layout(layout, tuple(tensors))
        group_set = GroupSet(groups, block_size)
        named = [layer for group in group_set.groups for layer in group.layers]
        if unknown := sorted(set(named) - set(tensors)):
            raise LayoutError(f"the groups name {unknown[0]!r}, which is not among the tensors")
        if left := sorted(set(tensors) - set(named)):
            raise LayoutError(f"tensor {left[0]!r} is in no group of layers: add it to one")
        if isinstance(block_dim, Mapping) and (unknown := sorted(set(block_dim) - set(tensors))):
            raise LayoutError(f"block_dim names {unknown[0]!r}, which is not among the tensors")
        layouts = [
            KVLayout.from_tensors(
                {name: tensors[name] for name in group.layers},
                group.block_size,
                num_blocks=num_blocks,
                block_dim=_of_group(block_dim, group),
            )
            for group in group_set.groups
        ]
        if len(devices := {layout.device for layout in layouts}) > 1:
            raise LayoutError(f"the groups are on {' and '.join(sorted(devices))}: register those of each device alone")
        _refuse_mixed_blocks(group_set, layouts)
        return cls(group_set, layouts)

    @classmethod
    def of_layout(cls, layout: KVLayout, layers: Sequence[str]) -> "PagedCache":
        """A cache with one group, of full attention."""
        return cls(GroupSet([KVGroup("full", tuple(layers), layout.block_size)], layout.block_size), [layout])

    @property
    def device(self) -> str:
        """Such as "cpu" or "cuda:0"."""
        return self.layouts[0].device

    @property
    def block_size(self) -> int:
        """Tokens of one block hash; with one group, tokens of a block."""
        return self.groups.hash_block_size

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The distinct dtypes, in the order of the tensors."""
        return tuple(dict.fromkeys(dtype for layout in self.layouts for dtype in layout.dtypes))

    @cached_property
    def block_nbytes(self) -> tuple[int, ...]:
        """Bytes of one block's payload, for each group."""
        return tuple(layout.block_nbytes for layout in self.layouts)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of what the payloads mean, 32 bytes: with one group, the digest of its layout."""
        if self.groups.is_single:
            return self.layouts[0].digest
        table = {
            "version": _TABLE_VERSION,
            "hash_block_size": self.groups.hash_block_size,
            "groups": [
                [group.kind.value, group.block_size, group.reach, layout.digest.hex()]
                for group, layout in zip(self.groups.groups, self.layouts, strict=True)
            ],
        }
        return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode("ascii")).digest()

    @cached_property
    def block_spaces(self) -> tuple[int, ...]:
        """For each group the number of the first group whose memory it shares, or its own: they share block ids."""
        return block_spaces(self.layouts)

    def __repr__(self) -> str:
        return f"<PagedCache: {self.describe()}>"

    def describe(self) -> str:
        """The cache in one line, for logs."""
        if self.groups.is_single:
            return self.layouts[0].describe()
        parts = (f"{g.name}: {layout.describe()}" for g, layout in zip(self.groups.groups, self.layouts, strict=True))
        return f"{len(self.layouts)} groups; " + "; ".join(parts)


def _of_group(block_dim: int | Mapping[str, int] | None, group: KVGroup) -> int | Mapping[str, int] | None:
    if not isinstance(block_dim, Mapping):
        return block_dim
    return {name: dim for name, dim in block_dim.items() if name in group.layers}


def _refuse_mixed_blocks(groups: GroupSet, layouts: Sequence[KVLayout]) -> None:
    """Refuse groups of which blocks with different ids lie in the same memory: a block's id would not say its place."""
    for (first, a), (second, b) in itertools.combinations(zip(groups.groups, layouts, strict=True), 2):
        if sharing(a, b) is Sharing.OTHER_BLOCKS:
            raise LayoutError(
                f"groups {first.name!r} and {second.name!r} share memory, but not block by block: give tensors that "
                "share memory one distance from block to block, or pass the right block_dim="
            )
