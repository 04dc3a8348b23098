"""The owner: a process that holds the pool of a machine, and says which blocks are where in it. It never uses a GPU."""

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from kvortex.config import KVortexConfig, format_bytes
from kvortex.errors import ConfigError, OwnerError
from kvortex.memory import SharedMemory, check_memory
from kvortex.owner.caches import Caches
from kvortex.owner.process import Connection, Process
from kvortex.owner.protocol import HEADER, VERSION, Kind, join, numbers, pack, unpack, unpack_header
from kvortex.owner.session import Session
from kvortex.owner.tiers import MakeTier, OwnerTiers
from kvortex.planes.control import ControlPlane
from kvortex.tiering import tier_of

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 5.0
SOCKET_CHECK_S: Final = 1.0
_CREDENTIALS: Final = struct.Struct("3i")


class Owner:
    """The pool of a machine and its clients, on the running loop.

    Args:
        config: sizes and eviction of the pool.
        path: of the Unix socket. Only processes of the same user are served.
        make_tier: makes the lower tier of a namespace, as `tier_of` does.
        is_sole: it serves one engine, which may make the pool smaller.

    Raises:
        ConfigError: the machine has not that much memory, or the settings of a lower tier are invalid.
    """

    def __init__(
        self,
        config: KVortexConfig,
        path: str | os.PathLike[str],
        make_tier: MakeTier = tier_of,
        *,
        is_sole: bool = False,
    ) -> None:
        self._is_sole = is_sole
        tier_of(config, bytes(32))  # refuses invalid settings before an engine comes
        self.path = Path(path)
        self._config = config
        check_memory(config.pool.bytes)
        self._memory = SharedMemory.create(config.pool.bytes)
        self.control = ControlPlane.from_config(config, self._memory.ticket.nbytes, ())
        self._tiers = OwnerTiers(config, self.control, self._memory, make_tier)
        self.caches = Caches(self.control, self._tiers)
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._lock: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.TimerHandle | None = None
        self._processes: dict[int, Process] = {}
        self.num_clients = 0

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen.

        Raises:
            OwnerError: another owner has this socket.
            ConfigError: the socket cannot be made there.
        """
        try:
            self._take_lock()
            self._listen()
        except OSError as error:
            self._release()
            raise ConfigError(f"cannot listen at {self.path}: {error}") from error
        except BaseException:
            self._release()
            raise
        self._begin_accepting()
        self._spawn(self._watch_socket())
        logger.info("a pool of %s for the engines that connect to %s", format_bytes(self._config.pool.bytes), self.path)

    def _take_lock(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            lock = self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                why = f"another owner listens at {self.path}: end it first, or take another socket"
                raise OwnerError(why) from None
            found = os.fstat(lock)
            if _inode_of(self._lock_path) == (found.st_dev, found.st_ino):
                return
            os.close(lock)  # its last holder has just deleted it

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    def _listen(self) -> None:
        if self.path.exists() and not self.path.is_socket():
            raise FileExistsError("this is no socket, and not replaced by one")
        self.path.unlink(missing_ok=True)  # of an owner that was killed: this one has the lock
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            before = os.umask(0o177)
            try:
                listener.bind(str(self.path))
            finally:
                os.umask(before)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        if self._listener is not None:
            self._listener.close()
        self._listener, self._inode = listener, _inode_of(self.path)

    async def _watch_socket(self) -> None:
        """Make the socket anew if somebody has deleted it: running engines are still served, new ones would not be."""
        said = ""
        while True:
            await asyncio.sleep(SOCKET_CHECK_S)
            if _inode_of(self.path) == self._inode:
                continue
            self._stop_accepting()  # the loop must not wait for a descriptor that is closed
            try:
                self._listen()
            except OSError as error:
                if said != (said := str(error)):
                    logger.error("the socket is gone, and cannot be made again: %s", error)
            else:
                logger.warning("%s was deleted or replaced: it was made again", self.path)
                said = ""
            self._begin_accepting()

    async def flush(self, timeout_s: float) -> None:
        """Wait until what waits for lower tiers is written or dropped, but no longer than that."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._tiers.flush()
        except TimeoutError:
            logger.warning("not all blocks were written to the lower tiers in %g s", timeout_s)

    async def aclose(self) -> None:
        """Close all connections and release the pool; engines go on without it. Idempotent."""
        self._stop_accepting()
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in list(self._processes.values()):
            process.close()
        self._processes.clear()
        await self._tiers.aclose()
        self.control.close()
        self._release()

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.close()
            if _inode_of(self.path) == self._inode:
                self.path.unlink(missing_ok=True)
            self._listener = None
        if self._lock is not None:
            if self._inode is not None:
                self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        self._memory.close()

    def _spawn(self, call: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_error)
        return task

    # -- connections -------------------------------------------------------------------------------

    def _begin_accepting(self) -> None:
        self._accepting = None
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener is not None:
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # it has gone again
        except OSError as error:  # out of descriptors
            logger.error("cannot accept a client: %s", error)
            self._stop_accepting()
            self._accepting = self._loop.call_later(SOCKET_CHECK_S, self._begin_accepting)
            return
        connection.setblocking(False)
        # Closed by the task's end, because one that is cancelled before it begins does nothing.
        self._spawn(self._serve(connection)).add_done_callback(lambda _: connection.close())

    async def _serve(self, connection: socket.socket) -> None:
        pid, uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                client = await self._greet(connection, pid, uid)
        except (OwnerError, OSError, TimeoutError) as error:
            logger.warning("process %d of user %d was not served: %s", pid, uid, error or "it said nothing")
            return
        process = self._process(pid)
        session = Session(self.caches, process, client, is_sole=self._is_sole)
        self.num_clients += 1
        served = Connection(session, pid)
        process.connections.add(served)
        try:
            await self._loop.create_connection(lambda: served, sock=connection)
            await served.ended
        finally:
            served.abort()
            process.connections.discard(served)
            self.num_clients -= 1
            process.may_write(client, session.close(), self._writers_of(session, process))

    async def _greet(self, connection: socket.socket, pid: int, uid: int) -> int:
        """Receive the first frame and answer it; returns the client's number."""

        async def receive(nbytes: int) -> bytes:
            return await _receive(self._loop.sock_recv, connection, nbytes)

        kind, count, tag, body = unpack_header(await receive(HEADER.size))
        if kind is not Kind.HELLO or body > 4096:
            raise OwnerError(f"a connection began with {kind.name}")
        version, client = [*unpack(kind, count, await receive(body))[0].tolist(), 0, 0][:2]
        why = ""
        if not pid:
            why = "this process is in another PID namespace: share it (in a pod: shareProcessNamespace or hostPID)"
        elif uid != os.geteuid():
            why = f"the pool belongs to user {os.geteuid()}, and this process to user {uid}"
        elif version != VERSION:
            why = (
                f"the owner speaks version {VERSION} of the protocol, and this engine {version}: restart the older one"
            )
        if why:
            connection.send(join(pack(Kind.REFUSED, tag, why.encode())))
            raise OwnerError(why)
        memory, pool = self._memory, self._config.pool
        welcome = numbers(VERSION, memory.ticket.nbytes, pool.pin_piece_bytes, os.getpid())
        frame = join(pack(Kind.WELCOME, tag, welcome, memory.ticket.label.encode()))
        socket.send_fds(connection, [frame], [memory.descriptor])
        return int(client)

    def _process(self, pid: int) -> Process:
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = Process(pid, self.control, self._forget)
        return process

    def _writers_of(self, session: Session, process: Process) -> list[Process]:
        wanted = set(session.writers)
        return [other for other in self._processes.values() if other is not process and other.names & wanted]

    def _forget(self, process: Process) -> None:
        if self._processes.get(process.pid) is process:
            del self._processes[process.pid]


async def _receive(
    receive: Callable[[socket.socket, int], Awaitable[bytes]], connection: socket.socket, nbytes: int
) -> bytes:
    parts = []
    while nbytes:
        part = await receive(connection, nbytes)
        if not part:
            raise OwnerError("the connection ended before its first frame")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


def _inode_of(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_dev, found.st_ino
    return None


def _log_error(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a task of the owner ended in an unexpected error", exc_info=error)
