"""What the connector needs to know of a vLLM configuration, and what it refuses."""

from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from kvortex.codecs import packed_nbytes
from kvortex.config import EXTENT_ALIGNMENT_BYTES, ModelIdentity
from kvortex.driver import align_up
from kvortex.errors import ConfigError
from kvortex.types import BlockSizes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def only_group(kv_cache_config: "KVCacheConfig") -> Any:
    """The one group of full-attention layers that KVortex serves.

    Raises:
        ConfigError: the model mixes attention kinds, or has sliding-window, state-space or cross-attention
            layers: a block is then not the KV of its tokens alone, and a hit could be silently wrong.
    """
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise ConfigError(
            f"KVortex serves models whose layers all keep full attention; this one has {len(groups)} group(s) of "
            f"{', '.join(kinds)}. Run it without the connector"
        )
    return groups[0]


def is_latent(group: Any) -> bool:
    """True for multi-head latent attention: every tensor-parallel rank then holds the same KV."""
    return isinstance(group.kv_cache_spec, MLAAttentionSpec)


def refuse_unserved(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """Refuse what KVortex would serve wrongly.

    Raises:
        ConfigError: context parallelism, where vLLM's block hashes cover more tokens than a rank's block holds; or
            latent attention on a CPU, where vLLM computes differently behind cached KV than without and therefore
            turns its own prefix cache off.
    """
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, 1)
        if size > 1:
            raise ConfigError(f"KVortex does not serve context parallelism ({name} = {size})")
    on_cpu = vllm_config.device_config.device_type == "cpu"
    if on_cpu and is_latent(only_group(kv_cache_config)) and not vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "vLLM's CPU backend gives other answers behind cached latent KV than without, and turns its own prefix "
            "cache off for such models: KVortex does not serve them on CPUs"
        )


def stored_sizes(kv_cache_config: "KVCacheConfig", codec: str) -> BlockSizes:
    """Sizes of one worker's blocks in the pool, as the scheduler can know them: from the size of a layer's page.

    Raises:
        ConfigError: no such codec, or it depends on how a page is cut whether and how its block is packed.
    """
    group = only_group(kv_cache_config)
    spec, layers = group.kv_cache_spec, len(group.layer_names)
    page, dtype = int(spec.page_size_bytes), str(spec.dtype).removeprefix("torch.")
    whole, halves = (packed_nbytes(pages * layers, codec, dtype) for pages in ([page], [page // 2] * 2))
    if whole != halves:
        raise ConfigError(f"codec {codec!r} does not suit pages of {page} bytes: set codec to 'raw'")
    raw = align_up(page * layers, EXTENT_ALIGNMENT_BYTES)
    return BlockSizes(raw, raw if whole is None else align_up(whole, EXTENT_ALIGNMENT_BYTES))


def identity_of(vllm_config: "VllmConfig", group: Any, rank: int) -> ModelIdentity:
    """What names the bytes of one rank beside the block hash; tensor-parallel ranks are neighbours.

    Ranks that hold the same KV have one identity.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tp_size = 1 if is_latent(group) else parallel.tensor_parallel_size
    return ModelIdentity(
        model=model.model,
        weights_revision=model.revision or "",
        tp_rank=rank % tp_size,
        tp_size=tp_size,
        pp_rank=rank // parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
    )


def block_dims(kv_caches: dict[str, Any], num_blocks: int) -> dict[str, int]:
    """For each tensor the dimension that counts blocks: the first that is a multiple of their number.

    vLLM puts it first, or second behind K and V.

    Raises:
        ConfigError: neither is.
    """
    dims = {}
    for name, tensor in kv_caches.items():
        candidates = [dim for dim in (0, 1) if dim < tensor.dim() and tensor.shape[dim] % num_blocks == 0]
        if not candidates:
            raise ConfigError(f"{name}: no dimension of {tuple(tensor.shape)} counts {num_blocks} blocks")
        dims[name] = candidates[0]
    return dims
