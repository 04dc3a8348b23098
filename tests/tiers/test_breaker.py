"""When a tier is left alone, and when it is tried again."""

import subprocess
import sys

import pytest

from kvortex.tiers import Cause, ReadOutcome, WriteOutcome
from kvortex.tiers.breaker import (
    FAILURES_TO_OPEN,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    BreakerState,
    CircuitBreaker,
)
from kvortex.types import MissReason, SaveOutcome

LATE = ReadOutcome(MissReason.DEADLINE, cause=Cause.DEADLINE, settled=False)
BROKEN = ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.IO_ERROR)
HIT = ReadOutcome(None)
ABSENT = ReadOutcome(MissReason.NEVER_STORED, cause=Cause.ABSENT)
CLOSED = ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.CLOSED)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("reads of the disk tier", clock)


def opened(breaker: CircuitBreaker) -> CircuitBreaker:
    breaker.judge([HIT, LATE])
    assert breaker.figures().state is BreakerState.OPEN
    return breaker


def test_a_call_that_hangs_opens_it_at_once(breaker: CircuitBreaker) -> None:
    assert breaker.admit(16) == 16
    breaker.judge([HIT, LATE, HIT])
    assert breaker.refuses
    assert breaker.admit(16) == 0
    assert breaker.figures().opened == 1


def test_calls_that_hang_together_open_it_once(breaker: CircuitBreaker) -> None:
    for _ in range(4):
        breaker.judge([LATE])
    assert breaker.figures().opened == 1


def test_calls_that_fail_open_it_only_in_a_row(breaker: CircuitBreaker) -> None:
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.judge([BROKEN, BROKEN])
    breaker.judge([BROKEN, HIT])
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.judge([BROKEN])
    assert breaker.admit(3) == 3
    breaker.judge([BROKEN])
    assert breaker.refuses


@pytest.mark.parametrize(
    "outcome",
    [
        ABSENT,
        ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT),
        ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.PERMISSION),
        WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE),
        WriteOutcome(SaveOutcome.FAILED, cause=Cause.READ_ONLY),
        CLOSED,
    ],
)
def test_an_answer_is_no_failure_whatever_it_is(breaker: CircuitBreaker, outcome: ReadOutcome | WriteOutcome) -> None:
    for _ in range(10):
        breaker.judge([outcome])
    assert breaker.figures().state is BreakerState.CLOSED


def test_after_a_pause_one_block_is_tried_and_closes_it(breaker: CircuitBreaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += FIRST_PAUSE_S
    assert not breaker.refuses
    assert breaker.admit(16) == 1
    assert breaker.figures().state is BreakerState.HALF_OPEN
    assert breaker.admit(16) == 0  # until it is known what came of it
    breaker.judge([ABSENT])
    assert breaker.admit(16) == 16


def test_each_try_that_fails_doubles_the_pause_up_to_a_bound(breaker: CircuitBreaker, clock: Clock) -> None:
    opened(breaker)
    pause_s = FIRST_PAUSE_S
    for _ in range(10):
        clock.now_s += pause_s - 0.01
        assert breaker.refuses
        clock.now_s += 0.01
        assert breaker.admit(2) == 1
        breaker.judge([BROKEN])
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    assert pause_s == LONGEST_PAUSE_S
    clock.now_s += pause_s
    breaker.admit(1)
    breaker.judge([HIT])
    opened(breaker)
    clock.now_s += FIRST_PAUSE_S
    assert not breaker.refuses, "what is well again starts with a short pause"


@pytest.mark.parametrize("gives_up", [CircuitBreaker.give_up, lambda breaker: breaker.judge([CLOSED])])
def test_a_try_that_says_nothing_leaves_room_for_another(
    breaker: CircuitBreaker, clock: Clock, gives_up: object
) -> None:
    opened(breaker)
    clock.now_s += FIRST_PAUSE_S
    assert breaker.admit(1) == 1
    gives_up(breaker)  # type: ignore[operator]
    assert breaker.admit(5) == 1


def test_what_began_before_it_was_opened_does_not_close_it(breaker: CircuitBreaker) -> None:
    opened(breaker)
    breaker.judge([HIT] * 16)
    assert breaker.refuses


def test_the_log_says_once_that_a_tier_is_left_alone_and_once_that_it_is_back(
    breaker: CircuitBreaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="kvortex")
    opened(breaker)
    for _ in range(4):
        clock.now_s += LONGEST_PAUSE_S
        breaker.admit(1)
        breaker.judge([BROKEN])
    clock.now_s += LONGEST_PAUSE_S
    breaker.admit(1)
    breaker.judge([HIT])
    breaker.judge([HIT])
    assert [record.getMessage() for record in caplog.records] == [
        "reads of the disk tier hang or fail: none is tried for 1 s, then one from time to time",
        "reads of the disk tier work again",
    ]


ENDS = """
import atexit
from kvortex.tiers.breaker import CircuitBreaker

breaker = CircuitBreaker("writes to the disk tier", float)
{when}
"""


@pytest.mark.parametrize(("when", "says"), [("breaker.hung()", True), ("atexit.register(breaker.hung)", False)])
def test_an_interpreter_that_ends_is_no_sick_tier(when: str, says: bool) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS.format(when=when)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "hang or fail" in done.stderr) == (0, says)
