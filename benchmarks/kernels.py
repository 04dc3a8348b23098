"""Gather, scatter, pack and unpack on the device alone, against a plain device copy of the same run. Needs a GPU.

    python benchmarks/kernels.py [--segment-bytes 65536,16384,4096] [--json FILE]

GB/s count bytes read and written. `ratio` is against a device copy of 128 MiB. `ms/GiB` is the time for one GiB
of KV, during which the kernel takes the card from the model that shares it.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from transfer import environment

from kvortex.codecs import packing_for
from kvortex.cuda.driver import Device
from kvortex.kernels import DeviceKernels
from kvortex.kernels.device import BatchSlot, device_table, staging_block_nbytes
from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.kernels.tiles import scratch_words
from kvortex.layout import KVLayout

SEGMENTS_A_BLOCK = 32
BATCH_BYTES = 128 << 20


@dataclass
class Row:
    kernel: str
    segment_bytes: int
    blocks: int
    gb_per_s: float
    ratio: float
    ms_per_gib: float


def median_s(run: Callable[[], None], stream: int, device: Device, repeats: int = 9) -> float:
    """Median seconds between two events around a run, which is queued before the device comes to it."""
    start, end = device.create_event(timing=True), device.create_event(timing=True)
    ahead = torch.empty((2, BATCH_BYTES), dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 2):
        device.copy_async(ahead[0].data_ptr(), ahead[1].data_ptr(), BATCH_BYTES, stream)
        device.record_event(start, stream)
        run()
        device.record_event(end, stream)
        device.synchronize_event(end)
        times.append(device.elapsed_s(start, end))
    return statistics.median(times[2:])


def device_copy_rate(device: Device, stream: int, nbytes: int) -> float:
    """Bytes read and written a second by a device-to-device copy of `nbytes`."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = median_s(lambda: device.copy_async(target.data_ptr(), source.data_ptr(), nbytes, stream), stream, device)
    return 2 * nbytes / seconds


def bench(device: Device, stream: int, segment: int, copy_rate: float, codec: str) -> list[Row]:
    """Rows of one segment size and codec: a full batch, and a sixteenth of one."""
    blocks = 2 * min(BATCH_BYTES // (SEGMENTS_A_BLOCK * segment), MAX_BATCH_BLOCKS)
    rng = torch.Generator(device="cuda").manual_seed(segment)
    kv = {
        f"layers.{i}": torch.randn((blocks, 16, segment // 32), device="cuda", generator=rng).to(torch.bfloat16)
        for i in range(SEGMENTS_A_BLOCK)
    }
    layout = KVLayout.from_tensors(kv, 16)
    packing = packing_for(layout, codec)
    count = blocks // 2
    ids = np.random.default_rng(0).permutation(blocks)[:count].astype(np.int32)
    tiles = torch.from_numpy(device_table(layout, packing)).cuda()
    staging = torch.empty(count * staging_block_nbytes(layout, packing), dtype=torch.uint8, device="cuda")
    scratch = torch.empty(8 * scratch_words(count), dtype=torch.uint8, device="cuda")
    rows = []
    with contextlib.closing(BatchSlot(device, count, scratch.data_ptr(), stream)) as slot:
        kernels = DeviceKernels(layout, device, tiles.data_ptr(), packing)
        names = ("gather", "scatter") if packing is None else (f"pack {codec}", f"unpack {codec}")
        stored = packing.block_nbytes if packing else layout.block_nbytes
        for moved in (count, max(count // 16, 1)):
            for name, launch in zip(names, (kernels.gather, kernels.scatter), strict=True):
                run = partial(launch, ids[:moved], staging.data_ptr(), slot, stream=stream)
                seconds = median_s(run, stream, device)
                rate = moved * (layout.block_nbytes + stored) / seconds
                cost = seconds * 1e3 / (moved * layout.block_nbytes / 2**30)
                rows.append(Row(name, segment, moved, rate / 1e9, rate / copy_rate, cost))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segment-bytes", default="65536,16384,4096")
    parser.add_argument("--codecs", default="raw,fp8")
    parser.add_argument("--json", help="write the figures to this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device; none is visible")
    torch.cuda.init()
    device = Device(torch.cuda.current_device())
    stream = device.create_stream()
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    copy_rate = device_copy_rate(device, stream, BATCH_BYTES)
    print(f"device copy of {BATCH_BYTES >> 20} MiB: {copy_rate / 1e9:.0f} GB/s read and written")
    rows = [
        row
        for codec in arguments.codecs.split(",")
        for segment in map(int, arguments.segment_bytes.split(","))
        for row in bench(device, stream, segment, copy_rate, codec)
    ]
    print(f"{'kernel':<12} {'segment':>8} {'blocks':>6} {'GB/s':>7} {'ratio':>6} {'ms/GiB':>7}")
    for row in rows:
        print(
            f"{row.kernel:<12} {row.segment_bytes:>8} {row.blocks:>6} {row.gb_per_s:>7.0f} {row.ratio:>6.3f} "
            f"{row.ms_per_gib:>7.2f}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": environment(), "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
