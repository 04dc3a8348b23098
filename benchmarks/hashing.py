"""What block hashing costs, next to the prefill that it may save.

    python benchmarks/hashing.py [--tokens 131072] [--block-size 16] [--prefill-tokens-per-s 20000] [--json]

Times are the best of `--repeats` runs, in milliseconds. The share is hashing time over the time that the given
prefill rate takes for the same tokens: the rate is an assumption of the reader's, not measured here.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvortex.hashing import hash_blocks


def best_s(run: Callable[[], object], repeats: int) -> float:
    """Shortest of `repeats` runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def measure(tokens: int, block_size: int, prefill_tokens_per_s: float, repeats: int) -> list[dict[str, Any]]:
    """One row per kind of token container."""
    ids = np.random.default_rng(0).integers(0, 150_000, tokens)
    inputs = {"list of int": ids.tolist(), "numpy int64": ids, "numpy uint32": ids.astype(np.uint32)}
    prefill_ms = tokens / prefill_tokens_per_s * 1e3
    rows = []
    for name, token_ids in inputs.items():
        ms = best_s(lambda token_ids=token_ids: hash_blocks(token_ids, block_size), repeats) * 1e3  # type: ignore[misc]
        ns_per_block = ms * 1e6 / max(1, tokens // block_size)
        rows.append({"input": name, "ms": ms, "ns_per_block": ns_per_block, "share": ms / prefill_ms})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--prefill-tokens-per-s", type=float, default=20_000.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()

    rows = measure(options.tokens, options.block_size, options.prefill_tokens_per_s, options.repeats)
    report = {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokens": options.tokens,
        "block_size": options.block_size,
        "prefill_tokens_per_s": options.prefill_tokens_per_s,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(report))
        return
    print(f"{report['cpu']} | Python {report['python']} | NumPy {report['numpy']}")
    print(f"{options.tokens:,} tokens, block size {options.block_size}, best of {options.repeats}\n")
    rate = f"of prefill at {options.prefill_tokens_per_s:,.0f} tokens/s"
    print(f"{'input':<14}{'ms':>8}{'ns/block':>10}  {rate}")
    for row in rows:
        print(f"{row['input']:<14}{row['ms']:>8.2f}{row['ns_per_block']:>10.0f}  {row['share']:.3%}")


if __name__ == "__main__":
    main()
