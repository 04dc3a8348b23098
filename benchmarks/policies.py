"""Hit rates of the eviction policies, and of the offline optimum, on a conversation trace.

python benchmarks/policies.py [--trace FILE] [--requests N] [--sizes GIB ...] [--eviction-watermark SHARE]
    [--eviction-ratio SHARE] [--json] [--plot docs/eviction.svg]

Each prompt is served as an LLM server does it, through the engine's own control plane, with its index, policies,
watermark, pace and extents: the contiguous prefix that is cached is loaded (pinned, unpinned), then the whole prompt is
saved (reserved, room made, committed). Blocks of 16 tokens, 2 MiB each (an 8B Llama in bf16). The prompts come one
after another, and nothing is in flight.

The optimum is Belady's MIN (IBM Systems Journal 1966) with the freedom not to keep what has just been computed: after
each request, of the blocks cached before and those of the request, the cache keeps those whose next use is soonest.
For blocks of one size this is the largest number of hits that any policy can have, since each pair of successive uses
is an interval, a hit needs the block to be kept over the whole of it, and dropping the interval that ends last is
optimal where too many overlap (Faigle and Nawijn, Discrete Applied Mathematics 1995). Whoever uses a block uses all
in front of it, so a head's next use is never later than its tail's; with the deeper block going first among equals,
what is kept is closed under prefixes. Hence every one of those hits is a contiguous prefix hit too, and the bound
holds for these. It knows the future: no server can reach it.
"""

import argparse
import contextlib
import heapq
import json
import lzma
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex import KVortexConfig
from kvortex.index import RESERVED, CacheIndex, EvictionPolicy
from kvortex.planes.control import ControlPlane
from kvortex.types import BlockSizes

BLOCK_TOKENS, TRACE_BLOCK_TOKENS = 16, 512
BLOCK_BYTES = BLOCK_TOKENS * 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head size, bf16
SIZES_GIB = (128, 512, 1024, 2048, 4096)
POLICIES = ("lru", "s3fifo", "arc")
OPTIMUM = "optimum"
NEVER = 1 << 30
DEFAULTS = KVortexConfig()


class Prompt(NamedTuple):
    """A request: names of its blocks `int64 [n]`, the request that uses each next or NEVER `int64 [n]`, its tokens."""

    names: NDArray[np.int64]
    next_use: NDArray[np.int64]
    num_tokens: int

    def keys(self) -> NDArray[np.uint64]:
        """Keys `uint64 [n, 4]`, uniform as hashes are (splitmix64)."""
        words = self.names.astype(np.uint64)[:, None] * np.uint64(4) + np.arange(4, dtype=np.uint64)
        words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return words ^ words >> np.uint64(31)


@dataclass(frozen=True)
class Result:
    """What one policy found in a cache of one size; rates over all blocks and over all prompt tokens."""

    policy: str
    size_gib: float
    block_hit_rate: float
    token_hit_rate: float
    evicted_blocks: int
    seconds: float


