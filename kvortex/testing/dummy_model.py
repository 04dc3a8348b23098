"""Models of any size for vLLM's `load_format="dummy"`. Nothing is downloaded, and the output depends on the prompt."""

import json
from pathlib import Path
from typing import Any

import torch


def write_config(directory: Path, **config: Any) -> None:
    """Write the `config.json` of a model in bfloat16 into `directory`.

    Args:
        directory: folder of the model, which must exist; pass it to vLLM as the model.
        config: entries of `config.json`: `architectures`, `model_type` and the sizes.
    """
    common = {
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
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
