"""The Redis protocol (RESP 2) over a socket: small replies as values, payloads straight from and into memory.

A plain socket blocks, and the kernel bounds its waits, so that one call takes or gives a whole payload and the GIL is
free for all of it. TLS has records of 16 KiB and takes a call for each.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

CRLF: Final = b"\r\n"
READ_BYTES: Final = 1 << 16
LONGEST_LINE: Final = 1 << 16
"""Bytes of a line of a reply. A longer one is no reply."""

Bytes: TypeAlias = bytes | bytearray | memoryview


class ReplyError(Exception):
    """The server has refused a command. Its text begins with a code, such as OOM."""

    @property
    def code(self) -> str:
        """The first word: `OOM`, `NOPERM`, ..."""
        return str(self).partition(" ")[0]


def command(*words: bytes) -> bytes:
    """A command with its arguments, as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def commands(name: bytes, keys: Sequence[bytes], *further: bytes) -> bytes:
    """The same command for each of many keys, all of one length; nothing for no keys."""
    if not keys:
        return b""
    head = b"*%d\r\n$%d\r\n%b\r\n$%d\r\n" % (2 + len(further), len(name), name, len(keys[0]))
    tail = CRLF + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in further)
    return head + (tail + head).join(keys) + tail


class Wire:
    """One connection that is set up and authenticated. One thread uses it; any may call `abort`.

    Every failure is an `OSError`, after which nothing can be done with it but `close`.

    Args:
        sock: the socket, which may be one of TLS.
        timeout_s: seconds that one exchange may take. A peer that drips can take some two times as long.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._due_s = 0.0
        self._ahead = b""  # received, and not taken yet
        self.is_spoiled = False
        """True if a part of a reply was left: the connection is of no use."""
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        if self._is_tls:
            sock.settimeout(timeout_s)
        else:
            sock.setblocking(True)
            limit = struct.pack("ll", int(timeout_s), max(1, int(timeout_s % 1 * 1e6)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()

    def abort(self) -> None:
        """Have the thread that waits for the peer fail at once."""
        # The method of TLS sockets also ends the decryption: the thread would take what is encrypted for a payload.
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def is_fresh(self) -> bool:
        """True unless the peer has closed the idle connection, or has said what nobody asked for."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0) and not self._ahead

    # -- sending -----------------------------------------------------------------------------------

    def send(self, *parts: Bytes) -> None:
        """Begin an exchange: send all parts."""
        self._due_s = time.monotonic() + self._timeout_s
        views = [memoryview(part) for part in parts]
        while views:
            try:
                sent = self._sock.send(views[0]) if self._is_tls else self._sock.sendmsg(views)
            except BlockingIOError:
                raise self._late() from None
            views = self._left(views, sent)

    # -- receiving ---------------------------------------------------------------------------------

    def fill(self, *parts: memoryview) -> None:
        """Receive as many bytes as the parts have."""
        views = [part for part in parts if part.nbytes]
        if self._ahead:
            views = self._fill_from_ahead(views)
        while views:
            try:
                if self._is_tls:
                    got = self._sock.recv_into(views[0])
                else:
                    got = self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                raise self._late() from None
            if not got:
                raise ConnectionResetError("the server has closed the connection")
            views = self._left(views, got)

    def _fill_from_ahead(self, views: list[memoryview]) -> list[memoryview]:
        while views and self._ahead:
            size = min(len(self._ahead), views[0].nbytes)
            views[0][:size] = self._ahead[:size]
            self._ahead = self._ahead[size:]
            views = _rest(views, size)
        return views

    def take(self, nbytes: int) -> bytes:
        """Receive a few bytes."""
        data = bytearray(nbytes)
        self.fill(memoryview(data))
        return bytes(data)

    def line(self, read_bytes: int = READ_BYTES) -> bytes:
        """Receive a line; returns it without its end.

        Args:
            read_bytes: bytes to receive at a time, so that what follows the line is left to `fill`.
        """
        while (end := self._ahead.find(CRLF)) < 0:
            if len(self._ahead) > LONGEST_LINE:
                raise ConnectionError(f"no reply of Redis: {self._ahead[:40]!r}...")
            self._receive(read_bytes)
        line, self._ahead = self._ahead[:end], self._ahead[end + 2 :]
        return line

    def lines(self, count: int) -> list[bytes]:
        """Receive the lines of many small replies."""
        while self._ahead.count(CRLF) < count:
            self._receive(READ_BYTES)
        *lines, self._ahead = self._ahead.split(CRLF, count)
        return lines

    def bulk_bytes(self, expected_bytes: int) -> int | ReplyError | None:
        """Receive the begin of a value: its length, None if there is none, or why not. `fill` has the value itself.

        Args:
            expected_bytes: bytes of the begin and of the part of the value that may be taken with it.
        """
        line = self.line(expected_bytes)
        if line[:1] == b"-":
            return ReplyError(_text(line))
        if line[:1] != b"$":
            raise ConnectionError(f"no value of Redis: {line[:40]!r}")
        nbytes = _integer(line)
        return None if nbytes < 0 else nbytes

    def reply(self) -> Any:
        """Receive a small reply: text, a number, bytes, None, a list, or a `ReplyError`, which is not raised."""
        line = self.line()
        kind = line[:1]
        if kind == b"-":
            return ReplyError(_text(line))
        if kind == b"+":
            return _text(line)
        count = _integer(line)
        if kind == b":":
            return count
        if kind == b"$":
            return None if count < 0 else self.take(count + len(CRLF))[:count]
        if kind == b"*":
            return [self.reply() for _ in range(count)]
        raise ConnectionError(f"no reply of Redis: {line[:40]!r}")

    # -- inside ------------------------------------------------------------------------------------

    def _receive(self, nbytes: int) -> None:
        self._check_time()
        try:
            data = self._sock.recv(nbytes)
        except BlockingIOError:
            raise self._late() from None
        if not data:
            raise ConnectionResetError("the server has closed the connection")
        self._ahead += data

    def _left(self, views: list[memoryview], moved: int) -> list[memoryview]:
        views = _rest(views, moved)
        if views:
            self._check_time()
        return views

    def _check_time(self) -> None:
        if time.monotonic() > self._due_s:
            raise self._late()

    def _late(self) -> TimeoutError:
        return TimeoutError(f"no answer within {self._timeout_s:g} s")


def integer_of(line: bytes) -> int | ReplyError:
    """The number that a line of `Wire.lines` says, or why there is none."""
    if line[:1] == b":":
        return _integer(line)
    if line[:1] == b"-":
        return ReplyError(_text(line))
    raise ConnectionError(f"no number of Redis: {line[:40]!r}")


def _rest(views: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of the memory after the first `moved` bytes."""
    for number, view in enumerate(views):
        if moved < view.nbytes:
            return [view[moved:], *views[number + 1 :]]
        moved -= view.nbytes
    return []


def _integer(line: bytes) -> int:
    try:
        return int(line[1:])
    except ValueError:
        raise ConnectionError(f"no reply of Redis: {line[:40]!r}") from None


def _text(line: bytes) -> str:
    return line[1:].decode("utf-8", "replace")
