"""What stands for the machine: its loop, its processes, and the connections between them."""

import asyncio
import os
import random
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvortex.owner.process import Connection
from kvortex.owner.session import Session
from kvortex.testing.simulation import VirtualClockLoop
from tests.simulation.ledger import Use
from tests.simulation.owner_record import content

if TYPE_CHECKING:
    from tests.simulation.owner_pool import SimulatedOwner

GARBAGE = 0xA5
NOTICE_S = 0.05  # after which the owner has noticed that a connection is gone, at most; less than a client's pause
SLOW_S, FAST_S = 2.0, 0.02


class MachineLoop(VirtualClockLoop):
    """A virtual clock, processes that can be watched through descriptors, and connections that are no sockets."""

    def __init__(self, *, shuffle: random.Random | None) -> None:
        super().__init__(shuffle=shuffle)
        self._ended: set[int] = set()
        self._watched: dict[int, int] = {}  # descriptor -> process
        self._callbacks: dict[int, Callable[[], Any]] = {}

    def pidfd_open(self, pid: int) -> int:
        """Stands for that of `os`."""
        if pid in self._ended:
            raise ProcessLookupError
        descriptor = os.open(os.devnull, os.O_RDONLY)
        self._watched[descriptor] = pid
        return descriptor

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        self._callbacks[fd] = callback

    def remove_reader(self, fd: Any) -> bool:
        self._watched.pop(fd, None)
        return self._callbacks.pop(fd, None) is not None

    def end_process(self, pid: int) -> None:
        """Whoever watches the process hears of it."""
        self._ended.add(pid)
        for descriptor, watched in list(self._watched.items()):
            if watched == pid:
                self.call_soon(self._tell, descriptor, pid)

    def _tell(self, descriptor: int, pid: int) -> None:
        if self._watched.get(descriptor) == pid:
            self._callbacks[descriptor]()

    def close_descriptors(self) -> None:
        """Of processes that nobody watches any more."""
        for descriptor in list(self._watched):
            self.remove_reader(descriptor)
            os.close(descriptor)

    async def create_connection(self, factory: Callable[[], Any], *, sock: Any) -> tuple[Any, Any]:  # type: ignore[override]
        protocol = factory()
        sock.begin(protocol)
        return sock, protocol


class Link(asyncio.Transport):
    """One connection: the owner's transport, and what both sides have for a socket.

    Args:
        owner: the owner.
        process: the client's.
        number: the client's number.
        dice: seeded.
    """

    def __init__(self, owner: "SimulatedOwner", process: "MachineProcess", number: int, dice: random.Random) -> None:
        super().__init__()
        self.owner = owner
        self.process = process
        self.number = number
        self.reads: list[Use] = []
        """What the client reads of the pool because this connection has pinned it."""
        self._dice = dice
        self._loop = asyncio.get_running_loop()
        self.begun = self._loop.create_future()
        self._protocol: Connection | None = None
        self._sent: deque[bytes] = deque()
        self._answers = bytearray()
        self._is_ending = False  # for the owner
        self._is_cut = False  # for the client

    # -- the owner's side --------------------------------------------------------------------------

    def getsockopt(self, *_: int) -> bytes:
        return struct.pack("3i", self.process.pid, os.geteuid(), os.getegid())

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def session(self) -> Session | None:
        """What the owner keeps of this connection."""
        return self._protocol._session if self._protocol is not None else None

    def begin(self, protocol: Connection) -> None:
        self._protocol = protocol
        protocol.connection_made(self)
        if self._is_ending:
            self._loop.call_soon(protocol.connection_lost, None)
        elif not self.begun.done():
            self.begun.set_result(None)

    def is_closing(self) -> bool:
        return self._is_ending

    def writelines(self, list_of_data: Any) -> None:
        self._answers += b"".join(list_of_data)

    def pause_reading(self) -> None:
        """The client reads every answer."""

    def resume_reading(self) -> None:
        """The same."""

    def abort(self) -> None:
        self.cut()
        if not self._is_ending:
            self._is_ending = True
            if self._protocol is not None:
                self._loop.call_soon(self._protocol.connection_lost, None)

    # -- the client's side -------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        if self._is_cut:
            raise BrokenPipeError("the connection is gone")
        self._sent.append(frame)
        self._loop.call_later(self._dice.choice((0.0, 0.001, 0.05)), self.deliver)

    def deliver(self) -> None:
        """The owner takes what was sent."""
        while self._sent and not self._is_ending and self._protocol is not None:
            self._protocol.data_received(self._sent.popleft())

    def take_answer(self) -> bytearray:
        answer, self._answers = self._answers, bytearray()
        if not answer:
            raise ConnectionResetError("the owner has closed the connection")
        return answer

    def cut(self) -> None:
        """Neither side hears of the other any more; the owner notices soon. Idempotent."""
        if self._is_cut:
            return
        self._is_cut = True
        for use in self.reads:
            self.owner.end_use(use)
        self.reads.clear()
        if not self._is_ending:
            self._loop.call_later(self._dice.uniform(0.0, NOTICE_S), self._end)

    def _end(self) -> None:
        self.deliver()
        self.abort()

    close = cut


