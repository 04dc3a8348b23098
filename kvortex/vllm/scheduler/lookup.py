"""How far a request can resume: vLLM's own coordinator answers, over a pool that stands for what KVortex has."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.groups import GroupSet, KVKind
from kvortex.index import pack_keys
from kvortex.types import BLOCK_HASH_BYTES
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.model import ServedGroups
from kvortex.vllm.versions import coordinator_over, hashes_of_blocks

if TYPE_CHECKING:
    from vllm.v1.request import Request

_WORDS = BLOCK_HASH_BYTES // 8


class _SizeKeys:
    """Hashes and keys of a request's blocks of one size, without the tags of groups."""

    def __init__(self) -> None:
        self.hashes: list[bytes] = []
        self._packed = np.empty((0, _WORDS), np.uint64)

    @property
    def packed(self) -> NDArray[np.uint64]:
        return self._packed[: len(self.hashes)]

    def add(self, hashes: Sequence[bytes], keys: NDArray[np.uint64]) -> None:
        start, stop = len(self.hashes), len(self.hashes) + len(hashes)
        if stop > len(self._packed):  # room for twice as many: a request grows block by block
            grown = np.empty((2 * stop, _WORDS), np.uint64)
            grown[:start] = self.packed
            self._packed = grown
        self._packed[start:stop] = keys
        self.hashes += hashes


class RequestKeys:
    """vLLM's hashes of a request's full blocks, and their keys: worked out once, and added to as the request grows.

    A group has one entry for each of its blocks; or, where a request may resume inside of a block, one for each block
    hash: the last of a block stands for the full block, the others for tails that end there.

    Args:
        groups: the groups whose blocks are cached.
        hash_block_size: tokens of one of vLLM's block hashes.
        entry_tokens: tokens of an entry of each group.
    """

    def __init__(self, groups: GroupSet, hash_block_size: int, entry_tokens: Sequence[int]) -> None:
        self._set = groups
        self._hash_block_size = hash_block_size
        self._entry_tokens = entry_tokens
        self._restart(b"")

    def _restart(self, adapter: bytes) -> None:
        self._adapter = adapter
        self._num_hashes, self._last_hash = 0, b""
        self._sizes = {num_tokens: _SizeKeys() for num_tokens in self._entry_tokens}

    def follow(self, request: "Request", block_keys: BlockKeys) -> None:
        """Take in the hashes that vLLM has made since, and all of them again if they are others."""
        hashes, adapter = request.block_hashes, block_keys.adapter_of(request)
        known = self._num_hashes
        # A hash covers all tokens before it, so all are the same if the last is.
        if adapter != self._adapter or (known and (known > len(hashes) or hashes[known - 1] != self._last_hash)):
            self._restart(adapter)
        if len(hashes) == self._num_hashes:
            return
        for num_tokens, of_size in self._sizes.items():
            found = hashes_of_blocks(hashes, self._hash_block_size, num_tokens)
            new = [found[n] for n in range(len(of_size.hashes), len(found))]
            of_size.add(new, pack_keys(block_keys.from_hashes(request, new)))
        self._num_hashes, self._last_hash = len(hashes), hashes[-1]

    def hashes(self, number: int) -> list[bytes]:
        """vLLM's hashes of a group's entries."""
        return self._sizes[self._entry_tokens[number]].hashes

    def keys(self, number: int, entries: slice | NDArray[np.intp] = slice(None)) -> NDArray[np.uint64]:
        """Keys of a group's entries, of all or of some, `uint64 [n, 4]`."""
        return self._set.tagged(self._sizes[self._entry_tokens[number]].packed[entries], number)


class _Hit:
    """Stands for a block that is there. vLLM's managers only tell it from the null block.

    Args:
        entry: its number among the entries of its group; not known where a block can only be in its own place.
    """

    is_null = False
    block_hash = None
    __slots__ = ("entry",)

    def __init__(self, entry: int = -1) -> None:
        self.entry = entry


class IndexPool:
    """A pool for vLLM's managers, which have only these members to look a prefix up.

    Args:
        hash_block_size: tokens of one block hash.
        null_block: vLLM's; it stands for blocks that a request does not need.
        has_tails: True if a request may resume inside of a block.
    """

    def __init__(self, hash_block_size: int, null_block: Any, *, has_tails: bool) -> None:
        self.hash_block_size = hash_block_size
        self.null_block = null_block
        self._has_tails = has_tails
        self._hit = _Hit()
        self.show({})

    def show(self, present: Mapping[int, tuple[Sequence[bytes], NDArray[np.bool_]]]) -> None:
        """Have the blocks of one request: for each of vLLM's groups the hashes of its entries, and which are there."""
        self._present = present
        self._asked: list[int] | None = None
        self._answers: dict[tuple[int, ...], dict[bytes, list[_Hit]]] = {}

    def get_cached_block(self, block_hash: bytes, kv_cache_group_ids: list[int]) -> list[_Hit] | None:
        """A block for each of the groups if all of them are there, else None. The answer is not to be changed."""
        if kv_cache_group_ids is not self._asked:  # vLLM passes the same list for all blocks of a look-up
            self._asked = kv_cache_group_ids
            self._answers_now = self._answers_for(tuple(kv_cache_group_ids))
        return self._answers_now.get(block_hash)

    def _answers_for(self, groups: tuple[int, ...]) -> dict[bytes, list[_Hit]]:
        """Answers by the hashes of the blocks that all of these groups have."""
        if groups not in self._answers:
            shown = [self._present[group] for group in groups if group in self._present]
            hashes = shown[0][0] if len(shown) == len(groups) else []
            # vLLM asks for several groups together if their blocks are alike, and so have the same hashes.
            there = np.logical_and.reduce([mask for _, mask in shown]) if hashes else np.empty(0, np.bool_)
            if self._has_tails:
                answers = {hashes[entry]: [_Hit(entry)] * len(groups) for entry in np.flatnonzero(there).tolist()}
            else:
                answers = dict.fromkeys(itertools.compress(hashes, there.tolist()), [self._hit] * len(groups))
            self._answers[groups] = answers
        return self._answers[groups]

    def hits(self, blocks: list[Any]) -> NDArray[np.intp]:
        """Entries of the blocks in an answer of the coordinator that a request needs."""
        if self._has_tails:
            return np.array([block.entry for block in blocks if block is not self.null_block], dtype=np.intp)
        hit = self._hit
        if (count := blocks.count(hit)) == 0:
            return np.empty(0, np.intp)
        if blocks[-count] is hit and blocks.index(hit) == len(blocks) - count:  # a prefix, or the end of one
            return np.arange(len(blocks) - count, len(blocks))
        return np.flatnonzero([block is hit for block in blocks])


