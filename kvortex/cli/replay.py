"""Part two of the demo: a real request trace through an engine, every loaded byte checked."""

import argparse
import asyncio
import json
import lzma
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex import BlockHash, KVortexConfig, KVortexEngine, ModelIdentity, hash_blocks
from kvortex.control import CPU_TIER
from kvortex.errors import ConfigError
from kvortex.stats import StatsSnapshot
from kvortex.types import Direction

BLOCK_SIZE = 16
TRACE_BLOCK_TOKENS = 512  # a hash id of the trace names this many tokens
LAYERS, HEADS, HEAD_DIM = 2, 1, 16  # a small cache: 4 KiB a block in float32


@dataclass
class Replay:
    """One engine, one paged cache, and what was seen."""

    engine: KVortexEngine
    paged: dict[str, torch.Tensor]
    requests: int = 0
    blocks: int = 0
    hits: int = 0
    mismatches: int = 0
    ttft_s: list[float] = field(default_factory=list)

    async def serve(self, token_ids: NDArray[np.uint32], first_block: int) -> None:
        """What a server does with a prompt: load the known prefix, compute the rest, save everything."""
        hashes = hash_blocks(token_ids, BLOCK_SIZE)
        block_ids = np.arange(first_block, first_block + len(hashes))
        started_s = time.perf_counter()
        known = self.engine.match_prefix(hashes)
        loaded = await self.engine.load_blocks(hashes[:known], block_ids[:known])
        hit = loaded.num_prefix_loaded
        self.ttft_s.append(time.perf_counter() - started_s)
        self.mismatches += self._count_mismatches(hashes[:hit], block_ids[:hit])
        self._compute(hashes[hit:], block_ids[hit:])
        await self.engine.save_blocks(hashes, block_ids)
        self.requests += 1
        self.blocks += len(hashes)
        self.hits += hit

    def _compute(self, hashes: Sequence[BlockHash], block_ids: NDArray[np.int64]) -> None:
        if len(hashes):
            for layer, block in zip(self.paged.values(), _contents(hashes), strict=True):
                layer[:, block_ids] = torch.from_numpy(block).to(layer.device)

    def _count_mismatches(self, hashes: Sequence[BlockHash], block_ids: NDArray[np.int64]) -> int:
        if not len(hashes):
            return 0
        wrong = np.zeros(len(hashes), dtype=np.bool_)
        for layer, block in zip(self.paged.values(), _contents(hashes), strict=True):
            found = layer[:, block_ids].cpu().numpy().view(np.uint32)
            wrong |= (found != block.view(np.uint32)).any(axis=(0, 2, 3, 4))
        return int(wrong.sum())


