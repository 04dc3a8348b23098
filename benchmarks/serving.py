"""What transfers cost whoever shares the machine, and how short ones fare. Needs a GPU.

    python benchmarks/serving.py [--codec fp8] [--json FILE]

- matmul: a loop of bfloat16 matrix products, alone and while saves or loads run at full speed
- python: a thread of pure Python, alone and beside transfers; how late another thread wakes up
- short: one load of 8 blocks, against its bytes at the ceiling and 100 us more
- start: from creating an engine with a large pool to its first save
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transfer import BLOCK_SIZE, environment, make_cache, measure_ceilings

from kvortex import KVortexConfig, KVortexEngine, hash_blocks
from kvortex.config import parse_bytes
from kvortex.cuda.driver import Device

BLOCK_BYTES, SEGMENT_BYTES = 2 << 20, 64 << 10
TOTAL_BYTES = 1 << 30


@dataclass
class Row:
    what: str
    setting: str
    value: float
    unit: str
    target: str = ""


class Traffic:
    """Saves or loads without end, until the block is left; counts bytes. Each save is of blocks that are new."""

    def __init__(self, engine: KVortexEngine, direction: str) -> None:
        self._engine = engine
        self._direction = direction
        self._blocks = TOTAL_BYTES // BLOCK_BYTES
        self._side = torch.cuda.Stream()  # idle: transfers must not queue behind the model's work
        self.moved_bytes = 0

    async def run(self) -> None:
        ids = np.arange(self._blocks)
        tokens = np.arange(self._blocks * BLOCK_SIZE)
        chains = [hash_blocks(tokens, BLOCK_SIZE, extra_keys=(self._direction, i)) for i in range(64)]
        hashes = chains[0]
        await self._engine.save_blocks(hashes, ids, stream=self._side)
        for number in itertools.count(1):
            if self._direction == "save":
                hashes = chains[number % len(chains)]  # evicted long before its turn comes again
                await self._engine.save_blocks(hashes, ids, stream=self._side)
            else:
                await self._engine.load_blocks(hashes, ids + self._blocks, stream=self._side)
            self.moved_bytes += TOTAL_BYTES


@asynccontextmanager
async def traffic(engine: KVortexEngine, direction: str, kind: type = Traffic) -> Any:
    running = kind(engine, direction)
    task = asyncio.create_task(running.run())
    await asyncio.sleep(0.3)
    running.moved_bytes = 0
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def engine_over(kv: dict[str, torch.Tensor], **settings: Any) -> Any:
    config = KVortexConfig(pool=3 * TOTAL_BYTES, **settings)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(kv, BLOCK_SIZE)
        await engine.wait_pinned()
        yield engine


def matmul_seconds(count: int = 1500, size: int = 4096) -> float:
    """Seconds of a loop of bfloat16 products, by events."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


async def slow_down(
    engine: KVortexEngine, direction: str, work: Callable[[], float], kind: type = Traffic
) -> tuple[float, float]:
    """How much longer `work` takes beside transfers, as a share; and the transfers' GB/s meanwhile."""
    alone, beside, rates = [], [], []
    await asyncio.to_thread(work)
    for _ in range(5):
        alone.append(await asyncio.to_thread(work))
        async with traffic(engine, direction, kind) as running:
            started = time.perf_counter()
            beside.append(await asyncio.to_thread(work))
            rates.append(running.moved_bytes / (time.perf_counter() - started))
    return statistics.median(beside) / statistics.median(alone) - 1, statistics.median(rates) / 1e9


def python_seconds(count: int = 4_000_000) -> float:
    """Seconds of a loop of pure Python."""
    started = time.perf_counter()
    total = 0
    for i in range(count):
        total += i & 3
    return time.perf_counter() - started


async def wake_up_delays(engine: KVortexEngine, beside: str | None) -> list[float]:
    """Seconds that a sleeping thread wakes up late, beside transfers in one direction or alone."""
    delays: list[float] = []
    stop = threading.Event()

    def sleeper() -> None:
        while not stop.is_set():
            due = time.perf_counter() + 1e-3
            time.sleep(1e-3)
            delays.append(time.perf_counter() - due)

    async with traffic(engine, beside) if beside else nullcontext():
        thread = threading.Thread(target=sleeper)
        thread.start()
        await asyncio.sleep(2)
        stop.set()
        thread.join()
    return sorted(delays)


class PlainCopies:
    """One large pinned copy after another, by itself: what any way of moving the bytes costs a model beside it."""

    def __init__(self, engine: KVortexEngine, direction: str) -> None:
        self._device = Device(torch.cuda.current_device())
        self._stream = self._device.create_stream()
        self._pool = engine._planes()[1].pool
        self._gpu = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        self._direction = direction
        self.moved_bytes = 0

    async def run(self) -> None:
        sides = self._pool.address, self._gpu.data_ptr()
        target, source = sides if self._direction == "save" else sides[::-1]
        events = [self._device.create_event(), self._device.create_event()]
        for number in itertools.count():
            event = events[number % 2]
            if number > 1:
                await asyncio.to_thread(self._device.synchronize_event, event)
                self.moved_bytes += self._gpu.numel()
            self._device.copy_async(target, source, self._gpu.numel(), self._stream)
            self._device.record_event(event, self._stream)


