"""KV events of a pool that an owner holds: what leaves it, and what reaches and leaves the lower tier."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.owner import RemoteControl
from kvortex.tiering.keys import split_keys
from kvortex.vllm.scheduler.events import EventLog, PlannedBlocks

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_REMEMBERED: Final = 1 << 16
"""Blocks whose event is kept for the time when the tier stores, or loses, them. Of more, nothing is told then."""


class OwnerEvents:
    """Takes the owner's events over into those of vLLM.

    Only blocks that this engine has saved or fetched are told: other engines tell of theirs.

    Args:
        control: the remote control plane.
        log: collects the events.
    """

    def __init__(self, control: RemoteControl, log: EventLog) -> None:
        self._control = control
        self._log = log
        self._generation = control.client.generation
        self._of_key: dict[bytes, tuple[PlannedBlocks, int]] = {}
        control.watch(log.add_removed)

    def add_saved(self, keys: Sequence[bytes], events: Sequence[tuple[PlannedBlocks, int]]) -> None:
        """Blocks were saved: their events, and their numbers in these, are needed again when the tier has them."""
        if not self._control.tier:
            return
        self._of_key.update(zip(keys, events, strict=True))
        while len(self._of_key) > MAX_REMEMBERED:
            del self._of_key[next(iter(self._of_key))]

    def places(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Offsets of blocks, `int64 [n]`, -1 for those that are not in the pool, or not any more."""
        return self._control.places(keys)

    def add_fetched(self, request: "Request", keys: NDArray[np.uint64], numbers: Sequence[tuple[int, int]]) -> None:
        """A fetch has ended: tell of the blocks that are in the pool now.

        Args:
            request: the request that asked for them.
            keys: their keys, `uint64 [n, 4]`.
            numbers: the group and the number in the request of each block.
        """
        offsets = self._control.places(keys)
        events = self._events_of(request, numbers)
        self.add_saved(split_keys(keys), events)
        for position in np.flatnonzero(offsets >= 0).tolist():
            blocks, number = events[position]
            self._log.add_stored(blocks, [number], [int(offsets[position])])

    def _events_of(self, request: "Request", numbers: Sequence[tuple[int, int]]) -> list[tuple[PlannedBlocks, int]]:
        """The event that names each block, and its number in that event."""
        event_of: dict[tuple[int, int], tuple[PlannedBlocks, int]] = {}
        for run in _runs(sorted(numbers)):
            (group, first), (_, last) = run[0], run[-1]
            event = self._log.planned(request, group, slice(first, last + 1))
            event_of.update({number: (event, n) for n, number in enumerate(run)})
        return [event_of[number] for number in numbers]

    def update(self) -> None:
        """Take in what has happened since the last call. If something was missed, all blocks count as gone."""
        events = self._control.take_events()
        generation = self._control.client.generation
        if events is None or generation != self._generation:
            self._generation = generation
            self._of_key.clear()
            self._log.add_all_removed()
            return
        for blocks, number in self._known(events.written):
            self._log.add_written(blocks, [number])
        self._log.add_lost([blocks.name(number) for blocks, number in self._known(events.lost)])

    def _known(self, keys: Sequence[bytes]) -> Iterator[tuple[PlannedBlocks, int]]:
        return (self._of_key[key] for key in keys if key in self._of_key)


def _runs(numbers: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Neighbouring blocks of one group together."""
    run: list[tuple[int, int]] = []
    for group, number in numbers:
        if run and run[-1] != (group, number - 1):
            yield run
            run = []
        run.append((group, number))
    if run:
        yield run
