"""Which blocks of a request are keyed, found, loaded and saved, for models that mix kinds of KV.

Nothing here knows what a window or a state needs: look-ups ask vLLM's own coordinator over a pool that answers for
KVortex's index, and what is saved is what vLLM has put into its own prefix cache. So every kind of KV of every version
is served as vLLM itself would serve it.

A block that is being saved counts as used for vLLM, so it is not given to another request before the save has ended.
vLLM may zero or copy the blocks of a step before it tells a connector about that step.

Some blocks are saved a step later than they are completed, because vLLM may tell connectors that a forward is over
before these blocks have their final bytes: states, which move to their blocks when it is known which drafts are
accepted, and all blocks where layers of a draft compute their KV after the forward.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.kv_cache_utils import get_block_hash

from kvortex.groups import GroupSet, KVKind
from kvortex.index import COMMITTED, CacheIndex, pack_keys
from kvortex.types import BlockHash
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.model import ServedGroups
from kvortex.vllm.scheduler.blocks import BlockRules, BlockRun, InTier, Reach, RequestBlocks, Wanted
from kvortex.vllm.scheduler.requests import TrackedRequest
from kvortex.vllm.versions import coordinator_over, hashes_of_blocks

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request


class _Hit:
    """Stands for a block that is there. vLLM's managers only tell it from the null block."""

    is_null = False
    block_hash = None


class IndexPool:
    """A pool for vLLM's managers, which have only these members to look a prefix up.

    Args:
        hash_block_size: tokens of one block hash.
        null_block: vLLM's; it stands for blocks that a request does not need.
    """

    def __init__(self, hash_block_size: int, null_block: Any) -> None:
        self.hash_block_size = hash_block_size
        self.null_block = null_block
        self.present: dict[int, set[bytes]] = {}
        """vLLM's group number -> its hashes of the blocks that are there."""
        self._hit = _Hit()

    def get_cached_block(self, block_hash: bytes, kv_cache_group_ids: list[int]) -> list[_Hit] | None:
        """A block for each of the groups if all of them are there, else None."""
        if all(block_hash in self.present.get(group, ()) for group in kv_cache_group_ids):
            return [self._hit] * len(kv_cache_group_ids)
        return None


