"""Which blocks of a request are keyed, found, loaded and saved.

`BlockRules` says what the planners ask. `FullAttention` answers for models with one group of full attention;
`hybrid.py` answers for all others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.index import CacheIndex, pack_keys
from kvortex.owner.remote_index import RemoteIndex
from kvortex.types import BlockHash, MissReason
from kvortex.vllm.identity.adapters import BlockKeys
from kvortex.vllm.scheduler.requests import TrackedRequest, follow_block_tables

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput

InTier: TypeAlias = Callable[[Sequence[bytes]], NDArray[np.bool_]]
"""Keys of 32 bytes -> which of them the lower tier is known to have, `bool [n]`."""


class RequestBlocks(NamedTuple):
    """Blocks of one request, what is worth more first.

    Attributes:
        keys: `uint64 [n, 4]`.
        block_ids: device blocks, `int32 [n]`.
    """

    keys: NDArray[np.uint64]
    block_ids: NDArray[np.int32]


class BlockRun(NamedTuple):
    """Consecutive blocks of one group of a request, or a tail: one block that vLLM resumes from before it is full.

    Attributes:
        group: the group's number.
        blocks: their numbers in the request. A tail has `~n`, if it ends with block hash `n` of the request.
        keys: their keys, `uint64 [n, 4]`.
        block_ids: their device blocks.
    """

    group: int
    blocks: slice
    keys: NDArray[np.uint64]
    block_ids: list[int]

    @property
    def is_tail(self) -> bool:
        """True for a block that is not full."""
        return bool(self.blocks.start < 0)


class Wanted(NamedTuple):
    """Blocks that are not in the pool, and with which a request could resume later than with what is there.

    Attributes:
        keys: their keys, 32 bytes each.
        numbers: the group and the number in the request of each; `~n` for a tail, as in `BlockRun`.
        is_chain: True if only a leading part of them is of use, too.
        reason: why the first of them is not there, PENDING if one that the request could wait for is being saved; None
            if nobody has asked.
    """

    keys: list[BlockHash]
    numbers: list[tuple[int, int]]
    is_chain: bool
    reason: MissReason | None = None


class Reach(NamedTuple):
    """How far a request could resume.

    Attributes:
        num_tokens: tokens that can be loaded from the pool now.
        wanted: blocks that would bring it further, if they came into the pool.
    """

    num_tokens: int
    wanted: Wanted


class BlockRules(ABC):
    """What the planners ask about the blocks of a request.

    Attributes:
        alignment: tokens between two boundaries at which a request can resume.
        num_groups: groups of layers.
        holds: True if blocks that are being saved count as used for vLLM.
    """

    alignment: int
    num_groups: int
    holds: bool

    @abstractmethod
    def num_ahead(self, tracked: TrackedRequest) -> int:
        """Boundaries behind what the device has, up to the last one at which the request could resume."""

    @abstractmethod
    def keys_ahead(self, tracked: TrackedRequest) -> NDArray[np.uint64]:
        """Keys of all blocks behind what the device has, `uint64 [n, 4]`."""

    @abstractmethod
    def reach(self, tracked: TrackedRequest, in_tier: InTier | None) -> Reach:
        """How far a request could resume behind what the device has, with what is in the pool and in the lower tier."""

    @abstractmethod
    def to_load(self, tracked: TrackedRequest, num_tokens: int, blocks: "KVCacheBlocks") -> RequestBlocks:
        """The blocks to load into the device blocks that were allocated for `num_tokens` tokens."""

    @abstractmethod
    def completed(self, tracked: TrackedRequest, num_tokens: int) -> Iterable[BlockRun]:
        """The blocks that a step completes which computes `num_tokens` tokens of a request; each is named once."""

    @abstractmethod
    def again(self, tracked: TrackedRequest) -> Iterable[BlockRun]:
        """The blocks of `too_lossy` that are still on the device; that set is emptied."""

    @abstractmethod
    def used(self, tracked: TrackedRequest) -> NDArray[np.uint64]:
        """Keys of the blocks that a later request with the same beginning would need, what is worth more first.

        `uint64 [n, 4]`.
        """

    @abstractmethod
    def stored_tokens(self, tracked: TrackedRequest) -> int:
        """Tokens of a request, from its first on, whose blocks are stored or being saved, up to a boundary."""

    @abstractmethod
    def ids_of(self, blocks: "KVCacheBlocks") -> list[int]:
        """The device blocks that vLLM has allocated for a request."""

    @abstractmethod
    def num_held(self, tracked: TrackedRequest) -> int:
        """Device blocks that a request holds which waits for its turn; of another one whether it holds any."""

    @abstractmethod
    def num_held_beside(self, waiting: Sequence[TrackedRequest], running: Sequence[TrackedRequest]) -> int:
        """Device blocks that are in use, without those of requests that wait for their turn."""

    @abstractmethod
    def num_needed(self, num_tokens: int) -> int:
        """Device blocks that a request needs for so many tokens."""

    def tails(
        self, tracked: Mapping[str, TrackedRequest], scheduler_output: "SchedulerOutput"
    ) -> Iterable[tuple[TrackedRequest, BlockRun]]:
        """Tails of prompts that vLLM hands over with a step, for requests that may resume inside of a block."""
        return ()

    @abstractmethod
    def add_finished_tail(
        self, tracked: TrackedRequest, block_ids: Sequence[Sequence[int]], tails: Sequence[tuple[int, int, int]]
    ) -> None:
        """A request has ended just where its prompt's last block hash does: its tail is one of the next `late`.

        Args:
            tracked: the request.
            block_ids: its device blocks, for each of vLLM's groups.
            tails: vLLM's number of a group, a device block with a state, and the tokens after which it is that state.
        """

    def late(self) -> list[tuple[TrackedRequest, BlockRun]]:
        """Blocks that were completed by the step before this one, and are held since then; each is named once."""
        return []

    @property
    def num_late(self) -> int:
        """How many runs `late` has for the next step."""
        return 0

    def follow(self, tracked: Mapping[str, TrackedRequest], scheduler_output: "SchedulerOutput") -> set[int]:
        """Update the tracked requests from a step's output.

        Returns:
            Device blocks that were allocated for this step, and that saves of earlier steps may still read.
        """
        return set()

    def fresh_ids(self, tracked: TrackedRequest) -> Sequence[int]:
        """A request's device blocks behind what vLLM has found in its own cache, if saves may still read them."""
        return ()

    def order(self, runs: Sequence[BlockRun]) -> NDArray[np.intp] | None:
        """The order in which blocks of several runs are stored, what is worth more first; None for the order given."""
        return None

    @abstractmethod
    def hold(self, block_ids: Sequence[int]) -> None:
        """A save reads these device blocks: vLLM must not give them to another request, or steps have to wait."""

    @abstractmethod
    def release(self, block_ids: Sequence[int]) -> None:
        """A save has ended."""


