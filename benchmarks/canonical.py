"""Re-laying blocks of a model's shape on one core, against a plain copy with a digest in the same run.

python benchmarks/canonical.py [--layers 32] [--heads 8] [--head-size 128] [--block-size 16] [--passes 15] [--json]
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.codecs import Pages, packing_for
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.kernels.relayout import warm_up
from kvortex.layout import KVLayout
from kvortex.layout.canonical import BlockRuns, BlockShard, Heads, runs_of, shards_of
from kvortex.tiering.canonical_blocks import CanonicalBlock, shards_by_form
from kvortex.tiers.payload import copy_payload, payload_digest

BLOCKS_A_PASS = 16


def runs_for(arguments: argparse.Namespace, ranks: int, heads_first: bool, codec: str) -> BlockRuns:
    """The runs of a block of all ranks; K and V of a layer are `[blocks, 2, tokens, heads, head size]`, bfloat16."""
    heads, parts, offset = arguments.heads // ranks, [], 0
    for rank in range(ranks):
        tensors = {}
        for layer in range(arguments.layers):
            tensor = torch.zeros(1, 2, arguments.block_size, heads, arguments.head_size, dtype=torch.bfloat16)
            turned = tensor.transpose(2, 3).contiguous().transpose(2, 3)
            tensors[f"layers.{layer}"] = turned if heads_first else tensor
        layout = KVLayout.from_tensors(tensors, arguments.block_size, block_dim=0)
        of_rank = Heads(3, rank * heads, arguments.heads)
        shards = shards_of(layout, {name: t.shape for name, t in tensors.items()}, dict.fromkeys(tensors, of_rank))
        by_form = shards_by_form(Pages(layout, packing_for(layout, codec)), shards)
        parts.append(BlockShard(offset, by_form[-1] or by_form[0]))
        offset = align_up(offset + parts[-1].nbytes, EXTENT_ALIGNMENT_BYTES)
    return runs_of(parts, offset + 8 * ranks if ranks > 1 else parts[0].nbytes)


def gbps(arguments: argparse.Namespace, nbytes: int, move: Callable[[int], object]) -> float:
    """Stored bytes a second, the median of the passes, each over several blocks."""
    seconds = []
    for number in range(arguments.passes + 1):
        started = time.perf_counter()
        for block in range(BLOCKS_A_PASS):
            move(block)
        if number:
            seconds.append(time.perf_counter() - started)
    return BLOCKS_A_PASS * nbytes / statistics.median(seconds) / 1e9


def memory(nbytes: int, seed: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, nbytes, dtype=np.uint8) for _ in range(BLOCKS_A_PASS)]


def measure(arguments: argparse.Namespace, codec: str, ranks: int, heads_first: bool) -> dict[str, Any]:
    runs = runs_for(arguments, ranks, heads_first, codec)
    block = CanonicalBlock(runs)
    canonical, payloads = memory(runs.nbytes, 0), memory(runs.payload_nbytes, 1)
    digests = [payload_digest(one) for one in canonical]
    in_pool = [block.up(*pair) for pair in zip(canonical, payloads, digests, strict=True)]
    others = memory(runs.nbytes, 2)
    rates = {
        "copy": gbps(arguments, runs.nbytes, lambda n: copy_payload(others[n], canonical[n])),
        "down": gbps(arguments, runs.nbytes, lambda n: block.down(payloads[n], others[n], in_pool[n] or 0)),
        "up": gbps(arguments, runs.nbytes, lambda n: block.up(others[n], payloads[n], digests[n])),
    }
    if [payload_digest(one) for one in others] != digests:
        raise SystemExit("blocks did not come back as they were")
    heads = "first" if heads_first else "behind tokens"
    return {"codec": codec, "ranks": ranks, "heads": heads, "block_bytes": runs.nbytes, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8, help="KV heads of the model")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16, help="tokens")
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warm_up()
    counts = [ranks for ranks in (1, 2, 4, 8) if arguments.heads % ranks == 0]
    cases = itertools.product(("raw", "fp8"), counts, (False, True))
    rows = [measure(arguments, *case) for case in cases]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python"
    if arguments.json:
        print(json.dumps({"machine": f"{machine} {platform.python_version()}", "rows": rows}))
        return
    print(f"{machine} {platform.python_version()}; GB/s of stored bytes on one core\n")
    print("| codec | ranks | heads | block | copy and digest | down | up |\n|---|---|---|---|---|---|---|")
    for row in rows:
        rates = " | ".join(f"{row[name]:.1f}" for name in ("copy", "down", "up"))
        print(f"| {row['codec']} | {row['ranks']} | {row['heads']} | {row['block_bytes']} | {rates} |")


if __name__ == "__main__":
    main()
