"""Saves and loads through the whole engine against the link's ceilings, measured in the same run. Needs a GPU.

    python benchmarks/transfer.py [--segment-bytes 65536,16384,8192,4096] [--block-bytes 2097152] [--codec fp8]

Every run is verified: what was loaded equals what was saved, byte for byte (as the codec rounds it, where there is one:
the NumPy reference for some blocks, the error for all), and each pass moves fresh blocks. GB/s are 1e9 bytes a second
of KV as the cache holds it; `ratio` is against the ceiling of the same direction, for bytes that are not packed.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from kvortex import KVortexConfig, KVortexEngine, hash_blocks
from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.config import parse_bytes
from kvortex.cuda.driver import Device
from kvortex.kernels.reference import gather_reference, scatter_reference
from kvortex.layout import KVLayout
from kvortex.memory import PinnedPool

GB = 1e9
BLOCK_SIZE = 16


@dataclass
class Row:
    what: str
    segment_bytes: int
    block_bytes: int
    direction: str
    gb_per_s: float
    ratio: float
    host_ms_per_gib: float | None = None


def median_s(run: Callable[[], None], repeats: int = 5) -> float:
    """Median seconds of a run that ends synchronised; one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_ceilings(nbytes: int, pool: PinnedPool, device: Device) -> dict[str, float]:
    """Bytes a second of large pinned copies, one a piece of the pool: each way, and both ways at once together.

    In the memory that is measured next: the same card reaches other figures with other host memory.
    """
    gpu = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [device.create_stream(), device.create_stream()]
    piece = min(pool.piece_bytes, nbytes)

    def save() -> None:
        for start in range(0, nbytes, piece):
            device.copy_async(pool.address + start, gpu[0].data_ptr() + start, piece, streams[0])

    def load() -> None:
        for start in range(0, nbytes, piece):
            device.copy_async(gpu[1].data_ptr() + start, pool.address + nbytes + start, piece, streams[1])

    def both() -> None:
        save()
        load()

    return {
        "save": nbytes / median_s(save),
        "load": nbytes / median_s(load),
        "both": 2 * nbytes / median_s(both),
    }


