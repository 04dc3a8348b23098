"""KV events: what enters and leaves pool and disk, as vLLM publishes it beside its own blocks' comings and goings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

if TYPE_CHECKING:
    from vllm.v1.request import Request

POOL: Final = "CPU"
DISK: Final = "STORAGE"
MAX_KNOWN_ON_DISK: Final = 1 << 20  # some 100 bytes each; a reset takes back no more than the last of them

# Newer versions untag the keys that they publish.
_untagged: Callable[[list[Any]], Any] = getattr(kv_cache_utils, "to_event_extra_keys", lambda keys: keys)
_OF_STORED: Final = frozenset(BlockStored.__struct_fields__)
_OF_REMOVED: Final = {"group_idx": 0} if "group_idx" in BlockRemoved.__struct_fields__ else {}


@dataclass(frozen=True)
class PlannedBlocks:
    """What an event will say of consecutive blocks of a request, before they are stored.

    `of_block` are fields with an entry a block, `of_all` those of the whole request; each only where this vLLM has it.
    """

    hashes: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    of_block: dict[str, list[Any]] = field(default_factory=dict)
    of_all: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, request: "Request", part: slice, block_size: int) -> "PlannedBlocks":
        """Blocks `part` of a request, with all that their hashes are made of."""
        lora = request.lora_request
        of_all = {
            "lora_id": lora.adapter_id if lora is not None else None,
            "lora_name": lora.name if lora is not None else None,
            "session_id": getattr(request, "session_id", None),
            "group_idx": 0,
        }
        of_block: dict[str, list[Any]] = {}
        if "extra_keys" in _OF_STORED:
            starts = range(part.start * block_size, part.stop * block_size, block_size)
            of_block["extra_keys"] = [generate_block_hash_extra_keys(request, n, n + block_size, 0)[0] for n in starts]
        return cls(
            hashes=tuple(request.block_hashes[part]),
            parent=request.block_hashes[part.start - 1] if part.start else None,
            token_ids=tuple(request.all_token_ids[part.start * block_size : part.stop * block_size]),
            block_size=block_size,
            of_block=of_block,
            of_all={name: value for name, value in of_all.items() if name in _OF_STORED},
        )

    def event(self, first: int, stop: int, medium: str) -> BlockStored:
        """The event that blocks `first` to `stop` are stored."""
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(h) for h in self.hashes[first:stop]],
            parent_block_hash=_external(self.hashes[first - 1] if first else self.parent),
            token_ids=list(self.token_ids[first * self.block_size : stop * self.block_size]),
            block_size=self.block_size,
            medium=medium,
            **self.of_all,
            **{name: _untagged(values[first:stop]) for name, values in self.of_block.items()},
        )


class EventLog:
    """Events since they were last taken; knows which hash lies at which offset of the pool, and which are on disk."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._hash_at: dict[int, bytes] = {}
        self._offset_of: dict[bytes, int] = {}
        self._on_disk: dict[bytes, None] = {}
        self._events: list[Any] = []
        self._unsent: set[bytes] = set()  # stored in the pool since events were last taken

    # -- pool --------------------------------------------------------------------------------------

    def stored(self, blocks: PlannedBlocks, positions: Sequence[int], offsets: Sequence[int]) -> None:
        """Blocks at `positions` of a plan are in the pool now, at `offsets`; one event a run of neighbours."""
        fresh = []
        for position, offset in zip(positions, offsets, strict=True):
            block_hash = blocks.hashes[position]
            if (before := self._offset_of.get(block_hash)) is None:
                fresh.append(position)
            else:
                del self._hash_at[before]  # it was dropped while it was read, and has come again before that ended
            self._hash_at[offset] = block_hash
            self._offset_of[block_hash] = offset
        self._unsent.update(blocks.hashes[position] for position in fresh)
        self._events += [blocks.event(run[0], run[-1] + 1, POOL) for run in _runs(fresh)]

    def removed(self, offsets: NDArray[np.int64]) -> None:
        """Whatever lay at these offsets has left the pool; of what a reset has overtaken nothing is left to say."""
        gone = [self._hash_at.pop(offset) for offset in offsets.tolist() if offset in self._hash_at]
        for block_hash in gone:
            del self._offset_of[block_hash]
        self._remove(gone, POOL)

    # -- disk --------------------------------------------------------------------------------------

    def written(self, blocks: PlannedBlocks, positions: Sequence[int]) -> None:
        """Blocks at `positions` of a plan are on disk now."""
        fresh = [i for i in positions if blocks.hashes[i] not in self._on_disk]
        self._on_disk.update((blocks.hashes[i], None) for i in fresh)
        self._events += [blocks.event(run[0], run[-1] + 1, DISK) for run in _runs(fresh)]
        while len(self._on_disk) > MAX_KNOWN_ON_DISK:
            del self._on_disk[next(iter(self._on_disk))]

    def lost(self, hashes: Iterable[bytes]) -> None:
        """These blocks could not be read from disk any more."""
        known = [block_hash for block_hash in hashes if block_hash in self._on_disk]
        for block_hash in known:
            del self._on_disk[block_hash]
        self._remove(known, DISK)

    # -- both --------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Everything goes, though what is being read keeps its place for a while.

        What was stored and never announced stays unsaid: vLLM announces first that its own cache is empty, and told of
        blocks behind that, a router would take them for new.
        """
        self._events = [event for event in self._events if isinstance(event, BlockRemoved)]
        self._remove([block_hash for block_hash in self._hash_at.values() if block_hash not in self._unsent], POOL)
        self._remove(list(self._on_disk), DISK)
        self._hash_at.clear()
        self._offset_of.clear()
        self._on_disk.clear()
        self._unsent.clear()

    def take(self) -> Iterable[KVCacheEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        self._unsent.clear()
        return events

    def _remove(self, hashes: list[bytes], medium: str) -> None:
        if hashes:
            external = [maybe_convert_block_hash(h) for h in hashes]
            self._events.append(BlockRemoved(block_hashes=external, medium=medium, **_OF_REMOVED))


def _external(block_hash: bytes | None) -> Any:
    return None if block_hash is None else maybe_convert_block_hash(block_hash)


def _runs(positions: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] + 1 == position:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs
