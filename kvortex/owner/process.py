"""A process with clients of the owner, and one connection of it."""

import asyncio
import logging
import os
from collections.abc import Callable

from kvortex.errors import OwnerError
from kvortex.owner.protocol import HEADER, Kind, pack, unpack, unpack_header
from kvortex.owner.session import Session
from kvortex.planes.control import ControlPlane

logger = logging.getLogger(__name__)


class Process:
    """A process with clients. What a dead client's device may still write is freed when its process has ended.

    Args:
        pid: its number.
        control: the pool's index and allocator.
        on_end: called when it has ended.
    """

    def __init__(self, pid: int, control: ControlPlane, on_end: Callable[["Process"], None]) -> None:
        self.pid = pid
        self.names: set[str] = set()
        """Names under which it writes for the connections of other processes."""
        self._control = control
        self._on_end = on_end
        self._written: list[tuple[int, list[int], list[Process]]] = []
        # Clients of lost connections, their extents, and who else writes to these.
        self.connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = None
            self._loop.call_soon(self._ended)
        else:
            self._loop.add_reader(self._descriptor, self._ended)

    def _ended(self) -> None:
        self.close()
        for connection in list(self.connections):  # a forked child may still have it open
            connection.abort()
        self._on_end(self)

    def write_for(self, name: str) -> None:
        """It writes to what the connections reserve that name it so."""
        self.names.add(name)

    def may_write(self, client: int, offsets: list[int], others: "list[Process]") -> None:
        """Its device may still write to these extents of a client, and then those of the others."""
        self._written.append((client, offsets, others))
        if self._descriptor is None:
            self._pass_on()

    def _pass_on(self) -> None:
        written, self._written = self._written, []
        for client, offsets, others in written:
            if others:
                others[0].may_write(client, offsets, others[1:])
            else:
                self._free(offsets)

    def _free(self, offsets: list[int]) -> None:
        for offset in offsets:
            self._control.free(offset)

    def has_settled(self, client: int) -> None:
        """None of the transfers of a client's lost connections writes any more."""
        for number, offsets, _ in self._written:
            if number == client:
                self._free(offsets)
        self._written = [written for written in self._written if written[0] != client]

    def close(self) -> None:
        """Stop watching it: it has ended, or the owner ends; idempotent."""
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
        self._pass_on()


class Connection(asyncio.Protocol):
    """Answers the frames of one client, in order. A protocol and no stream: it answers without a turn of the loop.

    Args:
        session: does what the frames ask for.
        pid: the client's process, for messages.
    """

    def __init__(self, session: Session, pid: int) -> None:
        self._session = session
        self._pid = pid
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Is done when the connection is gone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        """The client does not read its answers: take no more of its requests."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        """End the connection at once; idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            self._answer_all()
        except OwnerError as error:
            logger.error("process %d is not served any more: %s", self._pid, error)
            self.abort()
        except Exception:  # of this client's requests; the others must not suffer
            logger.exception("process %d is not served any more", self._pid)
            self.abort()

    def _answer_all(self) -> None:
        transport, received, start = self._transport, self._received, 0
        assert transport is not None
        while len(received) - start >= HEADER.size and not transport.is_closing():
            kind, count, tag, body = unpack_header(received[start : start + HEADER.size])
            end = start + HEADER.size + body
            if len(received) < end:
                break
            answer = self._session.answer(kind, unpack(kind, count, bytes(received[start + HEADER.size : end])))
            start = end
            if tag:
                kind, values = answer or (Kind.DONE, ())
                transport.writelines(pack(kind, tag, *values))
        del received[:start]
