"""What a vLLM configuration means for the connector: which models it serves, leaves alone or refuses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from kvortex.arithmetic import align_up
from kvortex.codecs import packed_nbytes
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import ConfigError
from kvortex.types import BlockSizes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def only_group(kv_cache_config: "KVCacheConfig") -> Any:
    """The only group of layers of a model with full attention. The pages of its layers may differ in size.

    Raises:
        ConfigError: the model mixes attention kinds, or has sliding-window, state-space or cross-attention layers. Then
            a block holds more or less than the KV of its tokens, and a hit could be silently wrong.
    """
    groups = kv_cache_config.kv_cache_groups
    specs = [spec for group in groups for spec in layer_specs(group)]
    if len(groups) != 1 or not all(isinstance(spec, FullAttentionSpec) for spec in specs):
        kinds = sorted({type(spec).__name__ for spec in specs})
        raise ConfigError(
            f"KVortex serves models whose layers all have full attention; this one has {len(groups)} group(s) of "
            f"{', '.join(kinds)}. Run it without the connector"
        )
    return groups[0]


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
    if not vllm_config.model_config.is_prefix_caching_supported:
        return "vLLM does not reuse KV for this model and its pooling"
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in layer_specs(group)]
    if any(getattr(spec, "non_causal", False) for spec in specs):
        return "a token's KV depends on tokens behind it (attention over the prompt is not causal)"
    if not all(getattr(spec, "prefix_cacheable", True) for spec in specs):
        return "vLLM marks its KV as not reusable"
    strange = {type(s) for s in specs if isinstance(s, FullAttentionSpec)} - {FullAttentionSpec, MLAAttentionSpec}
    if strange:
        return f"its attention is of a kind that is not known here: {', '.join(sorted(k.__name__ for k in strange))}"
    on_cpu = vllm_config.device_config.device_type == "cpu"
    latent = all(isinstance(spec, MLAAttentionSpec) for spec in specs)
    if on_cpu and latent and not vllm_config.cache_config.enable_prefix_caching:
        return "vLLM's CPU backend gives other answers behind cached latent KV than without"
    return ""


def refuse_unserved(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """Refuse a model that KVortex would serve wrongly.

    Raises:
        ConfigError: context parallelism is on: then a block hash covers more tokens than the block of a rank holds. Or
            not all layers have full attention, see `only_group`.
    """
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, 1)
        if size > 1:
            raise ConfigError(f"KVortex does not serve context parallelism ({name} = {size})")
    only_group(kv_cache_config)


def expected_sizes(kv_cache_config: "KVCacheConfig", codec: str) -> BlockSizes:
    """Bytes that one worker's blocks take in the pool, from the page sizes of its layers.

    The scheduler uses this guess until the workers have reported what they registered. It may be wrong: vLLM shows the
    scheduler the layers of one pipeline stage only, and one page size where they differ.

    Raises:
        ConfigError: there is no such codec.
    """
    group = only_group(kv_cache_config)
    specs = layer_specs(group)
    pages = [int(spec.page_size_bytes) for spec in specs] * (len(group.layer_names) if len(specs) == 1 else 1)
    dtypes = {str(spec.dtype).removeprefix("torch.") for spec in specs}
    packed = packed_nbytes(pages, codec, dtypes.pop()) if len(dtypes) == 1 else None
    raw = align_up(sum(pages), EXTENT_ALIGNMENT_BYTES)
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