class OfflineOptimum(EvictionPolicy):
    """Evicts what is used last of all; `next_use` must be set before each insert. A bucket a future request."""

    def __init__(self) -> None:
        self.next_use: NDArray[np.int64] = np.zeros(0, np.int64)
        self._buckets: dict[int, list[NDArray[np.int32]]] = {}  # runs of a chain, deepest first
        self._order: list[int] = []  # of the buckets, negative: a heap with the latest on top
        self._count = 0

    def resize(self, capacity: int) -> None:
        pass

    def serve(self, number: int) -> None:
        """The request's own blocks leave their bucket: it was theirs alone."""
        self._count -= sum(run.size for run in self._buckets.pop(number, []))

    def insert(self, slots: NDArray[np.int32], evicted: NDArray[np.bool_] | None = None) -> None:
        ends = np.flatnonzero(np.diff(self.next_use)) + 1
        for run, use in zip(np.split(slots, ends), self.next_use[np.r_[0, ends]].tolist(), strict=True):
            if use not in self._buckets:
                self._buckets[use] = []
                heapq.heappush(self._order, -use)
            # What is in the bucket already is deeper: it was used before, and its ancestors again now.
            self._buckets[use].append(run)
        self._count += slots.size

    def access(self, slots: NDArray[np.int32]) -> None:
        pass

    def remove(self, slots: NDArray[np.int32]) -> None:
        raise NotImplementedError("nothing fails here")

    def pop_coldest(self, target_bytes: int, nbytes: NDArray[np.int64], pins: NDArray[np.int32]) -> NDArray[np.int32]:
        wanted, popped = -(-target_bytes // BLOCK_BYTES), [np.zeros(0, np.int32)]
        while wanted > 0 and self._count:
            runs = self._buckets.get(-self._order[0])
            if not runs:
                self._buckets.pop(-heapq.heappop(self._order), None)
                continue
            run = runs[0]
            runs[0], tail = run[: max(run.size - wanted, 0)], run[max(run.size - wanted, 0) :]
            if not runs[0].size:
                del runs[0]
            popped.append(tail[::-1])
            wanted -= tail.size
            self._count -= tail.size
        return np.concatenate(popped)

    def __len__(self) -> int:
        return self._count


def read_trace(path: Path | None, count: int | None) -> list[Prompt]:
    """The first `count` requests; a hash id of the trace names up to 512 tokens, of which whole blocks are cached."""
    shipped = resources.files("kvortex.cli") / "data" / "mooncake_conversation.jsonl.xz"
    raw = path.read_bytes() if path else shipped.read_bytes()
    text = lzma.decompress(raw) if raw[:6] == b"\xfd7zXZ\x00" else raw
    rows = [json.loads(line) for line in text.splitlines()[:count]]
    following: dict[int, int] = {}
    prompts = []
    per_id = TRACE_BLOCK_TOKENS // BLOCK_TOKENS
    for number in range(len(rows) - 1, -1, -1):
        ids, num_tokens = rows[number]["hash_ids"], rows[number]["input_length"]
        whole = num_tokens // BLOCK_TOKENS
        next_use = np.repeat([following.get(name, NEVER) for name in ids], per_id)[:whole]
        names = (np.repeat(ids, per_id) * per_id + np.tile(np.arange(per_id), len(ids)))[:whole]
        following.update(dict.fromkeys(ids, number))
        prompts.append(Prompt(names, next_use, num_tokens))
    return prompts[::-1]


def serve(control: ControlPlane, keys: NDArray[np.uint64]) -> int:
    """One request as a server treats it; the number of blocks in its cached prefix."""
    found = control.index.prefix_length(keys)
    block_ids = np.arange(len(keys), dtype=np.int32)
    control.finish_load(control.plan_load(keys[:found], block_ids[:found]))
    saved = control.plan_save(keys, block_ids, "save")
    control.finish_save(saved, np.zeros(len(saved.slots), np.uint64))
    return found


def serve_optimally(index: CacheIndex, policy: OfflineOptimum, number: int, prompt: Prompt, capacity_bytes: int) -> int:
    """One request with knowledge of all later ones: what is not worth keeping is not kept."""
    keys = prompt.keys()
    found = index.prefix_length(keys)
    policy.serve(number)
    policy.next_use = prompt.next_use
    reservation = index.reserve(keys)
    commit(index, reservation.slots[reservation.states == RESERVED])
    index.evict(index.committed_bytes - capacity_bytes)
    return found


def commit(index: CacheIndex, slots: NDArray[np.int32]) -> None:
    index.commit(slots, np.zeros(slots.size, np.int64), BLOCK_BYTES, np.zeros(slots.size, np.uint64))


def simulate(
    name: str,
    prompts: Sequence[Prompt],
    size_gib: float,
    progress: Callable[[], object],
    settings: KVortexConfig = DEFAULTS,
) -> Result:
    """The whole trace through a cache of one size; `settings` says when it evicts."""
    capacity_bytes = int(size_gib * (1 << 30))
    blocks = capacity_bytes // BLOCK_BYTES
    found = []
    started_s = time.perf_counter()
    if name == OPTIMUM:
        optimum = OfflineOptimum()
        index = CacheIndex(optimum, ghost_entries=blocks, expected_entries=2 * blocks)
        for number, prompt in enumerate(prompts):
            found.append(serve_optimally(index, optimum, number, prompt, capacity_bytes))
            progress()
    else:
        config = settings.replace(pool=capacity_bytes, eviction={"policy": name, "ghost_entries": blocks})
        control = ControlPlane.from_config(config, capacity_bytes, [BlockSizes(BLOCK_BYTES, BLOCK_BYTES)])
        index = control.index
        for prompt in prompts:
            found.append(serve(control, prompt.keys()))
            progress()
        control.clear()
    return Result(
        policy=name,
        size_gib=size_gib,
        block_hit_rate=sum(found) / sum(prompt.names.size for prompt in prompts),
        token_hit_rate=sum(found) * BLOCK_TOKENS / sum(prompt.num_tokens for prompt in prompts),
        evicted_blocks=index.evicted_blocks,
        seconds=time.perf_counter() - started_s,
    )


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], Callable[[], object]]]:
    """Gives a function from a description to what advances the bar; on stderr, so that JSON stays clean."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def describe(text: str) -> Callable[[], object]:
            bar.update(task, description=text)
            return lambda: bar.advance(task)

        yield describe


def print_table(results: Sequence[Result], sizes: Sequence[float]) -> None:
    """A row a size, a column a policy: blocks / tokens."""
    by_place = {(result.policy, result.size_gib): result for result in results}
    names = (*POLICIES, OPTIMUM)
    print("| cache | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for size in sizes:
        row = (by_place[name, size] for name in names)
        rates = " | ".join(f"{100 * r.block_hit_rate:.2f} / {100 * r.token_hit_rate:.2f}" for r in row)
        print(f"| {size:g} GiB | {rates} |")


def plot(results: Sequence[Result], path: Path) -> None:
    """Hit rate over size, a line a policy.

    Raises:
        SystemExit: matplotlib is missing; the message names the extra to install.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install 'kvortex[bench]'")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvortex"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in zip((*POLICIES, OPTIMUM), ("o-", "s-", "^-", "k--"), strict=True):
        own = [result for result in results if result.policy == name]
        axes.plot([r.size_gib for r in own], [100 * r.token_hit_rate for r in own], style, label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r.size_gib for r in results}), [f"{s:g}" for s in sorted({r.size_gib for r in results})])
    axes.set(xlabel="cache, GiB", ylabel="prompt tokens found, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="JSON lines, .xz or plain (default: the shipped trace)")
    parser.add_argument("--requests", type=int, help="only the first N")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES_GIB, metavar="GIB")
    parser.add_argument("--eviction-watermark", type=float, default=DEFAULTS.eviction.watermark)
    parser.add_argument("--eviction-ratio", type=float, default=DEFAULTS.eviction.ratio)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    prompts = read_trace(arguments.trace, arguments.requests)
    settings = KVortexConfig(eviction={"watermark": arguments.eviction_watermark, "ratio": arguments.eviction_ratio})
    results = []
    with progress_bar(len(prompts) * len(arguments.sizes) * (len(POLICIES) + 1)) as describe:
        for size in arguments.sizes:
            for name in (*POLICIES, OPTIMUM):
                results.append(simulate(name, prompts, size, describe(f"{name}, {size:g} GiB"), settings))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.json:
        report: dict[str, Any] = {"requests": len(prompts), "results": [asdict(result) for result in results]}
        print(json.dumps(report))
        return
    print_table(results, arguments.sizes)


if __name__ == "__main__":
    main()