class Transfer:
    """Blocks that a device writes to a pool: first garbage, then what is meant.

    Args:
        owner: that of the pool.
        who: for messages.
        blocks: offset, bytes and number of the content of each block.
        dice: seeded.
        harm: chance of a block that it fails.
    """

    def __init__(
        self, owner: "SimulatedOwner", who: str, blocks: list[tuple[int, int, int]], dice: random.Random, harm: float
    ) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.good = np.array([dice.random() >= harm for _ in blocks], dtype=np.bool_)
        self._owner = owner
        self._blocks = blocks
        self._uses = [owner.ledger.begin(who, offset, nbytes, writes=True) for offset, nbytes, _ in blocks]
        self._dice = dice
        self._loop = asyncio.get_running_loop()
        self._is_doomed = False
        self._later(self._begin)

    def _later(self, step: Callable[[], None]) -> None:
        slow = self._dice.random() < 0.1
        self._timer = self._loop.call_later(self._dice.uniform(0.0, SLOW_S if slow else FAST_S), step)

    def _begin(self) -> None:
        self._spoil()
        self._later(self._move)

    def _move(self) -> None:
        for (offset, nbytes, number), is_good in zip(self._blocks, self.good.tolist(), strict=True):
            if is_good and not self._is_doomed:
                self._owner.pool[offset : offset + nbytes] = content(number, nbytes)
        self._later(self._settle)

    def _settle(self) -> None:
        if self._is_doomed:
            self._begin()  # and so on, until its process has ended
            return
        self._end()

    def _spoil(self) -> None:
        for offset, nbytes, _ in self._blocks:
            self._owner.pool[offset : offset + nbytes] = GARBAGE

    def doom(self) -> None:
        """Nobody waits for it any more: it writes garbage until its process has ended."""
        if not self.done.done():
            self._is_doomed = True

    def stop(self) -> None:
        """Its process has ended: it does not write any more. Idempotent."""
        if not self.done.done():
            self._spoil()
            self.good[:] = False
            self._timer.cancel()
            self._end()

    def _end(self) -> None:
        for use in self._uses:
            self._owner.end_use(use)
        self.done.set_result(None)


class MachineProcess:
    """A process with a device that writes.

    Args:
        pid: its number.
        loop: the machine's.
    """

    def __init__(self, pid: int, loop: MachineLoop) -> None:
        self.pid = pid
        self.is_over = False
        self._loop = loop
        self._transfers: list[Transfer] = []

    def start(self, transfer: Transfer) -> Transfer:
        self._transfers = [other for other in self._transfers if not other.done.done()]
        self._transfers.append(transfer)
        return transfer

    def doom(self) -> None:
        """It dies, and nobody knows what its device does until it has ended."""
        for transfer in self._transfers:
            transfer.doom()

    def end(self) -> None:
        """It has ended; idempotent."""
        if not self.is_over:
            self.is_over = True
            for transfer in self._transfers:
                transfer.stop()
            self._loop.end_process(self.pid)
