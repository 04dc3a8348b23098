"""Part one of the demo: saves a real transformer's KV, wipes its cache, loads the KV back and continues decoding."""

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvortex import KVortexConfig, KVortexEngine, hash_blocks
from kvortex.errors import ConfigError

BLOCK_SIZE = 16
PROMPT_TOKENS = (96, 160, 48, 256)  # whole blocks: a store keeps nothing else
DECODE_STEPS = 8


@dataclass(frozen=True)
class Outcome:
    """The result for one prompt."""

    prompt_tokens: int
    blocks: int
    identical: bool


def run() -> tuple[list[Outcome], str]:
    """Run the demo; returns the result for each prompt, and the device.

    Raises:
        ConfigError: transformers is not installed.
    """
    return asyncio.run(_round_trip())


def _make_model(device: str) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ConfigError("the demo needs transformers: pip install 'kvortex[demo]'") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval().to(device)


async def _round_trip() -> tuple[list[Outcome], str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _make_model(device)
    config = model.config
    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    num_blocks = sum(PROMPT_TOKENS) // BLOCK_SIZE
    paged = {
        f"layers.{i}": torch.zeros(2, num_blocks, BLOCK_SIZE, heads, head_dim, device=device)
        for i in range(config.num_hidden_layers)
    }
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, config.vocab_size, (1, n), generator=generator) for n in PROMPT_TOKENS]
    block_ids = torch.split(torch.randperm(num_blocks, generator=generator), [n // BLOCK_SIZE for n in PROMPT_TOKENS])
    outcomes = []
    async with KVortexEngine.create(KVortexConfig(pool=64 << 20)) as engine:
        engine.register_kv_caches(paged, BLOCK_SIZE)
        for prompt, ids in zip(prompts, block_ids, strict=True):
            outcomes.append(await _one_prompt(engine, model, paged, prompt.to(device), ids.tolist()))
    return outcomes, device


async def _one_prompt(
    engine: KVortexEngine, model: Any, paged: dict[str, torch.Tensor], prompt: torch.Tensor, block_ids: Sequence[int]
) -> Outcome:
    with torch.no_grad():
        prefill = model(prompt, use_cache=True)
    first = prefill.logits[:, -1:].argmax(-1)
    _into_pages(prefill.past_key_values, paged, block_ids)
    stayed = _decode(model, prefill.past_key_values, first)
    hashes = hash_blocks(prompt[0].tolist(), BLOCK_SIZE)
    saved = await engine.save_blocks(hashes, block_ids)
    for layer in paged.values():
        layer[:, list(block_ids)] = float("nan")
    loaded = await engine.load_blocks(hashes, block_ids)
    returned = _decode(model, _from_pages(model, paged, block_ids), first)
    identical = saved.ok and loaded.ok and torch.equal(stayed, returned)
    return Outcome(prompt.shape[1], len(block_ids), identical)


def _into_pages(cache: Any, paged: dict[str, torch.Tensor], block_ids: Sequence[int]) -> None:
    for layer, pages in zip(cache.layers, paged.values(), strict=True):
        for half, states in enumerate((layer.keys, layer.values)):  # [1, H, T, D]
            blocks = states[0].transpose(0, 1).unflatten(0, (-1, BLOCK_SIZE))
            pages[half, list(block_ids)] = blocks


def _from_pages(model: Any, paged: dict[str, torch.Tensor], block_ids: Sequence[int]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for number, pages in enumerate(paged.values()):
        keys, values = (pages[half, list(block_ids)].flatten(0, 1).transpose(0, 1)[None] for half in (0, 1))
        cache.update(keys.contiguous(), values.contiguous(), number)
    return cache


def cache_argument(model: Any) -> str:
    """The model's argument name for its KV cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _decode(model: Any, cache: Any, token: torch.Tensor) -> torch.Tensor:
    """Logits `[DECODE_STEPS, vocab]` of greedy decoding; grows the cache."""
    logits = []
    with torch.no_grad():
        for _ in range(DECODE_STEPS):
            out = model(token, **{cache_argument(model): cache}, use_cache=True)
            logits.append(out.logits[0, -1])
            token = out.logits[:, -1:].argmax(-1)
    return torch.stack(logits)
