"""One block of the conformance suite in a tier."""

from typing import Any

from kvortex.testing.tier_conformance import NBYTES, is_right, read_request, write_request
from kvortex.tiers import ReadOutcome, Tier, WriteOutcome


async def read_one(tier: Tier, number: int, nbytes: int = NBYTES, **arguments: Any) -> ReadOutcome:
    """Read a test block; its bytes are right if it is a hit."""
    request = read_request(number, nbytes)
    (outcome,) = await tier.read([request], **arguments)
    assert outcome.reason is not None or is_right(request, outcome)
    return outcome


async def write_one(tier: Tier, number: int, nbytes: int = NBYTES, **arguments: Any) -> WriteOutcome:
    """Write a test block."""
    (outcome,) = await tier.write([write_request(number, nbytes)], **arguments)
    return outcome
