"""Reads: neighbouring blocks of a segment by one request for a range, many requests at a time."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.runtime.blocking import run_to_its_end
from kvortex.tiers.base import Cause, ReadOutcome, as_bytes
from kvortex.tiers.s3.block_map import BlockMap, Place, Segment
from kvortex.tiers.s3.calls import Move, unfinished
from kvortex.tiers.s3.catalogue import Catalogue, all_of
from kvortex.tiers.s3.failures import StoreFailure
from kvortex.tiers.s3.objects import Objects
from kvortex.tiers.s3.payloads import Payloads
from kvortex.types import MissReason

RANGE_BYTES: Final = 4 << 20
"""Bytes of a request, at most; a larger block is read by one request all the same."""
GAP_BYTES: Final = 64 << 10
"""Bytes between two blocks that are read, and thrown away, rather than that there is another request."""
FRESH_S: Final = 0.05
"""Seconds for which the answer to a look-up of the store holds."""


@dataclass(slots=True)
class Span:
    """A range of a segment, and the blocks in it that are wanted."""

    segment: Segment
    start: int
    stop: int
    parts: list[tuple[Move, Place]] = field(default_factory=list)


class Reader:
    """Reads blocks.

    Args:
        store: has the objects.
        catalogue: knows where blocks are.
        payloads: takes blocks out of segments.
        connections: requests at a time.
    """

    def __init__(self, store: Objects, catalogue: Catalogue, payloads: Payloads, connections: int) -> None:
        self._store = store
        self._payloads = payloads
        self._catalogue = catalogue
        self._requests = asyncio.Semaphore(connections)

    async def read(self, moves: Sequence[Move]) -> None:
        """Read blocks, and end their moves."""
        blocks = self._catalogue.blocks
        known = [move for move in moves if blocks.get(move.request.key) is not None]
        unknown = [move for move in moves if blocks.get(move.request.key) is None]
        await all_of([self._read_known(known), self._read_unknown(unknown)])

    async def _read_unknown(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        try:
            await self._catalogue.refresh(FRESH_S)
        except StoreFailure as failure:
            for move in moves:
                move.end(unfinished(move.request, failure.cause, str(failure)))
        await self._read_known([move for move in moves if move.outcome is None])

    async def _read_known(self, moves: Sequence[Move]) -> None:
        spans = plan_spans(moves, self._catalogue.blocks)
        if spans:
            await all_of([self._read_span(span) for span in spans])

    async def _read_span(self, span: Span) -> None:
        segment = span.segment
        async with self._requests:
            try:
                data, whole = await self._store.get(segment.id.name, span.start, span.stop)
            except StoreFailure as failure:
                await self._failed(span, failure)
                return
            if whole != segment.nbytes:
                await self._damaged(span)
                return
            outcomes = await run_to_its_end(partial(self._take_all, span, data), _drop)
        for (move, _), outcome in zip(span.parts, outcomes, strict=True):
            if outcome.reason is None:
                self._catalogue.used(segment, move.request.used_s)
            move.end(outcome)
        flawed = [(place, outcome) for (_, place), outcome in zip(span.parts, outcomes, strict=True) if outcome.reason]
        self._catalogue.refuse(place for place, outcome in flawed if outcome.reason is MissReason.AUTH)
        if damaged := [place for place, outcome in flawed if outcome.reason is not MissReason.AUTH]:
            await self._catalogue.remove_damaged(damaged)

    def _take_all(self, span: Span, data: NDArray[np.uint8]) -> list[ReadOutcome]:
        taken = []
        for move, place in span.parts:
            entry = place.entry
            stored = data[entry.offset - span.start : entry.end - span.start]
            taken.append(self._payloads.take(entry, stored, move.request))
        return taken

    async def _failed(self, span: Span, failure: StoreFailure) -> None:
        if failure.is_damaged:
            await self._damaged(span)
            return
        if failure.is_absent:
            self._catalogue.forget(span.segment)
        for move, _ in span.parts:
            if failure.is_absent:
                move.end(ReadOutcome(MissReason.EVICTED, cause=Cause.ABSENT))
            else:
                move.end(unfinished(move.request, failure.cause, str(failure)))

    async def _damaged(self, span: Span) -> None:
        outcome = self._payloads.flawed("the object is not as long as it was")
        for move, _ in span.parts:
            move.end(outcome)
        if outcome.reason is MissReason.AUTH:
            self._catalogue.refuse(place for _, place in span.parts)
        else:
            await self._catalogue.remove_damaged_segment(span.segment)


def plan_spans(moves: Iterable[Move], blocks: BlockMap) -> list[Span]:
    """The requests that bring these blocks. A block that is not known, or does not fit its buffer, is ended."""
    found: list[tuple[Move, Place]] = []
    for move in moves:
        place = blocks.get(move.request.key)
        room = as_bytes(move.request.buffer).size
        if place is None:
            move.end(ReadOutcome(MissReason.NEVER_STORED, cause=Cause.ABSENT))
        elif room < (nbytes := blocks.room_for(place.entry)):
            detail = f"a payload of {nbytes} bytes does not fit a buffer of {room}"
            move.end(ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.BUFFER_TOO_SMALL, detail=detail))
        else:
            found.append((move, place))
    spans: list[Span] = []
    for move, place in sorted(found, key=lambda part: (part[1].segment.id, part[1].entry.offset)):
        entry, last = place.entry, spans[-1] if spans else None
        is_near = last is not None and last.segment is place.segment and entry.offset - last.stop <= GAP_BYTES
        if last is None or not is_near or entry.end - last.start > RANGE_BYTES:
            spans.append(last := Span(place.segment, entry.offset, entry.end))
        last.stop = max(last.stop, entry.end)
        last.parts.append((move, place))
    return spans


def _drop(_: object) -> None:
    """Nobody waits for the outcomes any more."""
