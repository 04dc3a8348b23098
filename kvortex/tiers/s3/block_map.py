"""Which block is in which segment, as far as this process knows."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvortex.tiers.s3.segment import MAX_BLOCKS, Footer, SegmentId, StoredEntry

POSITION_BITS: Final = MAX_BLOCKS.bit_length()
POSITION_MASK: Final = (1 << POSITION_BITS) - 1


@dataclass(slots=True, eq=False)
class Segment:
    """A segment that is in the store.

    Attributes:
        id: its number.
        nbytes: bytes of its object.
        serial: its number in this process.
        entries: its blocks.
        refers_to: the segments of whose blocks it says that they are gone.
        gone: positions of its own blocks that are gone.
    """

    id: SegmentId
    nbytes: int
    serial: int
    entries: Sequence[StoredEntry]
    refers_to: frozenset[SegmentId] = frozenset()
    gone: set[int] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """True if it has no block that is not gone."""
        return len(self.gone) == len(self.entries)


class Place(NamedTuple):
    """Where a block is."""

    segment: Segment
    position: int

    @property
    def entry(self) -> StoredEntry:
        """What the segment's footer says of it."""
        return self.segment.entries[self.position]


class BlockMap:
    """Key -> places. One thread changes it; `payload_bytes` may be called from any.

    Two processes that write a block at the same time store it twice: then it has two places. A removal may be known
    before the segment that it is about, or without it.

    A place is kept as one number, so that a million of them is no work for the garbage collector.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        self._further: dict[bytes, list[int]] = {}  # of blocks that are stored more than once
        self._segments: dict[SegmentId, Segment] = {}
        self._by_serial: dict[int, Segment] = {}
        self._serials = itertools.count()
        self._gone: dict[SegmentId, set[int]] = {}  # blocks that are gone, of segments which are not known

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, segment: SegmentId) -> bool:
        return segment in self._segments

    def segment(self, number: SegmentId) -> Segment | None:
        """A known segment."""
        return self._segments.get(number)

    def segments(self) -> list[Segment]:
        """All known segments."""
        return list(self._segments.values())

    def get(self, key: bytes) -> Place | None:
        """Where a block is."""
        return None if (code := self._places.get(key)) is None else self._place(code)

    def payload_bytes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each block's payload; 0 where none is known."""
        if self._places.keys().isdisjoint(keys):
            return [0] * len(keys)
        return [self._payload_bytes(key) for key in keys]

    def _payload_bytes(self, key: bytes) -> int:
        code = self._places.get(key)
        segment = None if code is None else self._by_serial.get(code >> POSITION_BITS)
        if code is None or segment is None:  # another thread may just have dropped it
            return 0
        return segment.entries[code & POSITION_MASK].payload_bytes

    def places(self, keys: Iterable[bytes]) -> list[list[Place]]:
        """All places of each block."""
        found = ([self._places[key], *self._further.get(key, ())] if key in self._places else [] for key in keys)
        return [[self._place(code) for code in codes] for codes in found]

    def live(self, segment: Segment) -> list[StoredEntry]:
        """The blocks of a segment that are not gone."""
        return [entry for position, entry in enumerate(segment.entries) if position not in segment.gone]

    # -- changes -----------------------------------------------------------------------------------

    def add(self, number: SegmentId, nbytes: int, footer: Footer) -> Segment:
        """A segment is in the store. What is known already stays: a listing may see what was just written."""
        if (known := self._segments.get(number)) is not None:
            return known
        refers_to = frozenset(removal.segment for removal in footer.removals)
        serial = next(self._serials)
        segment = Segment(number, nbytes, serial, footer.blocks, refers_to, self._gone.pop(number, set()))
        self._segments[number] = self._by_serial[serial] = segment
        for position, entry in enumerate(footer.blocks):
            if position not in segment.gone:
                self._put(entry.key, _code(segment, position))
        for removal in footer.removals:
            self.bury(removal.segment, removal.position)
        return segment

    def drop(self, number: SegmentId) -> None:
        """A segment is not in the store any more, or is not to be known."""
        if (segment := self._segments.pop(number, None)) is None:
            return
        if segment.gone:
            self._gone[number] = segment.gone  # it may come back
        for position, entry in enumerate(segment.entries):
            if position not in segment.gone:
                self._take(entry.key, _code(segment, position))
        del self._by_serial[segment.serial]

    def bury(self, number: SegmentId, position: int) -> None:
        """A block of a segment is gone."""
        if (segment := self._segments.get(number)) is None:
            self._gone.setdefault(number, set()).add(position)
        elif position < len(segment.entries) and position not in segment.gone:
            segment.gone.add(position)
            self._take(segment.entries[position].key, _code(segment, position))

    def forget_gone(self, there: Collection[SegmentId], before_ms: int) -> None:
        """Forget what is gone of segments that are not in the store, and were written before this time."""
        self._gone = {
            number: gone for number, gone in self._gone.items() if number in there or number.written_ms >= before_ms
        }

    # -- inside ------------------------------------------------------------------------------------

    def _place(self, code: int) -> Place:
        return Place(self._by_serial[code >> POSITION_BITS], code & POSITION_MASK)

    def _put(self, key: bytes, code: int) -> None:
        if self._places.setdefault(key, code) != code:
            self._further.setdefault(key, []).append(code)

    def _take(self, key: bytes, code: int) -> None:
        further = self._further.pop(key, [])
        remaining = [each for each in (self._places[key], *further) if each != code]
        if not remaining:
            del self._places[key]
            return
        self._places[key] = remaining[0]
        if remaining[1:]:
            self._further[key] = remaining[1:]


def _code(segment: Segment, position: int) -> int:
    return segment.serial << POSITION_BITS | position
