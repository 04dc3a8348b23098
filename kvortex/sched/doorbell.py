"""Wakes an event loop, or a thread that waits for a file descriptor."""

import ctypes
import os
import sys


class Doorbell:
    """A counter to which threads add: an `eventfd`, readable while the count is not zero.

    `ring` and `take` do not block, so they keep the GIL: if another thread runs Python code, getting the GIL back
    takes milliseconds.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        libc = ctypes.PyDLL(None)
        self._write, self._read = libc.write, libc.read
        self._write.argtypes = self._read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        self._taken = ctypes.c_uint64()
        self._taken_address = ctypes.addressof(self._taken)

    def ring(self, count: int = 1) -> None:
        """Add to the count; from any thread. The thread that takes the count sees all earlier writes of the caller."""
        if self._write(self.fd, count.to_bytes(8, sys.byteorder), 8) != 8:
            raise OSError(f"descriptor {self.fd} takes no count of {count}")

    def take(self) -> int:
        """The count since the last call, 0 if none; always call it on the same thread."""
        return self._taken.value if self._read(self.fd, self._taken_address, 8) == 8 else 0

    def close(self) -> None:
        """Close the descriptor; call it once, after the last `ring`."""
        os.close(self.fd)
