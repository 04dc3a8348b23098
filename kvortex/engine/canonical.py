"""The canonical layout of the caches that a program registers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvortex.codecs import Encodings, Pages
from kvortex.config import KVortexConfig
from kvortex.engine.parts import EngineParts
from kvortex.errors import ConfigError, LayoutError
from kvortex.hashing import Namespace
from kvortex.layout import PagedCache
from kvortex.layout.canonical import BlockShard, CanonicalCache, Heads, canonical_digest, shards_of
from kvortex.tiering.canonical import CanonicalTier
from kvortex.tiering.canonical_blocks import canonical_blocks, shards_by_form, why_not_canonical
from kvortex.tiers import Tier


class Canonical(NamedTuple):
    """The namespace of canonical blocks, and how blocks become canonical."""

    namespace: Namespace
    cache: CanonicalCache


def canonical_of(
    config: KVortexConfig,
    cache: PagedCache,
    pages: Sequence[Pages],
    shapes: Mapping[str, Sequence[int]],
    heads_dim: int | Mapping[str, int] | None,
    namespace: Namespace,
) -> "Canonical | str":
    """How the blocks of an engine that has all KV heads become canonical, or why they do not.

    Args:
        config: the engine's settings.
        cache: the groups of layers, with their layouts.
        pages: how the blocks of each group are packed.
        shapes: the shape of each tensor, by name.
        heads_dim: the dimension of the tensors that counts KV heads; a tensor that a mapping leaves out has none.
        namespace: that of the engine's blocks.

    Raises:
        LayoutError: a tensor has no such dimension.
        ConfigError: `heads_dim` names a tensor that there is not.
    """
    if config.identity.tp_size > 1:
        return (
            f"this engine has the blocks of one of {config.identity.tp_size} tensor-parallel ranks, and it takes those "
            "of all, as in vLLM: leave tier.canonical_layout out"
        )
    if why := why_not_canonical(cache.groups):
        return why
    if heads_dim is None:
        return "nothing says where its tensors have their KV heads: pass heads_dim= to register_kv_caches"
    if isinstance(heads_dim, Mapping) and (unknown := sorted(set(heads_dim) - set(shapes))):
        raise ConfigError(f"heads_dim names {unknown[0]!r}, which is not among the tensors")
    heads = {name: _heads_of(shape, name, heads_dim) for name, shape in shapes.items()}
    shards = [shards_of(layout, shapes, heads) for layout in cache.layouts]
    in_tier = namespace.canonical(canonical_digest(cache.groups, shards))
    try:
        by_form = [form for of_group in zip(pages, shards, strict=True) for form in shards_by_form(*of_group)]
    except LayoutError as error:
        return str(error)
    parts = tuple((BlockShard(0, of_form),) if of_form else () for of_form in by_form)
    return Canonical(in_tier, CanonicalCache(in_tier.digest, parts))


def _heads_of(shape: Sequence[int], name: str, heads_dim: int | Mapping[str, int]) -> Heads:
    axis = heads_dim.get(name) if isinstance(heads_dim, Mapping) else heads_dim
    return Heads() if axis is None else Heads(axis, 0, shape[axis] if -len(shape) <= axis < len(shape) else 0)


def lower_tier(
    parts: EngineParts, config: KVortexConfig, encodings: Encodings, namespace: Namespace, canonical: Canonical | str
) -> Tier | None:
    """Make the engine's lower tier, not opened, which keeps the canonical layout if the settings say so.

    Args:
        parts: makes the tier.
        config: the engine's settings.
        encodings: how blocks are encoded.
        namespace: that of the engine's blocks.
        canonical: how they become canonical, or why they do not.

    Raises:
        ConfigError: the tier cannot be made, or the blocks have no canonical layout.
        LayoutError: what lies together of a KV head in memory is no whole number of words.
    """
    if not config.tier.canonical_layout:
        return parts.make_tier(config, namespace)
    if isinstance(canonical, str):
        raise ConfigError(f"blocks have no canonical layout: {canonical}")
    blocks = canonical_blocks(canonical.cache, encodings, 1)
    tier = parts.make_tier(config, canonical.namespace)
    return None if tier is None else CanonicalTier(tier, blocks)
