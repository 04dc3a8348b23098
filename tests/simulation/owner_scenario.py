"""What a life around an owner is made of: settings, faults, and the caches of the clients."""

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Codec, Encodings
from kvortex.config.sections import EVICTION_POLICIES, TIER_ADMISSIONS, TIER_INCLUSIONS, TIER_SHEDS
from kvortex.groups import GroupSet, KVGroup
from kvortex.types import BlockSizes
from tests.owner.owner_support import some_keys

TIMEOUT_S = 1.0  # of the tier
NUM_HASHES, LONGEST_CHAIN = 10, 6
PRIORITIES = (None, -1, 1, 2)
QUOTAS = (None, None, None, 1536, 4096)  # the smaller one holds a block of each group
UNUSED_BYTES = 24  # of an extent, behind the payload


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a seed is made of, beside its dice."""

    settings: dict[str, Any]
    num_namespaces: int
    num_players: int
    rounds: int
    has_tier: bool
    store_blocks: int
    slow: float  # chances of a block that the tier moves
    hang: float
    fail: float
    lie: float
    unopened: float  # of a tier: it cannot be used at all
    lost: float  # chance of a question that the connection is lost with it
    harm: float  # chance of a block that its transfer fails
    kills: float  # chances of what happens every now and then
    cuts: float
    owner_ends: float
    ranks: tuple[tuple[int | None, int | None], ...]  # priority and quota that most clients of a namespace ask for
    has_writers: bool  # other processes write to what clients reserve
    shuffled: bool

    @classmethod
    def drawn(cls, dice: random.Random) -> "Scenario":
        def chance(most: float) -> float:
            return dice.choice((0.0, most / 4, most))

        settings: dict[str, Any] = {
            "pool": {"bytes": 4096 * dice.choice((1, 2, 4)), "pin_piece_bytes": 4096},
            "eviction": {
                "watermark": dice.choice((0.6, 0.8, 1.0)),
                "ratio": dice.choice((0.2, 0.5)),
                "policy": dice.choice(EVICTION_POLICIES),
                "ghost_entries": dice.choice((1, 4, 64)),
            },
            "tier": {
                "timeout_s": TIMEOUT_S,
                "queue_blocks": dice.choice((2, 8, 64)),
                "fetch_blocks": dice.choice((2, 12)),
                "inclusion": dice.choice(TIER_INCLUSIONS),
                "admission": dice.choice(TIER_ADMISSIONS),
                "shed": dice.choice(TIER_SHEDS),
            },
        }
        return cls(
            settings=settings,
            num_namespaces=dice.choice((1, 2, 2)),
            num_players=dice.randint(2, 4),
            rounds=dice.randint(6, 20),
            has_tier=dice.random() < 0.8,
            store_blocks=dice.choice((6, 24, 64)),
            slow=chance(0.5),
            hang=chance(0.1),
            fail=chance(0.1),
            lie=chance(0.1),
            unopened=chance(0.1),
            lost=chance(0.02),
            harm=chance(0.1),
            kills=chance(0.3),
            cuts=chance(0.4),
            owner_ends=chance(0.1),
            ranks=tuple((dice.choice(PRIORITIES), dice.choice(QUOTAS)) for _ in range(2)),
            has_writers=dice.random() < 0.5,
            shuffled=dice.random() < 0.5,
        )


class Shape(NamedTuple):
    """The blocks of a namespace.

    Attributes:
        digest: the namespace's.
        sizes: bytes of an extent, for each group.
        encodings: payloads and codecs, by form.
        groups: the groups.
        keys: every key, `uint64 [num_groups, NUM_HASHES, 4]`.
    """

    digest: bytes
    sizes: tuple[BlockSizes, ...]
    encodings: Encodings
    groups: GroupSet
    keys: NDArray[np.uint64]


@cache
def shape_of(namespace: int) -> Shape:
    """Namespace 0 has one group of blocks that are packed, namespace 1 two groups. Their block hashes are the same."""
    if namespace == 0:
        sizes: tuple[BlockSizes, ...] = (BlockSizes(1024, 640),)
        groups = GroupSet([KVGroup("full", ("f",), 16)], 16)
    else:
        sizes = (BlockSizes(1024, 1024), BlockSizes(512, 512))
        groups = GroupSet([KVGroup("full", ("f",), 16), KVGroup("window", ("w",), 16, "window", 40)], 16)
    payloads = [nbytes - UNUSED_BYTES for s in sizes for nbytes in (s.raw, s.packed)]
    codecs = [codec for s in sizes for codec in (Codec.RAW, Codec.FP8 if s.packs else Codec.RAW)]
    hashes = some_keys(NUM_HASHES)
    keys = np.stack([groups.tagged(hashes, n) if len(sizes) > 1 else hashes for n in range(len(sizes))])
    digest = hashlib.sha256(b"namespace %d" % namespace).digest()
    return Shape(digest, sizes, Encodings(payloads, codecs), groups, keys)
