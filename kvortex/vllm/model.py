"""What a vLLM configuration means for the connector: which models it serves, leaves alone or refuses."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvortex.arithmetic import align_up
from kvortex.codecs import RAW, packed_nbytes
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import ConfigError
from kvortex.groups import GroupSet, KVGroup, KVKind
from kvortex.types import BlockSizes
from kvortex.vllm.versions import OTHER_WINDOW_SPECS, SERVES_GROUPS, kind_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


DRAFTS_WITHOUT_MODEL: Final = ("ngram", "ngram_gpu", "suffix")

_KINDS: Final[dict[type, KVKind]] = {
    FullAttentionSpec: KVKind.FULL,
    MLAAttentionSpec: KVKind.FULL,
    SlidingWindowSpec: KVKind.WINDOW,
    ChunkedLocalAttentionSpec: KVKind.CHUNK,
    MambaSpec: KVKind.STATE,
    **dict.fromkeys(OTHER_WINDOW_SPECS, KVKind.WINDOW),
}
"""The specs that are known. Subclasses may mean something else, so they are not."""


class ServedGroups:
    """The groups of layers whose blocks vLLM caches by their hashes, with vLLM's numbers for them.

    Args:
        kv_cache_config: groups of the paged cache.
    """

    def __init__(self, kv_cache_config: "KVCacheConfig") -> None:
        self.every = tuple(kv_cache_config.kv_cache_groups)
        """All groups of vLLM, the others too."""
        self.ids = tuple(n for n, group in enumerate(self.every) if _is_cacheable(group))
        """vLLM's number of each served group."""
        self.of_vllm = tuple(self.every[n] for n in self.ids)
        groups = [_as_group(group, number) for number, group in zip(self.ids, self.of_vllm, strict=True)]
        self.set = GroupSet(groups, math.gcd(*(group.block_size for group in groups)))

    @property
    def is_one_of_full_attention(self) -> bool:
        """True for the simple case: one group, of full attention."""
        return len(self.every) == 1 and self.set.groups[0].kind is KVKind.FULL

    @property
    def facts(self) -> list[tuple[int, int, str | None, int | None]]:
        """For each group vLLM's number, tokens of a block, vLLM's name of its kind, and its window if it has one."""
        facts = []
        for number, of_vllm, group in zip(self.ids, self.of_vllm, self.set.groups, strict=True):
            window = group.reach if group.kind is KVKind.WINDOW else None
            facts.append((number, group.block_size, kind_name(of_vllm.kv_cache_spec), window))
        return facts

    @property
    def is_latent(self) -> bool:
        """True for multi-head latent attention alone: then every tensor-parallel rank holds the same KV."""
        return all(is_latent(group) for group in self.of_vllm)


def _as_group(group: Any, number: int) -> KVGroup:
    spec = layer_specs(group)[0]
    kind = _KINDS[type(spec)]
    reach = {KVKind.WINDOW: "sliding_window", KVKind.CHUNK: "attention_chunk_size"}.get(kind)
    return KVGroup(
        name=str(number),
        layers=tuple(group.layer_names),
        block_size=int(group.kv_cache_spec.block_size),
        kind=kind,
        reach=int(getattr(spec, reach)) if reach else 0,
    )


def _is_cacheable(group: Any) -> bool:
    return bool(getattr(group.kv_cache_spec, "prefix_cacheable", True))


def layer_specs(group: Any) -> Sequence[Any]:
    """The specs of a group's layers: one for all layers, or one for each layer if their pages differ."""
    spec = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def is_latent(group: Any) -> bool:
    """True for multi-head latent attention: then every tensor-parallel rank holds the same KV."""
    return all(isinstance(spec, MLAAttentionSpec) for spec in layer_specs(group))


def why_not_reused(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> str:
    """Why the KV of this model cannot serve another prompt with the same beginning; `""` if it can.

    A model that vLLM does not serve from its own prefix cache is not served here either.
    """
    if not kv_cache_config.kv_cache_groups:
        return "the model keeps no KV"
    if not _vllm_can_reuse(vllm_config):
        return "vLLM does not reuse KV for this model and its pooling"
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in layer_specs(group)]
    if any(getattr(spec, "non_causal", False) for spec in specs):
        return "a token's KV depends on tokens behind it (attention over the prompt is not causal)"
    groups = [group for group in kv_cache_config.kv_cache_groups if _is_cacheable(group)]
    cacheable = [spec for group in groups for spec in layer_specs(group)]
    if not cacheable:
        return "vLLM marks its KV as not reusable"
    strange = {type(spec).__name__ for spec in cacheable if type(spec) not in _KINDS}
    if strange:
        return f"its KV is of a kind that is not known here: {', '.join(sorted(strange))}"
    return _why_vllm_keeps_none(vllm_config, specs)