def _contents(hashes: Sequence[BlockHash]) -> Iterator[NDArray[np.float32]]:
    """Each layer's content of blocks, `float32 [2, n, 16, H, D]`: any bits, but a function of the hash."""
    seeds = np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), 4)
    words = 2 * BLOCK_SIZE * HEADS * HEAD_DIM // 2
    for layer in range(LAYERS):
        steps = np.arange(1, words // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 + 2 * layer)
        data = (seeds[:, None, :] ^ steps[None, :, None]).reshape(len(hashes), 2, -1)
        block = data.view(np.float32).reshape(len(hashes), 2, BLOCK_SIZE, HEADS, HEAD_DIM)
        yield np.ascontiguousarray(block.swapaxes(0, 1))


def read_trace(path: Path | None, count: int) -> list[NDArray[np.uint32]]:
    """Prompts of the first `count` requests as token ids: shared where the trace's hash ids are.

    Raises:
        ConfigError: the file is not such a trace.
    """
    try:
        raw = path.read_bytes() if path is not None else _shipped_trace()
        text = lzma.decompress(raw) if raw[:6] == b"\xfd7zXZ\x00" else raw
        rows = [json.loads(line) for line in text.splitlines()[:count] if line.strip()]
        return [_prompt(row["hash_ids"], row["input_length"]) for row in rows]
    except (OSError, lzma.LZMAError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path or 'the shipped trace'} cannot be replayed: {error!r}") from error


def _shipped_trace() -> bytes:
    return (resources.files("kvortex.cli") / "data" / "mooncake_conversation.jsonl.xz").read_bytes()


def _prompt(hash_ids: Sequence[int], num_tokens: int) -> NDArray[np.uint32]:
    ids = np.asarray(hash_ids, dtype=np.uint32)
    positions = np.arange(TRACE_BLOCK_TOKENS, dtype=np.uint32)
    tokens = (ids[:, None] * np.uint32(TRACE_BLOCK_TOKENS) + positions[None, :]).reshape(-1)
    return tokens[:num_tokens]


async def _replay(
    prompts: Sequence[NDArray[np.uint32]], arguments: argparse.Namespace, progress: Any
) -> tuple[Replay, StatsSnapshot]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    concurrency = arguments.concurrency
    room = max(len(prompt) for prompt in prompts) // BLOCK_SIZE + 1
    shape = (2, room * concurrency, BLOCK_SIZE, HEADS, HEAD_DIM)
    paged = {f"layers.{i}": torch.zeros(shape, device=device) for i in range(LAYERS)}
    identity = ModelIdentity(model="replay")
    config = KVortexConfig(
        cpu_pool_bytes=arguments.pool, eviction_policy=arguments.policy, disk_path=arguments.disk, identity=identity
    )
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(paged, BLOCK_SIZE)
        if arguments.disk and not await engine.wait_tier():
            raise ConfigError(f"{arguments.disk} cannot be used, see the log")
        replay = Replay(engine, paged)
        waiting = iter(prompts)

        async def worker(number: int) -> None:
            for prompt in waiting:
                await replay.serve(prompt, number * room)
                progress()

        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(worker(number))
        await engine.flush()
        return replay, engine.get_stats()


def run(arguments: argparse.Namespace) -> bool:
    """Replay and print a table or JSON; True when no byte was wrong."""
    prompts = read_trace(arguments.trace, arguments.requests)
    if not prompts:
        raise ConfigError("the trace holds no requests")
    started_s = time.perf_counter()
    replay, stats = asyncio.run(_with_progress(prompts, arguments))
    figures = _figures(replay, stats, time.perf_counter() - started_s)
    if arguments.json:
        print(json.dumps(figures))
    else:
        _print_table(figures)
    return replay.mismatches == 0


async def _with_progress(
    prompts: Sequence[NDArray[np.uint32]], arguments: argparse.Namespace
) -> tuple[Replay, StatsSnapshot]:
    if arguments.json:
        return await _replay(prompts, arguments, lambda: None)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("replaying requests", total=len(prompts))
        return await _replay(prompts, arguments, lambda: bar.advance(task))


def _figures(replay: Replay, stats: StatsSnapshot, seconds: float) -> dict[str, Any]:
    moved = {t.direction: t for t in stats.transfers if t.tier == CPU_TIER}
    tiering = stats.tiering
    ttft = np.array(replay.ttft_s)
    return {
        "device": next(iter(replay.paged.values())).device.type,
        "requests": replay.requests,
        "blocks": replay.blocks,
        "hit_rate": replay.hits / replay.blocks if replay.blocks else 0.0,
        "bytes_saved": moved[Direction.SAVE].nbytes if Direction.SAVE in moved else 0,
        "bytes_loaded": moved[Direction.LOAD].nbytes if Direction.LOAD in moved else 0,
        **{
            f"{direction.value}_{name}_ms": getattr(moved[direction], f"{name}_s") * 1e3
            for direction in Direction
            if direction in moved
            for name in ("p50", "p99")
        },
        "prefix_ready_p50_ms": float(np.percentile(ttft, 50)) * 1e3,
        "prefix_ready_p99_ms": float(np.percentile(ttft, 99)) * 1e3,
        "evicted_blocks": stats.evicted_blocks,
        **(
            {
                "disk_written_blocks": tiering.written_blocks,
                "disk_shed_blocks": tiering.shed_blocks,
                "disk_fetched_blocks": tiering.fetched_blocks,
            }
            if tiering is not None
            else {}
        ),
        "mismatches": replay.mismatches,
        "seconds": seconds,
    }


def _print_table(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Conversation trace through the engine", show_header=False)
    for name, value in figures.items():
        if name.startswith("bytes"):
            text = f"{value / 2**30:.2f} GiB"
        elif name == "hit_rate":
            text = f"{value:.1%} of blocks"
        elif isinstance(value, float):
            text = f"{value:,.2f}"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)
