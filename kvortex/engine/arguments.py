"""Block hashes and block ids of a call: checked and copied before it starts, so that callers may reuse theirs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.errors import InvalidBlockIdError, InvalidHashError
from kvortex.index import as_packed, pack_keys
from kvortex.kernels import validate_block_ids
from kvortex.layout import PagedCache
from kvortex.types import BlockHash

T = TypeVar("T")

BlockHashes: TypeAlias = Iterable[BlockHash] | NDArray[np.generic]
"""Block hashes in order: 32 bytes each, or an array with 32 bytes per row."""

BlockIds: TypeAlias = Iterable[int] | NDArray[np.integer] | torch.Tensor
"""Block ids in order: an iterable, an array or a tensor of `[n]` integers. A GPU tensor is waited for."""

BlockTables: TypeAlias = BlockIds | Mapping[str, BlockIds]
"""Block ids of one group, or, by the names of groups, of several. In these an id of -1 leaves a block out."""


class NamedBlocks(NamedTuple):
    """The blocks of one call, in the order in which they are planned. All arrays are copies.

    Attributes:
        keys: `uint64 [n, 4]`.
        block_ids: `int32 [n]`.
        groups: the number of each block's group, `uint8 [n]`; None for a cache with one group.
        order: the position of each block in the call, `intp [n]`; None if the call names them in this order.
        names: the name of each block's group, in the order of the call; empty for a cache with one group.
    """

    keys: NDArray[np.uint64]
    block_ids: NDArray[np.int32]
    groups: NDArray[np.uint8] | None = None
    order: NDArray[np.intp] | None = None
    names: tuple[str, ...] = ()

    def in_order_of_call(self, outcomes: tuple[T, ...]) -> tuple[T, ...]:
        """Outcomes as the call has named the blocks."""
        if self.order is None:
            return outcomes
        by_position = dict(zip(self.order.tolist(), outcomes, strict=True))
        return tuple(by_position[position] for position in range(len(outcomes)))


def named_blocks(hashes: BlockHashes, block_ids: BlockTables, cache: PagedCache) -> NamedBlocks:
    """The blocks that a call names.

    Raises:
        InvalidHashError: a hash is not 32 bytes, or the numbers of hashes and block ids differ.
        InvalidBlockIdError: an id is no integer, is outside `[0, num_blocks)`, or occurs twice, in one group or in
            two that share memory. Or the cache has several groups, and the ids are not given by their names, or the
            other way round.
    """
    keys, groups = pack_keys(hashes), cache.groups
    if not isinstance(block_ids, Mapping):
        if len(groups) > 1:
            raise InvalidBlockIdError(_which_form(cache))
        ids = copied_block_ids(block_ids, cache.layouts[0].num_blocks)
        _check_pairs(keys, ids)
        return NamedBlocks(keys, ids)
    if groups.is_single:
        raise InvalidBlockIdError(_which_form(cache))
    if unknown := set(block_ids) - {group.name for group in groups.groups}:
        raise InvalidBlockIdError(f"{unknown.pop()!r} is no group: {_which_form(cache)}")
    parts = [_blocks_of_group(keys, table, cache, groups.number_of(name)) for name, table in block_ids.items()]
    _refuse_shared_blocks(parts, cache)
    numbers = np.repeat([part.number for part in parts], [len(part.ids) for part in parts]).astype(np.int64)
    all_keys = np.concatenate([part.keys for part in parts] or [keys[:0]])
    all_ids = np.concatenate([part.ids for part in parts] or [np.empty(0, np.int32)])
    ends = np.concatenate([part.ends for part in parts] or [np.empty(0, np.int64)])
    order = groups.order(numbers, ends)
    names = tuple(groups.groups[number].name for number in numbers.tolist())
    return NamedBlocks(as_packed(all_keys[order]), all_ids[order], numbers[order].astype(np.uint8), order, names)


def _which_form(cache: PagedCache) -> str:
    if cache.groups.is_single:
        return "the cache has one group of layers: pass block ids as a list, one a hash"
    names = ", ".join(repr(group.name) for group in cache.groups.groups)
    return f"the cache has several groups of layers: pass block ids as a dict with {names}"


class _GroupBlocks(NamedTuple):
    """The blocks of one group: `uint64 [n, 4]`, `int32 [n]`, the group's number, and the tokens up to each's end."""

    keys: NDArray[np.uint64]
    ids: NDArray[np.int32]
    number: int
    ends: NDArray[np.int64]


def _blocks_of_group(hashes: NDArray[np.uint64], block_ids: BlockIds, cache: PagedCache, number: int) -> _GroupBlocks:
    group = cache.groups.groups[number]
    keys = cache.groups.keys(hashes, number)
    try:
        table = as_integers(block_ids)
        named = table[table != -1] if table.ndim == 1 else table  # what is not flat is refused
        ids = validate_block_ids(named, cache.layouts[number].num_blocks)
    except InvalidBlockIdError as error:
        raise InvalidBlockIdError(f"group {group.name!r}: {error}") from error
    _check_pairs(keys, table, group.name)
    there = np.flatnonzero(table != -1)
    return _GroupBlocks(keys[there], ids, number, (there + 1) * group.block_size)


def _refuse_shared_blocks(parts: Sequence[_GroupBlocks], cache: PagedCache) -> None:
    """Refuse a block that two groups name: it would be two blocks with the same bytes, or be written twice."""
    spaces = cache.block_spaces
    for space in set(spaces):
        sharing = [part for part in parts if spaces[part.number] == space]
        if len(sharing) < 2:
            continue
        ids, counts = np.unique(np.concatenate([part.ids for part in sharing]), return_counts=True)
        if (twice := ids[counts > 1]).size:
            names = [cache.groups.groups[part.number].name for part in sharing if twice[0] in part.ids]
            raise InvalidBlockIdError(
                f"block id {twice[0]} is named by {' and by '.join(map(repr, names))}, which share memory: a block of "
                "the cache belongs to one group at a time"
            )


def _check_pairs(keys: NDArray[np.uint64], ids: NDArray[np.integer], group: str = "") -> None:
    if len(keys) == len(ids):
        return
    if not group:
        raise InvalidHashError(f"{len(keys)} hashes and {len(ids)} block ids do not pair up: pass one id a hash")
    raise InvalidHashError(
        f"group {group!r}: the hashes are those of {len(keys)} blocks, and there are {len(ids)} block ids: "
        "pass one id a block, -1 for a block without one"
    )


def copied_block_ids(block_ids: BlockIds, num_blocks: int) -> NDArray[np.int32]:
    """Block ids as `int32 [n]`, a copy.

    Raises:
        InvalidBlockIdError: an id is no integer, is outside `[0, num_blocks)`, or occurs twice.
    """
    return validate_block_ids(as_integers(block_ids), num_blocks)


def as_integers(block_ids: BlockIds) -> NDArray[np.integer]:
    """Block ids as an array, a copy; `InvalidBlockIdError` if they are no integers in an order."""
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
    return copied