def measure_peers(
    kv: dict[str, torch.Tensor], pool: PinnedPool, device: Device, segment: int, nbytes: int
) -> dict[tuple[str, str], float]:
    """Bytes a second of the usual ways on `nbytes` of scattered segments: a copy each, and `cudaMemcpyBatchAsync`."""
    count = nbytes // segment
    tensors = list(kv.values())
    rng = np.random.default_rng(0)
    blocks = rng.permutation(tensors[0].shape[0])
    device_side = [
        tensors[i % len(tensors)].data_ptr() + int(blocks[i // len(tensors) % len(blocks)]) * segment
        for i in range(count)
    ]
    host_side = [pool.address + i * segment for i in range(count)]
    sizes = [segment] * count
    stream = device.create_stream()

    def each(targets: list[int], sources: list[int]) -> Callable[[], None]:
        def run() -> None:
            for target, source in zip(targets, sources, strict=True):
                device.copy_async(target, source, segment, stream)

        return run

    def batched(targets: list[int], sources: list[int]) -> Callable[[], None]:
        return lambda: device.copy_batch_async(targets, sources, sizes, stream)

    ways = {"copy a segment": each, "cudaMemcpyBatchAsync": batched}
    return {
        (name, direction): count * segment / median_s(way(*sides), 3)
        for name, way in ways.items()
        for direction, sides in (("save", (host_side, device_side)), ("load", (device_side, host_side)))
    }


class EngineBench:
    """One engine over a cache of twice the bytes that a pass moves: one half is saved, the other loaded into."""

    def __init__(self, engine: KVortexEngine, kv: dict[str, torch.Tensor], requests: int) -> None:
        self.engine = engine
        self.kv = kv
        num_blocks = next(iter(kv.values())).shape[0] // 2
        self.num_blocks = num_blocks
        order = np.random.default_rng(1).permutation(num_blocks)
        self.saved_ids = np.array_split(order, requests)
        self.loaded_ids = np.array_split(order[::-1] + num_blocks, requests)
        self.host_s = 0.0

    def fresh_hashes(self, number: int) -> list[list[Any]]:
        tokens = np.arange(self.num_blocks * BLOCK_SIZE, dtype=np.int64) + 1
        chain = hash_blocks(tokens, BLOCK_SIZE, extra_keys=(number,))
        stops = np.cumsum([len(ids) for ids in self.saved_ids])
        return [chain[stop - len(ids) : stop] for stop, ids in zip(stops, self.saved_ids, strict=True)]

    async def save(self, hashes: list[list[Any]]) -> None:
        results = await asyncio.gather(
            *(self.engine.save_blocks(h, ids) for h, ids in zip(hashes, self.saved_ids, strict=True))
        )
        if sum(r.num_stored for r in results) != self.num_blocks:
            raise RuntimeError(f"not every block was stored: {[r.counts() for r in results]}")

    async def load(self, hashes: list[list[Any]]) -> None:
        results = await asyncio.gather(
            *(self.engine.load_blocks(h, ids) for h, ids in zip(hashes, self.loaded_ids, strict=True))
        )
        if not all(r.ok for r in results):
            raise RuntimeError(f"not every block was loaded: {[r.miss_counts() for r in results]}")

    def wipe(self) -> None:
        for tensor in self.kv.values():
            tensor[self.num_blocks :].fill_(0xA5)
        torch.cuda.synchronize()

    def verify_packed(self, codec: str) -> None:
        """The reference's bytes for some blocks, the error that E4M3 or bfloat16 allows for all."""
        some = slice(None, None, max(self.num_blocks // 4, 1))
        saved, loaded = (np.concatenate(ids) for ids in (self.saved_ids, self.loaded_ids))
        rows = {name: tensor[torch.from_numpy(saved[some]).cuda()].cpu() for name, tensor in self.kv.items()}
        layout = KVLayout.from_tensors(rows, BLOCK_SIZE)
        packing = packing_for(layout, codec)
        if packing is None:
            raise RuntimeError(f"codec {codec!r} does not pack this cache")
        raw, _ = gather_reference(layout, range(layout.num_blocks))
        scatter_reference(layout, range(layout.num_blocks), unpack_reference(packing, pack_reference(packing, raw)[0]))
        on_card = [torch.from_numpy(ids).cuda() for ids in (saved, loaded, loaded[some])]
        for name, tensor in self.kv.items():
            if not torch.equal(tensor[on_card[2]].cpu().view(torch.uint8), rows[name].view(torch.uint8)):
                raise RuntimeError(f"bytes differ from the reference in {name}")
            before, after = tensor[on_card[0]].float(), tensor[on_card[1]].float()
            if not (after - before).norm() < 0.04 * before.norm():
                raise RuntimeError(f"{name} lost more than rounding")

    def verify(self) -> None:
        saved = torch.from_numpy(np.concatenate(self.saved_ids)).cuda()
        loaded = torch.from_numpy(np.concatenate(self.loaded_ids)).cuda()
        for name, tensor in self.kv.items():
            if not torch.equal(tensor[saved], tensor[loaded]):
                raise RuntimeError(f"bytes differ in {name}")

    async def timed(self, *passes: Any) -> float:
        torch.cuda.synchronize()
        cpu, started = time.thread_time(), time.perf_counter()
        await asyncio.gather(*passes)
        self.host_s = time.thread_time() - cpu
        return time.perf_counter() - started


def make_cache(total: int, block_bytes: int, segment: int, codec: str = "raw") -> dict[str, torch.Tensor]:
    """Layers of random bytes, `uint8 [2 * blocks, 16, segment / 16]`, or of numbers to pack; a segment a layer."""
    blocks = 2 * (total // block_bytes)
    generator = torch.Generator(device="cuda").manual_seed(segment)
    if codec != "raw":
        dtype = torch.bfloat16 if codec == "fp8" else torch.float32
        shape = (blocks, BLOCK_SIZE, segment // BLOCK_SIZE // dtype.itemsize)
        return {
            f"layers.{i}": torch.randn(shape, dtype=dtype, device="cuda", generator=generator)
            for i in range(block_bytes // segment)
        }
    return {
        f"layers.{i}": torch.randint(
            0, 256, (blocks, BLOCK_SIZE, segment // BLOCK_SIZE), dtype=torch.uint8, device="cuda", generator=generator
        )
        for i in range(block_bytes // segment)
    }


async def bench_engine(arguments: argparse.Namespace, segment: int, block_bytes: int) -> list[Row]:
    """Rows of one segment size."""
    kv = make_cache(arguments.total_bytes, block_bytes, segment, arguments.codec)
    padded = -(-block_bytes // 128) * 128
    blocks = arguments.total_bytes // block_bytes
    config = KVortexConfig(
        pool=2 * blocks * padded + 2 * KVortexConfig().pool.pin_piece_bytes,
        transfer={"max_batch_bytes": arguments.transfer_max_batch_bytes, "streams": arguments.transfer_streams},
        codec=arguments.codec,
        eviction={"watermark": 1.0},
    )
    times: dict[str, list[tuple[float, float]]] = {"save": [], "load": [], "both": []}
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(kv, BLOCK_SIZE)
        bench = EngineBench(engine, kv, arguments.requests)
        check = bench.verify if arguments.codec == "raw" else partial(bench.verify_packed, arguments.codec)
        await engine.wait_pinned()
        ceilings = measure_ceilings(
            arguments.total_bytes, engine._planes()[1].pool, Device(torch.cuda.current_device())
        )
        for number in range(arguments.repeats + 1):
            engine.clear()
            hashes = bench.fresh_hashes(number)
            seconds = await bench.timed(bench.save(hashes))
            times["save"].append((seconds, bench.host_s))
            bench.wipe()
            seconds = await bench.timed(bench.load(hashes))
            times["load"].append((seconds, bench.host_s))
            check()
            bench.wipe()
            other = bench.fresh_hashes(number + 1000)
            seconds = await bench.timed(bench.save(other), bench.load(hashes))
            times["both"].append((seconds, bench.host_s))
            check()
        name = f"kvortex, {arguments.codec}, {arguments.requests} requests"
    rows = [
        Row("ceiling: large pinned copies", segment, block_bytes, direction, rate / GB, 1.0)
        for direction, rate in ceilings.items()
    ]
    for direction, measured in times.items():
        moved = blocks * block_bytes * (2 if direction == "both" else 1)
        seconds, host_s = sorted(measured[1:])[len(measured[1:]) // 2]
        rate = moved / seconds
        host_ms = host_s * 1e3 / (moved / 2**30)
        rows.append(Row(name, segment, block_bytes, direction, rate / GB, rate / ceilings[direction], host_ms))
    return rows


def print_rows(rows: list[Row]) -> None:
    print(f"{'way':<32} {'segment':>8} {'block':>9} {'dir':>5} {'GB/s':>8} {'ratio':>7} {'host ms/GiB':>12}")
    for row in rows:
        host = f"{row.host_ms_per_gib:12.2f}" if row.host_ms_per_gib is not None else " " * 12
        print(
            f"{row.what:<32} {row.segment_bytes:>8} {row.block_bytes:>9} {row.direction:>5} "
            f"{row.gb_per_s:>8.2f} {row.ratio:>7.3f} {host}"
        )


def environment() -> dict[str, str]:
    """Card, driver and versions that the figures belong to."""
    return {
        "card": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numba", "numba-cuda", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segment-bytes", default="65536,16384,8192,4096")
    parser.add_argument("--block-bytes", default="2097152", help="comma-separated; `32s` means 32 segments")
    parser.add_argument("--total-bytes", type=int, default=4 << 30, help="moved in one pass")
    parser.add_argument(
        "--transfer-max-batch-bytes", type=parse_bytes, default=KVortexConfig().transfer.max_batch_bytes
    )
    parser.add_argument("--transfer-streams", type=int, default=KVortexConfig().transfer.streams)
    parser.add_argument("--requests", type=int, default=1, help="calls that share the bytes of a pass")
    parser.add_argument("--codec", default="raw", help="raw, fp8 (a bfloat16 cache) or bf16 (a float32 cache)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="leave the other ways out")
    parser.add_argument("--json", help="write the figures to this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/transfer.py needs a CUDA device; none is visible")
    torch.cuda.init()
    device = Device(torch.cuda.current_device())
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    with PinnedPool(2 * arguments.total_bytes, device=device, piece_bytes=2 * arguments.total_bytes) as pool:
        pool.wait_ready(pool.capacity_bytes)
        ceilings = measure_ceilings(arguments.total_bytes, pool, device)
        rows = [
            Row("ceiling: large pinned copies", 0, 0, direction, rate / GB, 1.0) for direction, rate in ceilings.items()
        ]
        segments = [int(text) for text in arguments.segment_bytes.split(",")]
        for segment in [] if arguments.no_peers else segments:
            kv = make_cache(256 << 20, 32 * segment, segment)
            for (name, direction), rate in measure_peers(kv, pool, device, segment, 128 << 20).items():
                rows.append(Row(name, segment, 32 * segment, direction, rate / GB, rate / ceilings[direction]))
    for segment in segments:
        for text in arguments.block_bytes.split(","):
            block_bytes = int(text[:-1]) * segment if text.endswith("s") else int(text) // segment * segment
            rows += asyncio.run(bench_engine(arguments, segment, block_bytes))
            torch.cuda.empty_cache()
    print_rows(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": environment(), "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
