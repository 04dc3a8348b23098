"""Blocks that a benchmark writes to a tier and reads back."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers import ReadRequest, Tier, WriteRequest
from kvortex.tiers.payload import payload_digest
from kvortex.types import SaveOutcome


class TierClient:
    """Writes and reads all blocks at once. A block that does not move ends the benchmark.

    Args:
        tier: the tier, not opened.
        views: the blocks, `uint8 [n]` each.
    """

    def __init__(self, tier: Tier, views: Sequence[NDArray[np.uint8]]) -> None:
        self.tier = tier
        self._views = views
        self._keys = [number.to_bytes(32, "little") for number in range(len(views))]
        self._digests = [payload_digest(view) for view in views]

    async def put(self) -> None:
        blocks = zip(self._keys, self._views, self._digests, strict=True)
        outcomes = await self.tier.write([WriteRequest(key, view, digest, view.size) for key, view, digest in blocks])
        if any(outcome.outcome is not SaveOutcome.STORED for outcome in outcomes):
            raise SystemExit(f"a write was refused: {outcomes[0]}")

    async def get(self) -> None:
        outcomes = await self.tier.read([ReadRequest(*block) for block in zip(self._keys, self._views, strict=True)])
        if any(outcome.reason is not None for outcome in outcomes):
            raise SystemExit(f"a read missed: {outcomes[0]}")

    async def aclose(self) -> None:
        await self.tier.aclose()
