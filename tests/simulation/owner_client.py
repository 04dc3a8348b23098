"""The real client of an owner, over a connection that is no socket, and with a task in place of its thread."""

import asyncio
import random
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

from kvortex.errors import OwnerError
from kvortex.owner import client as client_module
from kvortex.owner.client import OwnerClient, OwnerLost
from kvortex.owner.protocol import HEADER, Arrays, Kind, unpack, unpack_header
from tests.simulation.owner_machine import Link, MachineProcess
from tests.simulation.owner_pool import SimulatedOwner


class Machine(Protocol):
    """What a client needs of the world."""

    tally: Any

    async def accept(self, process: MachineProcess, number: int) -> Link: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]": ...


class SimulatedClient(OwnerClient):
    """Asks the owner through a `Link`; sometimes the connection is lost before a question, or instead of its answer.

    Args:
        machine: the world.
        link: the first connection.
        dice: seeded.
        lost: chance of a question that the connection is lost with it.
    """

    def __init__(self, machine: Machine, link: Link, dice: random.Random, lost: float) -> None:
        self._machine = machine
        self._next: Link = link
        self._dice = dice
        self._returning: asyncio.Task[None] | None = None
        self.lost = lost
        super().__init__("simulated", 1.0)
        self._number = link.number
        self._thread = threading.current_thread()  # so that it starts none, and waits for none

    @classmethod
    async def connect(
        cls, machine: Machine, process: MachineProcess, dice: random.Random, lost: float
    ) -> "SimulatedClient":
        """Raises ConnectionRefusedError if there is no owner."""
        return cls(machine, await machine.accept(process, dice.getrandbits(62)), dice, lost)

    @property
    def link(self) -> Link:
        """The connection, or the last one."""
        return self._next

    @property
    def owner(self) -> SimulatedOwner:
        """The owner of the memory that this client has."""
        return self._next.owner

    def _connect(self, deadline_s: float) -> Any:
        memory = self._next.owner._memory
        shown = SimpleNamespace(ticket=memory.ticket, close=lambda: None)
        return self._next, shown, self._next.owner.control.allocator.piece_bytes, 1

    def _send(self, parts: list[Any], due_s: float) -> None:
        link: Any = self._open_socket()
        if self._dice.random() < self.lost:
            self._fail("a question")
        link.send(b"".join(memoryview(part).cast("B") for part in parts))

    def _receive(self, tag: int, due_s: float) -> tuple[Kind, Arrays]:
        link: Any = self._open_socket()
        if self._dice.random() < self.lost:
            if self._dice.random() < 0.5:
                link.deliver()  # the owner has done it
            self._fail("an answer")
        link.deliver()
        frame = link.take_answer()
        kind, count, answered, nbytes = unpack_header(bytes(frame[: HEADER.size]))
        fields = unpack(kind, count, frame[HEADER.size :])
        if answered != tag or nbytes != len(frame) - HEADER.size:
            raise OwnerError(f"an answer to question {answered} came to question {tag}")
        return kind, fields

    def _fail(self, what: str) -> NoReturn:
        self._machine.tally[f"{what} is lost"] += 1
        raise TimeoutError(f"injected: {what} is lost")

    def _lose(self, error: Exception) -> OwnerLost:
        was_connected = self.is_connected
        lost = super()._lose(error)
        if was_connected and not self._closing.is_set():
            self._returning = self._machine.spawn(self._come_back())
        return lost

    async def _come_back(self) -> None:
        """As the thread of a real client does."""
        pause_s = client_module.FIRST_RETRY_S
        while not self.is_connected and not self._closing.is_set():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, client_module.LAST_RETRY_S)
            try:
                link = await self._machine.accept(self._next.process, self._number)
            except ConnectionRefusedError:
                continue
            if link.owner is not self.owner:
                link.close()
                self._replaced.set()
                return
            self._next = link
            self._machine.tally["connected again"] += 1
            self._resume(link)  # type: ignore[arg-type]
            return  # if it is lost again at once, there is another task

    async def aclose(self) -> None:
        """Close, and end the task."""
        self.close()
        if self._returning is not None and not self._returning.done():
            self._returning.cancel()
            await asyncio.wait([self._returning])

    def vanish(self) -> None:
        """Its process dies."""
        if self._returning is not None:
            self._returning.cancel()
        self.close()
