"""The tier over S3 against obstore alone, over a server of the same run.

python benchmarks/remote_s3.py [--sizes 256KiB,2MiB] [--connections 1,4,16] [--bytes 256MiB] [--latency-ms 0] [--json]

Each row moves the same bytes by the same number of requests at a time, in alternation: obstore with objects as large as
the tier's and ranges as long (the ceiling: it checks nothing, and leaves the bytes in memory of its own), the tier, and
obstore with an object for each block, which are copied to their places. CPU is that of this process, and of the server.

With --cold N: how long a new process takes to know N objects.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.store import S3Store
from tier_client import TierClient

from kvortex.config import format_bytes, parse_bytes
from kvortex.tiers import tier_from_url
from kvortex.tiers.payload import warm_up
from kvortex.tiers.s3.reader import RANGE_BYTES
from kvortex.tiers.s3.segment import Footer, StoredEntry, encode_footer

NAMESPACE = bytes(32)
WARM_PASSES = 1
CLIENTS = ("obstore", "tier", "an object a block")
SEGMENT_BYTES = 32 << 20


class Server:
    """`object_server.py` in a process of its own."""

    def __init__(self, latency_ms: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        program = str(Path(__file__).parent / "object_server.py")
        command = [sys.executable, program, str(self.port), "--latency-ms", f"{latency_ms:g}"]
        self._process = subprocess.Popen(command)
        for _ in range(1000):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            time.sleep(0.01)
        raise SystemExit("the server does not start")

    def store(self) -> S3Store:
        config: Any = {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1", "unsigned_payload": True}
        keys = {"access_key_id": "a", "secret_access_key": "b"}
        return S3Store("bench", config=config | keys, client_options={"allow_http": True, "timeout": "60s"})

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


async def together(connections: int, count: int, work: Callable[[int], Awaitable[None]]) -> None:
    """Do `work` with each number below `count`, so many at a time."""
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(some() for _ in range(connections)))


class Library:
    """obstore with objects and ranges as long as those of the tier: what this process could do at best."""

    def __init__(self, server: Server, connections: int, memory: NDArray[np.uint8], size: int) -> None:
        self._store, self._connections, self._memory = server.store(), connections, memory
        per_object = max(1, SEGMENT_BYTES // size)
        self._objects = [memory[at : at + per_object * size] for at in range(0, memory.size, per_object * size)]
        per_range = max(1, RANGE_BYTES // size) * size
        self._ranges = [
            (number, at, min(at + per_range, data.size))
            for number, data in enumerate(self._objects)
            for at in range(0, data.size, per_range)
        ]

    async def open(self) -> None:
        return

    async def put(self) -> None:
        async def put(number: int) -> None:
            await obstore.put_async(self._store, f"c/{number}", self._objects[number], use_multipart=False)

        await together(min(self._connections, 4), len(self._objects), put)

    async def get(self) -> None:
        async def get(number: int) -> None:
            of, start, stop = self._ranges[number]
            answer = await obstore.get_async(self._store, f"c/{of}", options={"range": (start, stop)})
            if len(await answer.bytes_async()) != stop - start:
                raise SystemExit("a range is short")

        await together(self._connections, len(self._ranges), get)

    async def aclose(self) -> None:
        return


class ObjectEach:
    """obstore with an object for each block, whose bytes are copied to their places."""

    def __init__(self, server: Server, connections: int, memory: NDArray[np.uint8], size: int) -> None:
        self._store, self._connections = server.store(), connections
        self._views = [memory[at : at + size] for at in range(0, memory.size, size)]

    async def open(self) -> None:
        return

    async def put(self) -> None:
        async def put(number: int) -> None:
            await obstore.put_async(self._store, f"e/{number}", self._views[number], use_multipart=False)

        await together(self._connections, len(self._views), put)

    async def get(self) -> None:
        async def get(number: int) -> None:
            answer = await obstore.get_async(self._store, f"e/{number}")
            self._views[number][:] = np.frombuffer(memoryview(await answer.bytes_async()), dtype=np.uint8)

        await together(self._connections, len(self._views), get)

    async def aclose(self) -> None:
        return


class OfTier(TierClient):
    """The tier, in calls of all blocks."""

    def __init__(self, server: Server, connections: int, memory: NDArray[np.uint8], size: int) -> None:
        url = f"s3://bench/{time.time_ns():x}?endpoint=http://127.0.0.1:{server.port}&region=us-east-1"
        tier = tier_from_url(f"{url}&connections={connections}&timeout_s=60&linger_s=0", NAMESPACE)
        super().__init__(tier, [memory[at : at + size] for at in range(0, memory.size, size)])

    async def open(self) -> None:
        await self.tier.open()
        await self.tier.scanned()


async def measure(size: int, connections: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """GB/s and CPU seconds a GiB of each client, both ways, medians over the passes."""
    memory = np.random.default_rng(0).integers(0, 256, arguments.bytes // size * size, dtype=np.uint8)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for number in range(arguments.passes + WARM_PASSES):
        makers = list(zip(CLIENTS, (Library, OfTier, ObjectEach), strict=True))
        for name, make in makers[number % 3 :] + makers[: number % 3]:
            with running(arguments) as server:
                client = make(server, connections, memory, size)
                await client.open()
                for way, move in (("put", client.put), ("get", client.get)):
                    cpu_s, server_s, started = time.process_time(), server.cpu_s(), time.perf_counter()
                    await move()
                    elapsed_s = time.perf_counter() - started
                    if number >= WARM_PASSES:
                        spent = (time.process_time() - cpu_s, server.cpu_s() - server_s)
                        found.setdefault(f"{name} {way}", []).append((elapsed_s, *spent))
                await client.aclose()
    row: dict[str, Any] = {"bytes": size, "connections": connections}
    gib = memory.size / (1 << 30)
    for key, values in found.items():
        elapsed_s, cpu_s, server_s = (statistics.median(column) for column in zip(*values, strict=True))
        row[key] = {
            "gbps": round(memory.size / elapsed_s / 1e9, 2),
            "cpu_s_per_gib": round(cpu_s / gib, 2),
            "server_cpu_s_per_gib": round(server_s / gib, 2),
        }
    return row


async def measure_cold(count: int, blocks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds until a new process knows `count` objects of so many blocks; the payloads are made small."""
    with running(arguments) as server:
        store, now_ms = server.store(), time.time_ns() // 1_000_000

        async def put(number: int) -> None:
            keys = [(number * blocks + place).to_bytes(32, "little") for place in range(blocks)]
            entries = [StoredEntry(key, 8 * place, 8, 8, 0, 0) for place, key in enumerate(keys)]
            segment, footer = encode_footer(NAMESPACE, Footer(entries, ()), now_ms - number)
            await obstore.put_async(store, f"kvortex/{NAMESPACE.hex()}/{segment.name}", bytes(8 * blocks) + footer)

        await together(16, count, put)
        url = f"s3://bench?endpoint=http://127.0.0.1:{server.port}&region=us-east-1&timeout_s=60"
        tier = tier_from_url(url, NAMESPACE)
        cpu_s, started = time.process_time(), time.perf_counter()
        async with tier:
            await tier.scanned()
            elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
            known = tier.stats().num_blocks
    return {"objects": count, "blocks": known, "seconds": round(elapsed_s, 2), "cpu_s": round(cpu_s, 2)}


