"""Block hashes and block ids of a call: checked and copied before it starts, so that callers may reuse theirs."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.errors import InvalidBlockIdError, InvalidHashError
from kvortex.index import pack_keys
from kvortex.kernels import validate_block_ids
from kvortex.types import BlockHash

BlockHashes: TypeAlias = Iterable[BlockHash] | NDArray[np.generic]
"""Block hashes in order: 32 bytes each, or an array with 32 bytes per row."""

BlockIds: TypeAlias = Iterable[int] | NDArray[np.integer] | torch.Tensor
"""Block ids in order: an iterable, an array or a tensor of `[n]` integers. A GPU tensor is waited for."""


def named_blocks(
    hashes: BlockHashes, block_ids: BlockIds, num_blocks: int
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Keys `uint64 [n, 4]` and block ids `int32 [n]` of one call; both are copies.

    Raises:
        InvalidHashError: a hash is not 32 bytes, or the numbers of hashes and block ids differ.
        InvalidBlockIdError: an id is no integer, is outside `[0, num_blocks)`, or occurs twice.
    """
    keys, ids = pack_keys(hashes), copied_block_ids(block_ids, num_blocks)
    if len(keys) != len(ids):
        raise InvalidHashError(f"{len(keys)} hashes and {len(ids)} block ids do not pair up: pass one id a hash")
    return keys, ids


def copied_block_ids(block_ids: BlockIds, num_blocks: int) -> NDArray[np.int32]:
    """Block ids as `int32 [n]`, a copy.

    Raises:
        InvalidBlockIdError: an id is no integer, is outside `[0, num_blocks)`, or occurs twice.
    """
    if isinstance(block_ids, torch.Tensor):
        if block_ids.is_floating_point() or block_ids.is_complex():
            raise InvalidBlockIdError(f"block ids are integers, not a tensor of {block_ids.dtype}")
        block_ids = block_ids.detach().cpu().numpy()
    elif isinstance(block_ids, set | frozenset | Mapping):
        raise InvalidBlockIdError(f"{type(block_ids).__name__} has no order: pass block ids as a list, one a hash")
    elif not isinstance(block_ids, np.ndarray | list | tuple | range) and isinstance(block_ids, Iterable):
        block_ids = list(block_ids)
    try:
        copied = np.array(block_ids)
    except ValueError as error:
        raise InvalidBlockIdError(f"block ids are a flat list of integers: {error}") from error
    return validate_block_ids(copied, num_blocks)
