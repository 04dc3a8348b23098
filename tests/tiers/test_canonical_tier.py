"""A tier with canonical blocks keeps the contract, and what it owns, over any other tier."""

from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kvortex.testing.tier_conformance import (
    NBYTES,
    TierConformance,
    digest_of,
    key_of,
    payload_of,
)
from kvortex.tiering.canonical import CanonicalBlock, CanonicalTier
from kvortex.tiers import Cause, ReadRequest, Tier, WriteRequest
from kvortex.tiers.payload import payload_digest
from kvortex.types import SaveOutcome
from tests.tiers.object_support import DictTier, keys_in

STORES: dict[tuple[Path, bytes], dict[str, bytes]] = {}


class ReversedBlock(CanonicalBlock):
    """Blocks of any size, whose canonical payload is the payload from its end to its beginning."""

    def __init__(self, nbytes: int) -> None:
        self.payload_nbytes = self.nbytes = nbytes
        self.raw_nbytes = 2 * nbytes  # what the suite expects

    def down(self, payload: NDArray[np.uint8], canonical: NDArray[np.uint8], digest: int) -> int | str:
        canonical[:] = payload[::-1]
        return payload_digest(canonical) if payload_digest(payload) == digest else "damaged"

    def up(self, canonical: NDArray[np.uint8], payload: NDArray[np.uint8], digest: int) -> int | None:
        payload[:] = canonical[::-1]
        return payload_digest(payload) if payload_digest(canonical) == digest else None


class TierOfAnySize(CanonicalTier):
    """Knows how large a block is from its write."""

    def __init__(self, inner: Tier, sizes: dict[bytes, int]) -> None:
        super().__init__(inner, [ReversedBlock(1 << 20)])
        self._sizes = sizes

    def _block_of(self, request: ReadRequest | WriteRequest) -> CanonicalBlock:
        if isinstance(request, WriteRequest) and request.key not in self._sizes:
            self._sizes[request.key] = memoryview(request.payload).nbytes
        return ReversedBlock(self._sizes.get(request.key, NBYTES))


SIZES: dict[Path, dict[bytes, int]] = {}


class TestCanonicalTier(TierConformance):
    keeps_blocks_after_closing = True

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        objects = STORES.setdefault((root, namespace), {})
        inner = DictTier(objects, namespace=namespace, capacity_bytes=capacity_bytes)
        return TierOfAnySize(inner, SIZES.setdefault(root, {}))

    def raw_keys(self, tier: Tier) -> set[bytes]:
        return keys_in(inner_of(tier))

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        return inner_of(tier).objects[inner_of(tier)._name(key)]

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        inner_of(tier).objects[inner_of(tier)._name(key)] = data

    async def test_a_wrong_digest_is_found_when_the_block_is_read(self, tmp_path: Path) -> None:
        """Here it is found when the block is written."""
        async with self.tier(tmp_path) as tier:
            payload = payload_of(key_of(0))
            (outcome,) = await tier.write([WriteRequest(key_of(0), payload, digest_of(payload) ^ 1, NBYTES)])
            assert (outcome.outcome, outcome.cause) == (SaveOutcome.FAILED, Cause.CORRUPT)
            assert self.raw_keys(tier) == set()


def inner_of(tier: Tier) -> DictTier:
    return cast(DictTier, cast(CanonicalTier, tier).inner)
