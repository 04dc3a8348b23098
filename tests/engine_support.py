"""Helpers of the engine's tests: a small cache, its content, engines with injected faults."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import torch

from kvortex import BlockHash, EngineParts, KVortexConfig, KVortexEngine, Namespace, hash_blocks
from kvortex.config import KIB, MIB
from kvortex.layout import KVLayout
from kvortex.sched import TransferExecutor
from kvortex.sched.batcher import Batch
from kvortex.testing import Fault, FaultInjectingExecutor
from kvortex.tiers import Tier

BLOCK_SIZE = 16
NUM_BLOCKS = 64
BLOCK_NBYTES = 2 * 2 * BLOCK_SIZE * 2 * 16 * 4  # layers, K and V, tokens, heads, head size, float32


def make_cache(num_blocks: int = NUM_BLOCKS, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}": torch.randn(2, num_blocks, BLOCK_SIZE, 2, 16, generator=generator) for i in range(2)}


def chain(num_blocks: int, salt: int = 0) -> list[BlockHash]:
    return hash_blocks(np.arange(num_blocks * BLOCK_SIZE), BLOCK_SIZE, extra_keys=(salt,))


def contents(cache: dict[str, torch.Tensor], block_ids: Sequence[int]) -> list[bytes]:
    """Each block's bytes, by torch's indexing."""
    return [b"".join(layer[:, b].contiguous().numpy().tobytes() for layer in cache.values()) for b in block_ids]


def wipe(cache: dict[str, torch.Tensor], block_ids: Sequence[int]) -> None:
    for layer in cache.values():
        layer[:, list(block_ids)] = float("nan")


class Parts(EngineParts):
    """Parts that functions make.

    Args:
        make_tier: namespace -> the tier.
        wrap_executor: the device's own executor -> another around it.
    """

    def __init__(
        self,
        *,
        make_tier: Callable[[Namespace], Tier] | None = None,
        wrap_executor: Callable[[TransferExecutor], TransferExecutor] | None = None,
    ) -> None:
        self._make_tier = make_tier
        self._wrap_executor = wrap_executor

    def make_tier(self, config: KVortexConfig, namespace: Namespace) -> Tier | None:
        return self._make_tier(namespace) if self._make_tier else super().make_tier(config, namespace)

    def wrap_executor(self, executor: TransferExecutor) -> TransferExecutor:
        return self._wrap_executor(executor) if self._wrap_executor else super().wrap_executor(executor)


def small_config(**changes: object) -> KVortexConfig:
    """A pool of many blocks in several pieces, batches of four blocks."""
    small = KVortexConfig(
        pool={"bytes": 4 * MIB, "pin_piece_bytes": 256 * KIB},
        transfer={"max_batch_bytes": 4 * BLOCK_NBYTES, "linger_s": 0.0, "self_test": False},
    )
    return small.replace(**changes)


@asynccontextmanager
async def running_engine(
    cache: dict[str, torch.Tensor],
    config: KVortexConfig | None = None,
    fault_of: Callable[[int, Batch], Fault | None] | None = None,
) -> AsyncIterator[tuple[KVortexEngine, FaultInjectingExecutor]]:
    """An engine over `cache` whose batches go wrong as `fault_of` says."""
    faulty: list[FaultInjectingExecutor] = []

    def wrap(inner: TransferExecutor) -> FaultInjectingExecutor:
        faulty.append(FaultInjectingExecutor(inner, fault_of or (lambda number, batch: None)))
        return faulty[0]

    async with KVortexEngine.create(config or small_config(), Parts(wrap_executor=wrap)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        yield engine, faulty[0]


def layout_of(cache: dict[str, torch.Tensor]) -> KVLayout:
    return KVLayout.from_tensors(cache, BLOCK_SIZE)
