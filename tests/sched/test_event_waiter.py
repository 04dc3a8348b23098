"""The thread that sleeps on events: in order, together when they have fired together, errors with their event."""

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from kvortex.sched import waiter
from kvortex.sched.doorbell import Doorbell
from kvortex.sched.executor import call_all
from kvortex.sched.waiter import EventWaiter
from tests.sched.fake_driver import FakeDriver

CAPACITY = 8
UNIT = 1 << 32


class Bench:
    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.doorbell = Doorbell()
        self.waiter = EventWaiter(self.driver, "test-events", self.doorbell, count_per_event=UNIT, capacity=CAPACITY)
        self.events = [self.driver.create_event() for _ in range(CAPACITY)]
        self.reports: list[tuple[int, str]] = []

    def watch(self, *numbers: int) -> None:
        for number in numbers:
            self.waiter.watch(self.events[number], lambda error, n=number: self.reports.append((n, str(error or ""))))

    def fire(self, *numbers: int, status: int = 0) -> None:
        self.driver.fire(*(self.events[number] for number in numbers), status=status)

    def turn(self, timeout_s: float = 10) -> list[tuple[int, str]]:
        """What one wake-up of a loop reports."""
        assert rings(self.doorbell, timeout_s)
        self.reports.clear()
        count, rest = divmod(self.doorbell.take(), UNIT)
        assert rest == 0
        call_all(self.waiter.fired(count))
        return list(self.reports)

    def close(self) -> None:
        self.driver.fire_all()
        self.waiter.close()
        self.doorbell.close()


def rings(doorbell: Doorbell, timeout_s: float = 10) -> bool:
    return bool(select.select([doorbell.fd], [], [], timeout_s)[0])


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.closing(Bench()) as bench:
        yield bench


def test_events_come_in_order_and_together_when_they_have_fired(bench: Bench) -> None:
    bench.fire(2, 1)
    bench.watch(0, 1, 2, 3)
    assert not rings(bench.doorbell, 0.02)
    bench.fire(0)
    assert bench.turn() == [(0, ""), (1, ""), (2, "")]
    assert not rings(bench.doorbell, 0.02)
    bench.fire(3)
    assert bench.turn() == [(3, "")]
    assert [bench.driver.times_slept_on(event) for event in bench.events[:4]] == [1, 0, 0, 1]


@pytest.mark.parametrize("slept_on", [True, False])
def test_an_error_is_reported_with_its_event_alone(bench: Bench, slept_on: bool) -> None:
    if slept_on:
        bench.watch(0, 1, 2)
    bench.fire(1)
    bench.fire(2, status=719)
    if not slept_on:
        bench.watch(0, 1, 2)
    bench.fire(0, status=700)
    seen: list[tuple[int, str]] = []
    while len(seen) < 3:
        seen += bench.turn()
    assert seen == [(0, "call 3: 700"), (1, ""), (2, "call 3: 719")]


def test_many_thousand_events_go_round_the_ring(bench: Bench) -> None:
    watched = fired = seen = 0
    while seen < 20_000:
        while watched - seen < CAPACITY:
            bench.watch(watched % CAPACITY)
            watched += 1
        while fired < watched:
            bench.fire(fired % CAPACITY)
            fired += 1
        reports = bench.turn()
        assert reports == [((seen + i) % CAPACITY, "") for i in range(len(reports))]
        seen += len(reports)


def test_no_more_is_watched_than_the_ring_holds(bench: Bench) -> None:
    bench.watch(*range(CAPACITY))
    with pytest.raises(AssertionError):
        bench.watch(0)
    bench.fire(*range(CAPACITY))
    seen = bench.turn()
    while len(seen) < CAPACITY:
        seen += bench.turn()
    assert seen == [(number, "") for number in range(CAPACITY)]


def test_it_reports_while_another_thread_keeps_the_gil(bench: Bench) -> None:
    bench.watch(0, 1)
    while not bench.driver.times_slept_on(bench.events[0]):
        time.sleep(0.001)
    holding = ctypes.PyDLL(None)  # calls that keep the GIL
    for number in (0, 1):
        assert holding.sem_post(ctypes.c_void_p(bench.events[number])) == 0
    holding.usleep(50_000)
    descriptor = (ctypes.c_int * 2)(bench.doorbell.fd, select.POLLIN)
    assert holding.poll(descriptor, 1, 0) == 1
    seen = bench.turn()
    while len(seen) < 2:
        seen += bench.turn()
    assert seen == [(0, ""), (1, "")]


def test_closing_reports_what_was_watched_before(bench: Bench) -> None:
    closing = Bench()
    closing.watch(*range(CAPACITY))
    closer = threading.Thread(target=closing.waiter.close)
    closer.start()
    closer.join(0.02)
    assert closer.is_alive()
    closing.fire(*range(CAPACITY))
    closer.join(10)
    assert not closer.is_alive()
    seen = closing.turn()
    assert seen == [(number, "") for number in range(CAPACITY)]
    closing.doorbell.close()


def test_nothing_is_left_of_it() -> None:
    for status in (0, 700):
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        closing = Bench()
        closing.watch(0, 1)
        closing.fire(0, 1, status=status)
        closing.close()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert threading.active_count() == threads


def test_a_report_that_raises_keeps_no_other_from_its_owner(bench: Bench) -> None:
    def broken(error: Exception | None) -> None:
        raise ZeroDivisionError

    bench.fire(0, 1, 2)
    bench.waiter.watch(bench.events[0], broken)
    bench.watch(1, 2)
    seen: list[tuple[int, str]] = []
    raised = 0
    while len(seen) < 2:
        bench.reports.clear()
        try:
            bench.turn()
        except ZeroDivisionError:
            raised += 1
        seen += bench.reports
    assert raised == 1
    assert seen == [(1, ""), (2, "")]


def test_signals_that_interrupt_it_do_no_harm(bench: Bench) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        bench.watch(0)
        bench.fire(0)
        assert bench.turn() == [(0, "")]
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "test-events")
        assert thread.ident is not None
        for number in (1, 2):
            for _ in range(20):
                signal.pthread_kill(thread.ident, signal.SIGUSR1)
                time.sleep(0.001)
            bench.watch(number)
        bench.fire(1, 2)
        seen = bench.turn()
        while len(seen) < 2:
            seen += bench.turn()
        assert seen == [(1, ""), (2, "")]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of threads
def test_a_forked_child_that_closes_it_leaves_the_parents_alone(bench: Bench) -> None:
    bench.watch(0)
    child = os.fork()
    if not child:
        try:
            bench.waiter.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    bench.watch(1)
    bench.fire(0, 1)
    seen = bench.turn()
    while len(seen) < 2:
        seen += bench.turn()
    assert seen == [(0, ""), (1, "")]


def test_a_doorbell_counts() -> None:
    doorbell = Doorbell()
    assert doorbell.take() == 0
    assert not rings(doorbell, 0)
    doorbell.ring()
    doorbell.ring(UNIT)
    assert rings(doorbell, 0)
    assert doorbell.take() == UNIT + 1
    assert not rings(doorbell, 0)
    doorbell.close()
    with pytest.raises(OSError, match="takes no count"):
        doorbell.ring()


def test_what_keeps_it_from_working_is_raised_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise OSError("no space for what is compiled")

    monkeypatch.setattr(waiter, "report_events", refuse)
    threads, doorbell = threading.active_count(), Doorbell()
    with pytest.raises(OSError, match="no space"):
        EventWaiter(FakeDriver(), "test-events", doorbell, count_per_event=1, capacity=1)
    assert threading.active_count() == threads
    doorbell.close()
