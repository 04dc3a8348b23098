"""One tier of a chain, and one block of a chain's call."""

import logging
import time
from collections import Counter
from enum import StrEnum
from typing import Final

from kvortex.errors import KVortexError
from kvortex.stats import LinkFigures
from kvortex.tiering.guard import GuardedTier
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, Tier, WriteOutcome, WriteRequest
from kvortex.types import MissReason, SaveOutcome

logger = logging.getLogger(__name__)

ABSENT: Final = ReadOutcome(MissReason.NEVER_STORED, cause=Cause.ABSENT)
REFUSED: Final = WriteOutcome(SaveOutcome.FAILED, cause=Cause.IO_ERROR)


class Takes(StrEnum):
    """When a tier of a chain gets a block."""

    ALWAYS = "always"
    """When it is saved."""
    SECOND_TOUCH = "second_touch"
    """When it is used again."""
    EVICTED = "evicted"
    """When the tier in front evicts it; it gives the block away when that gets it back."""


class Link:
    """One tier of a chain, behind circuit breakers of its own.

    Args:
        tier: the tier, not opened.
        takes: when it gets a block.
        timeout_s: seconds that one of its calls may take.
    """

    def __init__(self, tier: Tier, takes: Takes, timeout_s: float) -> None:
        self.tier = tier
        self.takes = takes
        self.coming: Counter[int] = Counter()
        """Bytes of the payloads that are being written."""
        self.guard = GuardedTier(tier, timeout_s, time.monotonic)
        self.is_open = False
        self.error = ""

    @property
    def reads(self) -> bool:
        """True if it is worth asking for blocks."""
        return self.is_open and not self.guard.reads.refuses

    @property
    def writes(self) -> bool:
        """True if it takes blocks."""
        return self.is_open and not self.guard.writes.refuses

    async def open(self) -> None:
        """Open the tier. A failure is logged, and the chain goes on without it."""
        try:
            await self.tier.open()
            self.is_open = True
        except KVortexError as error:
            self.error = str(error)
            logger.error("the %s tier cannot be used: %s", self.tier.name, error)
        except Exception as error:  # tiers can be third-party code, and must not stop the others
            self.error = f"{type(error).__name__}: {error}"
            logger.exception("the %s tier cannot be used", self.tier.name)

    def figures(self) -> LinkFigures:
        """What statistics say of it."""
        stats = self.tier.stats()
        return LinkFigures(
            tier=self.tier.name,
            usable=self.is_open,
            hits=stats.hits,
            num_blocks=stats.num_blocks,
            used_bytes=stats.used_bytes,
            capacity_bytes=stats.capacity_bytes,
            breakers={"reads": self.guard.reads.figures(), "writes": self.guard.writes.figures()},
        )


class ChainRead:
    """One block of a read: the tiers to try, and what came of those that were tried."""

    def __init__(self, request: ReadRequest, links: list[Link]) -> None:
        self.request = request
        self.links = links
        self.miss = ABSENT
        self.in_flight = False
        self.over: Cause | None = None  # why the call does not wait for it any more
        self.outcome: ReadOutcome | None = None

    def end(self, outcome: ReadOutcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.request.settle(outcome)

    def give_up(self, cause: Cause) -> None:
        """The call is over. What is in flight ends when it settles."""
        self.over = cause
        self.links.clear()
        if not self.in_flight:
            self.end(unread(cause))


class ChainWrite:
    """One block of a write, and the tiers that have not settled it."""

    def __init__(self, request: WriteRequest, num_links: int) -> None:
        self.request = request
        self.left = num_links
        self.outcomes: list[WriteOutcome | None] = [None] * num_links
        self.over: Cause | None = None
        self.outcome: WriteOutcome | None = None

    def settled(self, position: int, outcome: WriteOutcome) -> None:
        """One of the tiers is done. The outcome is that of the first tier that has the block, or is about to."""
        self.outcomes[position] = outcome
        self.left -= 1
        if self.left:
            return
        told = [outcome for outcome in self.outcomes if outcome is not None]
        good = [outcome for outcome in told if outcome.outcome.is_stored or outcome.outcome is SaveOutcome.PENDING]
        outcome = (good or told)[0]
        if outcome.cause is Cause.CANCELLED and self.over is not None:
            outcome = WriteOutcome(SaveOutcome.FAILED, cause=self.over)
        self.end(outcome)

    def end(self, outcome: WriteOutcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.request.settle(outcome)


def unread(cause: Cause) -> ReadOutcome:
    """The outcome of a block whose call ended for this cause before it was read."""
    return ReadOutcome(MissReason.DEADLINE if cause is Cause.DEADLINE else MissReason.TRANSFER_FAILED, cause=cause)
