"""Disk tier against a plain loop over the same files' sizes, threads and memory; and a directory of many blocks.

python benchmarks/disk.py [--path DIR] [--blocks 512] [--block-bytes 2MiB] [--threads 8] [--directory 100000] [--json]
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.config import parse_bytes
from kvortex.memory.pinned import PinnedPool
from kvortex.tiers import DiskTier, DiskTierConfig, ReadRequest, WriteRequest
from kvortex.tiers.disk.layout import DiskLayout
from kvortex.tiers.frame import HEADER_BYTES
from kvortex.tiers.payload import payload_digest, warm_up
from kvortex.types import Extent, SaveOutcome

NAMESPACE = bytes(32)
WARM_PASSES = 1


def keys_of(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(count)]


class Ceiling:
    """One file a block, one system call for its bytes, nothing else; as many threads, the same memory."""

    def __init__(self, path: Path, blocks: list[NDArray[np.uint8]], threads: int, flags: int) -> None:
        path.mkdir()
        self._paths = [f"{path}/{number}" for number in range(len(blocks))]
        self._blocks = blocks
        self._flags = flags
        self._threads = ThreadPoolExecutor(threads)

    def write(self) -> None:
        self._run(lambda n: self._move(n, os.O_CREAT | os.O_WRONLY | os.O_EXCL, os.pwritev))

    def read(self) -> None:
        self._run(lambda n: self._move(n, os.O_RDONLY, os.preadv))

    def clear(self) -> None:
        for path in self._paths:
            os.unlink(path)

    def close(self) -> None:
        self._threads.shutdown()

    def _run(self, move: Callable[[int], int]) -> None:
        moved = list(self._threads.map(move, range(len(self._blocks))))
        if moved != [block.size for block in self._blocks]:
            raise SystemExit("the plain loop moved less than it should: is the disk full?")

    def _move(self, number: int, flags: int, call: Callable[[int, list[memoryview], int], int]) -> int:
        fd = os.open(self._paths[number], flags | self._flags, 0o600)
        try:
            return call(fd, [self._blocks[number].data], 0)
        finally:
            os.close(fd)


class Transfers:
    """Both ways over the same memory; `offset` moves the tier's buffers off their pages."""

    def __init__(self, pool: PinnedPool, arguments: argparse.Namespace) -> None:
        count, nbytes, offset = arguments.blocks, arguments.block_bytes, arguments.offset
        stride = stride_of(arguments)
        self.views = [pool.view(Extent(n * stride + offset, nbytes)) for n in range(count)]
        self.pages = [pool.view(Extent(n * stride, nbytes // 4096 * 4096)) for n in range(count)]
        random_bytes = np.random.default_rng(0)
        for view in self.views:
            view[:] = random_bytes.integers(0, 256, nbytes, dtype=np.uint8)
        self.digests = [payload_digest(view) for view in self.views]
        self.arguments = arguments
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ceiling_write", "ceiling_read", "write", "read")}

    async def write(self, tier: DiskTier, keys: list[bytes]) -> None:
        for part in self._batches():
            blocks = zip(keys[part], self.views[part], self.digests[part], strict=True)
            outcomes = await tier.write([WriteRequest(key, view, digest, view.size) for key, view, digest in blocks])
            if any(outcome.outcome is not SaveOutcome.STORED for outcome in outcomes):
                raise SystemExit(f"a write was refused: {outcomes}")

    async def read(self, tier: DiskTier, keys: list[bytes]) -> None:
        for part in self._batches():
            blocks = zip(keys[part], self.views[part], strict=True)
            outcomes = await tier.read([ReadRequest(key, view) for key, view in blocks])
            if any(outcome.reason is not None for outcome in outcomes):
                raise SystemExit(f"a read missed: {outcomes}")

    async def one_pass(self, tier: DiskTier, path: Path, number: int) -> None:
        """Write both ways, read both ways; which goes first alternates."""
        ceiling = Ceiling(path / f"ceiling{number}", self.pages, self.arguments.threads, tier.direct_io.flags)
        keys = keys_of(len(self.views), number)
        for name, plain, ours in (("write", ceiling.write, self.write), ("read", ceiling.read, self.read)):
            for is_ceiling in (number % 2 == 0, number % 2 != 0):
                started = time.perf_counter()
                if is_ceiling:
                    plain()
                else:
                    await ours(tier, keys)
                elapsed_s = time.perf_counter() - started
                if number >= WARM_PASSES:
                    self.seconds[f"ceiling_{name}" if is_ceiling else name].append(elapsed_s)
                await asyncio.sleep(0.2)  # what the device still does in the background is not the next one's fault
        await tier.delete(keys)
        ceiling.clear()
        ceiling.close()

    def _batches(self) -> list[slice]:
        size = self.arguments.batch
        return [slice(start, start + size) for start in range(0, len(self.views), size)]


def stride_of(arguments: argparse.Namespace) -> int:
    return -(-(arguments.block_bytes + arguments.offset) // 4096) * 4096


async def measure_transfers(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """GB/s of the tier and of the ceiling, medians over the passes."""
    nbytes = arguments.blocks * arguments.block_bytes
    config = DiskTierConfig(
        path=path / "tier",
        capacity_bytes=4 * arguments.blocks * (arguments.block_bytes + 8192),
        read_threads=arguments.threads,
        write_threads=arguments.threads,
        fsync=arguments.fsync,
    )
    pool = PinnedPool(arguments.blocks * stride_of(arguments))
    transfers = Transfers(pool, arguments)
    async with DiskTier(config, namespace=NAMESPACE) as tier:
        await tier.scanned()
        for number in range(arguments.passes + WARM_PASSES):
            await transfers.one_pass(tier, path, number)
        direct = tier.direct_io
    gbps = {name: nbytes / statistics.median(times) / 1e9 for name, times in transfers.seconds.items()}
    return {
        "o_direct": direct.is_direct,
        "memory_alignment": direct.memory_alignment,
        **{f"{name}_gbps": round(value, 3) for name, value in gbps.items()},
        "write_ratio": round(gbps["write"] / gbps["ceiling_write"], 3),
        "read_ratio": round(gbps["read"] / gbps["ceiling_read"], 3),
    }


def make_directory(layout: DiskLayout, keys: list[bytes]) -> None:
    for first in range(256):
        os.makedirs(layout.directory(bytes([first])))
    for key in keys:
        with open(layout.path(key), "wb") as file:
            file.truncate(HEADER_BYTES + (2 << 20))


async def measure_directory(path: Path, count: int) -> dict[str, Any]:
    """A directory of `count` blocks, as empty files with a length: how soon a tier serves, and what a look-up costs."""
    keys = keys_of(count, 1)
    make_directory(DiskLayout(path / "many", NAMESPACE), keys)
    config = DiskTierConfig(path=path / "many", capacity_bytes=1 << 50)
    buffer = np.empty(2 << 20, dtype=np.uint8)
    started = time.perf_counter()
    async with DiskTier(config, namespace=NAMESPACE) as tier:
        open_s = time.perf_counter() - started
        during = [await timed_read(tier, bytes(32), buffer) for _ in range(20)]
        await tier.scanned()
        scan_s = time.perf_counter() - started
        found = sum(map(bool, tier.lookup(keys)))
        if found != count:
            raise SystemExit(f"the scan found {found} of {count} blocks")
        single = median_us(lambda key: tier.lookup([key]), keys[:20000])
        absent = median_us(lambda key: tier.lookup([key]), keys_of(20000, 2))
        started = time.perf_counter()
        tier.lookup(keys)
        batch_us = (time.perf_counter() - started) / count * 1e6
    return {
        "blocks": count,
        "open_ms": round(open_s * 1e3, 1),
        "miss_during_scan_ms": round(max(during) * 1e3, 2),
        "scan_complete_ms": round(scan_s * 1e3, 1),
        "lookup_us": round(single, 2),
        "lookup_absent_us": round(absent, 2),
        "lookup_in_batch_us": round(batch_us, 3),
    }


async def timed_read(tier: DiskTier, key: bytes, buffer: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    await tier.read([ReadRequest(key, buffer)])
    return time.perf_counter() - started


def median_us(run: Callable[[bytes], object], keys: list[bytes]) -> float:
    times = []
    for key in keys:
        started = time.perf_counter()
        run(key)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


@contextlib.contextmanager
def scratch_directory(parent: str | None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kvortex-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a directory on the disk to measure; default: the system's temporary one")
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--block-bytes", type=parse_bytes, default=2 << 20)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--batch", type=int, default=512, help="blocks a call")
    parser.add_argument("--offset", type=int, default=0, help="bytes that every buffer starts behind a page")
    parser.add_argument("--fsync", action="store_true")
    parser.add_argument("--directory", type=int, default=100_000, help="blocks of the start-up test; 0 leaves it out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    warm_up()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "warm_up_s": round(time.perf_counter() - started, 2),
        "block_bytes": arguments.block_bytes,
        "threads": arguments.threads,
    }
    with scratch_directory(arguments.path) as path:
        figures["transfers"] = asyncio.run(measure_transfers(path, arguments))
        if arguments.directory:
            figures["directory"] = asyncio.run(measure_directory(path, arguments.directory))
    print(json.dumps(figures, indent=2) if arguments.json else as_table(figures))


def as_table(figures: dict[str, Any]) -> str:
    moved = figures["transfers"]
    how = f"O_DIRECT, memory aligned to {moved['memory_alignment']}" if moved["o_direct"] else "buffered"
    lines = [
        f"{figures['machine']}; blocks of {figures['block_bytes']} bytes, {figures['threads']} threads, {how}",
        "",
        "|  | tier GB/s | ceiling GB/s | ratio |",
        "|---|---|---|---|",
    ]
    for name in ("write", "read"):
        lines.append(
            f"| {name} | {moved[f'{name}_gbps']} | {moved[f'ceiling_{name}_gbps']} | {moved[f'{name}_ratio']} |"
        )
    if many := figures.get("directory"):
        lines += ["", f"{many['blocks']} blocks in the directory:"]
        lines += [f"  {name}: {value}" for name, value in many.items() if name != "blocks"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
