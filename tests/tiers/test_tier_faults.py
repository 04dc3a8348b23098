"""The tier that fails on command keeps the contract when told nothing, and fails as told otherwise."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    ROOMY_BYTES,
    digest_of,
    is_right,
    key_of,
    payload_of,
    read_request,
    until,
    write_request,
)
from kvortex.tiers import Cause, MemoryTier, ReadOutcome, ReadRequest, Tier, WriteOutcome
from kvortex.types import Direction, MissReason, SaveOutcome
from tests.tiers.test_memory_tier import TestMemoryTier as _MemoryConformance


class TestFaultlessTier(_MemoryConformance):
    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        return FaultInjectingTier(super().make_tier(root, namespace, capacity_bytes), lambda *_: None)

    def raw_keys(self, tier: Tier) -> set[bytes]:
        return super().raw_keys(cast(FaultInjectingTier, tier)._inner)

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        return super().raw_read(cast(FaultInjectingTier, tier)._inner, key)

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        super().raw_write(cast(FaultInjectingTier, tier)._inner, key, data)


def faulty(direction: Direction, fault: TierFault, *, number: int = 0) -> FaultInjectingTier:
    """The block `number` of that direction goes wrong."""
    inner = MemoryTier(ROOMY_BYTES, namespace=NAMESPACE)
    return FaultInjectingTier(inner, lambda way, n, _: fault if (way, n) == (direction, number) else None, delay_s=0.02)


async def test_a_slow_block_arrives(tmp_path: Path) -> None:
    async with faulty(Direction.LOAD, TierFault.SLOW) as tier:
        await tier.write([write_request(0)])
        request = read_request(0)
        assert is_right(request, (await tier.read([request]))[0])


async def test_a_hung_block_misses_its_deadline_and_settles_when_released(tmp_path: Path) -> None:
    async with faulty(Direction.LOAD, TierFault.HANG, number=1) as tier:
        await tier.write([write_request(0), write_request(1)])
        settled: list[ReadOutcome] = []
        requests = [ReadRequest(key_of(n), bytearray(NBYTES), settled.append) for n in (0, 1)]
        good, late = await tier.read(requests, deadline_s=0.02)
        assert is_right(requests[0], good)
        assert (late.reason, late.settled) == (MissReason.DEADLINE, False)
        assert settled == [good]
        assert tier.num_held == tier.stats().unsettled == 1
        tier.release()
        await until(lambda: len(settled) == 2)
        assert is_right(requests[1], settled[1])


async def test_a_cancelled_caller_of_a_hung_block(tmp_path: Path) -> None:
    async with faulty(Direction.SAVE, TierFault.HANG) as tier:
        settled: list[WriteOutcome] = []
        task = asyncio.create_task(tier.write([write_request(0, on_settled=settled.append)]))
        await until(lambda: tier.num_held == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert settled == []
        assert await tier.find([key_of(0)]) == [0]
        tier.release()
        await until(lambda: settled == [WriteOutcome(SaveOutcome.STORED)])


@pytest.mark.parametrize(
    ("fault", "outcome", "cause"),
    [
        (TierFault.FAIL, SaveOutcome.FAILED, Cause.IO_ERROR),
        (TierFault.FULL, SaveOutcome.NO_SPACE, Cause.NO_SPACE),
    ],
)
async def test_a_refused_write(fault: TierFault, outcome: SaveOutcome, cause: Cause) -> None:
    async with faulty(Direction.SAVE, fault) as tier:
        (refused,) = await tier.write([write_request(0)])
        assert (refused.outcome, refused.cause) == (outcome, cause)
        assert await tier.find([key_of(0)]) == [0]
        assert (await tier.write([write_request(0)]))[0].outcome is SaveOutcome.STORED


async def test_a_failed_read() -> None:
    async with faulty(Direction.LOAD, TierFault.FAIL) as tier:
        await tier.write([write_request(0)])
        (outcome,) = await tier.read([read_request(0)])
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)


async def test_a_lying_read_differs_from_its_digest() -> None:
    async with faulty(Direction.LOAD, TierFault.LIE) as tier:
        await tier.write([write_request(0)])
        buffer = bytearray(NBYTES)
        (outcome,) = await tier.read([ReadRequest(key_of(0), buffer)])
        assert outcome.reason is None
        assert outcome.digest == digest_of(payload_of(key_of(0))) != digest_of(bytes(buffer))


async def test_a_lying_write_keeps_nothing() -> None:
    async with faulty(Direction.SAVE, TierFault.LIE) as tier:
        assert (await tier.write([write_request(0)]))[0].outcome is SaveOutcome.STORED
        assert await tier.find([key_of(0)]) == [0]


async def test_short_reads_and_writes() -> None:
    async with faulty(Direction.LOAD, TierFault.SHORT) as tier:
        await tier.write([write_request(0)])
        (outcome,) = await tier.read([read_request(0)])
        assert (outcome.reason, outcome.payload_bytes) == (None, NBYTES // 2)
    async with faulty(Direction.SAVE, TierFault.SHORT) as tier:
        await tier.write([write_request(0)])
        assert (await tier.read([read_request(0)]))[0].reason is MissReason.CORRUPT
