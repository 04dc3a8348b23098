"""A Llama of any size for vLLM's `load_format="dummy"`. Nothing is downloaded, and the output depends on the prompt."""

import json
from pathlib import Path

import torch


def write_llama(directory: Path, **config: int) -> None:
    """Write the `config.json` of a Llama in bfloat16 into `directory`.

    Args:
        directory: folder of the model, which must exist; pass it to vLLM as the model.
        config: entries of `config.json`, which take precedence over the defaults here. The sizes have no default:
            `hidden_size`, `intermediate_size`, `num_hidden_layers`, `head_dim`, `num_attention_heads`,
            `num_key_value_heads` and `vocab_size`.
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

    Use it as `llm.apply_model(scale_weights)`. The random weights of vLLM's `load_format="dummy"` are so small that the
    output is the same for every prompt, so a wrong KV cache would not show.

    Args:
        model: the model, which is changed.
        factor: factor of each parameter with two or more dimensions.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(1) if parameter.ndim == 1 else parameter.data.mul_(factor)