class FullAttention(BlockRules):
    """One group of full attention: a request needs every block of its prefix.

    vLLM may give a block away while a save still reads it; then the step that overwrites it waits, see
    `ConnectorPlan.fresh_block_ids`.

    Args:
        index: the pool's.
        keys: gives the keys of a request's blocks.
        block_size: tokens of a block.
        save_decoded: save the KV of generated tokens too, not only of the prompt.
    """

    num_groups = 1
    holds = False

    def __init__(
        self, index: CacheIndex | RemoteIndex, keys: BlockKeys, block_size: int, *, save_decoded: bool
    ) -> None:
        self.alignment = block_size
        self._index = index
        self._keys = keys
        self._save_decoded = save_decoded

    def num_ahead(self, tracked: TrackedRequest) -> int:
        return len(tracked.request.block_hashes) - tracked.local_tokens // self.alignment

    def keys_ahead(self, tracked: TrackedRequest) -> NDArray[np.uint64]:
        return pack_keys(self._keys.of(tracked.request, slice(tracked.local_tokens // self.alignment, None)))

    def reach(self, tracked: TrackedRequest, in_tier: InTier | None) -> Reach:
        first = tracked.local_tokens // self.alignment
        keys = self._keys.of(tracked.request, slice(first, None))
        found, reason = self._index.leading(pack_keys(keys))
        numbers = [(0, number) for number in range(first + found, first + len(keys))]
        return Reach(found * self.alignment, Wanted(keys[found:], numbers, is_chain=True, reason=reason))

    def to_load(self, tracked: TrackedRequest, num_tokens: int, blocks: "KVCacheBlocks") -> RequestBlocks:
        # Selected by position in the request: behind them there may be more blocks, for drafts.
        first = tracked.local_tokens // self.alignment
        wanted = slice(first, first + num_tokens // self.alignment)
        block_ids = np.array(tracked.block_ids[wanted], dtype=np.int32)
        return RequestBlocks(pack_keys(self._keys.of(tracked.request, wanted)), block_ids)

    def completed(self, tracked: TrackedRequest, num_tokens: int) -> Iterable[BlockRun]:
        request = tracked.request
        computed = request.num_computed_tokens + num_tokens
        if not self._save_decoded:
            computed = min(computed, request.num_prompt_tokens)
        full = int(min(computed // self.alignment, len(request.block_hashes), len(tracked.block_ids)))
        tracked.num_full = full
        planned = tracked.num_planned[0]
        if full > planned:
            tracked.num_planned[0] = full
            for blocks in tracked.to_save(planned, full, self.alignment):
                yield self._run(tracked, slice(blocks.start, blocks.stop))

    def again(self, tracked: TrackedRequest) -> Iterable[BlockRun]:
        # A request that was preempted in the meantime may not have computed all of its blocks again.
        numbers = [number for _, number in sorted(tracked.too_lossy) if number < tracked.num_full]
        tracked.too_lossy.clear()
        return [self._run(tracked, slice(number, number + 1)) for number in numbers]

    def _run(self, tracked: TrackedRequest, blocks: slice) -> BlockRun:
        return BlockRun(0, blocks, pack_keys(self._keys.of(tracked.request, blocks)), tracked.block_ids[blocks])

    def used(self, tracked: TrackedRequest) -> NDArray[np.uint64]:
        return pack_keys(self._keys.of(tracked.request, slice(tracked.num_planned[0])))

    def stored_tokens(self, tracked: TrackedRequest) -> int:
        absent = np.flatnonzero(self._index.states(self.used(tracked)) == 0)
        return int(absent[0] if absent.size else tracked.num_planned[0]) * self.alignment

    def ids_of(self, blocks: "KVCacheBlocks") -> list[int]:
        return list(blocks.get_block_ids()[0])

    def follow(self, tracked: Mapping[str, TrackedRequest], scheduler_output: "SchedulerOutput") -> set[int]:
        return follow_block_tables(tracked, scheduler_output, self.alignment)

    def fresh_ids(self, tracked: TrackedRequest) -> Sequence[int]:
        return tracked.block_ids[tracked.local_tokens // self.alignment :]

    def add_finished_tail(
        self, tracked: TrackedRequest, block_ids: Sequence[Sequence[int]], tails: Sequence[tuple[int, int, int]]
    ) -> None:
        """Do nothing: only states have tails."""

    def hold(self, block_ids: Sequence[int]) -> None:
        """Do nothing: a step that overwrites the blocks waits."""

    def release(self, block_ids: Sequence[int]) -> None:
        """Do nothing."""

    def num_held(self, tracked: TrackedRequest) -> int:
        return len(tracked.block_ids)

    def num_held_beside(self, waiting: Sequence[TrackedRequest], running: Sequence[TrackedRequest]) -> int:
        return sum(map(self.num_held, running))

    def num_needed(self, num_tokens: int) -> int:
        return num_tokens // self.alignment + 1
