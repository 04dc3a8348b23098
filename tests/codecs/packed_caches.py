"""Caches of every packed format, odd shapes included, with values that are hard to pack."""

import numpy as np
import torch

from kvortex.layout import KVLayout

BLOCKS = 6
# name -> (shape of a layer, codec, dtype): segments of full tiles, of a rest, of less than a group
CACHES = {
    "K and V apart": ((2, BLOCKS, 16, 4, 64), "fp8", torch.bfloat16),
    "latent": ((BLOCKS, 16, 576), "fp8", torch.bfloat16),
    "seven groups and a bit": ((BLOCKS, 1, 7 * 128 + 8), "fp8", torch.bfloat16),
    "one unit": ((BLOCKS, 1, 8), "fp8", torch.bfloat16),
    "half": ((BLOCKS, 16, 2, 72), "fp8", torch.float16),
    "float": ((BLOCKS, 16, 2, 40), "fp8", torch.float32),
    "float to bfloat16": ((BLOCKS, 16, 2, 36), "bf16", torch.float32),
}


def make_cache(name: str, layers: int = 2, seed: int = 0) -> tuple[KVLayout, dict[str, torch.Tensor], str]:
    """Layers of finite values whose magnitudes differ widely from group to group."""
    shape, codec, dtype = CACHES[name]
    rng = np.random.default_rng(seed)
    low, high = (-4, 4) if dtype is torch.float16 else (-20, 20)
    tensors = {}
    for i in range(layers):
        spread = 10.0 ** rng.uniform(low, high, (*shape[:-1], 1))
        values = (rng.standard_normal(shape) * spread).astype(np.float32)
        values[rng.random(shape) < 0.05] = 0
        tensors[f"layers.{i}"] = torch.from_numpy(values).clamp(-50000, 50000).to(dtype)
    return KVLayout.from_tensors(tensors, shape[-3] if len(shape) > 3 else shape[1], num_blocks=BLOCKS), tensors, codec