@contextlib.contextmanager
def running(arguments: argparse.Namespace) -> Iterator[Server]:
    server = Server(arguments.latency_ms)
    try:
        yield server
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256KiB,2MiB")
    parser.add_argument("--connections", default="1,4,16")
    parser.add_argument("--bytes", type=parse_bytes, default=256 << 20, help="bytes of a pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of the server, before each answer")
    parser.add_argument("--cold", type=int, help="objects of a bucket that a new process gets to know")
    parser.add_argument("--blocks", type=int, default=16, help="of each of these objects")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    warm_up()
    if arguments.cold:
        print(json.dumps(asyncio.run(measure_cold(arguments.cold, arguments.blocks, arguments))))
        return
    rows = []
    for size in map(parse_bytes, arguments.sizes.split(",")):
        for connections in map(int, arguments.connections.split(",")):
            rows.append(asyncio.run(measure(size, connections, arguments)))
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "server": f"object_server.py, {arguments.latency_ms:g} ms before each answer",
        "obstore": importlib.metadata.version("obstore"),
        "rows": rows,
    }
    print(json.dumps(figures, indent=2) if arguments.json else as_table(figures))


def as_table(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['machine']}; server {figures['server']}; obstore {figures['obstore']}",
        "GB/s, and CPU seconds a GiB of this process (in brackets)",
        "",
        "| block | connections | " + " | ".join(f"{way} {name}" for way in ("PUT", "GET") for name in CLIENTS) + " |",
        "|---" * 8 + "|",
    ]
    for row in figures["rows"]:
        cells = [row[f"{name} {way}"] for way in ("put", "get") for name in CLIENTS]
        shown = " | ".join(f"{cell['gbps']:.2f} ({cell['cpu_s_per_gib']:.2f})" for cell in cells)
        lines.append(f"| {format_bytes(row['bytes'])} | {row['connections']} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
