"""What names the bytes of a rank's blocks beside their hashes: everything that a server can set that changes KV."""

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvortex.config import ModelIdentity
from kvortex.vllm.identity.files import weights_digest
from kvortex.vllm.model import is_latent

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

DRAFTS_WITHOUT_MODEL = ("ngram", "ngram_gpu", "suffix")
_OF_INPUTS = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_encoder_attn_dtype",
)
"""What a server sets of how images and the like become embeddings; their names in vLLM's hashes say nothing of it."""
_VOLATILE = ("transformers_version",)  # beside names that begin with an underscore


class ModelSource(NamedTuple):
    """Where a model's weights come from: its name, and what tells these weights from others of that name."""

    name: str
    content: str


def identity_of(vllm_config: "VllmConfig", group: Any, rank: int, named: ModelIdentity) -> ModelIdentity:
    """What names the bytes of one rank beside the block hash; tensor-parallel ranks are neighbours.

    Ranks that hold the same KV have one identity.

    Args:
        vllm_config: the engine's configuration.
        group: the group of layers that is served.
        rank: number of the worker among all.
        named: what the user adds, for what vLLM cannot see: a name, and a revision of the weights.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    source = source_of(model, vllm_config.load_config)
    if not source.content:
        logger.warning(
            "nothing tells the weights of %s from other weights of that name: if they can change, set "
            '"identity": {"weights_revision": ...} in kv_connector_extra_config, or keep a disk directory for each',
            source.name,
        )
    tp_size = 1 if is_latent(group) else parallel.tensor_parallel_size
    return ModelIdentity(
        model=source.name,
        weights_revision=source.content,
        fingerprint=_digest_of({**facts_of(vllm_config), "named": [named.model, named.weights_revision]}),
        tp_rank=rank % tp_size,
        tp_size=tp_size,
        pp_rank=rank // parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
    )


def source_of(model: Any, load: Any) -> ModelSource:
    """The model of a `ModelConfig`, loaded as a `LoadConfig` says.

    The same weights have one source whether they were named by path or by hub id, and wherever their folder lies.
    """
    if str(load.load_format) == "dummy":
        return ModelSource(str(model.model), f"dummy {model.seed}")
    remote = getattr(model, "model_weights", "")
    if remote:
        return ModelSource(str(remote), str(model.revision or ""))
    path = Path(model.model)
    if not path.exists():
        # Where the configuration comes from elsewhere, so does its commit.
        commit = None if getattr(model, "hf_config_path", None) else getattr(model.hf_config, "_commit_hash", None)
        return ModelSource(str(model.model), str(commit or model.revision or ""))
    path = path.resolve() if not path.is_symlink() else path.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        repository = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return ModelSource(repository, path.name)
    return ModelSource(path.name, weights_digest(path))


def facts_of(vllm_config: "VllmConfig") -> dict[str, Any]:
    """Everything else that changes the bytes, as plain data."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    facts: dict[str, Any] = {
        **_computation_of(model),
        "cache_dtype": _cache_dtype_of(cache.cache_dtype, model),
        "layers": _layers_of(vllm_config),
    }
    if getattr(cache, "calculate_kv_scales", False):
        facts["scales"] = vllm_config.instance_id  # they depend on the first prompts of this very engine
    draft = vllm_config.speculative_config
    if draft is not None and draft.method not in DRAFTS_WITHOUT_MODEL and draft.draft_model_config is not None:
        facts["draft"] = [
            draft.method,
            source_of(draft.draft_model_config, vllm_config.load_config),
            _computation_of(draft.draft_model_config),
        ]
    if vllm_config.device_config.device_type == "cpu":
        # vLLM's CPU kernels choose by the processor how keys lie inside a block.
        facts["cpu"] = [platform.machine(), torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()]
    return facts


def _computation_of(model: Any) -> dict[str, Any]:
    config = _plain(model.hf_config.to_dict())
    facts: dict[str, Any] = {
        "config": config,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "no_sliding_window": bool(getattr(model, "disable_sliding_window", False)),
        "code": str(getattr(model, "code_revision", None)),
    }
    if (online := getattr(model, "quantization_config", None)) is not None:  # of weights that are quantised on loading
        facts["quantization_config"] = str(online)
    if classes := getattr(model, "model_class_overrides", None):
        facts["classes"] = _plain(classes)
    if (inputs := getattr(model, "multimodal_config", None)) is not None:
        facts["inputs"] = {name: _plain(getattr(inputs, name, None)) for name in _OF_INPUTS}
    if "longrope" in json.dumps(config):  # servers that accept long prompts use the factors for these everywhere
        reaches = _values_of("original_max_position_embeddings", config)
        facts["long_factors"] = [model.max_model_len > reach for reach in reaches]
    return facts


def _layers_of(vllm_config: "VllmConfig") -> list[tuple[str, str, str]]:
    """Of each layer its attention backend and what it stores: two kinds of FP8 have one dtype."""
    layers = vllm_config.compilation_config.static_forward_context
    return sorted(
        (
            name,
            type(getattr(layer, "impl", None)).__name__,
            _cache_dtype_of(getattr(layer, "kv_cache_dtype", ""), vllm_config.model_config),
        )
        for name, layer in layers.items()
    )


def _cache_dtype_of(name: object, model: Any) -> str:
    """One name for what has several: `auto` and the model's own type, `fp8` and `fp8_e4m3`."""
    own = str(model.dtype).removeprefix("torch.")
    return {"auto": own, "fp8": "fp8_e4m3"}.get(str(name), str(name))


def _values_of(name: str, config: Any) -> Iterator[int]:
    if isinstance(config, list):
        for part in config:
            yield from _values_of(name, part)
    elif isinstance(config, dict):
        if isinstance(config.get(name), int):
            yield config[name]
        for part in config.values():
            yield from _values_of(name, part)


def _plain(value: Any) -> Any:
    """JSON's types, without what differs between equal configurations."""
    if isinstance(value, Mapping):
        kept = {str(name): part for name, part in value.items() if not str(name).startswith("_")}
        return {name: _plain(part) for name, part in kept.items() if name not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _digest_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
