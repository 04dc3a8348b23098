"""Tiny random models in the shapes that people serve: windows, chunks, states and mixtures of them.

As in `tiny_model`, the weights are scaled so that the greedy continuation depends on the whole context.
Windows and chunks are short: a prompt of 320 tokens spans several of them, and many blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tiny_model import VOCAB_SIZE

HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 512
HEAD_DIM = 64
WINDOW = 64  # tokens
CHUNK = 96  # tokens
BLOCK_SIZE = 32  # tokens; vLLM gives the windows of Gemma 4 twice as many
DRAFT = "draft"  # the folder of a draft model, in its target's
SEED = 0

SLIDING, FULL = "sliding_attention", "full_attention"

Draft = Literal["mtp", "eagle", "eagle3"]
EAGLE3_LAYERS = [1, 2, 3]  # those of the target whose outputs the draft gets
MTP_NORMS = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")


@dataclass(frozen=True)
class Shape:
    """A model's config, what random weights of it need, and what an engine needs to serve it.

    `gains` are applied to the parameters whose name contains the key: a matrix gets random entries with a standard
    deviation of gain / sqrt(columns), a vector is filled with the value itself. The last key that fits counts.
    `options` are arguments of `vllm.LLM` without which the shape does not start or says something else when it hits.
    With `needs_stand_ins` it runs on CPUs only after `cpu_ops_mamba.install`.
    """

    config: dict[str, Any]
    gains: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    draft: Draft | None = None
    needs_stand_ins: bool = False


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": HIDDEN_SIZE,
}

UNIT_GAIN = HIDDEN_SIZE**0.5  # unit variance an entry, so that tokens and logits are told apart
GAINS = {"": 1.0, "attn": 2.0, "embed": UNIT_GAIN, "lm_head": UNIT_GAIN}
GENERAL = ("", "attn")
# Mamba 2: vLLM's CPU kernel gives no state at a block boundary inside a step, and the step fails. Steps that end at
# every boundary do not; nor do long ones after `cpu_ops_mamba.install`.
# Gated delta net: the CPU kernel takes bfloat16 only, and results depend on the lengths of steps. With equal steps a
# run that hits gives the tokens of a run that computes everything.
ONE_BLOCK_A_STEP = {"max_num_batched_tokens": BLOCK_SIZE}
# vLLM's CPU kernel of rotary embeddings reads wrong positions where queries have a dimension for heads, as LFM2's do.
PLAIN_ROTATION = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
SLOW = -4.6  # logarithm of a decay of 0.01 a token: states remember some hundred tokens
# Gemma multiplies its embeddings by sqrt(HIDDEN_SIZE) and adds one to the weights of its norms.
GEMMA_GAINS = {"embed": 0.25, "post_attention_layernorm": 1.0, "q_norm": 1.0, "k_norm": 1.0}

QWEN3_NEXT = Shape(
    COMMON
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", FULL, "linear_attention", FULL],
        "head_dim": 256,  # a block of KV is as large as a state then, without more tokens
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": HIDDEN_SIZE,
        "shared_expert_intermediate_size": HIDDEN_SIZE,
    },
    {"A_log": SLOW, "q_norm": 1.0, "k_norm": 1.0},
    ONE_BLOCK_A_STEP,
    torch.bfloat16,
)

SHAPES: dict[str, Shape] = {
    "gemma3": Shape(
        COMMON
        | {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "query_pre_attn_scalar": HEAD_DIM,
        },
        GEMMA_GAINS,
    ),
    "gemma2": Shape(
        COMMON
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "query_pre_attn_scalar": HEAD_DIM,
            "tie_word_embeddings": True,
        },
        GEMMA_GAINS,
    ),
    "gemma4": Shape(
        COMMON
        | {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "global_head_dim": 2 * HEAD_DIM,  # a token of full attention is twice as large as one of a window
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": True,
        },
        {"embed": 0.25},
    ),
    "gpt_oss": Shape(COMMON | GPT_OSS),
    "llama4": Shape(
        COMMON
        | {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "intermediate_size_mlp": INTERMEDIATE_SIZE,
            "attention_chunk_size": CHUNK,
            "layer_types": ["chunked_attention", FULL, "chunked_attention", FULL],
            "no_rope_layers": [1, 0, 1, 0],
            "moe_layers": [],
            "interleave_moe_layer_step": 0,  # no experts
        },
        {"v_proj": 4.0},
    ),
    "mistral": Shape(
        COMMON | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW}
    ),
    "exaone_mtp": Shape(
        COMMON
        | {
            "architectures": ["ExaoneMoEForCausalLM"],
            "model_type": "exaone_moe",
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "mlp_layer_types": ["dense"] * 4,
            "num_nextn_predict_layers": 1,
        },
        {"q_norm": 2.0, "k_norm": 2.0},
        draft="mtp",
    ),
    "llama_eagle": Shape(COMMON | LLAMA, draft="eagle"),
    "gpt_oss_eagle3": Shape(COMMON | GPT_OSS, draft="eagle3"),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_next_mtp": replace(QWEN3_NEXT, draft="mtp", needs_stand_ins=True),
    "granite4": Shape(
        COMMON
        | {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "attention_multiplier": HEAD_DIM**-0.5,
            "mamba_expand": 1,
            "mamba_n_heads": 4,
            "mamba_d_head": HEAD_DIM,
            "mamba_d_state": 16,
            "mamba_chunk_size": 32,
            "num_local_experts": 0,
            "shared_intermediate_size": INTERMEDIATE_SIZE,
        },
        {"A_log": SLOW},
        ONE_BLOCK_A_STEP,
    ),
    "lfm2": Shape(
        COMMON
        | {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "layer_types": ["conv", FULL, "conv", FULL],
            "block_auto_adjust_ff_dim": False,
            "block_dim": HIDDEN_SIZE,
            "conv_dim": HIDDEN_SIZE,
            "conv_L_cache": 3,
            "tie_word_embeddings": True,
        },
        {"embed": 4.0, "q_layernorm": 2.0, "k_layernorm": 2.0},
        PLAIN_ROTATION,
    ),
    "mamba2": Shape(
        COMMON
        | {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "expand": 1,
            "num_heads": 4,
            "head_dim": HEAD_DIM,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
            "intermediate_size": HIDDEN_SIZE,
        },
        {"A_log": SLOW},
        ONE_BLOCK_A_STEP,
    ),
    "nemotron_h": Shape(
        COMMON
        | {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba", "mlp", "attention", "mlp"],
            "num_hidden_layers": 8,
            "expand": 1,
            "mamba_num_heads": 4,
            "mamba_head_dim": HEAD_DIM,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
        },
        {"A_log": SLOW},
        ONE_BLOCK_A_STEP,
    ),
}

# vLLM resumes at every 8th token here, inside of blocks, where a prompt has ended.
SHAPES["granite4_tails"] = replace(SHAPES["granite4"], options=ONE_BLOCK_A_STEP | {"prefix_match_unit": 8})


def make_shape(directory: Path, shape: str, *, dtype: torch.dtype | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors`` of ``SHAPES[shape]`` into `directory` and return it.

    `dtype` replaces the shape's own. No tokenizer: prompts are token ids in ``range(3, VOCAB_SIZE)``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    chosen = SHAPES[shape]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(chosen.config, indent=1))
    config = AutoConfig.from_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            fill(name, parameter, GAINS | chosen.gains)
        model.to(dtype or chosen.dtype).save_pretrained(directory)
        if chosen.draft == "mtp":
            add_mtp_layer(directory)
        elif chosen.draft == "eagle":
            make_eagle(directory)
        elif chosen.draft == "eagle3":
            make_eagle3(directory, dtype or chosen.dtype)
    return directory


def add_mtp_layer(directory: Path) -> None:
    """Add to a model a layer that predicts the token after next: its last one again, behind a random projection."""
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    layer = {name.removeprefix(last): weight.clone() for name, weight in weights.items() if name.startswith(last)}
    layer = {f"mtp.layers.0.{name}": weight for name, weight in layer.items()}
    norms = {f"mtp.{name}.weight": torch.ones(HIDDEN_SIZE) for name in MTP_NORMS}
    joint = {"mtp.fc.weight": random_matrix(HIDDEN_SIZE, 2 * HIDDEN_SIZE)}
    dtype = weights["lm_head.weight"].dtype
    added = {name: weight.to(dtype) for name, weight in {**layer, **norms, **joint}.items()}
    write_model(directory, config, weights | added)


def make_eagle(directory: Path) -> None:
    """Write a draft of a llama: its own layers over the embeddings, without the states of the target.

    It sees the context without its first token, so that many of its tokens are accepted, and many are not.
    """
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    # A draft's first layer has no norm: with embeddings of norm one there it makes no difference.
    embeddings = weights["model.embed_tokens.weight"]
    embeddings /= embeddings.pow(2).mean(1, keepdim=True).sqrt()
    write_model(directory, config, weights)
    prefix, first_norm = "model.layers.", "layers.0.input_layernorm.weight"
    layers = {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith(prefix)}
    del layers[first_norm]
    embedding_only = torch.eye(HIDDEN_SIZE, 2 * HIDDEN_SIZE, dtype=weights["lm_head.weight"].dtype)
    write_model(directory / DRAFT, config, {**layers, "fc.weight": embedding_only})


def make_eagle3(directory: Path, dtype: torch.dtype) -> None:
    """Write a random draft: a llama layer over a token's embedding and the outputs of several layers of the target."""
    query_size, kv_size = COMMON["num_attention_heads"] * HEAD_DIM, COMMON["num_key_value_heads"] * HEAD_DIM
    weights = {
        "fc": random_matrix(HIDDEN_SIZE, HIDDEN_SIZE * len(EAGLE3_LAYERS)),
        "midlayer.self_attn.q_proj": random_matrix(query_size, 2 * HIDDEN_SIZE),
        "midlayer.self_attn.k_proj": random_matrix(kv_size, 2 * HIDDEN_SIZE),
        "midlayer.self_attn.v_proj": random_matrix(kv_size, 2 * HIDDEN_SIZE),
        "midlayer.self_attn.o_proj": random_matrix(HIDDEN_SIZE, query_size),
        "midlayer.mlp.gate_proj": random_matrix(INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "midlayer.mlp.up_proj": random_matrix(INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "midlayer.mlp.down_proj": random_matrix(HIDDEN_SIZE, INTERMEDIATE_SIZE),
        "midlayer.input_layernorm": torch.ones(HIDDEN_SIZE),
        "midlayer.hidden_norm": torch.ones(HIDDEN_SIZE),
        "midlayer.post_attention_layernorm": torch.ones(HIDDEN_SIZE),
        "norm": torch.ones(HIDDEN_SIZE),
        "lm_head": random_matrix(VOCAB_SIZE, HIDDEN_SIZE),
    }
    config = COMMON | LLAMA | {"num_hidden_layers": 1, "dtype": str(dtype).removeprefix("torch.")}
    config |= {"draft_vocab_size": VOCAB_SIZE, "eagle_aux_hidden_state_layer_ids": EAGLE3_LAYERS}
    write_model(directory / DRAFT, config, {f"{name}.weight": weight.to(dtype) for name, weight in weights.items()})


def write_model(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    values: torch.Tensor = torch.randn(rows, columns) / columns**0.5
    return values


def engine_options(directory: Path, shape: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` with which it serves what `make_shape` wrote into `directory`."""
    chosen = SHAPES[shape]
    options: dict[str, Any] = {
        "model": str(directory),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": json.loads((directory / "config.json").read_text())["dtype"],
        "block_size": BLOCK_SIZE,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "enable_prefix_caching": True,
        **chosen.options,
    }
    if chosen.draft is not None:
        eagle = {} if chosen.draft == "mtp" else {"model": str(directory / DRAFT)}
        options["speculative_config"] = {"method": chosen.draft, "num_speculative_tokens": 2, **eagle}
    return options


@torch.no_grad()
def fill(name: str, parameter: torch.nn.Parameter, gains: dict[str, float]) -> None:
    """Give a parameter values by its name; a vector that only general keys fit keeps its own."""
    key = [key for key in gains if key in name][-1]
    if parameter.ndim > 1:
        parameter.normal_(0.0, gains[key] / parameter.shape[-1] ** 0.5)
    elif key not in GENERAL:
        parameter.fill_(gains[key])
