"""What is in the bucket: learnt by listing names and reading the footers of new objects."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from typing import Any, Final, NamedTuple

from kvortex.tiers.base import Cause, ScanProgress
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.s3.block_map import BlockMap, Place, Segment
from kvortex.tiers.s3.failures import StoreFailure
from kvortex.tiers.s3.objects import Listed, Objects
from kvortex.tiers.s3.segment import MAX_FOOTER_BYTES, Footer, Removal, SegmentId, decode_footer, encode_footer
from kvortex.tiers.s3.settings import S3Settings
from kvortex.tiers.store_index import IndexedBlock, StoreIndex, Victims

FOOTERS_AT_A_TIME: Final = 64
KNOWN_BLOCKS: Final = 1 << 19
"""Blocks that are remembered, some 300 bytes each; then the segments are forgotten that nobody has used for longest."""
SKEW_S: Final = 20.0
"""Seconds by which the clocks of hosts may differ, beside the time that an upload may take."""

_ROOM_LEFT = 15 / 16  # share of `KNOWN_BLOCKS` that stays when some are forgotten


class Seen(NamedTuple):
    """An object of a listing that is named as ours are."""

    number: SegmentId
    nbytes: int

    @property
    def is_bare(self) -> bool:
        """True for an object that only says which blocks of others are gone. The index does not have it."""
        return self.nbytes == self.number.footer_bytes


class Catalogue:
    """Knows the segments of one namespace, and which blocks they have. Its methods run on one loop.

    Args:
        settings: of the bucket.
        namespace: digest of the namespace, 32 bytes.
        store: has the objects of this namespace.
        overhead: bytes that a block takes in a segment beside its payload.
        index: keeps capacity and order of use; its files are the segments that have blocks.
        counters: count what was damaged.

    Attributes:
        blocks: where each known block is.
        progress: of the first listing.
        evicted_blocks: blocks of the segments that were evicted.
    """

    def __init__(
        self,
        settings: S3Settings,
        namespace: bytes,
        store: Objects,
        overhead: int,
        index: StoreIndex,
        counters: TierCounters,
    ) -> None:
        self.blocks = BlockMap(overhead)
        self.progress = ScanProgress(0, 1, 0, complete=False)
        self.evicted_blocks = 0
        self._namespace = namespace
        self._store = store
        self._index = index
        self._counters = counters
        self._ttl_s = settings.ttl_s
        self._margin_ms = round(1000 * (SKEW_S + settings.timeout_s))
        self._ignored: set[SegmentId] = set()
        self._listed_ms = self._newest_ms = self._last_ms = 0
        self._known_s = float("-inf")  # what was stored before this time of the loop is known
        self._listing: tuple[float, asyncio.Task[StoreFailure | None]] | None = None  # the time of its begin
        self._rescanning = asyncio.Lock()

    # -- listing -----------------------------------------------------------------------------------

    async def refresh(self, max_age_s: float) -> None:
        """Know what others had stored `max_age_s` seconds before this call. Calls share one listing.

        Raises:
            StoreFailure: the store cannot be asked.
        """
        loop = asyncio.get_running_loop()
        due_s = loop.time() - max_age_s
        while self._known_s < due_s:
            if self._listing is None:
                self._listing = loop.time(), asyncio.create_task(self._list_new(), name="kvortex-s3-list")
            began_s, listing = self._listing
            await asyncio.wait([listing])
            if listing.cancelled():
                raise StoreFailure("Closed", "the tier was closed")
            failure = listing.result()
            if failure is not None and began_s >= due_s:
                raise StoreFailure(failure.kind, str(failure), failure.status)  # others get the same from this listing

    @property
    def listing_for_s(self) -> float:
        """Seconds since the listing in progress has begun."""
        return 0.0 if self._listing is None else asyncio.get_running_loop().time() - self._listing[0]

    async def _list_new(self) -> StoreFailure | None:
        began_s, began_ms = asyncio.get_running_loop().time(), _now_ms()
        after_ms = min(self._listed_ms, self._newest_ms) - self._margin_ms
        try:
            if after_ms > 0:
                with self._index.watching() as removed:
                    await self._learn(await self._list(removed, f"{after_ms:012x}"))
                self._listed_ms = began_ms
                self._forget_coldest()
            else:
                await self.rescan()
            self._known_s = began_s
        except StoreFailure as failure:
            return failure
        finally:
            self._listing = None
        return None

    async def rescan(self) -> None:
        """List all objects: learn of new ones, forget those that are gone, and delete what is of no use any more.

        Raises:
            StoreFailure: the store cannot be asked.
        """
        async with self._rescanning:
            began_ms = _now_ms()
            self._index.begin_scan()
            with self._index.watching() as removed:
                seen = await self._list(removed)
                await self._learn(seen, has_room_for=KNOWN_BLOCKS)
            self._index.end_scan()
            await asyncio.sleep(0)  # others have their turn between the parts, each of which takes a while
            there = {one.number for one in seen}
            for segment in self.blocks.segments():
                is_there = segment.id in there if _is_bare(segment) else self._index.get(segment.id.key) is not None
                if not is_there:
                    self.blocks.drop(segment.id)
            self.blocks.forget_gone(there, before_ms=began_ms - self._margin_ms)
            self._forget_coldest()
            await asyncio.sleep(0)
            self._ignored &= there
            self._listed_ms = max(self._listed_ms, began_ms)
            self.progress = ScanProgress(len(seen), len(seen), len(self.blocks), complete=True)
            await self._delete_useless(there)

    async def close(self) -> None:
        """End the listing that is in progress."""
        if self._listing is not None:
            listing = self._listing[1]
            listing.cancel()
            await asyncio.wait([listing])

    async def check(self) -> None:
        """Ask the store for the first names, and no more.

        Raises:
            StoreFailure: it cannot be asked.
        """
        await anext(self._store.pages(), None)

    async def scan(self) -> AsyncIterator[list[Segment]]:
        """All segments that have blocks, from the store itself.

        Raises:
            StoreFailure: the store cannot be asked.
        """
        with self._index.watching() as removed:
            async for page in self._store.pages():
                seen = self._see(page, removed)
                await self._learn(seen)
                found = (self.blocks.segment(one.number) for one in seen if not one.is_bare)
                yield [segment for segment in found if segment is not None]
        self._forget_coldest()

    async def _list(self, removed: set[bytes], after: str = "") -> list[Seen]:
        """The objects whose names come after this one; the index knows those that have blocks then.

        Args:
            removed: what this process deletes meanwhile, from `StoreIndex.watching`.
            after: a name.
        """
        return [one async for page in self._store.pages(after) for one in self._see(page, removed)]

    def _see(self, page: Sequence[Listed], removed: set[bytes]) -> list[Seen]:
        numbered = [Seen(number, one.nbytes) for one in page if (number := _number_of(one)) is not None]
        self._index.merge(
            [
                (one.number.key, IndexedBlock("", one.nbytes, one.number.written_ms / 1000))
                for one in numbered
                if not one.is_bare
            ],
            removed,
        )
        return numbered

    async def _learn(self, seen: Sequence[Seen], has_room_for: int | None = None) -> None:
        """Read the footers of objects that are not known yet, the newest first.

        Args:
            seen: the objects.
            has_room_for: do not learn of older segments than are known, once so many blocks are.
        """
        newest_ms = self._newest_ms
        self._newest_ms = max([newest_ms, *(one.number.written_ms for one in seen)])
        new = [one for one in seen if one.number not in self.blocks and one.number not in self._ignored]
        left, done = iter(sorted(new, reverse=True)), 0

        async def read_some() -> None:
            nonlocal done
            for one in left:
                is_new = has_room_for is None or 0 < newest_ms < one.number.written_ms
                if is_new or len(self.blocks) < _ROOM_LEFT * (has_room_for or 0):
                    await self._read_footer(one.number, one.nbytes)
                done += 1
                if not self.progress.complete:
                    self.progress = ScanProgress(done, len(new), len(self.blocks), complete=False)

        if new:
            await all_of([read_some() for _ in range(min(FOOTERS_AT_A_TIME, len(new)))])

    async def _read_footer(self, number: SegmentId, nbytes: int) -> None:
        try:
            data, whole = await self._store.get(number.name, nbytes - number.footer_bytes, nbytes)
        except StoreFailure as failure:
            if failure.is_absent:
                self._index.discard(number.key, self._index.get(number.key))
                return
            if not failure.is_damaged:
                raise
            footer: Footer | Cause = Cause.CORRUPT
        else:
            footer = decode_footer(data.data, self._namespace, number, nbytes)
            if whole != nbytes:
                footer = Cause.CORRUPT
        if isinstance(footer, Footer):
            if nbytes == number.footer_bytes or self._index.get(number.key) is not None:  # else it is being deleted
                self.blocks.add(number, nbytes, footer)
            return
        self._counters.record_cause(footer)
        self._ignored.add(number)
        if footer is Cause.UNKNOWN_VERSION:
            self._index.ignore(number.key)
        else:
            await self._delete_damaged(number)

    async def _delete_useless(self, there: Collection[SegmentId]) -> None:
        """Delete segments that have no block left and say nothing of others, and those whose time is over."""
        oldest_ms = 0 if self._ttl_s is None else _now_ms() - 1000 * self._ttl_s
        useless = {number for number in there if number.written_ms < oldest_ms and number not in self._ignored}
        for segment in self.blocks.segments():
            if segment.is_empty and segment.refers_to.isdisjoint(there) and segment.id in there:
                useless.add(segment.id)
        try:
            await self.delete_segments(useless)
        except StoreFailure:
            return  # it was counted and logged; the next listing tries again

    # -- writing and removing: each raises StoreFailure ---------------------------------------------

    def new_footer(self, footer: Footer) -> tuple[SegmentId, bytes]:
        """The footer of a new segment in bytes, and its number."""
        self._last_ms = max(_now_ms(), self._last_ms + 1)
        return encode_footer(self._namespace, footer, self._last_ms)

    def stored(self, number: SegmentId, nbytes: int, footer: Footer) -> None:
        """A segment for which the index has reserved room is in the store."""
        self._index.commit(number.key, "")
        self.blocks.add(number, nbytes, footer)
        self._forget_coldest()

    def _forget_coldest(self) -> None:
        if len(self.blocks) <= KNOWN_BLOCKS:
            return
        uses = {key: block.last_use_s for key, block in self._index.blocks()}
        for segment in sorted(self.blocks.segments(), key=lambda one: uses.get(one.id.key, 0.0)):
            if len(self.blocks) <= _ROOM_LEFT * KNOWN_BLOCKS:
                return
            if not _is_bare(segment):
                self.blocks.drop(segment.id)

    async def evict(self, victims: Victims) -> None:
        """Delete the segments that the index has chosen to make room."""
        numbers = [SegmentId.of_key(key) for key, _ in victims]
        known = [segment for number in numbers if (segment := self.blocks.segment(number)) is not None]
        self.evicted_blocks += sum(len(segment.entries) - len(segment.gone) for segment in known)
        await self._delete_owned(numbers)

    async def delete_segments(self, numbers: Iterable[SegmentId]) -> None:
        """Delete segments; those that are being deleted anyway are left out."""
        await self._delete_owned([number for number in numbers if self._index.claim(number.key)])

    async def _delete_owned(self, numbers: Sequence[SegmentId]) -> None:
        try:
            await self._store.delete([number.name for number in numbers])
        finally:
            for number in numbers:  # if it has failed, they cannot be relied on
                self.blocks.drop(number)
                self._index.removed(number.key)

    async def _delete_damaged(self, number: SegmentId) -> None:
        try:
            await self.delete_segments([number])
        except StoreFailure:
            self._ignored.add(number)  # it cannot be deleted, and is never used
        else:
            self._counters.record_removed_corrupt()

    async def remove_damaged(self, places: Sequence[Place]) -> None:
        """Remove blocks whose payloads are damaged."""
        places = [place for place in dict.fromkeys(places) if place.position not in place.segment.gone]
        try:
            await self.remove(places)
        except StoreFailure:
            for place in places:
                self.blocks.bury(place.segment.id, place.position)  # this process does not use them any more
        else:
            for _ in places:
                self._counters.record_removed_corrupt()

    def refuse(self, places: Iterable[Place]) -> None:
        """Use blocks no more that cannot be opened, and leave them to those who have their key."""
        for place in places:
            self.blocks.bury(place.segment.id, place.position)

    async def remove_damaged_segment(self, segment: Segment) -> None:
        """Remove a segment that is not as long as it was."""
        if segment.id in self.blocks:
            await self._delete_damaged(segment.id)

    def segment_of(self, key: bytes) -> Segment | None:
        """The segment that has this key in the index."""
        return self.blocks.segment(SegmentId.of_key(key))

    def used(self, segment: Segment, used_s: float | None) -> None:
        """A block of a segment was used at this time, in seconds since the epoch; None for now."""
        self._index.touch([segment.id.key], [time.time() if used_s is None else used_s], float("inf"))

    def forget(self, segment: Segment) -> None:
        """A segment was not there."""
        self._index.discard(segment.id.key, self._index.get(segment.id.key))
        self.blocks.drop(segment.id)

    async def remove(self, places: Sequence[Place]) -> None:
        """Remove blocks: the segment if all of its blocks go, and otherwise by a new object that says so."""
        going: dict[SegmentId, set[int]] = {}
        for place in places:
            going.setdefault(place.segment.id, set(place.segment.gone)).add(place.position)
        whole = {place.segment.id for place in places if len(going[place.segment.id]) == len(place.segment.entries)}
        removals = [Removal(each.segment.id, each.position) for each in places if each.segment.id not in whole]
        if removals:
            footer = Footer((), removals)
            number, data = self.new_footer(footer)
            await self._store.put(number.name, data)
            self.blocks.add(number, len(data), footer)
        await self.delete_segments(whole)


def _is_bare(segment: Segment) -> bool:
    return Seen(segment.id, segment.nbytes).is_bare


def _number_of(listed: Listed) -> SegmentId | None:
    """The number of an object; None if it is none of ours."""
    number = SegmentId.of_name(listed.name)
    if number is None or number.footer_bytes > min(listed.nbytes, MAX_FOOTER_BYTES):
        return None
    return number


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def all_of(parts: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines together. If one fails, or this call is cancelled, the others are cancelled."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
