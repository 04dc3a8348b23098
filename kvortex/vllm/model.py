"""What the connector needs to know of a vLLM configuration: what it serves, what it leaves alone, what it refuses."""

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
    """The one group of full-attention layers that KVortex serves; their pages may differ in size.

    Raises:
        ConfigError: the model mixes attention kinds, or has sliding-window, state-space or cross-attention
            layers: a block is then not the KV of its tokens alone, and a hit could be silently wrong.
    """
    groups = kv_cache_config.kv_cache_groups
    specs = [spec for group in groups for spec in layer_specs(group)]
    if len(groups) != 1 or not all(isinstance(spec, FullAttentionSpec) for spec in specs):
        kinds = sorted({type(spec).__name__ for spec in specs})
        raise ConfigError(
            f"KVortex serves models whose layers all keep full attention; this one has {len(groups)} group(s) of "
            f"{', '.join(kinds)}. Run it without the connector"
        )
    return groups[0]


def layer_specs(group: Any) -> Sequence[Any]:
    """The specs of a group's layers: one for all of them, or one for each where their pages differ."""
    spec = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def is_latent(group: Any) -> bool:
    """True for multi-head latent attention: every tensor-parallel rank then holds the same KV."""
    return all(isinstance(spec, MLAAttentionSpec) for spec in layer_specs(group))


def why_not_reused(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> str:
    """Why the KV of this model cannot serve another prompt with the same beginning; `""` if it can.

    What vLLM would not serve from its own prefix cache is not served here either.
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
    """Refuse what KVortex would serve wrongly.

    Raises:
        ConfigError: context parallelism, where vLLM's block hashes cover more tokens than a rank's block holds; or
            layers that do not all keep full attention, see `only_group`.
    """
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, 1)
        if size > 1:
            raise ConfigError(f"KVortex does not serve context parallelism ({name} = {size})")
    only_group(kv_cache_config)


def expected_sizes(kv_cache_config: "KVCacheConfig", codec: str) -> BlockSizes:
    """Sizes of one worker's blocks in the pool, from the sizes of its layers' pages.

    In the scheduler this is a guess until the workers have said what they registered: vLLM tells it the layers of one
    stage, and of pages that differ only one.

    Raises:
        ConfigError: no such codec.
    """
    group = only_group(kv_cache_config)
    specs = layer_specs(group)
    pages = [int(spec.page_size_bytes) for spec in specs] * (len(group.layer_names) if len(specs) == 1 else 1)
    dtypes = {str(spec.dtype).removeprefix("torch.") for spec in specs}
    packed = packed_nbytes(pages, codec, dtypes.pop()) if len(dtypes) == 1 else None
    raw = align_up(sum(pages), EXTENT_ALIGNMENT_BYTES)
    return BlockSizes(raw, raw if packed is None else align_up(packed, EXTENT_ALIGNMENT_BYTES))


def block_dims(kv_caches: dict[str, Any], num_blocks: int) -> dict[str, int]:
    """For each tensor the dimension that counts blocks: the first that is their number, or else a multiple of it.

    vLLM puts it first, or second behind K and V.

    Raises:
        ConfigError: neither is.
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
