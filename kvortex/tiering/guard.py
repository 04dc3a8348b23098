"""A tier behind circuit breakers: every call ends in time, whatever the tier does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from kvortex.errors import KVortexError
from kvortex.runtime.blocking import interpreter_ends
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, StoredBlock, Tier, WriteOutcome, WriteRequest
from kvortex.tiers.breaker import CircuitBreaker
from kvortex.types import MissReason, SaveOutcome

logger = logging.getLogger(__name__)

GRACE_S: Final = 1.0
"""Seconds that a tier may take beyond the deadline it was given. After that the call is abandoned."""

CLOSE_TIMEOUT_S: Final = 30.0
DELETE_BATCH: Final = 1024

Request = TypeVar("Request", ReadRequest, WriteRequest)
Outcome = TypeVar("Outcome", ReadOutcome, WriteOutcome)
Result = TypeVar("Result")

_UNREAD: Final = ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.IO_ERROR)
_UNWRITTEN: Final = WriteOutcome(SaveOutcome.FAILED, cause=Cause.IO_ERROR)


async def _next_keys(stored: AsyncIterator[StoredBlock]) -> list[bytes]:
    keys: list[bytes] = []
    async for block in stored:
        keys.append(block.key)
        if len(keys) == DELETE_BATCH:
            break
    return keys


class GuardedTier:
    """The calls of a tier, for one loop. The caller asks the breaker's `admit` before a call that moves blocks; this
    class reports the result of the call to the breaker.

    An exception of the tier is logged and counts as a failure. If it is one that the contract defines for misuse,
    nothing has been started, and the requests are settled. After any other exception the state of the requests is
    unknown, so their memory is not used again.

    Args:
        tier: the tier; its owner opens it.
        timeout_s: seconds that any call may take.
        clock: returns seconds, for the breakers.
    """

    def __init__(self, tier: Tier, timeout_s: float, clock: Callable[[], float]) -> None:
        self.tier = tier
        self.reads = CircuitBreaker(f"reads of the {tier.name} tier", clock)
        self.writes = CircuitBreaker(f"writes to the {tier.name} tier", clock)
        self._timeout_s = timeout_s

    @property
    def longest_call_s(self) -> float:
        """Seconds after which a call is abandoned."""
        return self._timeout_s + GRACE_S

    async def read(self, requests: Sequence[ReadRequest]) -> list[ReadOutcome]:
        """Read blocks. Returns outcomes in the order of the requests; an empty list if the tier has given none."""
        return await self._move(self.reads, self.tier.read, requests, _UNREAD)

    async def write(self, requests: Sequence[WriteRequest]) -> list[WriteOutcome]:
        """Write blocks. Returns outcomes in the order of the requests; an empty list if the tier has given none."""
        return await self._move(self.writes, self.tier.write, requests, _UNWRITTEN)

    async def find(self, keys: Sequence[bytes]) -> list[int]:
        """What the store itself says of each key, as `Tier.find`; 0 for all if it does not answer in time."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        there = await self._call(self.reads, self.tier.find(keys, deadline_s=self._timeout_s))
        if there is None:
            return [0] * len(keys)
        if not any(there) and loop.time() - began_s >= self._timeout_s:
            self.reads.hung()
        else:
            self.reads.worked()
        return there

    async def delete(self, keys: Sequence[bytes]) -> list[bool] | None:
        """Delete blocks, as `Tier.delete`; None if the tier has failed, which is logged and counted."""
        return await self._call(self.writes, self.tier.delete(keys, deadline_s=self._timeout_s))

    async def delete_surely(self, keys: Sequence[bytes]) -> bool:
        """Delete blocks, and ask the store about those that it does not say are gone; False if any may be left."""
        deleted = await self.delete(keys)
        if deleted is None:
            return False
        doubtful = [key for key, is_gone in zip(keys, deleted, strict=True) if not is_gone]
        if not doubtful:
            return True
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        there = await self._call(self.reads, self.tier.find(doubtful, deadline_s=self._timeout_s))
        return there is not None and not any(there) and loop.time() - began_s < self._timeout_s

    async def delete_all(self) -> bool:
        """Delete every block of the namespace that is in the store now; False if any may be left."""
        stored = self.tier.scan()
        while True:
            keys = await self._call(self.writes, _next_keys(stored))
            if not keys:
                return keys is not None
            if not await self.delete_surely(keys):
                return False

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float]) -> None:
        """Count blocks as used at these times, in seconds since the epoch."""
        await self._call(self.writes, self.tier.touch(keys, used_s, deadline_s=self._timeout_s))

    async def aclose(self) -> None:
        """Close the tier, or abandon it if that takes longer than `CLOSE_TIMEOUT_S`.

        Raises:
            Exception: whatever the tier raises.
        """
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.tier.aclose()
        except TimeoutError:
            logger.warning("the %s tier has not closed within %.0f s and is abandoned", self.tier.name, CLOSE_TIMEOUT_S)

    async def _move(
        self,
        breaker: CircuitBreaker,
        call: Callable[..., Awaitable[list[Outcome]]],
        requests: Sequence[Request],
        failure: Any,
    ) -> list[Outcome]:
        outcomes = await self._call(breaker, call(requests, deadline_s=self._timeout_s), requests, failure)
        if outcomes is None:
            return []
        breaker.judge(outcomes)
        return outcomes

    async def _call(
        self, breaker: CircuitBreaker, call: Awaitable[Result], requests: Sequence[Any] = (), failure: Any = None
    ) -> Result | None:
        try:
            async with asyncio.timeout(self.longest_call_s):
                return await call
        except TimeoutError:
            logger.warning("the %s tier does not keep its deadlines", self.tier.name)
            breaker.hung()
        except asyncio.CancelledError:
            breaker.give_up()
            raise
        except (KVortexError, ValueError) as error:  # misuse, or closed in the meantime: nothing has been started
            logger.warning("the %s tier refuses a call: %s", self.tier.name, error)
            for request in requests:
                request.settle(failure)
            breaker.failed()
        except Exception as error:  # tiers can be third-party code, and must not stop the pool
            level = logging.DEBUG if interpreter_ends() else logging.ERROR  # no thread can be started at the end
            logger.log(level, "the %s tier failed unexpectedly", self.tier.name, exc_info=error)
            breaker.failed()
        return None