class Hybrid(BlockRules):
    """Several groups of layers, or one that does not have full attention.

    Args:
        index: the pool's.
        keys: gives the keys of a request's blocks.
        groups: the groups whose blocks are cached.
        manager: vLLM's `KVCacheManager`.
        max_blocks: for each group the most device blocks that a request holds.
        save_decoded: save the KV of generated tokens too, not only of the prompt.
        drafts: True if drafts come from layers that keep KV.
    """

    holds = True

    def __init__(
        self,
        index: CacheIndex,
        keys: BlockKeys,
        groups: ServedGroups,
        manager: Any,
        max_blocks: Sequence[int],
        *,
        save_decoded: bool,
        drafts: bool,
    ) -> None:
        coordinator = manager.coordinator
        self._index = index
        self._keys = keys
        self._groups = groups
        self._set: GroupSet = groups.set
        self._managers = [coordinator.single_type_managers[number] for number in groups.ids]
        self._all_managers = coordinator.single_type_managers
        self._device_pool = manager.block_pool
        self._max_blocks = max_blocks
        self._save_decoded = save_decoded
        self._hash_block_size = int(getattr(manager.block_pool, "hash_block_size", groups.set.hash_block_size))
        self._pool = IndexPool(self._hash_block_size, manager.block_pool.null_block)
        self._coordinator = coordinator_over(coordinator, self._pool)
        self._is_late = [drafts or group.kind is KVKind.STATE for group in groups.set.groups]
        self._late: list[tuple[TrackedRequest, BlockRun]] = []  # that the last step has completed
        self.alignment = int(getattr(coordinator, "scheduler_block_size", groups.set.alignment))
        self.num_groups = len(groups.set)

    # -- look-up -----------------------------------------------------------------------------------

    def num_ahead(self, tracked: TrackedRequest) -> int:
        return (self._limit(tracked.request) - tracked.local_tokens) // self.alignment

    def _limit(self, request: "Request") -> int:
        """Tokens that a hit may have: at least one is left to compute, because a state cannot go back."""
        return int(min(request.num_tokens - 1, len(request.block_hashes) * self._hash_block_size))

    def reach(self, tracked: TrackedRequest, in_tier: InTier | None) -> Reach:
        hashes, keys = self._hashes_and_keys(tracked.request)
        states = [self._states(keys[number], number, tracked.local_tokens) for number in range(self.num_groups)]
        found, _ = self._longest(tracked, hashes, [state == COMMITTED for state in states])
        arriving = [state != 0 for state in states]
        if in_tier is not None:
            for mask, packed in zip(arriving, keys, strict=True):
                absent = np.flatnonzero(~mask)
                mask[absent] = in_tier([packed[n].tobytes() for n in absent.tolist()])
        wanted: list[tuple[int, int]] = []
        if any((mask & (state != COMMITTED)).any() for mask, state in zip(arriving, states, strict=True)):
            further, needed = self._longest(tracked, hashes, arriving)
            if further > found:
                wanted = [(number, block) for number, block in needed if states[number][block] != COMMITTED]
        return Reach(
            max(found - tracked.local_tokens, 0),
            Wanted([BlockHash(keys[number][block].tobytes()) for number, block in wanted], wanted, is_chain=False),
        )

    def _hashes_and_keys(self, request: "Request") -> tuple[list[Sequence[bytes]], list[NDArray[np.uint64]]]:
        """For each group vLLM's hashes of a request's full blocks, and their keys, `uint64 [n, 4]`."""
        hashes = [self._hashes(request, number) for number in range(self.num_groups)]
        keys = [
            self._set.tagged(pack_keys(self._keys.from_hashes(request, found)), number)
            for number, found in enumerate(hashes)
        ]
        return hashes, keys

    def _hashes(self, request: "Request", number: int) -> Sequence[bytes]:
        return list(hashes_of_blocks(request.block_hashes, self._hash_block_size, self._set.groups[number].block_size))

    def _states(self, keys: NDArray[np.uint64], number: int, local_tokens: int) -> NDArray[np.uint8]:
        """COMMITTED, PENDING or 0 for each block; blocks of what the device has count as there."""
        states = self._index.states(keys)
        states[: local_tokens // self._set.groups[number].block_size] = COMMITTED
        return states

    def _longest(
        self, tracked: TrackedRequest, hashes: Sequence[Sequence[bytes]], present: Sequence[NDArray[np.bool_]]
    ) -> tuple[int, list[tuple[int, int]]]:
        """The last boundary at which the request could resume with these blocks, and the blocks that it needs there."""
        self._pool.present = {
            vllm_number: {found[n] for n in np.flatnonzero(mask).tolist()}
            for vllm_number, found, mask in zip(self._groups.ids, hashes, present, strict=True)
        }
        limit = self._limit(tracked.request)
        while True:
            blocks, num_tokens, *_ = self._coordinator.find_longest_cache_hit(tracked.request.block_hashes, limit)
            num_tokens -= num_tokens % self.alignment
            needed = [
                (number, block)
                for number, vllm_number in enumerate(self._groups.ids)
                for block, found in enumerate(blocks[vllm_number][: num_tokens // self._set.groups[number].block_size])
                if not found.is_null
            ]
            # Where a draft's layers drop a block, 0.23 may answer more than is there.
            if all(present[number][block] for number, block in needed) and self._has_prefix(present, num_tokens):
                return int(num_tokens), needed + self._seen_by_drafts(present, num_tokens)
            limit = num_tokens - self.alignment

    def _seen_by_drafts(self, present: Sequence[NDArray[np.bool_]], num_tokens: int) -> list[tuple[int, int]]:
        """Blocks behind the boundary, which vLLM looks for and does not take where a group has draft layers."""
        behind = [
            (number, num_tokens // self._set.groups[number].block_size)
            for number, manager in enumerate(self._managers)
            if num_tokens and getattr(manager, "use_eagle", False)
        ]
        return [(number, block) for number, block in behind if present[number][block : block + 1].any()]

    def _has_prefix(self, present: Sequence[NDArray[np.bool_]], num_tokens: int) -> bool:
        return all(
            bool(mask[: num_tokens // group.block_size].all())
            for mask, group in zip(present, self._set.groups, strict=True)
            if group.kind is KVKind.FULL
        )

    # -- load --------------------------------------------------------------------------------------

    def to_load(self, tracked: TrackedRequest, num_tokens: int, blocks: "KVCacheBlocks") -> RequestBlocks:
        start, stop = tracked.local_tokens, tracked.local_tokens + num_tokens
        _, keys = self._hashes_and_keys(tracked.request)
        numbers, ends, packed, ids = [], [], [], []
        for number, vllm_number in enumerate(self._groups.ids):
            block_size, table = self._set.groups[number].block_size, blocks.blocks[vllm_number]
            for block in range(start // block_size, min(stop // block_size, len(table))):
                if not table[block].is_null:
                    numbers.append(number)
                    ends.append((block + 1) * block_size)
                    packed.append(keys[number][block])
                    ids.append(table[block].block_id)
        order = self._set.order(np.array(numbers, dtype=np.int64), np.array(ends, dtype=np.int64))
        all_keys = np.array(packed, dtype=np.uint64).reshape(-1, 4)[order]
        return RequestBlocks(all_keys, np.array(ids, dtype=np.int32)[order])

    # -- save --------------------------------------------------------------------------------------

    def completed(self, tracked: TrackedRequest, num_tokens: int) -> Iterable[BlockRun]:
        """The blocks that vLLM has put into its own prefix cache since the last step; this step fills them."""
        request = tracked.request
        if len(tracked.num_planned) < self.num_groups:
            tracked.num_planned = [0] * self.num_groups
        for number, manager in enumerate(self._managers):
            cached = manager.num_cached_block.get(request.request_id, 0)
            if not self._save_decoded:
                cached = min(cached, request.num_prompt_tokens // self._set.groups[number].block_size)
            start, tracked.num_planned[number] = tracked.num_planned[number], max(cached, tracked.num_planned[number])
            table = manager.req_to_blocks.get(request.request_id, ())
            runs = self._runs(request, number, range(start, min(cached, len(table))), table)
            if not self._is_late[number]:
                yield from runs
                continue
            for run in runs:
                self.hold(run.block_ids)
                self._late.append((tracked, run))

    def late(self) -> list[tuple[TrackedRequest, BlockRun]]:
        late, self._late = self._late, []
        return late

    @property
    def num_late(self) -> int:
        return len(self._late)

    def again(self, tracked: TrackedRequest) -> Iterable[BlockRun]:
        again, request = sorted(tracked.too_lossy), tracked.request
        tracked.too_lossy.clear()
        for number, block in again:
            table = self._managers[number].req_to_blocks.get(request.request_id, ())
            yield from self._runs(request, number, range(block, min(block + 1, len(table))), table)

    def _runs(self, request: "Request", number: int, blocks: range, table: Sequence[Any]) -> Iterable[BlockRun]:
        """Runs of those blocks that have KV and are in vLLM's own prefix cache."""
        run: list[int] = []
        for block in blocks:
            there = not table[block].is_null and table[block].block_hash is not None
            if there:
                run.append(block)
            if run and (not there or block == blocks[-1]):
                yield self._run(request, number, slice(run[0], run[-1] + 1), table)
                run = []

    def _run(self, request: "Request", number: int, blocks: slice, table: Sequence[Any]) -> BlockRun:
        of_device = table[blocks]
        hashes = [get_block_hash(block.block_hash) for block in of_device]
        packed = self._set.tagged(pack_keys(self._keys.from_hashes(request, hashes)), number)
        keys = [BlockHash(key.tobytes()) for key in packed]
        return BlockRun(number, blocks, keys, [block.block_id for block in of_device])

    def order(self, runs: Sequence[BlockRun]) -> NDArray[np.intp]:
        sizes = [len(run.keys) for run in runs]
        numbers = np.repeat(np.array([run.group for run in runs], dtype=np.int64), sizes)
        block_sizes = [self._set.groups[run.group].block_size for run in runs]
        ends = [
            (np.arange(run.blocks.start, run.blocks.stop, dtype=np.int64) + 1) * block_size
            for run, block_size in zip(runs, block_sizes, strict=True)
        ]
        return self._set.order(numbers, np.concatenate(ends))

    def hold(self, block_ids: Sequence[int]) -> None:
        self._device_pool.touch([self._device_pool.blocks[block_id] for block_id in block_ids])

    def release(self, block_ids: Sequence[int]) -> None:
        self._device_pool.free_blocks([self._device_pool.blocks[block_id] for block_id in block_ids])

    # -- use ---------------------------------------------------------------------------------------

    def used(self, tracked: TrackedRequest) -> list[BlockHash]:
        hashes, keys = self._hashes_and_keys(tracked.request)
        present = [self._index.states(packed) == COMMITTED for packed in keys]
        _, needed = self._longest(tracked, hashes, present)
        if not needed:
            return []
        numbers = np.array([number for number, _ in needed], dtype=np.int64)
        ends = [(block + 1) * self._set.groups[number].block_size for number, block in needed]
        order = self._set.order(numbers, np.array(ends, dtype=np.int64)).tolist()
        return [BlockHash(keys[needed[n][0]][needed[n][1]].tobytes()) for n in order]

    def ids_of(self, blocks: "KVCacheBlocks") -> list[int]:
        return [block.block_id for table in blocks.blocks for block in table if not block.is_null]

    def num_held(self, tracked: TrackedRequest) -> int:
        request_id = tracked.request.request_id
        tables = [manager.req_to_blocks.get(request_id, ()) for manager in self._all_managers]
        return sum(not block.is_null for table in tables for block in table)

    def num_needed(self, num_tokens: int) -> int:
        return sum(
            min(math.ceil((num_tokens + 1) / manager.block_size), most)
            for manager, most in zip(self._all_managers, self._max_blocks, strict=True)
        )
