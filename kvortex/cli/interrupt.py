"""Ctrl-C ends a command at once: while it imports, compiles or transfers.

No cleanup is needed: memory is freed with the process, and blocks of a disk tier are intact after a kill. An orderly
end would have to wait for the compiler, which cannot be interrupted.
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
    """Let an interrupt end the process with one line, by the signal itself, so that a shell's loop ends too."""
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    previous = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # standard error is closed
        os.write(2, (_SHOW_CURSOR + b"\r\n" if os.isatty(2) else b"") + b"kvortex: interrupted\n")
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
