"""A connection to the owner of a shared pool. Calls block, and never longer than a deadline."""

import contextlib
import itertools
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvortex.errors import ConfigError, OwnerError
from kvortex.memory import SharedMemory
from kvortex.owner.protocol import HEADER, VERSION, Arrays, Field, Kind, numbers, pack, text_of, unpack, unpack_header

logger = logging.getLogger(__name__)

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 30.0
START_DEADLINE_S: Final = 10.0
"""Of calls while an engine starts, if its own deadline is shorter: then it waits, and does without the pool later."""


class OwnerLost(OwnerError):
    """The owner does not answer now. The engine computes what it cannot look up."""


@dataclass(slots=True, eq=False)
class Question:
    """What the owner was asked ahead."""

    tag: int
    on_answer: Callable[[Arrays], None] | None = None
    """Called when the answer comes, before that of any later question is read, whoever reads it."""
    found: tuple[Kind, Arrays] | None = None

    def take(self, kind: Kind, values: Arrays) -> None:
        """The answer has come."""
        self.found = kind, values
        if self.on_answer is not None and kind is not Kind.REFUSED:
            self.on_answer(values)


class OwnerClient:
    """Asks the owner, from any thread, one question at a time.

    If the owner does not answer in time, or ends, the connection is given up: every call raises `OwnerLost` at once,
    until a thread in the background has connected again. An owner that was started anew has other memory: then the
    client stays without one, `is_replaced` is true, and whoever wants that memory makes another client. An owner that
    refuses is asked again, and said once.

    Args:
        path: the owner's socket.
        deadline_s: seconds that a call may take; the first connection has `START_DEADLINE_S` at least.

    Raises:
        OwnerError: the owner refuses this process, or does not answer.
        ConfigError: nobody listens there, or its memory cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], deadline_s: float) -> None:
        self.path = Path(path)
        self._deadline_s = deadline_s
        self._lock = threading.RLock()
        self._tags = itertools.count(1)
        self._asked: deque[Question] = deque()  # that are not answered yet
        self._number = secrets.randbits(62)
        self._socket: socket.socket | None = None
        self.generation = 0
        """Number of this connection. What an earlier one held is lost."""
        self._is_wanted = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._replaced = threading.Event()
        self._refusal = ""  # the last one that was said
        self.on_connected: Callable[[], None] | None = None
        """Called after a connection was made anew, before anything else is asked; may ask itself."""
        try:
            self._socket, self.memory, self.piece_bytes, self.owner_pid = self._connect(self.start_deadline_s)
        except OSError as error:
            raise ConfigError(
                f"no owner of a pool answers at {self.path} ({error}): start one with `kvortex serve`"
            ) from error

    @property
    def start_deadline_s(self) -> float:
        """Seconds that a call may take while an engine starts."""
        return max(self._deadline_s, START_DEADLINE_S)

    @property
    def is_connected(self) -> bool:
        return self._socket is not None

    @property
    def is_replaced(self) -> bool:
        """True once another owner, with other memory, listens at this socket."""
        return self._replaced.is_set()

    @property
    def label(self) -> str:
        """Random name of the owner's memory."""
        return self.memory.ticket.label

    @property
    def pool_bytes(self) -> int:
        """Size of the pool, in bytes."""
        return self.memory.ticket.nbytes

    def exclusive(self) -> contextlib.AbstractContextManager[object]:
        """Let no other thread ask or reconnect meanwhile."""
        return self._lock

    # -- calls -------------------------------------------------------------------------------------

    def ask(self, kind: Kind, *fields: Field, deadline_s: float | None = None) -> Arrays:
        """Ask, and wait for the answer, no longer than that, or the usual deadline; returns its fields.

        Raises:
            OwnerLost: there is no answer.
            OwnerError: the owner refuses; the message says why.
        """
        due_s = time.monotonic() + (self._deadline_s if deadline_s is None else deadline_s)
        with self._lock:
            return self._wait_for(self._ask(kind, fields, due_s), due_s)

    def ask_ahead(self, kind: Kind, *fields: Field, on_answer: Callable[[Arrays], None] | None = None) -> Question:
        """Ask, and go on; `answer` gives what `ask` gives. Questions are answered in the order in which they come.

        Args:
            kind: what is asked.
            fields: its fields.
            on_answer: see `Question`.

        Raises:
            OwnerLost: the owner is not there.
        """
        return self._ask(kind, fields, time.monotonic() + self._deadline_s, on_answer)

    def answer(self, question: Question) -> Arrays:
        """Wait for the answer to a question that was asked ahead, as `ask` does."""
        with self._lock:
            return self._wait_for(question, time.monotonic() + self._deadline_s)

    def _ask(
        self,
        kind: Kind,
        fields: tuple[Field, ...],
        due_s: float,
        on_answer: Callable[[Arrays], None] | None = None,
    ) -> Question:
        with self._lock:
            question = Question(next(self._tags), on_answer)
            parts = pack(kind, question.tag, *fields)
            try:
                self._send(parts, due_s)
            except (OSError, OwnerError) as error:
                raise self._lose(error) from error
            self._asked.append(question)
            return question

    def _wait_for(self, question: Question, due_s: float) -> Arrays:
        while question.found is None and question in self._asked:
            asked = self._asked[0]
            try:
                found = self._receive(asked.tag, due_s)
            except (OSError, OwnerError) as error:
                raise self._lose(error) from error
            self._asked.popleft()
            asked.take(*found)
        if question.found is None:
            raise OwnerLost(f"the connection to the owner at {self.path} was lost before it answered")
        kind, values = question.found
        if kind is Kind.REFUSED:
            raise OwnerError(text_of(values[0]))
        return values

    def tell(self, kind: Kind, *fields: Field) -> bool:
        """Say something that has no answer; False if the owner is lost."""
        with self._lock:
            if self._socket is None:
                return False
            parts = pack(kind, 0, *fields)
            try:
                self._send(parts, time.monotonic() + self._deadline_s)
            except (OSError, OwnerError) as error:
                self._lose(error)
                return False
        return True

    def probe(self) -> None:
        """Notice that the owner has ended, without a question; for a client that asks seldom."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._socket is not None and _is_readable(self._socket) and not self._socket.recv(1, socket.MSG_PEEK):
                self._lose(ConnectionResetError("the owner has closed the connection"))
        except OSError as error:
            self._lose(error)
        finally:
            self._lock.release()

    def _send(self, parts: list[Any], due_s: float) -> None:
        connection = self._open_socket()
        views = [memoryview(part).cast("B") for part in parts]
        while views:
            connection.settimeout(max(due_s - time.monotonic(), 0.001))
            sent = connection.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _receive(self, tag: int, due_s: float) -> tuple[Kind, Arrays]:
        connection = self._open_socket()
        kind, count, answered, nbytes = unpack_header(_read(connection, HEADER.size, due_s))
        fields = unpack(kind, count, _read(connection, nbytes, due_s))
        if answered != tag:
            raise OwnerError(f"an answer to question {answered} came to question {tag}")
        return kind, fields

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise OwnerLost(f"the owner of the pool at {self.path} is not there")
        return self._socket

    # -- connections -------------------------------------------------------------------------------

    def _connect(self, deadline_s: float) -> tuple[socket.socket, SharedMemory, int, int]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            due_s = time.monotonic() + deadline_s
            connection.settimeout(deadline_s)
            connection.connect(str(self.path))
            connection.sendall(b"".join(pack(Kind.HELLO, 1, numbers(VERSION, self._number))))
            header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 4, socket.MSG_CMSG_CLOEXEC)
            try:
                header += _read(connection, HEADER.size - len(header), due_s)
                kind, count, _, nbytes = unpack_header(bytes(header))
                fields = unpack(kind, count, _read(connection, nbytes, due_s))
                if kind is not Kind.WELCOME:
                    raise OwnerError(text_of(fields[0]) if kind is Kind.REFUSED else f"the owner answered {kind.name}")
                if len(descriptors) != 1:
                    raise OwnerError("the owner did not send its memory")
            except BaseException:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise
            _, nbytes, piece, pid = fields[0][:4].tolist()
            return connection, SharedMemory.received(descriptors[0], text_of(fields[1]), nbytes), piece, pid
        except BaseException:
            connection.close()
            raise

    def _lose(self, error: Exception) -> OwnerLost:
        """Give the connection up; returns the error to raise."""
        if self._socket is not None:
            logger.warning(
                "the owner of the pool at %s is lost: %s; blocks are computed until it is back", self.path, error
            )
            self._socket.close()
            self._socket = None
            self._asked.clear()
            self._is_wanted.set()
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._reconnect, name="kvortex-owner", daemon=True)
                self._thread.start()
        return OwnerLost(str(error))

    def _reconnect(self) -> None:
        while self._is_wanted.wait() and not self._closing.is_set():
            self._is_wanted.clear()
            pause_s = FIRST_RETRY_S
            while not self.is_connected and not self._closing.wait(pause_s):
                pause_s = min(2 * pause_s, LAST_RETRY_S)
                try:
                    connection, memory, _, _ = self._connect(self._deadline_s)
                except (OSError, OwnerError, ConfigError) as error:
                    self._say_why(error)
                    continue
                memory.close()
                if memory.ticket.label != self.memory.ticket.label:
                    connection.close()
                    logger.warning("the owner at %s was started anew, with another pool", self.path)
                    self._replaced.set()
                    return
                self._resume(connection)

    def _say_why(self, error: Exception) -> None:
        is_absent = isinstance(error, OSError) and not isinstance(error, PermissionError)
        if is_absent or str(error) == self._refusal:
            logger.debug("the owner is still not there: %s", error)
            return
        self._refusal = str(error)
        logger.warning("the owner that listens at %s now cannot be used: %s", self.path, error)

    def _resume(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closing.is_set():
                connection.close()
                return
            self._socket = connection
            self.generation += 1
            try:
                if self.on_connected is not None:
                    self.on_connected()
            except OwnerError as error:
                self._lose(error)
                return
        logger.info("connected to the owner of the pool at %s again", self.path)

    def close(self) -> None:
        """Close the connection; idempotent. Memory that is mapped stays mapped."""
        with self._lock:
            self._closing.set()
            self.on_connected = None
            self._asked.clear()
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        self._is_wanted.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.memory.close()


def _is_readable(connection: socket.socket) -> bool:
    """True if something has come. A socket with a time limit waits for that in `recv`, whatever its flags say."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _read(connection: socket.socket, nbytes: int, due_s: float) -> bytearray:
    data = bytearray(nbytes)
    view, done = memoryview(data), 0
    while done < nbytes:
        connection.settimeout(max(due_s - time.monotonic(), 0.001))
        received = connection.recv_into(view[done:])
        if not received:
            raise ConnectionResetError("the owner has closed the connection")
        done += received
    return data


__all__ = ["OwnerClient", "OwnerLost", "Question"]
