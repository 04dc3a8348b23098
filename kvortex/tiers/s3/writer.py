"""Writes: blocks that come within a short time go into one segment, in the order in which they come."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.runtime.blocking import run_to_its_end
from kvortex.tiers.base import Cause, WriteOutcome, WriteRequest
from kvortex.tiers.s3.calls import Move, unfinished
from kvortex.tiers.s3.catalogue import Catalogue
from kvortex.tiers.s3.failures import StoreFailure
from kvortex.tiers.s3.objects import Objects
from kvortex.tiers.s3.payloads import Payloads
from kvortex.tiers.s3.segment import (
    MAX_BLOCKS,
    Footer,
    SegmentId,
    StoredEntry,
    aligned,
    segment_bytes,
)
from kvortex.tiers.s3.settings import S3Settings
from kvortex.tiers.store_index import Admission, StoreIndex
from kvortex.types import SaveOutcome

logger = logging.getLogger(__name__)

UPLOAD_BYTES: Final = 128 << 20
"""Bytes of segments that are being uploaded; each is a copy of its payloads. One is uploaded even if it has more."""
KNOWN_FOR_S: Final = 1.0
"""Seconds after a look-up of the store in which a write does not ask again whether others have stored its blocks."""
SHARE_OF_CAPACITY: Final = 4
"""A segment takes at most this part of the capacity, because segments are evicted whole."""


class Writer:
    """Writes blocks.

    Args:
        settings: of the bucket.
        store: takes the objects.
        catalogue: knows what is stored already.
        payloads: puts blocks into segments.
        index: reserves room.
    """

    def __init__(
        self, settings: S3Settings, store: Objects, catalogue: Catalogue, payloads: Payloads, index: StoreIndex
    ) -> None:
        self._store = store
        self._payloads = payloads
        self._catalogue = catalogue
        self._index = index
        self._linger_s = settings.linger_s
        self._most_bytes = min(settings.segment_bytes, index.capacity_bytes // SHARE_OF_CAPACITY)
        at_a_time = max(1, min(settings.connections, UPLOAD_BYTES // settings.segment_bytes))
        self._places = asyncio.Semaphore(at_a_time)
        self._moving: set[bytes] = set()
        self._waiting: list[Move] = []  # they go into the next segment
        self._waiting_bytes = 0
        self._num_sealed = 0
        self._timer: asyncio.TimerHandle | None = None
        self._uploads: set[asyncio.Task[None]] = set()

    async def write(self, moves: Sequence[Move]) -> None:
        """Write blocks, and wait until all of these moves have ended."""
        blocks = self._catalogue.blocks
        if any(blocks.get(move.request.key) is None for move in moves):
            try:
                await self._catalogue.refresh(KNOWN_FOR_S)
            except StoreFailure as failure:
                _fail(moves, failure)
                return
        num_sealed = self._num_sealed
        for move in moves:
            self._admit(move)
        if self._waiting and self._num_sealed != num_sealed:
            self._seal()  # where so much comes at a time there is nothing to wait for
        pending = [move.ended for move in moves if move.outcome is None]
        if pending:
            await asyncio.wait(pending)

    async def aclose(self, grace_s: float) -> None:
        """Wait for the uploads in progress, `grace_s` seconds at most, and end the others."""
        if self._timer is not None:
            self._timer.cancel()
        if self._uploads:
            _, late = await asyncio.wait(self._uploads, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    # -- gathering ---------------------------------------------------------------------------------

    def _admit(self, move: Move) -> None:
        request = move.request
        if (place := self._catalogue.blocks.get(request.key)) is not None:
            self._catalogue.used(place.segment, request.used_s)
            move.end(WriteOutcome(SaveOutcome.ALREADY_STORED))
        elif request.key in self._moving:
            move.end(WriteOutcome(SaveOutcome.PENDING))
        else:
            self._moving.add(request.key)
            move.on_end.append(self._ended)
            self._gather(move)

    def _ended(self, move: Move) -> None:
        self._moving.discard(move.request.key)

    def _gather(self, move: Move) -> None:
        nbytes = aligned(self._payloads.stored_bytes(move.request))
        if self._waiting and self._waiting_bytes + nbytes > self._most_bytes:
            self._seal()
        self._waiting.append(move)
        self._waiting_bytes += nbytes
        if self._waiting_bytes >= self._most_bytes or len(self._waiting) == MAX_BLOCKS:
            self._seal()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._linger_s, self._seal)

    def _seal(self) -> None:
        """No further block goes into the segment: upload it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._num_sealed += 1
        moves, self._waiting, self._waiting_bytes = self._waiting, [], 0
        task = asyncio.create_task(self._upload(moves), name="kvortex-s3-upload")
        self._uploads.add(task)
        task.add_done_callback(self._uploads.discard)

    # -- uploading ---------------------------------------------------------------------------------

    async def _upload(self, moves: Sequence[Move]) -> None:
        begun: list[Move] = []
        try:
            async with self._places:
                begun += [move for move in moves if move.outcome is None]
                for move in begun:
                    move.is_begun = True
                if begun:
                    await self._store_segment(begun)
        except StoreFailure as failure:
            _fail(begun, failure)
        except asyncio.CancelledError:  # the tier is being closed
            for move in moves:
                move.end(unfinished(move.request, Cause.CLOSED))
        except Exception as error:  # a thread that cannot be started, for example
            logger.error("the s3 tier cannot make a segment", exc_info=error)
            for move in begun:
                move.end(unfinished(move.request, Cause.IO_ERROR, str(error)))

    async def _store_segment(self, moves: Sequence[Move]) -> None:
        requests = [move.request for move in moves]
        nbytes = segment_bytes([self._payloads.stored_bytes(request) for request in requests])
        data, entries = await run_to_its_end(partial(_assemble, self._payloads, requests, nbytes), _drop)
        footer = Footer(entries, ())
        number, encoded = self._catalogue.new_footer(footer)
        data[nbytes - len(encoded) :] = np.frombuffer(encoded, dtype=np.uint8)
        if not await self._make_room(number, nbytes, _last_use(requests)):
            for move in moves:
                move.end(unfinished(move.request, Cause.NO_SPACE))
            return
        try:
            await self._store.put(number.name, data)
        except BaseException:
            self._index.abort(number.key)
            raise
        self._catalogue.stored(number, nbytes, footer)
        for move in moves:
            move.end(WriteOutcome(SaveOutcome.STORED))

    async def _make_room(self, number: SegmentId, nbytes: int, used_s: float | None) -> bool:
        admission, victims = self._index.reserve(number.key, nbytes, used_s)
        if admission is not Admission.RESERVED:
            return False
        try:
            if victims:
                await self._catalogue.evict(victims)
        except BaseException:
            self._index.abort(number.key)
            raise
        return True


def _assemble(
    payloads: Payloads, requests: Sequence[WriteRequest], nbytes: int
) -> tuple[NDArray[np.uint8], list[StoredEntry]]:
    """A segment, `uint8 [nbytes]`, with its payloads in their places and without a footer, and what is in it."""
    data = np.empty(nbytes, dtype=np.uint8)
    entries: list[StoredEntry] = []
    offset = 0
    for request in requests:
        entry = payloads.put(request, data, offset)
        entries.append(entry)
        offset += aligned(entry.stored_bytes)
    return data, entries


def _last_use(requests: Iterable[WriteRequest]) -> float | None:
    """The time at which the segment of these blocks counts as used; None for now."""
    times = [request.used_s for request in requests if request.used_s is not None]
    return max(times) if times else None


def _fail(moves: Iterable[Move], failure: StoreFailure) -> None:
    for move in moves:
        move.end(unfinished(move.request, failure.cause, str(failure)))


def _drop(_: object) -> None:
    """Nobody waits for the segment any more."""
