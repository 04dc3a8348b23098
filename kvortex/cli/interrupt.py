"""Ctrl-C ends a command where it stands: importing, compiling or in the middle of a transfer.

Nothing has to be tidied up: memory goes with the process, and what a disk tier holds is whole after a kill. To wait for
an orderly end would mean to wait for a compiler that does not listen.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


@contextlib.contextmanager
def ends_on_interrupt() -> Iterator[None]:
    """Meanwhile an interrupt ends the process with one line, by the signal itself, so that a shell's loop ends too."""
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    previous = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, (_SHOW_CURSOR + b"\r\n" if os.isatty(2) else b"") + b"kvortex: interrupted\n")
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
