"""What wakes an event loop, or any thread that can wait for a file descriptor."""

import ctypes
import os
import sys


class Doorbell:
    """A count that threads add to, behind a descriptor that is readable while it is not zero: an `eventfd`.

    Neither call gives the GIL up: it does not block, and beside a busy thread of Python code the GIL takes
    milliseconds to come back.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        libc = ctypes.PyDLL(None)
        self._write, self._read = libc.write, libc.read
        self._write.argtypes = self._read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        self._taken = ctypes.c_uint64()
        self._taken_address = ctypes.addressof(self._taken)

    def ring(self, count: int = 1) -> None:
        """Add to the count; from any thread. What the caller wrote before is seen by whoever takes it."""
        if self._write(self.fd, count.to_bytes(8, sys.byteorder), 8) != 8:
            raise OSError(f"descriptor {self.fd} takes no count of {count}")

    def take(self) -> int:
        """The count since the last call, 0 if nobody rang; on one thread."""
        return self._taken.value if self._read(self.fd, self._taken_address, 8) == 8 else 0

    def close(self) -> None:
        """Give the descriptor back; once, when nobody rings any more."""
        os.close(self.fd)
