"""First-fit extents: cases, and a comparison with a map of bytes."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvortex.errors import DoubleFreeError, ForeignExtentError, OutOfPoolMemoryError
from kvortex.memory import ExtentAllocator
from kvortex.memory.allocator import MAX_REMEMBERED_SIZES
from kvortex.types import Extent

UNIT = 128
pytestmark = pytest.mark.leaves_extents


def test_sizes_are_rounded_and_addresses_aligned() -> None:
    allocator = ExtentAllocator(10 * UNIT)
    assert allocator.allocate(1, "a") == Extent(0, UNIT)
    assert allocator.allocate(UNIT + 1, "a") == Extent(UNIT, 2 * UNIT)
    assert allocator.allocated_bytes == 3 * UNIT


def test_a_batch_is_one_run_where_there_is_room() -> None:
    allocator = ExtentAllocator(10 * UNIT)
    first = allocator.allocate(UNIT, "a")
    allocator.allocate(UNIT, "a")
    allocator.free(first)
    assert allocator.allocate_many(3, UNIT, "b").tolist() == [2 * UNIT, 3 * UNIT, 4 * UNIT]
    assert allocator.allocate_many(9, UNIT, "c").tolist() == [0, *range(5 * UNIT, 10 * UNIT, UNIT)]
    assert allocator.allocate_many(1, UNIT, "d").size == 0


def test_no_extent_crosses_a_piece() -> None:
    allocator = ExtentAllocator(8 * UNIT, 4 * UNIT)
    assert allocator.allocate_many(4, 3 * UNIT, "a").tolist() == [0, 4 * UNIT]
    allocator.free_many([0, 4 * UNIT])
    assert allocator.largest_free_bytes == 4 * UNIT
    offsets = allocator.allocate_many(8, UNIT, "a")
    allocator.free_many(offsets)
    assert allocator.largest_free_bytes == 4 * UNIT
    assert allocator.allocated_bytes == 0


def test_full_and_fragmented_are_told_apart() -> None:
    allocator = ExtentAllocator(4 * UNIT)
    offsets = allocator.allocate_many(4, UNIT, "a")
    with pytest.raises(OutOfPoolMemoryError, match="raise its size"):
        allocator.allocate(UNIT, "a")
    allocator.free_many(offsets[::2])
    with pytest.raises(OutOfPoolMemoryError, match="fragmented"):
        allocator.allocate(2 * UNIT, "a")
    assert allocator.figures().fragmentation == 0.5


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        ([0, 0], DoubleFreeError),
        ([0, 2 * UNIT], DoubleFreeError),
        ([0, 64], ForeignExtentError),
        ([0, 99 * UNIT], ForeignExtentError),
        ([0, -UNIT], ForeignExtentError),
    ],
)
def test_a_bad_free_frees_nothing(offsets: list[int], error: type[Exception]) -> None:
    allocator = ExtentAllocator(4 * UNIT)
    allocator.allocate_many(2, UNIT, "a")
    with pytest.raises(error):
        allocator.free_many(offsets)
    assert allocator.allocated_bytes == 2 * UNIT
    allocator.free_many([0, UNIT])
    assert allocator.largest_free_bytes == 4 * UNIT


def test_an_extent_of_another_size_is_foreign() -> None:
    allocator = ExtentAllocator(4 * UNIT)
    extent = allocator.allocate(UNIT, "a")
    with pytest.raises(ForeignExtentError):
        allocator.free(Extent(extent.offset, 2 * UNIT))
    allocator.free(extent)
    with pytest.raises(DoubleFreeError):
        allocator.free(extent)


def test_owners_are_accounted() -> None:
    allocator = ExtentAllocator(10 * UNIT)
    allocator.allocate_many(3, UNIT, "save")
    extent = allocator.allocate(UNIT, "load")
    assert allocator.bytes_by_owner() == {"save": 3 * UNIT, "load": UNIT}
    assert allocator.leak_report() == f"save: {3 * UNIT} bytes, load: {UNIT} bytes"
    allocator.free(extent)
    allocator.free_many([0, UNIT, 2 * UNIT])
    assert allocator.leak_report() == ""


def test_many_sizes_do_not_confuse_it() -> None:
    allocator = ExtentAllocator(1 << 20)
    for size in range(1, 3 * MAX_REMEMBERED_SIZES):
        allocator.allocate(size * UNIT, "a") if size * UNIT < 4096 else None
        allocator.allocate_many(1, size * UNIT, "b")
    assert allocator.allocate_many(1, UNIT, "c").size == 1


@pytest.mark.parametrize(("count", "nbytes"), [(1, 0), (-1, 128)])
def test_nonsense_is_refused(count: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="cannot allocate"):
        ExtentAllocator(4 * UNIT).allocate_many(count, nbytes, "a")


class AgainstByteMap(RuleBasedStateMachine):
    """The model: one flag a unit, and a scan from the start for every request."""

    @initialize(units=st.integers(1, 24), piece=st.integers(2, 24))
    def begin(self, units: int, piece: int) -> None:
        self.units, self.piece = units, piece
        self.allocator = ExtentAllocator(units * UNIT, piece * UNIT)
        self.used = np.zeros(units, dtype=bool)
        self.held: dict[int, int] = {}

    def _fits(self, start: int, size: int) -> bool:
        end = start + size
        same_piece = start // self.piece == (end - 1) // self.piece
        return end <= self.units and same_piece and not self.used[start:end].any()

    def _first(self, size: int) -> int | None:
        return next((start for start in range(self.units) if self._fits(start, size)), None)

    def _hole_units(self, start: int) -> int:
        end = start
        while end < self.units and not self.used[end] and end // self.piece == start // self.piece:
            end += 1
        return end - start

    @rule(count=st.integers(1, 5), size=st.integers(1, 4))
    def allocate(self, count: int, size: int) -> None:
        expected: list[int] = []
        start = self._first(size * count)
        if start is None:
            start = self._first(size)
        while start is not None and len(expected) < count:
            fitting = min(self._hole_units(start) // size, count - len(expected))
            for i in range(fitting):
                at = start + i * size
                self.used[at : at + size] = True
                self.held[at] = size
                expected.append(at * UNIT)
            start = self._first(size)
        assert self.allocator.allocate_many(count, size * UNIT, "x").tolist() == expected

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        starts = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
        self.allocator.free_many([start * UNIT for start in starts])
        for start in starts:
            self.used[start : start + self.held.pop(start)] = False

    @invariant()
    def figures_agree(self) -> None:
        if not hasattr(self, "used"):
            return
        assert self.allocator.allocated_bytes == int(self.used.sum()) * UNIT
        holes = [self._hole_units(start) for start in range(self.units) if not self.used[start]]
        assert self.allocator.largest_free_bytes == max(holes, default=0) * UNIT
        assert self.allocator.figures().num_extents == len(self.held)


TestAgainstByteMap = AgainstByteMap.TestCase
TestAgainstByteMap.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
