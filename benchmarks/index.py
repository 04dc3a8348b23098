"""What the cache index costs with a million entries.

python benchmarks/index.py [--entries 1000000] [--prompt-blocks 8192] [--eviction lru] [--ranked] [--json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvortex.config import EVICTION_POLICIES
from kvortex.index import CacheIndex, EvictionPolicy, make_policy, pack_keys, warm_up
from kvortex.index.orders import EvictionOrders
from kvortex.types import BLOCK_HASH_BYTES

NBYTES = 2 << 20
PROMPTS = 50


def random_keys(count: int, seed: int) -> list[bytes]:
    data = np.random.default_rng(seed).bytes(count * BLOCK_HASH_BYTES)
    return [data[i : i + BLOCK_HASH_BYTES] for i in range(0, len(data), BLOCK_HASH_BYTES)]


def median_ms(run: Callable[[int], object]) -> float:
    """Median over prompts, each at other keys: nothing is in a processor cache from the last time."""
    times = []
    for number in range(PROMPTS):
        started = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def array_bytes(index: CacheIndex) -> int:
    """Bytes of everything the index and its orders of eviction hold, by looking at their arrays."""
    policy: EvictionPolicy = index._policy
    arrays = [*index._table]
    for order in policy._orders() if isinstance(policy, EvictionOrders) else [policy]:
        arrays.extend(vars(order).values())
    if isinstance(policy, EvictionOrders):
        arrays.append(policy._share_of)
    return sum(array.nbytes for array in arrays)


def measure(entries: int, prompt_blocks: int, policy_name: str, *, ranked: bool) -> dict[str, Any]:
    """Figures of one index; its blocks have a priority and a quota, if `ranked`."""
    warm_up(policy_name)
    index = CacheIndex(make_policy(policy_name), ghost_entries=65536, expected_entries=entries)
    if ranked:
        index.rank(range(2), priority=1, is_bounded=True)
    keys = random_keys(entries, 1)
    offsets, digests = np.arange(entries, dtype=np.int64) * NBYTES, np.arange(entries, dtype=np.uint64)
    stored_s = []
    for start in range(0, entries, prompt_blocks):
        started = time.perf_counter()
        part = slice(start, start + prompt_blocks)
        slots = index.reserve(pack_keys(keys[part])).slots
        index.commit(slots, offsets[part], NBYTES, digests[part])
        stored_s.append(time.perf_counter() - started)
    order = np.random.default_rng(2).permutation(entries)
    prompts = [
        [bytes(bytearray(keys[i])) for i in np.roll(order, -n * prompt_blocks)[:prompt_blocks]] for n in range(PROMPTS)
    ]
    chains = [[bytes(bytearray(k)) for k in keys[n * prompt_blocks :][:prompt_blocks]] for n in range(PROMPTS)]
    absent = random_keys(prompt_blocks, 3)
    pins: list[Any] = []
    figures: dict[str, Any] = {
        "prefix_length_chain_ms": median_ms(lambda n: index.prefix_length(chains[n])),
        "prefix_length_scattered_ms": median_ms(lambda n: index.prefix_length(prompts[n])),
        "contains_mask_scattered_ms": median_ms(lambda n: index.contains_mask(prompts[n])),
        "contains_mask_absent_ms": median_ms(lambda n: index.contains_mask(absent)),
        "pin_ms": median_ms(lambda n: pins.append(index.pin(pack_keys(chains[n])).slots)),
        "unpin_ms": median_ms(lambda n: index.unpin(pins[n])),
        "reserve_and_commit_ms": statistics.median(stored_s) * 1e3,
        "reserve_and_commit_blocks_per_s": entries / sum(stored_s),
    }
    evicted_s, evicted = [], 0
    for _ in range(min(2000, entries // 64)):
        started = time.perf_counter()
        evicted += index.evict(64 * NBYTES).offsets.size
        evicted_s.append(time.perf_counter() - started)
    figures["evict_64_ms"] = statistics.median(evicted_s) * 1e3
    figures["evict_blocks_per_s"] = evicted / sum(evicted_s)
    figures["bytes_per_entry"] = array_bytes(index) / index._table.capacity
    return {"policy": policy_name, "entries": entries, "prompt_blocks": prompt_blocks, **figures}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--prompt-blocks", type=int, default=8192)
    parser.add_argument("--eviction", choices=EVICTION_POLICIES, default="lru")
    parser.add_argument("--ranked", action="store_true", help="blocks have a priority and a quota")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = {
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **measure(arguments.entries, arguments.prompt_blocks, arguments.eviction, ranked=arguments.ranked),
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        text = (
            f"{value:,.3f}"
            if isinstance(value, float) and value < 1000
            else f"{value:,.0f}"
            if isinstance(value, float)
            else str(value)
        )
        print(f"{name:<34} {text:>20}")


if __name__ == "__main__":
    main()
