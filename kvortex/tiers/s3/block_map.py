"""Which block is in which segment, as far as this process knows."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvortex.tiers.s3.segment import Footer, SegmentId, StoredEntry


@dataclass(slots=True, eq=False)
class Segment:
    """A segment that is in the store.

    Attributes:
        id: its number.
        nbytes: bytes of its object.
        entries: its blocks.
        refers_to: the segments of whose blocks it says that they are gone.
        gone: positions of its own blocks that are gone.
    """

    id: SegmentId
    nbytes: int
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
    """

    def __init__(self) -> None:
        self._places: dict[bytes, Place] = {}
        self._further: dict[bytes, list[Place]] = {}  # of blocks that are stored more than once
        self._segments: dict[SegmentId, Segment] = {}
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
        return self._places.get(key)

    def payload_bytes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each block's payload; 0 where none is known."""
        if self._places.keys().isdisjoint(keys):
            return [0] * len(keys)
        get = self._places.get
        return [place.entry.payload_bytes if (place := get(key)) is not None else 0 for key in keys]

    def places(self, keys: Iterable[bytes]) -> list[list[Place]]:
        """All places of each block."""
        return [[self._places[key], *self._further.get(key, ())] if key in self._places else [] for key in keys]

    def live(self, segment: Segment) -> list[StoredEntry]:
        """The blocks of a segment that are not gone."""
        return [entry for position, entry in enumerate(segment.entries) if position not in segment.gone]

    # -- changes -----------------------------------------------------------------------------------

    def add(self, number: SegmentId, nbytes: int, footer: Footer) -> Segment:
        """A segment is in the store."""
        refers_to = frozenset(removal.segment for removal in footer.removals)
        segment = Segment(number, nbytes, footer.blocks, refers_to, self._gone.pop(number, set()))
        self._segments[number] = segment
        for position, entry in enumerate(footer.blocks):
            if position not in segment.gone:
                self._put(entry.key, Place(segment, position))
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
                self._take(entry.key, Place(segment, position))

    def bury(self, number: SegmentId, position: int) -> None:
        """A block of a segment is gone."""
        if (segment := self._segments.get(number)) is None:
            self._gone.setdefault(number, set()).add(position)
        elif position < len(segment.entries) and position not in segment.gone:
            segment.gone.add(position)
            self._take(segment.entries[position].key, Place(segment, position))

    def forget_gone(self, there: Collection[SegmentId], before_ms: int) -> None:
        """Forget what is gone of segments that are not in the store, and were written before this time."""
        self._gone = {
            number: gone for number, gone in self._gone.items() if number in there or number.written_ms >= before_ms
        }

    # -- inside ------------------------------------------------------------------------------------

    def _put(self, key: bytes, place: Place) -> None:
        if self._places.setdefault(key, place) is not place:
            self._further.setdefault(key, []).append(place)

    def _take(self, key: bytes, place: Place) -> None:
        further = self._further.pop(key, [])
        remaining = [each for each in (self._places[key], *further) if each != place]
        if not remaining:
            del self._places[key]
            return
        self._places[key] = remaining[0]
        if remaining[1:]:
            self._further[key] = remaining[1:]
