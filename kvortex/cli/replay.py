"""Part two of the demo: replays a real request trace through an engine and checks every loaded byte."""

import argparse
import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex import BlockHash, KVortexConfig, KVortexEngine, ModelIdentity, hash_blocks
from kvortex.cli import REPLAY_BLOCK_BYTES
from kvortex.cli.trace import read_trace
from kvortex.config import format_bytes
from kvortex.errors import ConfigError
from kvortex.planes.control import CPU_TIER
from kvortex.stats import StatsSnapshot
from kvortex.types import Direction

BLOCK_SIZE = 16
LAYERS, HEADS, HEAD_DIM = 2, 1, 16  # `REPLAY_BLOCK_BYTES` a block in float32


@dataclass
class Replay:
    """One engine, one paged cache, and the results of a replay."""

    engine: KVortexEngine
    paged: dict[str, torch.Tensor]
    waits_for_disk: bool = False
    start_s: float = 0.0
    seconds: float = 0.0
    requests: int = 0
    blocks: int = 0
    hits: int = 0
    mismatches: int = 0
    ttft_s: list[float] = field(default_factory=list)

    async def serve(self, token_ids: NDArray[np.uint32], first_block: int) -> None:
        """Process a prompt as a server does: load the known prefix, compute the rest, save everything."""
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
        if self.waits_for_disk:  # a server computes meanwhile
            await self.engine.flush()
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
    """Content of blocks per layer, `float32 [2, n, 16, H, D]`: arbitrary bits, computed from the hash."""
    seeds = np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), 4)
    words = 2 * BLOCK_SIZE * HEADS * HEAD_DIM // 2
    for layer in range(LAYERS):
        steps = np.arange(1, words // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 + 2 * layer)
        data = (seeds[:, None, :] ^ steps[None, :, None]).reshape(len(hashes), 2, -1)
        block = data.view(np.float32).reshape(len(hashes), 2, BLOCK_SIZE, HEADS, HEAD_DIM)
        yield np.ascontiguousarray(block.swapaxes(0, 1))


def run(arguments: argparse.Namespace, report: ModuleType | None) -> dict[str, Any]:
    """Replay the trace that the arguments name.

    Args:
        arguments: the parsed command line.
        report: shows progress, figures and notes; None shows nothing.

    Returns:
        Figures by name: sizes in bytes, rates as shares, the rest as the names say.

    Raises:
        ConfigError: the trace cannot be read, or pool and disk cannot be had.
    """
    prompts = read_trace(arguments.trace, arguments.requests, arguments.trace_block_size)
    if not prompts:
        raise ConfigError("the trace holds no requests")
    bar = contextlib.nullcontext(lambda: None)
    with report.progress("replaying requests", len(prompts)) if report is not None else bar as advance:
        replay, stats = asyncio.run(_replay(prompts, arguments, advance))
    figures = _figures(replay, stats, arguments)
    if report is not None:
        report.print_replay(figures)
        for note in _notes(figures, arguments):
            report.print_note(note)
    return figures


async def _replay(
    prompts: Sequence[NDArray[np.uint32]], arguments: argparse.Namespace, advance: Callable[[], None]
) -> tuple[Replay, StatsSnapshot]:
    started_s = time.perf_counter()
    concurrency = min(arguments.concurrency, len(prompts))
    room = max(len(prompt) for prompt in prompts) // BLOCK_SIZE + 1
    async with KVortexEngine.create(_config(arguments, room * concurrency)) as engine:
        replay = Replay(engine, _paged_cache(room * concurrency), waits_for_disk=bool(arguments.disk))
        engine.register_kv_caches(replay.paged, BLOCK_SIZE)
        if arguments.disk and not await engine.wait_tier():
            raise ConfigError(f"{arguments.disk} cannot be used, see the log")
        ready_s = time.perf_counter()
        waiting = iter(prompts)

        async def worker(number: int) -> None:
            for prompt in waiting:
                await replay.serve(prompt, number * room)
                advance()

        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(worker(number))
        replay.start_s, replay.seconds = ready_s - started_s, time.perf_counter() - ready_s
        return replay, engine.get_stats()


def _config(arguments: argparse.Namespace, num_blocks: int) -> KVortexConfig:
    """Settings for a pool of as many blocks as asked for, in blocks of the replay's own size."""
    pool_blocks = arguments.pool // arguments.block_bytes
    if not pool_blocks:
        raise ConfigError(f"a pool of {arguments.pool} bytes holds no block of {arguments.block_bytes}: raise --pool")
    return KVortexConfig(
        pool=pool_blocks * REPLAY_BLOCK_BYTES,
        eviction=arguments.eviction,
        disk=arguments.disk,
        tier={"queue_blocks": num_blocks},
        identity=ModelIdentity(model="replay"),
    )


def _paged_cache(num_blocks: int) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, num_blocks, BLOCK_SIZE, HEADS, HEAD_DIM)
    return {f"layers.{i}": torch.zeros(shape, device=device) for i in range(LAYERS)}


def _figures(replay: Replay, stats: StatsSnapshot, arguments: argparse.Namespace) -> dict[str, Any]:
    moved = {t.direction: t for t in stats.transfers if t.tier == CPU_TIER}
    tiering = stats.tiering
    ttft = np.array(replay.ttft_s)
    return {
        "device": next(iter(replay.paged.values())).device.type,
        "pool_bytes": arguments.pool,
        "block_bytes": arguments.block_bytes,
        "pool_blocks": arguments.pool // arguments.block_bytes,
        "pool_tokens": arguments.pool // arguments.block_bytes * BLOCK_SIZE,
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
        "start_seconds": replay.start_s,
        "seconds": replay.seconds,
    }


def _notes(figures: dict[str, Any], arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.block_bytes == REPLAY_BLOCK_BYTES:
        yield (
            f"A block of {BLOCK_SIZE} tokens takes {format_bytes(REPLAY_BLOCK_BYTES)} here, and some 2 MiB in a model "
            "of 8 billion parameters: give --block-bytes to see a pool as your model would fill it."
        )
    if shed := figures.get("disk_shed_blocks", 0):
        share = shed / max(shed + figures["disk_written_blocks"], 1)
        yield f"{share:.0%} of the blocks for the disk were not written: it is full, too slow or failing, see the log."
