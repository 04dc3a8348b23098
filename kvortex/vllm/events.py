"""KV events: what enters and leaves the cache, as vLLM publishes it beside its own blocks' comings and goings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

if TYPE_CHECKING:
    from vllm.v1.request import Request

MEDIUM = "CPU"


@dataclass(frozen=True)
class PlannedBlocks:
    """What an event will say of the blocks of one save: consecutive ones of a request, before they are stored."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]
    lora_id: int | None
    lora_name: str | None

    @classmethod
    def of(cls, request: "Request", part: slice, block_size: int) -> "PlannedBlocks":
        """Blocks `part` of a request."""
        lora = request.lora_request
        return cls(
            hashes=tuple(request.block_hashes[part]),
            parent=request.block_hashes[part.start - 1] if part.start else None,
            token_ids=tuple(request.all_token_ids[part.start * block_size : part.stop * block_size]),
            lora_id=lora.adapter_id if lora is not None else None,
            lora_name=lora.name if lora is not None else None,
        )


class EventLog:
    """Events since they were last taken; knows which hash lies at which offset."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._hash_at: dict[int, bytes] = {}
        self._events: list[Any] = []

    def stored(self, blocks: PlannedBlocks, positions: Sequence[int], offsets: Sequence[int]) -> None:
        """Blocks at `positions` of a plan are stored now, at `offsets`; one event a run of neighbours."""
        self._hash_at.update(zip(offsets, (blocks.hashes[i] for i in positions), strict=True))
        for run in _runs(positions):
            first, last = run[0], run[-1] + 1
            self._events.append(
                BlockStored(
                    block_hashes=[maybe_convert_block_hash(h) for h in blocks.hashes[first:last]],
                    parent_block_hash=self._external(blocks.hashes[first - 1] if first else blocks.parent),
                    token_ids=list(blocks.token_ids[first * self._block_size : last * self._block_size]),
                    block_size=self._block_size,
                    lora_id=blocks.lora_id,
                    medium=MEDIUM,
                    lora_name=blocks.lora_name,
                )
            )

    def removed(self, offsets: NDArray[np.int64]) -> None:
        """The blocks at these offsets have left the cache."""
        hashes = [self._hash_at.pop(offset) for offset in offsets.tolist()]
        self._events.append(BlockRemoved(block_hashes=[maybe_convert_block_hash(h) for h in hashes], medium=MEDIUM))

    def take(self) -> Iterable[KVCacheEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    @staticmethod
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
