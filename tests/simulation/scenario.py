"""A scenario, made from a seed: settings, faults, keys, and the bytes that belong to each key."""

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex import BlockHash, hash_blocks
from kvortex.config.sections import EVICTION_POLICIES, TIER_ADMISSIONS, TIER_INCLUSIONS, TIER_SHEDS
from tests.simulation.executor import ExecutorFaults
from tests.simulation.tier import TierFaults

BLOCK_SIZE, LAYERS, WIDTH = 16, 2, 8
BLOCK_NBYTES = LAYERS * BLOCK_SIZE * WIDTH * 4
CLIENTS, BLOCKS_EACH = 4, 8
CHAINS, CHAIN_BLOCKS = 5, 8
TIMEOUT_S = 1.0  # of the tier


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a seed is made of, beside its dice."""

    settings: dict[str, Any]
    executor_faults: ExecutorFaults
    tier_faults: TierFaults
    store_blocks: int
    warm: bool  # the store has everything from before
    lives: int
    rounds: int
    loss: float  # chance, every now and then, that a block of the store is lost or taken away by others
    shutdown: bool  # in the middle of everything
    shuffled: bool

    @classmethod
    def drawn(cls, dice: random.Random) -> "Scenario":
        def chance(most: float) -> float:
            return dice.choice((0.0, 0.0, most / 4, most))

        codec = dice.choice(("raw", "raw", "bf16"))
        settings: dict[str, Any] = {
            "pool": {"bytes": 4096 * dice.randint(2, 6), "pin_piece_bytes": dice.choice((4096, 8192))},
            "transfer": {
                "max_batch_bytes": BLOCK_NBYTES * dice.choice((2, 4, 16)),
                "max_batch_requests": dice.choice((1, 8)),
            },
            "eviction": {
                "watermark": dice.choice((0.6, 0.8, 1.0)),
                "ratio": dice.choice((0.2, 0.5)),
                "policy": dice.choice(EVICTION_POLICIES),
            },
            "codec": {"name": codec, "max_error": 1e-4},
            "tier": {
                "queue_blocks": dice.choice((2, 8, 64)),
                "fetch_blocks": dice.choice((1, 3, 12)),
                "load_deadline_s": dice.choice((None, None, 0.3)),
            },
        }
        settings["eviction"]["ghost_entries"] = dice.choice((0, 4, 64))
        for name, choices in (("inclusion", TIER_INCLUSIONS), ("admission", TIER_ADMISSIONS), ("shed", TIER_SHEDS)):
            settings["tier"][name] = dice.choice(choices)
        return cls(
            settings=settings,
            executor_faults=ExecutorFaults(chance(0.05), chance(0.05), chance(0.05), chance(0.05)),
            tier_faults=TierFaults(
                slow=chance(0.3),
                hang=chance(0.1),
                fail=chance(0.1),
                short=chance(0.1),
                lie=chance(0.1),
                full=chance(0.2),
                unopened=chance(0.1),
                stale=chance(0.05),
            ),
            store_blocks=dice.choice((6, 24, 64)),
            warm=dice.random() < 0.5,
            lives=dice.choice((1, 1, 2)),
            rounds=dice.randint(6, 12),
            loss=chance(0.5),
            shutdown=dice.random() < 0.3,
            shuffled=dice.random() < 0.5,
        )


@cache
def chains() -> tuple[tuple[BlockHash, ...], ...]:
    """Those of the clients, and one more to probe with at the end."""
    tokens = np.arange(CHAIN_BLOCKS * BLOCK_SIZE)
    return tuple(tuple(hash_blocks(tokens, BLOCK_SIZE, extra_keys=(salt,))) for salt in range(CHAINS + 1))


@cache
def content(block_hash: BlockHash) -> NDArray[np.uint8]:
    """The oracle: a block's bytes follow from its hash. One block in four loses something when it is packed."""
    dice = np.random.default_rng(int.from_bytes(block_hash[:8], "little"))
    values = dice.integers(-128, 128, BLOCK_NBYTES // 4).astype(np.float32)
    if is_lossy(block_hash):
        values += np.float32(0.3)
    return values.view(np.uint8)


def is_lossy(block_hash: bytes) -> bool:
    """Whether packing would change the block's bytes."""
    return block_hash[8] % 4 == 0


@cache
def _names() -> dict[bytes, str]:
    return {block_hash: f"{c}.{i}" for c, chain in enumerate(chains()) for i, block_hash in enumerate(chain)}


def name_of(block_hash: bytes) -> str:
    """Its chain and its place there."""
    return _names()[block_hash]
