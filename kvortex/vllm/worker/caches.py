"""What vLLM registers as the cache of each layer, as groups of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from kvortex.arithmetic import align_up
from kvortex.errors import LayoutError
from kvortex.groups import GroupSet
from kvortex.layout import KVLayout, PagedCache
from kvortex.layout.layout import ALIGNMENT_BYTES
from kvortex.vllm.model import ServedGroups, block_dims

LayerCache: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
"""The cache of one layer: a tensor, or the tensors of a state, each `[num_blocks, ...]`, which lie in one page."""


def register(
    kv_caches: Mapping[str, LayerCache], groups: ServedGroups, num_blocks: int
) -> tuple[dict[str, torch.Tensor], PagedCache, list[int]]:
    """Derive the layouts of the groups of which this worker has layers.

    Args:
        kv_caches: the cache of each layer.
        groups: the groups whose blocks are cached.
        num_blocks: device blocks.

    Returns:
        The tensors by name, the groups with their layouts, and the number of each of these groups.

    Raises:
        ConfigError: a tensor has no dimension that counts blocks.
        LayoutError: a tensor's memory cannot be moved block by block, or no layer is here.
    """
    tensors: dict[str, torch.Tensor] = {}
    layouts, here, own = [], [], []
    for number, group in enumerate(groups.set.groups):
        of_group = _without_shared({name: _as_tensor(kv_caches[name]) for name in group.layers if name in kv_caches})
        if not of_group:
            continue
        dims = block_dims(of_group, num_blocks)
        layouts.append(KVLayout.from_tensors(of_group, group.block_size, num_blocks=num_blocks, block_dim=dims))
        own.append(replace(group, layers=tuple(of_group)))
        here.append(number)
        tensors.update(of_group)
    if not layouts:
        raise LayoutError("none of the layers whose KV is cached is on this worker")
    return tensors, PagedCache(GroupSet(own, groups.set.hash_block_size), layouts), here


def _as_tensor(cache: LayerCache) -> torch.Tensor:
    return cache if isinstance(cache, torch.Tensor) else _page_of(cache)


def _page_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The pages of a state as bytes, `[num_blocks, nbytes]`: what the parts of a block span, without padding behind it.

    Raises:
        LayoutError: the parts of a block do not lie in one page.
    """
    storage = parts[0].untyped_storage()
    starts = [part.storage_offset() * part.element_size() for part in parts]
    ends = [start + _span(part) for start, part in zip(starts, parts, strict=True)]
    stride = parts[0].stride(0) * parts[0].element_size()
    strides = {part.stride(0) * part.element_size() for part in parts}
    if len(strides) > 1 or any(part.untyped_storage().data_ptr() != storage.data_ptr() for part in parts):
        raise LayoutError("the parts of a state are not in one page: their storages or their strides differ")
    start = min(starts)
    nbytes = min(align_up(int(max(ends) - start), ALIGNMENT_BYTES), int(stride))
    as_bytes = torch.empty(0, dtype=torch.uint8, device=parts[0].device)
    return as_bytes.set_(storage, start, (parts[0].shape[0], nbytes), (stride, 1))


def _span(part: torch.Tensor) -> int:
    """Bytes from the first to the last element of one block."""
    steps = sum((size - 1) * stride for size, stride in zip(part.shape[1:], part.stride()[1:], strict=True))
    return (steps + 1) * part.element_size()


def _without_shared(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once: layers that share the cache of another layer have the same tensor."""
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in kv_caches.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: kv_caches[name] for name in seen.values()}
