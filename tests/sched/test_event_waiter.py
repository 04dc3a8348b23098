"""The thread that sleeps on events: everything that has fired comes with one wake-up, in order, errors with it."""

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from kvortex.errors import DeviceError
from kvortex.sched.cuda import EventWaiter


class FakeDevice:
    """Events are numbers that fire when told to; those in `broken` fail."""

    def __init__(self) -> None:
        self.fired = {number: threading.Event() for number in range(10)}
        self.broken: set[int] = set()
        self.slept_on: list[int] = []

    def make_current(self) -> None:
        pass

    def synchronize_event(self, event: int) -> None:
        self.slept_on.append(event)
        assert self.fired[event].wait(10)
        self._check(event)

    def has_fired(self, event: int) -> bool:
        fired = self.fired[event].is_set()
        if fired:
            self._check(event)
        return fired

    def _check(self, event: int) -> None:
        if event in self.broken:
            raise DeviceError(f"event {event}")


class Bench:
    def __init__(self) -> None:
        self.device = FakeDevice()
        self.posts: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.reports: list[tuple[int, str]] = []
        self.waiter = EventWaiter(self.device, "test-events", self.posts.put)

    def watch(self, *events: int) -> None:
        for event in events:
            self.waiter.watch(event, lambda error, event=event: self.reports.append((event, str(error or ""))))

    def fire(self, *events: int) -> None:
        for event in events:
            self.device.fired[event].set()

    def turn(self) -> list[tuple[int, str]]:
        """What one post reports."""
        self.reports.clear()
        self.posts.get(timeout=10)()
        return list(self.reports)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.fire(*range(10))
    bench.waiter.close()


def test_events_come_in_order_and_together_when_they_have_fired(bench: Bench) -> None:
    bench.watch(0, 1, 2, 3)
    bench.fire(2, 1, 0)
    assert bench.turn() == [(0, ""), (1, ""), (2, "")]
    bench.fire(3)
    assert bench.turn() == [(3, "")]
    assert bench.device.slept_on == [0, 3]


def test_an_error_is_reported_with_its_event_alone(bench: Bench) -> None:
    bench.device.broken = {0, 2}
    bench.fire(0, 1, 2)
    bench.watch(0, 1, 2)
    seen: list[tuple[int, str]] = []
    while len(seen) < 3:
        seen += bench.turn()
    assert seen == [(0, "event 0"), (1, ""), (2, "event 2")]


def test_closing_reports_what_was_watched_before(bench: Bench) -> None:
    bench.watch(0, 1)
    closer = threading.Thread(target=bench.waiter.close)
    closer.start()
    bench.fire(0, 1)
    seen = bench.turn()
    while len(seen) < 2:
        seen += bench.turn()
    closer.join(10)
    assert not closer.is_alive()
    assert seen == [(0, ""), (1, "")]


def test_a_report_that_raises_keeps_no_other_from_its_owner(bench: Bench) -> None:
    def broken(error: DeviceError | None) -> None:
        raise ZeroDivisionError

    bench.fire(0, 1, 2)
    bench.waiter.watch(0, broken)
    bench.watch(1, 2)
    seen, raised = [], 0
    while len(seen) < 2:
        bench.reports.clear()
        try:
            bench.posts.get(timeout=10)()
        except ZeroDivisionError:
            raised += 1
        seen += bench.reports
    assert raised == 1
    assert seen == [(1, ""), (2, "")]
