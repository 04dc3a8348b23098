"""What the cache index costs with a million entries.

    python benchmarks/index.py [--entries 1000000] [--prompt-blocks 8192] [--json]

Look-ups use fresh `bytes` objects (no cached hash, no identity shortcut), as keys from a request are. `stored`
prompts lie in the index as a chain; `scattered` keys come from everywhere in it, the worst case for the CPU's
caches; `absent` keys are not in it. Each look-up is timed once on keys not asked for before; the median counts.
"""

import argparse
import json
import platform
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvortex.index import CacheIndex, make_policy
from kvortex.types import Extent

NBYTES = 1 << 20
ROUNDS = 15


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def new_index() -> CacheIndex[Extent]:
    return CacheIndex(make_policy("lru"))


def random_keys(count: int, generator: random.Random) -> list[bytes]:
    raw = generator.randbytes(32 * count)
    return [raw[start : start + 32] for start in range(0, 32 * count, 32)]


def fill(index: CacheIndex[Extent], keys: Sequence[bytes], chunk: int) -> float:
    """Reserve and commit all keys, `chunk` a call; seconds taken by the index."""
    total = 0.0
    for first in range(0, len(keys), chunk):
        chain = keys[first : first + chunk]
        extents = [Extent((first + position) * NBYTES, NBYTES) for position in range(len(chain))]
        sizes, digests = [NBYTES] * len(chain), [hash(key) for key in chain]
        start = time.perf_counter()
        index.reserve(chain)
        index.commit(chain, extents, sizes, digests)
        total += time.perf_counter() - start
    return total


def median_ms(run: Callable[[list[bytes]], object], prompts: Sequence[Sequence[bytes]]) -> float:
    """Median over the prompts, each seen once as fresh objects."""
    times = []
    for prompt in prompts:
        fresh = [bytes(bytearray(key)) for key in prompt]
        start = time.perf_counter()
        run(fresh)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def bytes_per_entry(entries: int, generator: random.Random) -> tuple[float, float]:
    """Traced bytes per entry of a filled index: the index with its keys, and the locations beside it."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    extents = [Extent(position * NBYTES, NBYTES) for position in range(entries)]
    locations = tracemalloc.get_traced_memory()[0] - before
    index = new_index()
    keys = [generator.randbytes(32) for _ in range(entries)]
    index.reserve(keys)
    index.commit(keys, extents, [NBYTES] * entries, [generator.getrandbits(64) for _ in range(entries)])
    del keys, extents
    total = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return (total - locations) / entries, locations / entries


def measure(entries: int, prompt_blocks: int) -> list[dict[str, Any]]:
    """Rows of name, value, unit."""
    generator = random.Random(0)
    in_index, in_locations = bytes_per_entry(min(entries, 200_000), generator)
    keys = random_keys(entries, generator)
    index = new_index()
    fill_s = fill(index, keys, prompt_blocks)

    starts = [generator.randrange(max(1, entries - prompt_blocks)) for _ in range(ROUNDS)]
    stored = [keys[start : start + prompt_blocks] for start in starts]
    scattered = [generator.sample(keys, min(prompt_blocks, entries)) for _ in range(ROUNDS)]
    absent = [random_keys(prompt_blocks, generator) for _ in range(ROUNDS)]

    def row(name: str, value: float, unit: str) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": unit}

    rows = [
        row("prefix_length, stored", median_ms(index.prefix_length, stored), "ms"),
        row("prefix_length, scattered", median_ms(index.prefix_length, scattered), "ms"),
        row("prefix_length, absent", median_ms(index.prefix_length, absent), "ms"),
        row("contains_mask, stored", median_ms(index.contains_mask, stored), "ms"),
        row("contains_mask, scattered", median_ms(index.contains_mask, scattered), "ms"),
        row("contains_mask, absent", median_ms(index.contains_mask, absent), "ms"),
    ]
    pinned: list[Any] = []
    rows.append(row("pin, stored", median_ms(lambda chain: pinned.append(index.pin(chain)), stored), "ms"))
    start = time.perf_counter()
    for found in pinned:
        index.unpin(found)
    rows.append(row("unpin", (time.perf_counter() - start) * 1e3 / len(pinned), "ms"))
    rows.append(row("reserve + commit", entries / fill_s / 1e6, "M blocks/s"))

    start = time.perf_counter()
    evicted = len(index.evict(entries // 2 * NBYTES))
    rows.append(row("evict", evicted / (time.perf_counter() - start) / 1e6, "M blocks/s"))
    rows.append(row("memory, index with keys", in_index, "bytes/entry"))
    rows.append(row("memory, locations beside it", in_locations, "bytes/entry"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--prompt-blocks", type=int, default=8192)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()

    rows = measure(options.entries, options.prompt_blocks)
    report = {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "entries": options.entries,
        "prompt_blocks": options.prompt_blocks,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(report))
        return
    print(f"{report['cpu']} | Python {report['python']} | NumPy {report['numpy']}")
    print(f"{options.entries:,} entries, prompts of {options.prompt_blocks:,} blocks\n")
    for entry in rows:
        print(f"{entry['name']:<30}{entry['value']:>10.3f}  {entry['unit']}")


if __name__ == "__main__":
    main()
