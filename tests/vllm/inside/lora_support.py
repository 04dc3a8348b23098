"""Tiny LoRA adapters whose effect is seen in the answers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj")


def make_adapter(directory: Path, model: Path, *, seed: int) -> Path:
    """Write an adapter of the attention's inputs for `model` into `directory` (made if absent) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.split(".")[-2] in TARGETS:
            rows, columns = weight.shape
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def request_of(directory: Path, number: int = 1) -> Any:
    """vLLM's name for an adapter: that of its folder."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(directory.name, number, str(directory))
