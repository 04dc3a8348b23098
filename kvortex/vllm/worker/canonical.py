"""The canonical layout of what one rank registers: which KV heads it has, and where its tensors have them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from vllm.v1.kv_cache_interface import MLAAttentionSpec, UniformTypeKVCacheSpecs

from kvortex.codecs import Pages
from kvortex.errors import LayoutError
from kvortex.layout import PagedCache
from kvortex.layout.canonical import BlockShard, Heads, TensorShard, canonical_digest, shards_of
from kvortex.tiering.canonical_blocks import shards_by_form, why_not_canonical
from kvortex.types import form_of
from kvortex.vllm.model import ServedGroups
from kvortex.vllm.versions import heads_dim
from kvortex.vllm.worker.parts import BlockParts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_WAY_OUT: Final = "leave tier.canonical_layout out for this model"
_SCALES_OF_TENSORS: Final = 1
"""The last of vLLM's modes of quantisation whose elements lie in a tensor as those of a model's own dtype do."""


class Ranks(NamedTuple):
    """Number of a rank's part of a block among those of its pipeline stage, and how many these are."""

    rank: int
    size: int


class Canonical(NamedTuple):
    """What follows from one rank's caches.

    Attributes:
        layout: digest of the canonical layout, the same on all ranks of a pipeline stage.
        parts: for each form the rank's part of a block; None for a form that there is not.
    """

    layout: bytes
    parts: tuple[BlockShard | None, ...]


def canonical_of(
    vllm_config: "VllmConfig",
    groups: ServedGroups,
    cache: PagedCache,
    tensors: Mapping[str, torch.Tensor],
    here: Sequence[int],
    ranks: Ranks,
    parts: BlockParts,
    pages: Sequence[Pages],
) -> Canonical | str:
    """The canonical layout of what this rank has registered, or why there is none.

    Args:
        vllm_config: the engine's configuration.
        groups: the groups whose blocks are cached.
        cache: those of which this rank has layers, with their layouts.
        tensors: the tensor of each layer.
        here: the number of each of these groups.
        ranks: which of the ranks of its stage this one is.
        parts: where its part of a block is.
        pages: how the blocks of the groups that are here are packed.
    """
    if why := why_not_canonical(groups.set):
        return why
    try:
        shards, by_form = dict[int, tuple[TensorShard, ...]](), dict[int, tuple[TensorShard, ...]]()
        for number, layout, of_group in zip(here, cache.layouts, pages, strict=True):
            specs = _specs_of(groups.of_vllm[number].kv_cache_spec, [fmt.name for fmt in layout.formats])
            heads = {name: _heads_of(vllm_config, name, spec, tensors[name], ranks) for name, spec in specs.items()}
            shards[number] = shards_of(layout, {name: tensors[name].shape for name in specs}, heads)
            raw, packed = shards_by_form(of_group, shards[number])
            by_form |= {form_of(number, False): raw, form_of(number, True): packed}
    except LayoutError as error:
        return str(error)
    layout_digest = canonical_digest(groups.set, [shards.get(number, ()) for number in range(len(groups.set))])
    forms = [form for form in range(2 * len(groups.set)) if form % 2 == 0 or parts.encodings.packs[form // 2]]
    of_forms = {form: BlockShard(parts.offset(form), by_form.get(form, ())) for form in forms}
    return Canonical(layout_digest, tuple(of_forms.get(form) for form in range(2 * len(groups.set))))


def _specs_of(spec: Any, layers: Sequence[str]) -> dict[str, Any]:
    of_layers = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else {}
    return {name: of_layers.get(name, spec) for name in layers}


def _heads_of(vllm_config: "VllmConfig", name: str, spec: Any, tensor: torch.Tensor, ranks: Ranks) -> Heads:
    """Where a layer's tensor has its KV heads.

    Raises:
        LayoutError: it is not known.
    """
    if isinstance(spec, MLAAttentionSpec):
        return Heads()
    count = int(spec.num_kv_heads)
    if int(getattr(spec, "kv_quant_mode", 0)) > _SCALES_OF_TENSORS:
        raise LayoutError(f"layer {name!r} has pages of quantised KV, whose bytes are not told by KV heads: {_WAY_OUT}")
    axis = heads_dim(vllm_config.compilation_config.static_forward_context.get(name), spec)
    if axis is None or axis >= tensor.dim() or tensor.shape[axis] != count:
        raise LayoutError(
            f"layer {name!r} has a cache of shape {tuple(tensor.shape)}, in which {count} KV heads are not found: "
            f"{_WAY_OUT}"
        )
    shards = _num_shards(vllm_config, spec, count, ranks)
    if ranks.size % shards:
        raise LayoutError(
            f"layer {name!r}: {shards} shards of its KV heads are not those of {ranks.size} ranks: {_WAY_OUT}"
        )
    return Heads(axis, ranks.rank // (ranks.size // shards) * count, shards * count)


def _num_shards(vllm_config: "VllmConfig", spec: Any, count: int, ranks: Ranks) -> int:
    """How many different shards of a layer's KV heads the ranks have; further ranks have copies of these.

    With more ranks than heads a rank has a single head, which others have too. That they have the same bytes is checked
    whenever a block is written.
    """
    known = getattr(spec, "max_tp_shards", None)
    if known is None and count == 1:
        known = int(vllm_config.model_config.get_total_num_kv_heads())
    return ranks.size if known is None else min(int(known), ranks.size)