async def bench_matmul(kv: dict[str, torch.Tensor], arguments: argparse.Namespace) -> list[Row]:
    rows = []
    async with engine_over(kv) as engine:
        for direction in ("save", "load"):
            share, rate = await slow_down(engine, direction, matmul_seconds, PlainCopies)
            setting = f"plain copies, {direction} at {rate:.1f} GB/s"
            rows.append(Row("matmul slowed down", setting, 100 * share, "%"))
    async with engine_over(kv, codec=arguments.codec) as engine:
        for direction in ("save", "load"):
            share, rate = await slow_down(engine, direction, matmul_seconds)
            setting = f"{direction} at {rate:.1f} GB/s"
            rows.append(Row("matmul slowed down", setting, 100 * share, "%", "<= 2"))
    return rows


async def bench_python(kv: dict[str, torch.Tensor], arguments: argparse.Namespace) -> list[Row]:
    rows = []
    async with engine_over(kv, codec=arguments.codec) as engine:
        for direction in ("save", "load"):
            share, rate = await slow_down(engine, direction, python_seconds)
            setting = f"{direction} at {rate:.1f} GB/s"
            rows.append(Row("Python thread slowed down", setting, 100 * share, "%", "<= 3"))
        for beside in (None, "save", "load"):
            delays = await wake_up_delays(engine, beside)
            for name, position in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
                late = delays[int(position * (len(delays) - 1))] * 1e6
                target = "< 200 more" if beside else ""
                rows.append(Row("another thread wakes up late", f"{beside or 'alone'}, {name}", late, "us", target))
    return rows


async def bench_short(kv: dict[str, torch.Tensor], arguments: argparse.Namespace) -> list[Row]:
    rows = []
    async with engine_over(kv, codec=arguments.codec) as engine:
        ceiling = measure_ceilings(TOTAL_BYTES // 2, engine._planes()[1].pool, Device(torch.cuda.current_device()))
        for blocks in (1, 8, 64):
            hashes = hash_blocks(np.arange(blocks * BLOCK_SIZE), BLOCK_SIZE, extra_keys=(blocks,))
            for direction in ("save", "load"):
                times = []
                for _ in range(40):
                    if direction == "save":
                        engine.clear()
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    call = engine.save_blocks if direction == "save" else engine.load_blocks
                    result = await call(hashes, range(blocks))
                    times.append(time.perf_counter() - started)
                    if not result.ok:
                        raise RuntimeError(f"not every block was moved: {result}")
                least = blocks * BLOCK_BYTES / ceiling[direction] + 100e-6
                seconds = statistics.median(times[5:])
                rows.append(Row("short transfer", f"{direction} of {blocks} blocks", seconds * 1e6, "us"))
                rows.append(Row("  over bytes / ceiling + 100 us", "", seconds / least, "", "<= 1.5"))
    return rows


async def bench_start(kv: dict[str, torch.Tensor], arguments: argparse.Namespace) -> list[Row]:
    hashes = hash_blocks(np.arange(8 * BLOCK_SIZE), BLOCK_SIZE)
    started = time.perf_counter()
    config = KVortexConfig(pool=arguments.pool, codec=arguments.codec)
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(kv, BLOCK_SIZE)
        registered = time.perf_counter() - started
        if not (await engine.save_blocks(hashes, range(8))).ok:
            raise RuntimeError("the first save failed")
        first = time.perf_counter() - started
        await engine.wait_pinned()
        pinned = time.perf_counter() - started
    pool = f"pool of {arguments.pool >> 30} GiB"
    return [
        Row("start: caches registered", pool, registered, "s"),
        Row("start: first save done", pool, first, "s", "< 2"),
        Row("start: all pinned", pool, pinned, "s"),
    ]


PARTS: dict[str, Callable[[dict[str, torch.Tensor], argparse.Namespace], Coroutine[Any, Any, list[Row]]]] = {
    "start": bench_start,
    "short": bench_short,
    "python": bench_python,
    "matmul": bench_matmul,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--pool", type=parse_bytes, default=16 << 30)
    parser.add_argument("--json", help="write the figures to this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/serving.py needs a CUDA device; none is visible")
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    kv = make_cache(TOTAL_BYTES, BLOCK_BYTES, SEGMENT_BYTES, arguments.codec)
    rows: list[Row] = []
    for part in arguments.parts.split(","):
        found = asyncio.run(PARTS[part](kv, arguments))
        for row in found:
            print(f"{row.what:<32} {row.setting:<44} {row.value:>9.2f} {row.unit:<3} {row.target}", flush=True)
        rows += found
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": environment(), "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
