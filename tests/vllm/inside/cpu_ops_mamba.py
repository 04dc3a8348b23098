"""Stand-ins in Python for what vLLM has for models with states as Triton kernels only, which CPUs lack.

With its prefix cache on, vLLM computes a prompt in one step and keeps, beside the state at its end, the one at its
last block boundary; the CPU's scan of Mamba 2 returns states at the ends of sequences only. With speculation it moves
states between blocks, as tokens are accepted. Without these functions such steps fail. Call `install` before vLLM
builds an engine.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import torch


def install() -> None:
    """Let steps pass block boundaries, and let models with states have drafts, in this process."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.mamba import mamba_mixer2
    from vllm.model_executor.layers.mamba.ops import ssd_combined
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

    scan = ssd_combined._mamba_chunk_scan_combined_fwd
    update = _custom_ops.fused_sigmoid_gating_delta_rule_update_cpu

    def scan_with_chunks(*inputs: Any, return_intermediate_states: bool = False, **options: Any) -> Any:
        return chunk_states(scan, *inputs, **options) if return_intermediate_states else scan(*inputs, **options)

    def update_with_any_stride(*, initial_state_indices: torch.Tensor, **inputs: Any) -> torch.Tensor:
        # The index of a single request may be a column of a wider table, which the kernel takes for a hole in it.
        dense = initial_state_indices.clone(memory_format=torch.contiguous_format)
        output: torch.Tensor = update(initial_state_indices=dense, **inputs)
        return output

    ssd_combined._mamba_chunk_scan_combined_fwd = scan_with_chunks
    _custom_ops.fused_sigmoid_gating_delta_rule_update_cpu = update_with_any_stride
    mamba_mixer2.store_prefill_checkpoint = store_prefill_checkpoint
    MambaSpecDecodeGPUContext.run_fused_precopy = move_states_before_step
    MambaSpecDecodeGPUContext.run_fused_postprocess = keep_states_after_step


def chunk_states(
    scan: Any,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
    *,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor,
    cu_chunk_seqlens: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Scan chunk by chunk, each as a sequence that begins with the state of the one before it.

    Returns the state at the end of each chunk, ``[chunks, heads, head_dim, state_size]``; fills `out` as `scan` does.
    """
    starts = cu_chunk_seqlens.tolist()
    owners = seq_idx.tolist()
    states: list[torch.Tensor] = []
    for chunk, (start, end) in enumerate(pairwise(starts)):
        owner = owners[chunk]
        if chunk and owners[chunk - 1] == owner:
            before: torch.Tensor | None = states[-1][None]
        else:
            before = None if initial_states is None else initial_states[owner][None]
        tokens = slice(start, end)
        options |= {"initial_states": before, "cu_seqlens": torch.tensor([0, end - start], dtype=torch.int32)}
        states.append(scan(x[tokens], dt[tokens], A, B[tokens], C[tokens], chunk_size, out[tokens], **options)[0])
    return torch.stack(states)


def store_prefill_checkpoint(
    checkpoint: Any,
    chunk_idx: torch.Tensor,
    x: torch.Tensor,
    conv_state: torch.Tensor,
    chunk_states: torch.Tensor,
    ssm_state: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    state_len: int,
) -> None:
    """Write the states at boundaries into their blocks, as vLLM's function of this name does.

    `x` has the inputs of the convolution, ``[dim, tokens]``; the newest `state_len` are its state.
    """
    for row, offset in enumerate(checkpoint.checkpoint_offsets.tolist()):
        if offset:
            block_id = int(checkpoint.state_indices[row])
            end = int(query_start_loc[row]) + offset
            conv_state[block_id, :, :state_len] = x[:, end - state_len : end]
            ssm_state[block_id] = chunk_states[chunk_idx[row]].to(ssm_state.dtype)


def move_states_before_step(
    context: Any,
    num_reqs: int,
    state_idx_gpu: torch.Tensor,
    src_col_gpu: torch.Tensor,
    token_bias_gpu: torch.Tensor,
    idx_mapping: None,
) -> None:
    """Copy the state of each request that goes on in another block into that block."""
    if context.is_initialized:
        for request in range(num_reqs):
            source, target = int(src_col_gpu[request]), int(state_idx_gpu[request])
            if source not in (-1, target):
                copy_states(context, request, source, target, int(token_bias_gpu[request]))


def keep_states_after_step(
    context: Any,
    num_reqs: int,
    num_accepted_tokens_gpu: torch.Tensor,
    mamba_state_idx_gpu: torch.Tensor,
    num_scheduled_tokens_gpu: torch.Tensor,
    num_computed_tokens_gpu: torch.Tensor,
    num_draft_tokens_gpu: torch.Tensor,
) -> None:
    """Copy the state at a block boundary that accepted tokens reach or pass into the block that ends there."""
    if not context.is_initialized:
        return
    context.num_accepted_tokens_out[:num_reqs].copy_(num_accepted_tokens_gpu[:num_reqs])
    before = num_computed_tokens_gpu + num_scheduled_tokens_gpu - num_draft_tokens_gpu
    for request in range(num_reqs):
        running = int(before[request])
        computed = running + int(num_accepted_tokens_gpu[request]) - 1
        boundary = computed // context.block_size * context.block_size
        if boundary < running:
            continue
        source, target = int(mamba_state_idx_gpu[request]), boundary // context.block_size - 1
        if source == target:
            context.num_accepted_tokens_out[request] = 1
        if source != target or boundary != running:
            copy_states(context, request, source, target, boundary - running)


def copy_states(context: Any, request: int, source: int, target: int, num_accepted: int) -> None:
    """Copy the states after `num_accepted` drafts from column `source` of a request's block tables to `target`.

    Drafts move the window of a convolution's state; other states have a block for each draft, after `source`.
    """
    for state in range(context.num_states):
        table = int(context.block_table_ptrs[int(context.state_group_indices[state])])
        row = (ctypes.c_int32 * (max(source + num_accepted, target) + 1)).from_address(
            table + 4 * request * context.block_table_stride_req
        )
        base, stride = int(context.state_base_addrs[state]), int(context.state_block_strides[state])
        row_nbytes = int(context.state_inner_sizes[state]) * int(context.state_elem_sizes[state])
        width = int(context.state_conv_widths[state])
        if width:
            start = base + row[source] * stride + num_accepted * row_nbytes
            ctypes.memmove(base + row[target] * stride, start, (width - num_accepted) * row_nbytes)
        else:
            ctypes.memmove(base + row[target] * stride, base + row[source + num_accepted] * stride, row_nbytes)
