"""KV events: vLLM publishes which blocks enter and leave pool and disk, beside the events of its own cache."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

from kvortex.vllm.versions import hashes_of_blocks

if TYPE_CHECKING:
    from vllm.v1.request import Request

POOL: Final = "CPU"
DISK: Final = "STORAGE"
MAX_KNOWN_ON_DISK: Final = 1 << 20  # some 100 bytes each; a reset announces the removal of these only

# Newer versions remove the tags of the keys that they publish.
_untagged: Callable[[list[Any]], Any] = getattr(kv_cache_utils, "to_event_extra_keys", lambda keys: keys)
_OF_STORED: Final = frozenset(BlockStored.__struct_fields__)
_REMOVED_NAMES_GROUP: Final = "group_idx" in BlockRemoved.__struct_fields__
_NAMES_TIER: Final = "ownership" in _OF_STORED
_OF_ONE_MACHINE: Final = frozenset({"disk", "memory"})


BlockName: TypeAlias = tuple[int, bytes]
"""vLLM's number of a block's group, and the block's hash."""


class EventGroup(NamedTuple):
    """What events say of a group of layers: vLLM's number, tokens of a block, and the kind of its KV."""

    number: int
    block_size: int
    kind: str | None = None
    window: int | None = None


@dataclass(frozen=True)
class PlannedBlocks:
    """The event for consecutive blocks of a request, prepared before they are stored.

    Args:
        hashes: vLLM's block hashes.
        parent: hash of the block before the first; None for the head of a request.
        token_ids: tokens of all blocks.
        block_size: tokens of a block.
        group: vLLM's number of the blocks' group.
        of_block: fields with one entry a block, as far as this vLLM's events have them.
        of_all: fields of the whole request, likewise.
    """

    hashes: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    group: int = 0
    of_block: dict[str, list[Any]] = field(default_factory=dict)
    of_all: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, request: "Request", part: slice, group: EventGroup, hash_block_size: int) -> "PlannedBlocks":
        """Prepare the event for the blocks `part` of a request.

        Args:
            request: the request.
            part: numbers of consecutive blocks of the group.
            group: their group.
            hash_block_size: tokens of one of the request's block hashes.
        """
        hashes, block_size = hashes_of_blocks(request.block_hashes, hash_block_size, group.block_size), group.block_size
        lora = request.lora_request
        of_all = {
            "lora_id": lora.adapter_id if lora is not None else None,
            "lora_name": lora.name if lora is not None else None,
            "session_id": getattr(request, "session_id", None),
            "group_idx": group.number,
            "kv_cache_spec_kind": group.kind,
            "kv_cache_spec_sliding_window": group.window,
        }
        of_block: dict[str, list[Any]] = {}
        if "extra_keys" in _OF_STORED:
            starts = range(part.start * block_size, part.stop * block_size, block_size)
            of_block["extra_keys"] = [generate_block_hash_extra_keys(request, n, n + block_size, 0)[0] for n in starts]
        return cls(
            hashes=tuple(hashes[part]),
            parent=hashes[part.start - 1] if part.start else None,
            token_ids=tuple(request.all_token_ids[part.start * block_size : part.stop * block_size]),
            block_size=block_size,
            group=group.number,
            of_block=of_block,
            of_all={name: value for name, value in of_all.items() if name in _OF_STORED},
        )

    def name(self, position: int) -> BlockName:
        """The block at a position."""
        return self.group, self.hashes[position]

    def event(self, first: int, stop: int, medium: str, **of_tier: Any) -> BlockStored:
        """The event that the blocks from `first` up to, and without, `stop` are stored in `medium`.

        Args:
            first, stop: positions in `hashes`.
            medium: where they are.
            of_tier: what the event says of the tier, as far as this vLLM's events have it.
        """
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(h) for h in self.hashes[first:stop]],
            parent_block_hash=_external(self.hashes[first - 1] if first else self.parent),
            token_ids=list(self.token_ids[first * self.block_size : stop * self.block_size]),
            block_size=self.block_size,
            medium=medium,
            **self.of_all,
            **of_tier,
            **{name: _untagged(values[first:stop]) for name, values in self.of_block.items()},
        )