def _vllm_can_reuse(vllm_config: "VllmConfig") -> bool:
    model = vllm_config.model_config
    # vLLM reuses the states of a model if it is told to; up to 0.23 it does not so by default.
    has_states = getattr(model, "attn_type", "") in ("attention_free", "hybrid") and model.pooler_config is None
    return bool(model.is_prefix_caching_supported) or (
        has_states and bool(vllm_config.cache_config.enable_prefix_caching)
    )


def _why_vllm_keeps_none(vllm_config: "VllmConfig", specs: Sequence[Any]) -> str:
    """Why vLLM itself would not serve this model from its prefix cache as it is configured; `""` if it would."""
    caches = bool(vllm_config.cache_config.enable_prefix_caching)
    mixes = not all(isinstance(spec, FullAttentionSpec) for spec in specs)
    if mixes and not caches:
        return "it mixes kinds of KV, and only vLLM's prefix caching tells which blocks are of use: turn that on"
    if any(isinstance(spec, MambaSpec) and spec.mamba_cache_mode not in ("align", "all") for spec in specs):
        return "vLLM keeps no snapshots of its states (mamba_cache_mode is 'none'): set mamba_cache_mode to 'align'"
    latent = all(isinstance(spec, MLAAttentionSpec) for spec in specs)
    if vllm_config.device_config.device_type == "cpu" and latent and not caches:
        return "vLLM's CPU backend gives other answers behind cached latent KV than without"
    return ""


def has_draft_layers(vllm_config: "VllmConfig") -> bool:
    """True if drafts come from layers that keep KV."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method not in DRAFTS_WITHOUT_MODEL


def max_blocks_of_request(vllm_config: "VllmConfig", groups: Sequence[Any]) -> list[int]:
    """For each of vLLM's groups the most device blocks that one request holds."""
    specs = [group.kv_cache_spec for group in groups]
    return [-(-int(spec.max_memory_usage_bytes(vllm_config)) // int(spec.page_size_bytes)) for spec in specs]


def refuse_unserved(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """Refuse a model that KVortex would serve wrongly.

    Raises:
        ConfigError: context parallelism is on: then a block hash covers more tokens than the block of a rank holds. Or
            the model mixes kinds of KV, and this vLLM does not say which blocks of a request are of use.
    """
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, 1)
        if size > 1:
            raise ConfigError(
                f"KVortex does not serve context parallelism ({name} = {size}): a block hash then covers more tokens "
                "than one rank's block holds. Run it without the connector, or with tensor parallelism alone"
            )
    if not SERVES_GROUPS and not ServedGroups(kv_cache_config).is_one_of_full_attention:
        raise ConfigError(
            "with this vLLM KVortex serves models whose layers all have full attention: use vLLM 0.23 or newer for "
            "this model, or run it without the connector"
        )


def expected_sizes(groups: ServedGroups, codec: str) -> tuple[BlockSizes, ...]:
    """Bytes that one worker's blocks take in the pool, for each group, from the page sizes of its layers.

    The scheduler uses this guess until the workers have reported what they registered. It may be wrong: vLLM shows the
    scheduler the layers of one pipeline stage only, and one page size where they differ.

    Raises:
        ConfigError: there is no such codec.
    """
    return tuple(
        _expected_sizes(of_vllm, codec if group.may_pack else RAW)
        for of_vllm, group in zip(groups.of_vllm, groups.set.groups, strict=True)
    )


def _expected_sizes(group: Any, codec: str) -> BlockSizes:
    specs = layer_specs(group)
    # The stage whose layers the scheduler sees may have none of a group, and the spec of a layer nevertheless.
    pages = [int(spec.page_size_bytes) for spec in specs] * (max(len(group.layer_names), 1) if len(specs) == 1 else 1)
    dtypes = {str(getattr(spec, "dtype", "")).removeprefix("torch.") for spec in specs}
    packed = packed_nbytes(pages, codec, dtypes.pop()) if len(dtypes) == 1 else None
    raw = align_up(max(sum(pages), 1), EXTENT_ALIGNMENT_BYTES)
    return BlockSizes(raw, raw if packed is None else align_up(packed, EXTENT_ALIGNMENT_BYTES))


def block_dims(kv_caches: dict[str, Any], num_blocks: int) -> dict[str, int]:
    """For each tensor the dimension that counts blocks. vLLM puts it first, or second, behind the one of K and V.

    Args:
        kv_caches: the cache tensor of each layer, by name.
        num_blocks: device blocks.

    Returns:
        For each name the first of these two dimensions with `num_blocks` entries, or else with a multiple of that.

    Raises:
        ConfigError: no such dimension.
    """
    dims = {}
    for name, tensor in kv_caches.items():
        sizes = {dim: tensor.shape[dim] for dim in (0, 1) if dim < tensor.dim()}
        exact = [dim for dim, size in sizes.items() if size == num_blocks]
        multiple = [dim for dim, size in sizes.items() if size % num_blocks == 0]
        if not multiple:
            raise ConfigError(f"{name}: no dimension of {tuple(tensor.shape)} counts {num_blocks} blocks")
        dims[name] = (exact or multiple)[0]
    return dims
