"""Random weights that make a model's answers depend on what it was asked."""

import torch


def scale_weights(model: torch.nn.Module, factor: float = 20.0) -> None:
    """Multiply a model's matrices by `factor` and set its vectors to one, in place.

    vLLM's own random weights (`load_format="dummy"`) are so small that every prompt goes on alike, and a wrong KV cache
    changes nothing: `llm.apply_model(scale_weights)`.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(1) if parameter.ndim == 1 else parameter.data.mul_(factor)
