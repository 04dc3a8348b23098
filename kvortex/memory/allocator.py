"""First-fit allocation of extents. It works on offsets only and touches no memory."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import DoubleFreeError, ForeignExtentError, OutOfPoolMemoryError
from kvortex.stats import PoolFigures
from kvortex.types import Extent

MAX_REMEMBERED_SIZES = 64


class ExtentAllocator:
    """Allocates extents of `[0, capacity_bytes)`, lowest address first, and merges extents that are freed.

    The range is divided into pieces of `piece_bytes`. No extent crosses the border of a piece, because pieces are
    pinned one by one, and a copy must not span two registrations. Sizes are rounded up to 128 bytes, offsets are
    multiples of 128. Not thread-safe: it belongs to the control plane's thread.

    First fit is exact, and still cheap, because a cache asks for few distinct sizes: for each size the allocator
    remembers an address below which no hole is large enough. Only a free below that address lowers it.

    Args:
        capacity_bytes: size of the whole range in bytes.
        piece_bytes: size of a piece in bytes; the last one may be smaller. None for a single piece.
        name: the pool's name, for messages and figures.
    """

    def __init__(self, capacity_bytes: int, piece_bytes: int | None = None, *, name: str = "cpu") -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes - capacity_bytes % EXTENT_ALIGNMENT_BYTES
        self.piece_bytes = piece_bytes or max(self.capacity_bytes, 1)
        self.allocated_bytes = 0
        self._allocated: dict[int, tuple[int, str]] = {}  # offset -> (size, owner)
        self._bytes_of: dict[str, int] = {}  # bytes of the extents of owners that are watched
        self._hole_size: dict[int, int] = {}  # start -> size
        self._hole_starting: list[int] = []  # sorted starts
        self._hole_ending: dict[int, int] = {}  # end -> start
        self._no_fit_below: dict[int, int] = {}  # size -> no hole of that size starts below
        for start in range(0, self.capacity_bytes, self.piece_bytes):
            self._insert_hole(start, min(self.piece_bytes, self.capacity_bytes - start))

    # -- allocate ----------------------------------------------------------------------------------

    def allocate(self, nbytes: int, owner: str) -> Extent:
        """Allocate one extent.

        Args:
            nbytes: its size in bytes, which is rounded up.
            owner: name under which its bytes are accounted.

        Raises:
            OutOfPoolMemoryError: no hole is large enough; the message says whether the pool is full or fragmented.
        """
        offsets = self.allocate_many(1, nbytes, owner)
        if not offsets.size:
            raise OutOfPoolMemoryError(self._why_not(nbytes))
        return Extent(int(offsets[0]), align_up(nbytes, EXTENT_ALIGNMENT_BYTES))

    def allocate_many(self, count: int, nbytes: int, owner: str) -> NDArray[np.int64]:
        """Allocate extents of one size, in as few contiguous runs as first fit gives.

        Extents of a run follow each other without a gap, so that one copy can move them.

        Args:
            count: number of extents.
            nbytes: size of each in bytes, which is rounded up.
            owner: name under which their bytes are accounted.

        Returns:
            Their offsets in bytes, `int64 [m]`; `m < count` if the pool is full.
        """
        if nbytes < 1 or count < 0:
            raise ValueError(f"cannot allocate {count} extents of {nbytes} bytes")
        size = align_up(nbytes, EXTENT_ALIGNMENT_BYTES)
        runs: list[range] = []
        missing = count
        while missing:
            start = self._run_fit(size, size * missing) if not runs and missing > 1 else None
            if start is None:
                start = self._first_fit(size)
            if start is None:
                break
            runs.append(self._take(start, size, min(self._hole_size[start] // size, missing), owner))
            missing -= len(runs[-1])
        parts = [np.arange(run.start, run.stop, run.step, dtype=np.int64) for run in runs]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _first_fit(self, size: int) -> int | None:
        start = self._run_fit(size, size)
        if len(self._no_fit_below) >= MAX_REMEMBERED_SIZES:
            self._no_fit_below.clear()
        self._no_fit_below[size] = self.capacity_bytes if start is None else start
        return start

    def _run_fit(self, size: int, total: int) -> int | None:
        # Runs have many lengths, so no address is remembered for them. A hole that holds a run holds one extent, too.
        starts, sizes = self._hole_starting, self._hole_size
        for position in range(bisect_left(starts, self._no_fit_below.get(size, 0)), len(starts)):
            if sizes[starts[position]] >= total:
                return starts[position]
        return None

    def _take(self, start: int, size: int, count: int, owner: str) -> range:
        run = range(start, start + size * count, size)
        self._allocated.update(dict.fromkeys(run, (size, owner)))
        self.allocated_bytes += size * count
        if owner in self._bytes_of:
            self._bytes_of[owner] += size * count
        if self._hole_size[start] > size * count:
            self._shorten_hole(start, run.stop)
        else:
            self._remove_hole(start)
        return run

    def _why_not(self, nbytes: int) -> str:
        free = self.capacity_bytes - self.allocated_bytes
        largest = self.largest_free_bytes
        hint = "raise its size" if free < nbytes else f"the largest free run is {largest} bytes (fragmented)"
        return f"pool {self.name!r} has no {nbytes} bytes: {free} of {self.capacity_bytes} are free; {hint}"

    # -- free --------------------------------------------------------------------------------------

    def free(self, extent: Extent) -> None:
        """Free one extent.

        Raises:
            DoubleFreeError: its bytes are free already.
            ForeignExtentError: this allocator has not allocated an extent of this offset and size. Nothing is freed.
        """
        held = self._allocated.get(extent.offset)
        if held is not None and held[0] != extent.nbytes:
            raise ForeignExtentError(f"pool {self.name!r} handed out {held[0]} bytes at {extent.offset}, not {extent}")
        self.free_many([extent.offset])

    def free_many(self, offsets: Sequence[int] | NDArray[np.int64]) -> None:
        """Free the extents at these offsets. All are checked before the first is freed.

        Args:
            offsets: offsets in bytes, `int64 [n]` or a sequence.

        Raises:
            DoubleFreeError, ForeignExtentError: as in `free`; then none is freed.
        """
        if not len(offsets):
            return
        ordered = np.sort(np.asarray(offsets, dtype=np.int64)).tolist()
        if not self._allocated.keys() >= set(ordered) or len(set(ordered)) != len(ordered):
            self._refuse(ordered)
        if self._bytes_of:
            self._discount(ordered)
        start = end = ordered[0]
        for offset in ordered:
            size = self._allocated.pop(offset)[0]
            if offset != end:
                self._give_back(start, end)
                start = offset
            end = offset + size
        self._give_back(start, end)

    def _discount(self, offsets: list[int]) -> None:
        for offset in offsets:
            size, owner = self._allocated[offset]
            if owner in self._bytes_of:
                self._bytes_of[owner] -= size

    def _give_back(self, start: int, end: int) -> None:
        # A run of extents may span pieces; its holes may not.
        self.allocated_bytes -= end - start
        end = min(end, self.capacity_bytes)  # bytes that `shrink` has cut off are not free
        while start < end:
            border = min(end, start - start % self.piece_bytes + self.piece_bytes)
            self._merge_hole(start, border)
            start = border

    def _merge_hole(self, start: int, end: int) -> None:
        if end in self._hole_size and end % self.piece_bytes:
            end += self._remove_hole(end)
        if start in self._hole_ending and start % self.piece_bytes:
            before = self._hole_ending[start]
            self._remove_hole(before)
            start = before
        self._insert_hole(start, end - start)

    def _refuse(self, ordered: list[int]) -> NoReturn:
        for first, second in pairwise(ordered):
            if first == second:
                raise DoubleFreeError(f"pool {self.name!r}: the extent at {first} is named twice")
        offset = next(offset for offset in ordered if offset not in self._allocated)
        if 0 <= offset < self.capacity_bytes and self._is_free(offset):
            raise DoubleFreeError(f"pool {self.name!r}: the extent at {offset} is free already")
        raise ForeignExtentError(f"pool {self.name!r} never handed out an extent at {offset}")

    def _is_free(self, offset: int) -> bool:
        position = bisect_left(self._hole_starting, offset + 1) - 1
        if position < 0:
            return False
        start = self._hole_starting[position]
        return offset < start + self._hole_size[start]

    # -- size --------------------------------------------------------------------------------------

    def holds(self, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each offset, `int64 [n]`, True if an allocated extent begins there, `bool [n]`."""
        return np.array([offset in self._allocated for offset in offsets.tolist()], dtype=np.bool_)

    def shrink(self, capacity_bytes: int) -> None:
        """Reduce the range to `[0, capacity_bytes)`. Extents beyond it are freed as usual, and not allocated again.

        Raises:
            ValueError: `capacity_bytes` is negative, or larger than now.
        """
        if not 0 <= capacity_bytes <= self.capacity_bytes:
            raise ValueError(f"pool {self.name!r} of {self.capacity_bytes} bytes cannot shrink to {capacity_bytes}")
        self.capacity_bytes = capacity_bytes - capacity_bytes % EXTENT_ALIGNMENT_BYTES
        for start in [s for s in self._hole_starting if s + self._hole_size[s] > self.capacity_bytes]:
            self._remove_hole(start)
            if start < self.capacity_bytes:
                self._insert_hole(start, self.capacity_bytes - start)

    # -- holes -------------------------------------------------------------------------------------

    def _insert_hole(self, start: int, size: int) -> None:
        self._hole_size[start] = size
        self._hole_ending[start + size] = start
        insort(self._hole_starting, start)
        for wanted, below in self._no_fit_below.items():
            if wanted <= size and start < below:
                self._no_fit_below[wanted] = start

    def _shorten_hole(self, start: int, new_start: int) -> None:
        size = self._hole_size.pop(start) - (new_start - start)
        self._hole_size[new_start] = size
        self._hole_ending[new_start + size] = new_start
        self._hole_starting[bisect_left(self._hole_starting, start)] = new_start

    def _remove_hole(self, start: int) -> int:
        size = self._hole_size.pop(start)
        del self._hole_ending[start + size]
        del self._hole_starting[bisect_left(self._hole_starting, start)]
        return size

    # -- figures -----------------------------------------------------------------------------------

    @property
    def largest_free_bytes(self) -> int:
        return max(self._hole_size.values(), default=0)

    def watch(self, owner: str) -> None:
        """Keep count of the bytes of an owner's extents from now on; idempotent."""
        if owner not in self._bytes_of:
            self._bytes_of[owner] = self.bytes_by_owner().get(owner, 0)

    def bytes_of(self, owner: str) -> int:
        """Bytes of the extents of an owner that is watched."""
        return self._bytes_of[owner]

    def bytes_by_owner(self) -> dict[str, int]:
        """Owner -> bytes of its extents; empty if every extent was freed."""
        totals: Counter[str] = Counter()
        for size, owner in self._allocated.values():
            totals[owner] += size
        return dict(totals)

    def leak_report(self) -> str:
        """Bytes that are still allocated, by owner, largest first; empty if there are none."""
        held = Counter(self.bytes_by_owner())
        return ", ".join(f"{owner}: {nbytes} bytes" for owner, nbytes in held.most_common())

    def figures(self, *, pinned_bytes: int = 0) -> PoolFigures:
        """Occupancy and fragmentation now; `pinned_bytes` is passed on."""
        largest = self.largest_free_bytes
        free = sum(self._hole_size.values())
        return PoolFigures(
            name=self.name,
            capacity_bytes=self.capacity_bytes,
            allocated_bytes=self.allocated_bytes,
            largest_free_bytes=largest,
            fragmentation=1 - largest / min(free, self.piece_bytes) if free else 0.0,
            num_extents=len(self._allocated),
            pinned_bytes=pinned_bytes,
        )