class Found(NamedTuple):
    """Where a request could resume.

    Attributes:
        num_tokens: the boundary.
        needed: for each group the entries that it needs there, `intp [n]`.
    """

    num_tokens: int
    needed: list[NDArray[np.intp]]


class PrefixLookup:
    """Asks vLLM's coordinator how far requests could resume, if certain blocks were there.

    Args:
        groups: the groups whose blocks are cached.
        coordinator: vLLM's, over its own pool of device blocks.
        block_pool: that pool.

    Attributes:
        alignment: tokens between two boundaries at which a request can resume.
        strides: for each group how many entries a block has, see `RequestKeys`.
        entry_tokens: tokens of an entry of each group.
    """

    def __init__(self, groups: ServedGroups, coordinator: Any, block_pool: Any) -> None:
        self._groups = groups
        self._set = groups.set
        hash_block_size = int(getattr(block_pool, "hash_block_size", groups.set.hash_block_size))
        has_tails = bool(getattr(coordinator, "enable_partial_hash_hits", False))
        sizes = [group.block_size for group in groups.set.groups]
        self.strides = [block_size // hash_block_size if has_tails else 1 for block_size in sizes]
        self.entry_tokens = [size // stride for size, stride in zip(sizes, self.strides, strict=True)]
        aligned = hash_block_size if has_tails else getattr(coordinator, "scheduler_block_size", groups.set.alignment)
        self.alignment = int(aligned)
        self._pool = IndexPool(hash_block_size, block_pool.null_block, has_tails=has_tails)
        self._coordinator = coordinator_over(coordinator, self._pool)
        self._has_draft_layers = [
            getattr(coordinator.single_type_managers[number], "use_eagle", False) for number in groups.ids
        ]

    def longest(
        self, block_hashes: Sequence[bytes], keys: RequestKeys, present: Sequence[NDArray[np.bool_]], limit: int
    ) -> Found:
        """The last boundary at which a request could resume.

        Args:
            block_hashes: the request's, as vLLM has them.
            keys: of the same blocks.
            present: for each group which of its entries are there, `bool [n]`.
            limit: the most tokens that it may resume behind.
        """
        self._pool.show(
            {
                vllm_number: (keys.hashes(number), mask)
                for number, (vllm_number, mask) in enumerate(zip(self._groups.ids, present, strict=True))
            }
        )
        while True:
            blocks, num_tokens, *_ = self._coordinator.find_longest_cache_hit(block_hashes, limit)
            num_tokens = int(num_tokens) // self.alignment * self.alignment
            needed = [
                self._pool.hits(list(blocks[vllm_number][: -(-num_tokens // group.block_size)]))
                for vllm_number, group in zip(self._groups.ids, self._set.groups, strict=True)
            ]
            # Where a draft's layers drop a block, 0.23 may answer more than is there.
            are_there = all(mask[numbers].all() for mask, numbers in zip(present, needed, strict=True))
            if are_there and self._has_prefix(present, num_tokens):
                return Found(num_tokens, self._with_seen_by_drafts(needed, present, num_tokens))
            limit = num_tokens - self.alignment

    def _has_prefix(self, present: Sequence[NDArray[np.bool_]], num_tokens: int) -> bool:
        return all(
            bool(mask[stride - 1 :: stride][: num_tokens // group.block_size].all())
            for mask, stride, group in zip(present, self.strides, self._set.groups, strict=True)
            if group.kind is KVKind.FULL
        )

    def _with_seen_by_drafts(
        self, needed: list[NDArray[np.intp]], present: Sequence[NDArray[np.bool_]], num_tokens: int
    ) -> list[NDArray[np.intp]]:
        """With the blocks behind the boundary which vLLM looks for and does not take where a group has draft layers."""
        if not num_tokens:
            return needed
        behind = [num_tokens // entry_tokens for entry_tokens in self.entry_tokens]
        return [
            np.append(entries, next_one) if has_drafts and mask[next_one : next_one + 1].any() else entries
            for entries, mask, next_one, has_drafts in zip(needed, present, behind, self._has_draft_layers, strict=True)
        ]
