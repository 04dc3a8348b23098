"""A Llama of any size for vLLM's `load_format="dummy"`: nothing is downloaded, and answers depend on what was asked."""

import json
from pathlib import Path

import torch


def write_llama(directory: Path, **config: int) -> None:
    """Write the `config.json` of a Llama in bfloat16 into `directory`.

    Args:
        directory: where the model's files are written, as vLLM reads them.
        config: sizes by their names there: `hidden_size`, `intermediate_size`, `num_hidden_layers`, `head_dim`,
            `num_attention_heads`, `num_key_value_heads`, `vocab_size`; and whatever else shall not be as here.
    """
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(common | config))


def scale_weights(model: torch.nn.Module, factor: float = 20.0) -> None:
    """Multiply a model's matrices by `factor` and set its vectors to one, in place.

    vLLM's own random weights (`load_format="dummy"`) are so small that every prompt goes on alike, and a wrong KV cache
    changes nothing: `llm.apply_model(scale_weights)`.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(1) if parameter.ndim == 1 else parameter.data.mul_(factor)
