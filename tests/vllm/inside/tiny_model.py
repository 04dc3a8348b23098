"""Tiny llama, qwen3 and deepseek_v2 models with random weights whose outputs depend on their whole context.

vLLM's own ``load_format="dummy"`` fills weights with values so small that every prompt continues alike: two
equal outputs would then prove nothing about the KV behind them. These weights are scaled so that attention
is peaked and a wrong, stale or misplaced block changes the greedy continuation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

Architecture = Literal["llama", "qwen3", "deepseek_v2"]

VOCAB_SIZE = 1000
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 512
NUM_LAYERS = 4
NUM_QUERY_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 64
LATENT_RANK = 512  # vLLM's CPU kernel for latent attention takes DeepSeek's sizes only: 512 and 64


def make_tiny_model(
    directory: Path,
    architecture: Architecture = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into `directory` (made if absent) and return it.

    Four layers, four query and two KV heads of 64: 2.9 million parameters, 4 KiB of float32 KV a token
    (deepseek_v2: one latent vector a token and layer, 9 KiB).
    No tokenizer: use ``skip_tokenizer_init=True`` and prompts of token ids in ``range(3, VOCAB_SIZE)``
    (1 and 2 are the begin and end tokens).
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model_config(architecture, dtype), indent=1))
    save_file(random_weights(architecture, dtype, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def quantize(directory: Path) -> Path:
    """Give a model 8-bit weights, a scale a row, in place; its layers then run on integers."""
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scales = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / scales).round().to(torch.int8)
        weights[f"{name}_scale"] = scales
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = quantization(group)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def quantization(*groups: dict[str, Any]) -> dict[str, Any]:
    """What a config says of quantised weights; without groups none of them is."""
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def model_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """A Hugging Face config, as both versions of transformers that are tested read it."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_QUERY_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if architecture == "llama":
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
        }
    if architecture == "deepseek_v2":
        return config | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "num_key_value_heads": NUM_QUERY_HEADS,
            "kv_lora_rank": LATENT_RANK,
            "q_lora_rank": None,
            "qk_nope_head_dim": HEAD_DIM,
            "qk_rope_head_dim": HEAD_DIM,
            "v_head_dim": HEAD_DIM,
            "first_k_dense_replace": NUM_LAYERS,  # no experts
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": HEAD_DIM,
            "n_group": 1,
            "topk_group": 1,
        }
    return config | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_window_layers": NUM_LAYERS,
    }


def random_weights(architecture: Architecture, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the model by its name; the same `seed` gives the same weights."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        values: torch.Tensor = torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)
        return values.to(dtype)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=dtype)

    query_size, kv_size = NUM_QUERY_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    # Unit variance an entry, so that tokens and logits are told apart.
    unit_gain = HIDDEN_SIZE**0.5
    weights = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE, unit_gain),
        "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE, unit_gain),
        "model.norm.weight": ones(HIDDEN_SIZE),
    }
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}."
        # A gain of two in attention makes the scores peaked; the MLP must not drown it.
        if architecture == "deepseek_v2":
            weights |= {
                f"{layer}self_attn.q_proj.weight": matrix(2 * query_size, HIDDEN_SIZE, 2.0),
                f"{layer}self_attn.kv_a_proj_with_mqa.weight": matrix(LATENT_RANK + HEAD_DIM, HIDDEN_SIZE, 2.0),
                f"{layer}self_attn.kv_a_layernorm.weight": ones(LATENT_RANK),
                f"{layer}self_attn.kv_b_proj.weight": matrix(2 * query_size, LATENT_RANK, 2.0),
            }
        else:
            weights |= {
                f"{layer}self_attn.q_proj.weight": matrix(query_size, HIDDEN_SIZE, 2.0),
                f"{layer}self_attn.k_proj.weight": matrix(kv_size, HIDDEN_SIZE, 2.0),
                f"{layer}self_attn.v_proj.weight": matrix(kv_size, HIDDEN_SIZE, 2.0),
            }
        weights |= {
            f"{layer}self_attn.o_proj.weight": matrix(HIDDEN_SIZE, query_size, 2.0),
            f"{layer}mlp.gate_proj.weight": matrix(INTERMEDIATE_SIZE, HIDDEN_SIZE, 1.0),
            f"{layer}mlp.up_proj.weight": matrix(INTERMEDIATE_SIZE, HIDDEN_SIZE, 1.0),
            f"{layer}mlp.down_proj.weight": matrix(HIDDEN_SIZE, INTERMEDIATE_SIZE, 1.0),
            f"{layer}input_layernorm.weight": ones(HIDDEN_SIZE),
            f"{layer}post_attention_layernorm.weight": ones(HIDDEN_SIZE),
        }
        if architecture == "qwen3":
            weights[f"{layer}self_attn.q_norm.weight"] = ones(HEAD_DIM)
            weights[f"{layer}self_attn.k_norm.weight"] = ones(HEAD_DIM)
    return weights


def lacks_float32_latent() -> bool:
    """On processors with AMX vLLM's CPU backend takes latent attention to kernels that have no float32."""
    return bool(torch.cpu._is_amx_tile_supported())


def force_prefix_caching() -> None:
    """Undo what vLLM's CPU platform does to models with latent attention: turn the prefix cache off."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.cache_config.enable_prefix_caching = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
