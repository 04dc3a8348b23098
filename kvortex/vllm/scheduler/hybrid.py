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

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvortex.groups import GroupSet, KVKind
from kvortex.index import COMMITTED, PENDING, CacheIndex
from kvortex.owner.remote_index import RemoteIndex
from kvortex.tiering.keys import split_keys
from kvortex.types import BlockHash, MissReason
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.model import ServedGroups
from kvortex.vllm.scheduler.blocks import BlockRules, BlockRun, InTier, Reach, RequestBlocks, Wanted
from kvortex.vllm.scheduler.lookup import Found, PrefixLookup, RequestKeys
from kvortex.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


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
        index: CacheIndex | RemoteIndex,
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
        self._num_device_blocks = int(manager.block_pool.num_gpu_blocks) - 1  # without the null block
        sizes = [int(manager.block_size) for manager in self._all_managers]
        self._most_blocks = list(zip(sizes, max_blocks, strict=True))
        self._save_decoded = save_decoded
        self._hash_block_size = int(getattr(manager.block_pool, "hash_block_size", groups.set.hash_block_size))
        self._is_late = [drafts or group.kind is KVKind.STATE for group in groups.set.groups]
        self._late: list[tuple[TrackedRequest, BlockRun]] = []  # that the last step has completed
        self.num_groups = len(groups.set)
        self._lookup = PrefixLookup(groups, coordinator, manager.block_pool)
        self._strides, self._entry_tokens = self._lookup.strides, self._lookup.entry_tokens
        self.alignment = self._lookup.alignment

    # -- look-up -----------------------------------------------------------------------------------

    def num_ahead(self, tracked: TrackedRequest) -> int:
        return (self._limit(tracked.request) - tracked.local_tokens) // self.alignment

    def _limit(self, request: "Request") -> int:
        """Tokens that a hit may have: at least one is left to compute, because a state cannot go back."""
        return int(min(request.num_tokens - 1, len(request.block_hashes) * self._hash_block_size))

    def _keys_of(self, tracked: TrackedRequest) -> RequestKeys:
        if tracked.keys is None:
            tracked.keys = RequestKeys(self._set, self._hash_block_size, self._entry_tokens)
        tracked.keys.follow(tracked.request, self._keys)
        return tracked.keys

    def keys_ahead(self, tracked: TrackedRequest) -> NDArray[np.uint64]:
        keys = self._keys_of(tracked)
        behind = [tracked.local_tokens // entry_tokens for entry_tokens in self._entry_tokens]
        return np.concatenate([keys.keys(number, slice(first, None)) for number, first in enumerate(behind)])

    def reach(self, tracked: TrackedRequest, in_tier: InTier | None) -> Reach:
        keys = self._keys_of(tracked)
        of_groups = [keys.keys(number) for number in range(self.num_groups)]
        states = self._states(of_groups, tracked.local_tokens)
        arriving = [state != 0 for state in states]
        if in_tier is not None:
            for mask, of_group in zip(arriving, of_groups, strict=True):
                absent = np.flatnonzero(~mask)
                mask[absent] = in_tier(split_keys(of_group[absent]))
        behind = [tracked.local_tokens // entry_tokens for entry_tokens in self._entry_tokens]
        if not any(mask[first:].any() for mask, first in zip(arriving, behind, strict=True)):
            return Reach(0, Wanted([], [], is_chain=False))
        found = self._longest(tracked, keys, [state == COMMITTED for state in states])
        wanted: list[NDArray[np.intp]] = [np.empty(0, np.intp)] * self.num_groups
        if any((mask & (state != COMMITTED)).any() for mask, state in zip(arriving, states, strict=True)):
            further = self._longest(tracked, keys, arriving)
            if further.num_tokens > found.num_tokens:
                wanted = [
                    needed[state[needed] != COMMITTED] for needed, state in zip(further.needed, states, strict=True)
                ]
        numbers = [self._name(number, entry) for number, entries in enumerate(wanted) for entry in entries.tolist()]
        wanted_keys = [
            BlockHash(key)
            for of_group, entries in zip(of_groups, wanted, strict=True)
            for key in split_keys(of_group[entries])
        ]
        is_saved = any((state[entries] == PENDING).any() for state, entries in zip(states, wanted, strict=True))
        num_tokens = max(found.num_tokens - tracked.local_tokens, 0)
        reason = MissReason.PENDING if is_saved else None
        return Reach(num_tokens, Wanted(wanted_keys, numbers, is_chain=False, reason=reason))

    def _states(self, of_groups: Sequence[NDArray[np.uint64]], local_tokens: int) -> list[NDArray[np.uint8]]:
        """COMMITTED, PENDING or 0 for each entry; entries of what the device has count as there."""
        ends = np.cumsum([len(keys) for keys in of_groups])
        states = np.split(self._index.states(np.concatenate(of_groups)), ends[:-1])
        for state, entry_tokens in zip(states, self._entry_tokens, strict=True):
            state[: local_tokens // entry_tokens] = COMMITTED
        return states

    def _name(self, number: int, entry: int) -> tuple[int, int]:
        """The group of an entry and its number among the group's blocks, or `~entry` for a tail."""
        block, rest = divmod(entry + 1, self._strides[number])
        return number, block - 1 if not rest else ~entry

    def _longest(self, tracked: TrackedRequest, keys: RequestKeys, present: Sequence[NDArray[np.bool_]]) -> Found:
        request = tracked.request
        return self._lookup.longest(request.block_hashes, keys, present, self._limit(request))

    # -- load --------------------------------------------------------------------------------------

    def to_load(self, tracked: TrackedRequest, num_tokens: int, blocks: "KVCacheBlocks") -> RequestBlocks:
        start, stop = tracked.local_tokens, tracked.local_tokens + num_tokens
        keys = self._keys_of(tracked)
        numbers: list[NDArray[np.intp]] = []
        ids: list[int] = []
        for number, (vllm_number, group) in enumerate(zip(self._groups.ids, self._set.groups, strict=True)):
            table, first = blocks.blocks[vllm_number], start // group.block_size
            own = table[first : -(-stop // group.block_size)]
            there = [n for n, block in enumerate(own, first) if not block.is_null]
            entries = (np.array(there, dtype=np.intp) + 1) * self._strides[number] - 1
            if there and (there[-1] + 1) * group.block_size > stop:
                entries[-1] = self._entry_to_resume_in(keys, number, int(entries[-1]), stop)
            numbers.append(entries)
            ids += [table[n].block_id for n in there]
        all_keys, order = self._in_order(keys, numbers)
        return RequestBlocks(all_keys, np.array(ids, dtype=np.int32)[order])

    def _entry_to_resume_in(self, keys: RequestKeys, number: int, full: int, num_tokens: int) -> int:
        """The entry that has a group's KV up to a boundary inside of a block: a tail, or else the full block."""
        tail = num_tokens // self._entry_tokens[number] - 1
        has_tail = self._index.states(keys.keys(number, slice(tail, tail + 1)))[0] == COMMITTED
        return tail if has_tail or full >= len(keys.hashes(number)) else full

    def _in_order(
        self, keys: RequestKeys, entries: Sequence[NDArray[np.intp]]
    ) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """Keys of some entries of each group, what is worth more first, and that order of them."""
        groups = np.repeat(np.arange(self.num_groups), [len(of_group) for of_group in entries])
        sizes = np.array(self._entry_tokens)
        order = self._set.order(groups, (np.concatenate(entries) + 1) * sizes[groups])
        return np.concatenate([keys.keys(number, of_group) for number, of_group in enumerate(entries)])[order], order

    # -- save --------------------------------------------------------------------------------------

    def completed(self, tracked: TrackedRequest, num_tokens: int) -> Iterable[BlockRun]:
        """The blocks that vLLM has put into its own prefix cache since the last step; this step fills them."""
        request, planned = tracked.request, tracked.num_planned
        request_id = request.request_id
        known = len(request.block_hashes), (request.num_computed_tokens + num_tokens) // self._hash_block_size
        if known == tracked.looked_for:
            return  # most steps of decoding: vLLM counts whole block hashes
        tracked.looked_for = known
        if len(planned) < self.num_groups:
            planned += [0] * (self.num_groups - len(planned))
        for number, manager in enumerate(self._managers):
            cached = manager.num_cached_block.get(request_id, 0)
            if cached <= planned[number]:
                continue
            if not self._save_decoded:
                cached = min(cached, request.num_prompt_tokens // self._set.groups[number].block_size)
            table = manager.req_to_blocks.get(request_id, ())
            start, planned[number] = planned[number], max(cached, planned[number])
            block_size = self._set.groups[number].block_size
            for blocks in tracked.to_save(start, min(cached, len(table)), block_size):
                runs = self._runs(tracked, number, blocks, table)
                if not self._is_late[number]:
                    yield from runs
                    continue
                for run in runs:
                    self._save_later(tracked, run)

    def _save_later(self, tracked: TrackedRequest, run: BlockRun) -> None:
        self.hold(run.block_ids)
        self._late.append((tracked, run))

    def tails(
        self, tracked: Mapping[str, TrackedRequest], scheduler_output: "SchedulerOutput"
    ) -> Iterable[tuple[TrackedRequest, BlockRun]]:
        state = getattr(scheduler_output, "kv_connector_block_state", None)
        handed_over = state.boundary_state_offloads if state is not None else {}
        for request_id, tails in handed_over.items():
            if (known := tracked.get(request_id)) is None:
                continue
            tables = {n: self._managers[n].req_to_blocks.get(request_id, ()) for n in range(self.num_groups)}
            ids = {n: [block.block_id for block in table] for n, table in tables.items()}
            for run in self._tails(known, ids, tails):
                if self._is_late[run.group]:
                    self._save_later(known, run)
                else:
                    yield known, run

    def add_finished_tail(
        self, tracked: TrackedRequest, block_ids: Sequence[Sequence[int]], tails: Sequence[tuple[int, int, int]]
    ) -> None:
        ids = {n: block_ids[vllm_number] for n, vllm_number in enumerate(self._groups.ids)}
        for run in self._tails(tracked, ids, tails):
            self._save_later(tracked, run)

    def _tails(
        self, tracked: TrackedRequest, ids: Mapping[int, Sequence[int]], tails: Sequence[tuple[int, int, int]]
    ) -> Iterable[BlockRun]:
        """The blocks of all groups that are not full at a boundary of which vLLM hands over the states."""
        number_of = {vllm_number: number for number, vllm_number in enumerate(self._groups.ids)}
        of_states = [(number_of[group], block_id, tokens) for group, block_id, tokens in tails if group in number_of]
        others = [
            (number, ids[number][tokens // group.block_size], tokens)
            for tokens in sorted({tokens for _, _, tokens in of_states})
            for number, group in enumerate(self._set.groups)
            if group.kind is not KVKind.STATE and tokens // group.block_size < len(ids[number])
        ]
        keys, null_block = self._keys_of(tracked), self._device_pool.null_block.block_id
        for number, block_id, tokens in [*others, *of_states]:
            entry = tokens // self._entry_tokens[number] - 1
            name = self._name(number, entry)[1]
            if name < 0 <= entry < len(keys.hashes(number)) and block_id != null_block:
                run = slice(name, name + 1)
                yield BlockRun(number, run, keys.keys(number, slice(entry, entry + 1)), [block_id])

    def late(self) -> list[tuple[TrackedRequest, BlockRun]]:
        late, self._late = self._late, []
        return late

    @property
    def num_late(self) -> int:
        return len(self._late)

    def again(self, tracked: TrackedRequest) -> Iterable[BlockRun]:
        again, request_id = sorted(tracked.too_lossy), tracked.request.request_id
        tracked.too_lossy.clear()
        for number, block in again:
            manager = self._managers[number]
            table = manager.req_to_blocks.get(request_id, ())
            # The request may have been preempted in the meantime, and a tail is not the full block.
            if 0 <= block < min(len(table), manager.num_cached_block.get(request_id, 0)):
                yield from self._runs(tracked, number, range(block, block + 1), table)

    def _runs(self, tracked: TrackedRequest, number: int, blocks: range, table: Sequence[Any]) -> Iterable[BlockRun]:
        """Runs of those blocks that have KV and are in vLLM's own prefix cache."""
        there = [n for n in blocks if not table[n].is_null and table[n].block_hash is not None]
        if not there:
            return
        keys, stride = self._keys_of(tracked), self._strides[number]
        starts = [n for n, before in zip(there, [-2, *there], strict=False) if n != before + 1]
        ends = [n for n, after in zip(there, [*there[1:], -1], strict=True) if n != after - 1]
        for start, end in zip(starts, ends, strict=True):
            run = slice(start, end + 1)
            entries = slice((start + 1) * stride - 1, (end + 1) * stride, stride)
            yield BlockRun(number, run, keys.keys(number, entries), [block.block_id for block in table[run]])

    def order(self, runs: Sequence[BlockRun]) -> NDArray[np.intp]:
        sizes = [len(run.keys) for run in runs]
        numbers = np.repeat(np.array([run.group for run in runs], dtype=np.int64), sizes)
        block_sizes = [self._set.groups[run.group].block_size for run in runs]
        ends = [
            np.array([~run.blocks.start + 1]) * self._hash_block_size
            if run.is_tail
            else (np.arange(run.blocks.start, run.blocks.stop) + 1) * block_size
            for run, block_size in zip(runs, block_sizes, strict=True)
        ]
        return self._set.order(numbers, np.concatenate(ends))

    def hold(self, block_ids: Sequence[int]) -> None:
        self._device_pool.touch([self._device_pool.blocks[block_id] for block_id in block_ids])

    def release(self, block_ids: Sequence[int]) -> None:
        self._device_pool.free_blocks([self._device_pool.blocks[block_id] for block_id in block_ids])

    # -- use ---------------------------------------------------------------------------------------

    def used(self, tracked: TrackedRequest) -> NDArray[np.uint64]:
        keys = self._keys_of(tracked)
        of_groups = [keys.keys(number) for number in range(self.num_groups)]
        states = zip(self._states(of_groups, 0), self._strides, strict=True)
        there = [state[stride - 1 :: stride] == COMMITTED for state, stride in states]
        # Any boundary will do to count blocks as used, so vLLM, which takes longer, is not asked.
        boundary = int(self._set.resumable(there, self._limit(tracked.request))[-1])
        entries = [
            (np.array(group.needed(boundary), dtype=np.intp) + 1) * stride - 1
            for group, stride in zip(self._set.groups, self._strides, strict=True)
        ]
        last_hash = (tracked.request.num_prompt_tokens - 1) // self._hash_block_size - 1
        for number, stride in enumerate(self._strides):
            if 0 <= last_hash < len(of_groups[number]) and (last_hash + 1) % stride:
                entries[number] = np.append(entries[number], last_hash)  # the tail of the prompt
        return self._in_order(keys, entries)[0]

    def stored_tokens(self, tracked: TrackedRequest) -> int:
        keys = self._keys_of(tracked)
        of_groups = [keys.keys(number) for number in range(self.num_groups)]
        arriving = [state != 0 for state in self._states(of_groups, 0)]
        for run in (run for late, run in self._late if late is tracked):
            stride, (first, stop) = self._strides[run.group], (run.blocks.start, run.blocks.stop)
            arriving[run.group][~first if run.is_tail else slice((first + 1) * stride - 1, stop * stride, stride)] = (
                True
            )
        return self._longest(tracked, keys, arriving).num_tokens

    def ids_of(self, blocks: "KVCacheBlocks") -> list[int]:
        return [block.block_id for table in blocks.blocks for block in table if not block.is_null]

    def num_held(self, tracked: TrackedRequest) -> int:
        # A request that waits has what it had when blocks were allocated for it: only those that run get more.
        has_any = any(manager.req_to_blocks.get(tracked.request.request_id) for manager in self._all_managers)
        return len(tracked.block_ids) if has_any else 0

    def num_held_beside(self, waiting: Sequence[TrackedRequest], running: Sequence[TrackedRequest]) -> int:
        in_use = self._num_device_blocks - self._device_pool.get_num_free_blocks()
        return max(int(in_use) - sum(map(self.num_held, waiting)), 0)

    def num_needed(self, num_tokens: int) -> int:
        return sum(min(num_tokens // block_size + 1, most) for block_size, most in self._most_blocks)
