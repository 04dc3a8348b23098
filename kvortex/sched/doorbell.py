"""Wakes an event loop, or any thread that waits for a file descriptor."""

import ctypes
import os
import sys


class Doorbell:
    """A counter that threads add to, in an `eventfd`: its descriptor is readable while the counter is not zero.

    `ring` and `take` keep the GIL. They do not block, and getting the GIL back from a busy Python thread takes
    milliseconds.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        libc = ctypes.PyDLL(None)
        self._write, self._read = libc.write, libc.read
        self._write.argtypes = self._read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        self._taken = ctypes.c_uint64()
        self._taken_address = ctypes.addressof(self._taken)

    def ring(self, count: int = 1) -> None:
        """Add to the count; from any thread. The thread that takes the count sees all that this thread wrote before."""
        if self._write(self.fd, count.to_bytes(8, sys.byteorder), 8) != 8:
            raise OSError(f"descriptor {self.fd} takes no count of {count}")

    def take(self) -> int:
        """The count since the last call, 0 if nobody rang; always on the same thread."""
        return self._taken.value if self._read(self.fd, self._taken_address, 8) == 8 else 0

    def close(self) -> None:
        """Close the descriptor; once, when no thread rings any more."""
        os.close(self.fd)