class EventLog:
    """Collects events until they are taken. Knows the block at each offset of the pool, and the blocks on disk.

    Args:
        groups: the groups of layers whose blocks are cached.
        hash_block_size: tokens of one block hash.
    """

    tier = ""
    """Name of the lower tier, such as "redis"; several are joined by "+"."""

    def __init__(self, groups: Sequence[EventGroup], hash_block_size: int) -> None:
        self._groups = groups
        self.hash_block_size = hash_block_size
        self._at: dict[int, BlockName] = {}
        self._offset_of: dict[BlockName, int] = {}
        self._on_disk: dict[BlockName, None] = {}
        self._events: list[Any] = []
        self._unsent: set[BlockName] = set()  # stored in the pool since events were last taken

    def planned(self, request: "Request", group: int, blocks: slice) -> PlannedBlocks:
        """Prepare the event for consecutive blocks of a request.

        Args:
            request: the request.
            group: number of their group among those whose blocks are cached.
            blocks: their numbers in the request; `~n` for a block that is not full and ends with block hash `n`. As in
                vLLM's own events such a block is told by the tokens of that hash.
        """
        of_group = self._groups[group]
        if blocks.start < 0:
            of_group, blocks = of_group._replace(block_size=self.hash_block_size), slice(~blocks.start, -blocks.start)
        return PlannedBlocks.of(request, blocks, of_group, self.hash_block_size)

    # -- pool --------------------------------------------------------------------------------------

    def add_stored(self, blocks: PlannedBlocks, positions: Sequence[int], offsets: Sequence[int]) -> None:
        """Blocks are in the pool now: add one event a run of neighbours.

        Args:
            blocks: the prepared event.
            positions: the positions of the stored blocks in `blocks`.
            offsets: the offsets of these blocks in the pool, in bytes.
        """
        fresh = []
        for position, offset in zip(positions, offsets, strict=True):
            name = blocks.name(position)
            if (before := self._offset_of.get(name)) is None:
                fresh.append(position)
            else:
                del self._at[before]  # dropped during a read, and stored again before that read ended
            self._at[offset] = name
            self._offset_of[name] = offset
        self._unsent.update(blocks.name(position) for position in fresh)
        self._events += [blocks.event(run[0], run[-1] + 1, POOL) for run in _runs(fresh)]

    def add_removed(self, offsets: NDArray[np.int64]) -> None:
        """The blocks at these offsets, `int64 [n]`, have left the pool. A reset has announced some of them already."""
        gone = [self._at.pop(offset) for offset in offsets.tolist() if offset in self._at]
        for name in gone:
            del self._offset_of[name]
        self._remove(gone, POOL)

    # -- disk --------------------------------------------------------------------------------------

    def add_written(self, blocks: PlannedBlocks, positions: Sequence[int]) -> None:
        """The blocks at `positions` of a prepared event are on disk now."""
        fresh = [i for i in positions if blocks.name(i) not in self._on_disk]
        self._on_disk.update((blocks.name(i), None) for i in fresh)
        self._events += [blocks.event(run[0], run[-1] + 1, DISK, **self._of_tier) for run in _runs(fresh)]
        while len(self._on_disk) > MAX_KNOWN_ON_DISK:
            del self._on_disk[next(iter(self._on_disk))]

    def add_lost(self, names: Iterable[BlockName]) -> None:
        """These blocks could not be read from disk: they count as removed."""
        known = list(dict.fromkeys(name for name in names if name in self._on_disk))
        for name in known:
            del self._on_disk[name]
        self._remove(known, DISK)

    # -- both --------------------------------------------------------------------------------------

    def add_all_removed(self) -> None:
        """Announce that every block is removed; blocks that are being read keep their place for a while.

        Blocks that were stored and not announced yet are not announced at all. vLLM announces first that its own cache
        is empty: a router that hears of stored blocks after that would take them for new ones.
        """
        self._events = [event for event in self._events if isinstance(event, BlockRemoved)]
        self._remove([name for name in self._at.values() if name not in self._unsent], POOL)
        self._remove(list(self._on_disk), DISK)
        self._at.clear()
        self._offset_of.clear()
        self._on_disk.clear()
        self._unsent.clear()

    def take(self) -> Iterable[KVCacheEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        self._unsent.clear()
        return events

    def _remove(self, names: Sequence[BlockName], medium: str) -> None:
        by_group: dict[int, list[Any]] = {}
        for group, block_hash in names:
            by_group.setdefault(group, []).append(maybe_convert_block_hash(block_hash))
        for group, external in by_group.items():
            of_group = {"group_idx": group} if _REMOVED_NAMES_GROUP else {}
            of_tier = self._of_tier if medium == DISK else {}
            self._events.append(BlockRemoved(block_hashes=external, medium=medium, **of_group, **of_tier))

    @property
    def _of_tier(self) -> dict[str, Any]:
        """What events say of the lower tier: its name, and whether other machines can reach what it has."""
        if not _NAMES_TIER or not self.tier:
            return {}
        is_local = _OF_ONE_MACHINE.issuperset(self.tier.split("+"))
        return {"ownership": self.tier, "locality": "LOCAL" if is_local else "REMOTE"}


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
