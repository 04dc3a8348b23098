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


def test_more_sizes_than_it_remembers_are_still_first_fit() -> None:
    allocator = ExtentAllocator(6000 * UNIT)
    used = np.zeros(6000, dtype=bool)
    held: dict[int, int] = {}
    rng = np.random.default_rng(3)
    for _ in range(800):
        size = int(rng.integers(1, 3 * MAX_REMEMBERED_SIZES))
        taken = np.concatenate([[0], np.cumsum(used)])
        fits = np.flatnonzero(taken[size:] == taken[:-size])
        expected = int(fits[0]) if fits.size else None
        got = allocator.allocate_many(1, size * UNIT, "a").tolist()
        assert got == ([] if expected is None else [expected * UNIT])
        assert len(allocator._no_fit_below) <= MAX_REMEMBERED_SIZES
        if expected is not None:
            used[expected : expected + size] = True
            held[expected] = size
        if expected is None or rng.random() < 0.3:
            start = sorted(held)[int(rng.integers(len(held)))]
            allocator.free_many([start * UNIT])
            used[start : start + held.pop(start)] = False


def test_holes_that_are_too_small_are_looked_at_once() -> None:
    """What makes exact first fit cheap: 500 allocations above 2,000 holes do not read a million of them."""

    class Counted(dict[int, int]):
        reads = 0

        def __getitem__(self, key: int) -> int:
            Counted.reads += 1
            return super().__getitem__(key)

    allocator = ExtentAllocator(8000 * UNIT)
    small = allocator.allocate_many(4000, UNIT, "a")
    allocator.free_many(small[::2])
    allocator._hole_size = Counted(allocator._hole_size)
    for i in range(500):
        assert allocator.allocate(2 * UNIT, "b").offset == (4000 + 2 * i) * UNIT
    assert Counted.reads < 20_000


def test_a_free_below_makes_it_look_again() -> None:
    allocator = ExtentAllocator(8 * UNIT)
    allocator.allocate_many(8, UNIT, "a")
    assert allocator.allocate_many(1, 2 * UNIT, "b").size == 0
    allocator.free_many([5 * UNIT])
    assert allocator.allocate_many(1, 2 * UNIT, "b").size == 0
    allocator.free_many([6 * UNIT])
    assert allocator.allocate_many(1, 2 * UNIT, "b").tolist() == [5 * UNIT]
    allocator.free_many([2 * UNIT, 1 * UNIT])
    assert allocator.allocate_many(1, 2 * UNIT, "b").tolist() == [UNIT]


def test_a_run_over_a_border_comes_back_as_a_hole_a_piece() -> None:
    allocator = ExtentAllocator(12 * UNIT, 4 * UNIT)
    offsets = allocator.allocate_many(12, UNIT, "a")
    allocator.free_many(offsets[2:10])
    assert allocator.largest_free_bytes == 4 * UNIT
    assert allocator.allocate_many(2, 3 * UNIT, "b").tolist() == [4 * UNIT]
    assert allocator.allocate_many(5, UNIT, "c").tolist() == [2 * UNIT, 3 * UNIT, 7 * UNIT, 8 * UNIT, 9 * UNIT]


def test_a_rest_of_less_than_a_unit_is_not_handed_out() -> None:
    allocator = ExtentAllocator(2 * UNIT + 127)
    assert allocator.capacity_bytes == 2 * UNIT
    assert allocator.allocate_many(3, 1, "a").tolist() == [0, UNIT]
    assert ExtentAllocator(127).allocate_many(1, 1, "a").size == 0


def test_freeing_nothing_is_nothing() -> None:
    allocator = ExtentAllocator(4 * UNIT)
    allocator.free_many([])
    assert allocator.allocate_many(0, UNIT, "a").size == 0
    assert allocator.largest_free_bytes == 4 * UNIT


