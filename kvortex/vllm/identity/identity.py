"""The identity of a rank's blocks: every setting of a server that changes KV and is not in the block hashes."""

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
from kvortex.vllm.model import DRAFTS_WITHOUT_MODEL

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_OF_INPUTS = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_encoder_attn_dtype",
)
"""Settings of how images and other inputs become embeddings; vLLM's block hashes cover the inputs only."""
_VOLATILE = ("transformers_version",)  # beside names that begin with an underscore


class ModelSource(NamedTuple):
    """The weights of a model: its name, and a revision or digest that tells them from other weights of that name."""

    name: str
    content: str


def identity_of(vllm_config: "VllmConfig", is_latent: bool, rank: int, named: ModelIdentity) -> ModelIdentity:
    """The identity of one rank's blocks. Ranks that hold the same KV have the same identity.

    Args:
        vllm_config: the engine's configuration.
        is_latent: True if all tensor-parallel ranks hold the same KV.
        rank: number of the worker among all; the ranks of one tensor-parallel group follow each other.
        named: a name and a revision of the weights that the user adds, for changes that vLLM cannot see.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    source = source_of(model, vllm_config.load_config)
    if not source.content:
        logger.warning(
            "nothing tells the weights of %s from other weights of that name: if they can change, set "
            '"identity": {"weights_revision": ...} in kv_connector_extra_config, or keep a disk directory for each',
            source.name,
        )
    tp_size = 1 if is_latent else parallel.tensor_parallel_size
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
    """The weights that vLLM's `ModelConfig` and `LoadConfig` name.

    The same weights have one source, whether they are named by a path or by a hub id, and wherever the folder is.
    """
    if str(load.load_format) == "dummy":
        return ModelSource(str(model.model), f"dummy {model.seed}")
    remote = getattr(model, "model_weights", "")
    if remote:
        return ModelSource(str(remote), str(model.revision or ""))
    path = Path(model.model)
    if not path.exists():
        # If the configuration comes from another place, its commit is not that of the weights.
        commit = None if getattr(model, "hf_config_path", None) else getattr(model.hf_config, "_commit_hash", None)
        return ModelSource(str(model.model), str(commit or model.revision or ""))
    path = path.resolve() if not path.is_symlink() else path.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        repository = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return ModelSource(repository, path.name)
    return ModelSource(path.name, weights_digest(path))


def facts_of(vllm_config: "VllmConfig") -> dict[str, Any]:
    """Every other setting that changes the bytes of KV, as plain data."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    facts: dict[str, Any] = {
        **_computation_of(model),
        "cache_dtype": _cache_dtype_of(cache.cache_dtype, model),
        "layers": _layers_of(vllm_config),
    }
    if getattr(cache, "calculate_kv_scales", False):
        facts["scales"] = vllm_config.instance_id  # they depend on the first prompts of this engine
    draft = vllm_config.speculative_config
    if draft is not None and draft.method not in DRAFTS_WITHOUT_MODEL and draft.draft_model_config is not None:
        facts["draft"] = [
            draft.method,
            source_of(draft.draft_model_config, vllm_config.load_config),
            _computation_of(draft.draft_model_config),
        ]
    if vllm_config.device_config.device_type == "cpu":
        # vLLM's CPU kernels choose the layout of keys inside a block by the processor.
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
    if (online := getattr(model, "quantization_config", None)) is not None:  # for quantisation at load time
        facts["quantization_config"] = str(online)
    if classes := getattr(model, "model_class_overrides", None):
        facts["classes"] = _plain(classes)
    if (inputs := getattr(model, "multimodal_config", None)) is not None:
        facts["inputs"] = {name: _plain(getattr(inputs, name, None)) for name in _OF_INPUTS}
    if "longrope" in json.dumps(config):  # a server that accepts long prompts uses their factors in every prompt
        reaches = _values_of("original_max_position_embeddings", config)
        facts["long_factors"] = [model.max_model_len > reach for reach in reaches]
    return facts


def _layers_of(vllm_config: "VllmConfig") -> list[tuple[str, str, str]]:
    """For each layer its name, attention backend and storage format: the dtype alone does not tell two FP8 formats."""
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
    """One name for each storage format: `auto` is the model's own type, `fp8` is `fp8_e4m3`."""
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
    """The value in JSON's types, without the entries that differ between equal configurations."""
    if isinstance(value, Mapping):
        kept = {str(name): part for name, part in value.items() if not str(name).startswith("_")}
        return {name: _plain(part) for name, part in kept.items() if name not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _digest_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
