"""What every simulation of one seed has: its loop and trace, its end at the first thing that is wrong, its report."""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from kvortex.testing.simulation import NothingLeftToDoError, VirtualClockLoop

MAX_PASSES = 100_000  # of the loop, in one seed: more is a loop without an end
SHOWN_EVENTS = 40
ABANDONS = 10  # times that what is left after a violation is cancelled


class ViolationError(AssertionError):
    """Something has happened that never must; the message names the seed and how to see it again."""


class SeededWorld:
    """Everything of one seed; `run` it once.

    `tally` counts what has happened: a simulation in which something never happens proves nothing of it.

    Args:
        seed: what all dice follow from.
        loop: what it runs on.
        scenario: what the seed has made of the settings; shown when something is wrong.
    """

    runner: ClassVar[str]
    """The module that repeats a seed."""

    def __init__(self, seed: int, loop: VirtualClockLoop, scenario: object) -> None:
        self.seed = seed
        self.tally: Counter[str] = Counter()
        self.trace: list[tuple[float, str]] = []
        self._started_with = scenario
        self._loop = loop
        self._complaints: list[str] = []
        self._passes = 0
        loop._after_pass = self._after_pass

    def run(self) -> None:
        """Raises `ViolationError` for the first thing that is wrong."""
        self._loop.set_exception_handler(lambda loop, context: self.complain(f"unexpected: {_described(context)}"))
        with _errors_logged_to(self._logged), self._surroundings():
            try:
                self._loop.run_until_complete(self._main())
                self._after_pass()
            except NothingLeftToDoError as error:
                self.complain(str(error))
            except ViolationError:
                pass
            finally:
                self._abandon()
        if self._complaints:
            raise ViolationError(self._report())

    def complain(self, what: str) -> None:
        """Something is wrong."""
        self._complaints.append(what)
        self.note(f"VIOLATION {what}")

    def note(self, event: str) -> None:
        """Something has happened."""
        self.trace.append((self._loop.time(), event))

    # -- of each simulation ------------------------------------------------------------------------

    async def _main(self) -> None:
        raise NotImplementedError

    def _check(self) -> None:
        """Complain of what is wrong now; after each pass of the loop."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Let go of memory, at the end."""
        raise NotImplementedError

    def _may_log(self, text: str) -> bool:
        """Whether an error with this text is one that the faults explain."""
        raise NotImplementedError

    def _surroundings(self) -> contextlib.AbstractContextManager[None]:
        """What the simulation runs in."""
        return contextlib.nullcontext()

    # -- its own -----------------------------------------------------------------------------------

    def _after_pass(self) -> None:
        self._passes += 1
        if self._passes > MAX_PASSES:
            self.complain("it does not come to an end")
        self._check()
        if self._complaints:
            raise ViolationError

    def _abandon(self) -> None:
        """After a violation: what is left is of no interest, but must not be heard of again."""
        self._loop.set_exception_handler(lambda loop, context: None)
        self._loop._after_pass = None
        for _ in range(ABANDONS):
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            with contextlib.suppress(NothingLeftToDoError, asyncio.CancelledError):
                if tasks:
                    self._loop.run_until_complete(asyncio.wait(tasks))
        self._let_go()
        self._loop.close()

    def _complain_of_tasks(self) -> None:
        """Complain if there are others than the one that asks."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            self.complain(f"{len(left)} tasks are left: {sorted(task.get_name() for task in left)}")

    def _logged(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not self._may_log(text):
            self.complain(f"logged: {text} {record.exc_info[1] if record.exc_info else ''}")

    def _report(self) -> str:
        lines = [f"seed {self.seed}: {self._complaints[0]}", f"  {self._started_with}"]
        lines += [f"  {time_s:10.4f} {event}" for time_s, event in self.trace[-SHOWN_EVENTS:]]
        lines.append(f"replay: python -m {self.runner} --seed {self.seed} --trace")
        return "\n".join(lines)


def order_of(seed: int, *, shuffled: bool) -> random.Random | None:
    """What a loop's callbacks are shuffled with."""
    return random.Random(f"{seed}/order") if shuffled else None


def _described(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return (
        f"{context.get('message')}: {type(error).__name__}: {error}" if error is not None else str(context["message"])
    )


@contextlib.contextmanager
def _errors_logged_to(receive: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Meanwhile the library's errors go there, and its warnings, of which faults make many, nowhere."""
    logger = logging.getLogger("kvortex")
    handler = logging.Handler(logging.ERROR)
    handler.emit = receive  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        logger.setLevel(before[0])