def test_figures_of_an_empty_and_of_a_full_pool() -> None:
    allocator = ExtentAllocator(8 * UNIT, 4 * UNIT, name="small")
    figures = allocator.figures(pinned_bytes=UNIT)
    assert (figures.name, figures.capacity_bytes, figures.pinned_bytes) == ("small", 8 * UNIT, UNIT)
    assert (figures.fragmentation, figures.largest_free_bytes) == (0.0, 4 * UNIT)
    allocator.allocate_many(8, UNIT, "a")
    figures = allocator.figures()
    assert (figures.fragmentation, figures.largest_free_bytes, figures.num_extents) == (0.0, 0, 8)


def test_a_pool_shrinks_once_and_does_not_grow() -> None:
    allocator = ExtentAllocator(8 * UNIT, 4 * UNIT)
    offsets = allocator.allocate_many(8, UNIT, "a")
    allocator.shrink(6 * UNIT)
    assert (allocator.capacity_bytes, allocator.allocated_bytes) == (6 * UNIT, 8 * UNIT)
    allocator.free_many(offsets)
    assert allocator.allocate_many(8, UNIT, "b").tolist() == [n * UNIT for n in range(6)]
    for wrong in (-1, 6 * UNIT + 1):
        with pytest.raises(ValueError, match="cannot shrink"):
            allocator.shrink(wrong)


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
        self.owner: dict[int, str] = {}

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

    @rule(count=st.integers(0, 5), size=st.integers(1, 4), owner=st.sampled_from("xyz"))
    def allocate(self, count: int, size: int, owner: str) -> None:
        expected: list[int] = []
        start = self._first(size * count)
        if start is None or not count:
            start = self._first(size)
        while start is not None and len(expected) < count:
            fitting = min(self._hole_units(start) // size, count - len(expected))
            for i in range(fitting):
                at = start + i * size
                self.used[at : at + size] = True
                self.held[at], self.owner[at] = size, owner
                expected.append(at * UNIT)
            start = self._first(size)
        assert self.allocator.allocate_many(count, size * UNIT, owner).tolist() == expected

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        starts = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
        self.allocator.free_many([start * UNIT for start in starts])
        for start in starts:
            self.used[start : start + self.held.pop(start)] = False

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_wrongly(self, data: st.DataObject) -> None:
        """Good extents with one bad among them: nothing is freed, and the error says what was bad."""
        good = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
        bad = data.draw(st.integers(-1, self.units).filter(lambda unit: unit not in self.held or unit in good))
        is_free = 0 <= bad < self.units and not self.used[bad]
        with pytest.raises(DoubleFreeError if is_free or bad in good else ForeignExtentError):
            self.allocator.free_many([unit * UNIT for unit in data.draw(st.permutations([*good, bad]))])

    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        """What is handed out beyond the end stays so until it is freed; `used` keeps its length."""
        units = data.draw(st.integers(0, self.units))
        odd_bytes = data.draw(st.integers(0, UNIT - 1)) if units < self.units else 0
        self.units = units
        self.allocator.shrink(units * UNIT + odd_bytes)

    @invariant()
    def figures_agree(self) -> None:
        if not hasattr(self, "used"):
            return
        assert self.allocator.allocated_bytes == int(self.used.sum()) * UNIT
        holes = [self._hole_units(start) for start in range(self.units) if not self.used[start]]
        assert self.allocator.largest_free_bytes == max(holes, default=0) * UNIT
        figures = self.allocator.figures()
        assert figures.num_extents == len(self.held)
        free = self.units - int(self.used[: self.units].sum())
        usable = min(free, self.piece)
        assert figures.fragmentation == pytest.approx(1 - max(holes, default=0) / usable if usable else 0.0)
        by_owner = {o: sum(n for at, n in self.held.items() if self.owner[at] == o) * UNIT for o in "xyz"}
        assert self.allocator.bytes_by_owner() == {o: nbytes for o, nbytes in by_owner.items() if nbytes}


TestAgainstByteMap = AgainstByteMap.TestCase
TestAgainstByteMap.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
