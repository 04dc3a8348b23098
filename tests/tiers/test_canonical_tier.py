"""A tier with canonical blocks keeps the contract, and what it owns, over any other tier."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from kvortex.codecs import Codec
from kvortex.errors import EngineStateError
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    ROOMY_BYTES,
    TierConformance,
    digest_of,
    is_right,
    key_of,
    payload_of,
    read_request,
    until,
    write_request,
)
from kvortex.tiering.canonical import BATCH, CanonicalTier
from kvortex.tiering.canonical_blocks import CanonicalBlock
from kvortex.tiering.scratch import MAX_BUFFERS, MIN_BUFFERS, SCRATCH_BYTES, Scratch
from kvortex.tiers import (
    Cause,
    DiskTier,
    DiskTierConfig,
    MemoryTier,
    ReadOutcome,
    ReadRequest,
    Tier,
    WriteOutcome,
    WriteRequest,
)
from kvortex.tiers.base import as_bytes
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction, MissReason, SaveOutcome
from tests.tiers.object_support import DictTier, hanging, keys_in
from tests.tiers.test_disk_tier import layout_of

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


class TestCanonicalDisk(TestCanonicalTier):
    """Over threads that settle later, with memory for few blocks."""

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        config = DiskTierConfig(path=root / "tier", capacity_bytes=capacity_bytes)
        tier = TierOfAnySize(DiskTier(config, namespace=namespace), SIZES.setdefault(root, {}))
        tier._scratch = Scratch(1 << 20, BATCH)
        return tier

    def raw_keys(self, tier: Tier) -> set[bytes]:
        layout = layout_of(inner_of(tier))
        return {bytes.fromhex(path.stem) for path in Path(layout.blocks, layout.namespace_name).rglob("*.kv1")}

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        return Path(layout_of(inner_of(tier)).path(key)).read_bytes()

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        Path(layout_of(inner_of(tier)).path(key)).write_bytes(data)


# -- who owns what -------------------------------------------------------------------------------------


@asynccontextmanager
async def over(inner: Tier) -> AsyncIterator[CanonicalTier]:
    """A tier with memory for one batch."""
    tier = CanonicalTier(inner, [ReversedBlock(NBYTES)])
    tier._scratch = Scratch(NBYTES, BATCH)
    async with tier:
        yield tier
        assert tier._scratch.num_taken == 0
        assert tier.stats().unsettled == 0


def hung(direction: Direction) -> FaultInjectingTier:
    """The first batch hangs."""
    inner = MemoryTier(ROOMY_BYTES, namespace=NAMESPACE)
    return FaultInjectingTier(
        inner, lambda way, n, _: TierFault.HANG if way is direction and n < BATCH else None, delay_s=0.02
    )


async def test_memory_of_reads_that_hang_serves_no_others_until_they_end() -> None:
    inner = hung(Direction.LOAD)
    async with over(inner) as tier:
        await tier.write([write_request(n) for n in range(3 * BATCH)])
        settled: list[tuple[int, ReadOutcome]] = []
        requests = [
            ReadRequest(key_of(n), np.zeros(NBYTES, np.uint8), lambda o, n=n: settled.append((n, o)))  # type: ignore[misc]
            for n in range(BATCH)
        ]
        late = await tier.read(requests, deadline_s=0.02)
        assert {(o.reason, o.cause, o.settled) for o in late} == {(MissReason.DEADLINE, Cause.DEADLINE, False)}
        assert (tier._scratch.num_taken, tier.stats().unsettled, settled) == (BATCH, BATCH, [])
        waiting = await tier.read([read_request(n) for n in range(BATCH, 2 * BATCH)], deadline_s=0.02)
        assert {(o.reason, o.cause, o.settled) for o in waiting} == {(MissReason.DEADLINE, Cause.DEADLINE, True)}
        assert inner.num_held == BATCH, "those were not asked of the store"
        others = [read_request(n) for n in range(2 * BATCH, 3 * BATCH)]
        reading = asyncio.create_task(tier.read(others))
        await asyncio.sleep(0)
        inner.release()
        assert all(map(is_right, others, await reading))
        await until(lambda: len(settled) == BATCH, 60)
        assert all(is_right(requests[n], outcome) for n, outcome in settled)


async def test_memory_of_writes_that_hang_serves_no_others_until_they_end() -> None:
    inner = hung(Direction.SAVE)
    async with over(inner) as tier:
        settled: list[WriteOutcome] = []
        writes = [write_request(n, on_settled=settled.append) for n in range(BATCH)]
        writing = asyncio.create_task(tier.write(writes))
        await until(lambda: inner.num_held == BATCH, 60)
        waiting = await tier.write([write_request(n) for n in range(BATCH, 2 * BATCH)], deadline_s=0.02)
        assert {(o.cause, o.settled) for o in waiting} == {(Cause.DEADLINE, True)}
        assert (tier._scratch.num_taken, settled) == (BATCH, [])
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert (tier._scratch.num_taken, settled) == (BATCH, []), "it goes on without its caller"
        inner.release()
        await until(lambda: settled == [WriteOutcome(SaveOutcome.STORED)] * BATCH, 60)
        requests = [read_request(n) for n in range(2 * BATCH)]
        outcomes = await tier.read(requests)
        assert [is_right(*pair) for pair in zip(requests, outcomes, strict=True)] == [True] * BATCH + [False] * BATCH


class SlowBlock(ReversedBlock):
    """Is re-laid when it is allowed to be."""

    def __init__(self) -> None:
        super().__init__(NBYTES)
        self.begun, self.allowed = threading.Semaphore(0), threading.Event()

    def _wait(self) -> None:
        self.begun.release()
        assert self.allowed.wait(60)

    def down(self, payload: NDArray[np.uint8], canonical: NDArray[np.uint8], digest: int) -> int | str:
        self._wait()
        return super().down(payload, canonical, digest)

    def up(self, canonical: NDArray[np.uint8], payload: NDArray[np.uint8], digest: int) -> int | None:
        self._wait()
        return super().up(canonical, payload, digest)


@pytest.mark.parametrize("ends", ["cancelled", "deadline", "closed"])
async def test_a_payload_is_not_given_back_while_it_is_re_laid(ends: str) -> None:
    inner, block = MemoryTier(ROOMY_BYTES, namespace=NAMESPACE), SlowBlock()
    tier = CanonicalTier(inner, [block])
    await tier.open()
    settled: list[WriteOutcome] = []
    deadline_s = 0.05 if ends == "deadline" else None
    writing = asyncio.create_task(tier.write([write_request(0, on_settled=settled.append)], deadline_s=deadline_s))
    await asyncio.to_thread(block.begun.acquire)
    if ends == "cancelled":
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    elif ends == "deadline":
        assert [(o.cause, o.settled) for o in await writing] == [(Cause.DEADLINE, False)]
    else:
        closing = asyncio.create_task(tier.aclose())
        await asyncio.sleep(0)
    assert settled == []
    block.allowed.set()
    await until(lambda: len(settled) == 1, 60)
    expected = {"cancelled": Cause.CANCELLED, "deadline": Cause.DEADLINE, "closed": Cause.CLOSED}
    assert (settled[0].outcome, settled[0].cause) == (SaveOutcome.FAILED, expected[ends])
    if ends == "closed":
        assert [o.cause for o in await writing] == [Cause.CLOSED]
        await closing
    else:
        assert await tier.find([key_of(0)]) == [0], "it was not passed on"
    assert tier._scratch.num_taken == 0
    await tier.aclose()


async def test_a_cancelled_read_that_is_being_re_laid_is_still_a_hit() -> None:
    inner, block = MemoryTier(ROOMY_BYTES, namespace=NAMESPACE), SlowBlock()
    async with CanonicalTier(inner, [block]) as tier:
        block.allowed.set()
        await tier.write([write_request(0)])
        block.begun.acquire(blocking=False)
        block.allowed.clear()
        settled: list[ReadOutcome] = []
        request = ReadRequest(key_of(0), bytearray(NBYTES), settled.append)
        reading = asyncio.create_task(tier.read([request]))
        await asyncio.to_thread(block.begun.acquire)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert settled == []
        block.allowed.set()
        await until(lambda: len(settled) == 1, 60)
        assert is_right(request, settled[0])


class Broken(MemoryTier):
    """Raises in the middle of its calls, and remembers what it was given."""

    def __init__(self, error: Exception) -> None:
        super().__init__(ROOMY_BYTES, namespace=NAMESPACE)
        self.error: Exception | None = error
        self.given: list[Any] = []

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        self.given += requests
        if self.error is not None:
            raise self.error
        return await super().read(requests, deadline_s=deadline_s)

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        self.given += requests
        if self.error is not None:
            raise self.error
        return await super().write(requests, deadline_s=deadline_s)


async def test_memory_of_a_call_that_has_raised_is_never_used_again() -> None:
    inner = Broken(RuntimeError("a defect"))
    async with over(inner) as tier:
        settled: list[object] = []
        assert [o.cause for o in await tier.write([write_request(0, on_settled=settled.append)])] == [Cause.IO_ERROR]
        request = ReadRequest(key_of(0), np.full(NBYTES, 0xAA, np.uint8), settled.append)
        assert [(o.reason, o.settled) for o in await tier.read([request])] == [(MissReason.TRANSFER_FAILED, True)]
        write, read = inner.given
        inner.error = None
        for _ in range(3):
            await tier.write([write_request(n) for n in range(4 * BATCH)])
        given = [memoryview(request.payload) for request in inner.given[2:]]
        before = [as_bytes(write.payload).tobytes(), as_bytes(read.buffer).tobytes()]
        as_bytes(read.buffer)[:] = 0x77  # as it comes late
        write.settle(WriteOutcome(SaveOutcome.STORED))
        read.settle(ReadOutcome(None, NBYTES, NBYTES, 0, 1))
        assert (as_bytes(request.buffer) == 0xAA).all()
        assert len(settled) == 2, "once each"
        assert before[0] == as_bytes(write.payload).tobytes()
        assert not any(np.shares_memory(np.frombuffer(one, np.uint8), as_bytes(read.buffer)) for one in given)
        reads = [read_request(n) for n in range(4 * BATCH)]
        assert all(map(is_right, reads, await tier.read(reads)))


class RaisesLate(MemoryTier):
    """Settles what it has read, and raises then."""

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        await super().read(requests, deadline_s=deadline_s)
        raise RuntimeError("a defect")


async def test_what_has_come_before_a_call_raises_is_a_hit() -> None:
    block = SlowBlock()
    async with CanonicalTier(RaisesLate(ROOMY_BYTES, namespace=NAMESPACE), [block]) as tier:
        block.allowed.set()
        await tier.write([write_request(0)])
        block.begun.acquire(blocking=False)
        block.allowed.clear()
        settled: list[ReadOutcome] = []
        request = ReadRequest(key_of(0), bytearray(NBYTES), settled.append)
        reading = asyncio.create_task(tier.read([request]))
        await asyncio.to_thread(block.begun.acquire)
        for _ in range(5):
            await asyncio.sleep(0)
        assert settled == [], "it is still being re-laid"
        block.allowed.set()
        assert [is_right(request, outcome) for outcome in await reading] == [True]
        assert len(settled) == 1


async def test_a_call_that_is_refused_gives_everything_back() -> None:
    inner = Broken(EngineStateError("not open"))
    async with over(inner) as tier:
        settled: list[object] = []
        (outcome,) = await tier.write([write_request(0, on_settled=settled.append)])
        assert (outcome.cause, settled) == (Cause.IO_ERROR, [outcome])
        assert len(tier._scratch._free) == 1


async def test_closing_ends_reads_that_hang_and_those_that_wait_for_memory() -> None:
    inner = DictTier({}, namespace=NAMESPACE)
    tier = CanonicalTier(inner, [ReversedBlock(NBYTES)])
    tier._scratch = Scratch(NBYTES, BATCH)
    await tier.open()
    await tier.write([write_request(n) for n in range(3 * BATCH)])
    inner.before = hanging("get")
    settled: list[ReadOutcome] = []
    requests = [ReadRequest(key_of(n), bytearray(NBYTES), settled.append) for n in range(3 * BATCH)]
    reading = asyncio.create_task(tier.read(requests))
    await until(lambda: tier._scratch.num_taken == BATCH, 60)
    await tier.aclose()
    assert {outcome.cause for outcome in await reading} == {Cause.CLOSED}
    assert len(settled) == 3 * BATCH
    assert tier._scratch.num_taken == 0


async def test_a_block_of_another_length_is_a_miss_and_not_re_laid() -> None:
    inner = MemoryTier(ROOMY_BYTES, namespace=NAMESPACE)
    async with over(inner) as tier:
        payload = payload_of(key_of(0), NBYTES - 8)
        await inner.write([WriteRequest(key_of(0), payload, digest_of(payload), len(payload))])
        request = read_request(0)
        (outcome,) = await tier.read([request])
        assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.CORRUPT)
        assert (as_bytes(request.buffer) == 0xAA).all()


class Trusting(MemoryTier):
    """Does not look at digests, and may not be able to delete."""

    cannot_delete = False

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        outcomes = await super().read([replace(request, on_settled=None) for request in requests])
        for request, outcome in zip(requests, outcomes, strict=True):
            as_bytes(request.buffer)[100] ^= 1
            request.settle(outcome)
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        if self.cannot_delete:
            raise RuntimeError("a defect")
        await asyncio.sleep(0.05)
        return await super().delete(keys, deadline_s=deadline_s)


@pytest.mark.parametrize("cannot_delete", [False, True])
async def test_damage_that_the_other_tier_does_not_see_is_a_miss_and_removed_before_it_is_told(
    cannot_delete: bool,
) -> None:
    inner = Trusting(ROOMY_BYTES, namespace=NAMESPACE)
    inner.cannot_delete = cannot_delete
    async with over(inner) as tier:
        await tier.write([write_request(0)])
        (outcome,) = await tier.read([read_request(0)])
        assert (outcome.reason, outcome.cause) == (MissReason.CORRUPT, Cause.CORRUPT)
        assert bool(tier.lookup([key_of(0)])[0]) == cannot_delete
        assert tier.stats().removed_corrupt == (not cannot_delete)


async def test_what_is_no_block_of_a_form_is_misuse() -> None:
    async with over(MemoryTier(ROOMY_BYTES, namespace=NAMESPACE)) as tier:
        for form in (-1, 1, 7):
            with pytest.raises(ValueError, match=f"no canonical blocks of form {form}"):
                await tier.read([ReadRequest(key_of(0), bytearray(NBYTES), form=form)])
        with pytest.raises(ValueError, match="a block of 4096 bytes instead of 12288"):
            await tier.write([write_request(0, 4096)])


async def test_the_room_of_a_block_is_that_of_its_payload() -> None:
    inner = MemoryTier(ROOMY_BYTES, namespace=NAMESPACE)
    small, large = ReversedBlock(NBYTES), ReversedBlock(NBYTES)
    large.payload_nbytes = 3 * NBYTES
    async with CanonicalTier(inner, [small, None, large]) as tier:
        payload = payload_of(key_of(0))
        await tier.write([WriteRequest(key_of(0), payload, digest_of(payload), NBYTES, Codec.RAW)])
        assert tier.lookup([key_of(0), key_of(1)]) == await tier.find([key_of(0), key_of(1)]) == [3 * NBYTES, 0]


# -- scratch memory ------------------------------------------------------------------------------------


async def test_scratch_memory_is_bounded_and_given_in_order() -> None:
    scratch = Scratch(5000, 3)
    first = await scratch.take(2)
    assert all(buffer.ctypes.data % 4096 == 0 and buffer.size == 5000 for buffer in first)
    order: list[str] = []

    async def take(name: str, count: int) -> list[NDArray[np.uint8]]:
        taken = await scratch.take(count)
        order.append(name)
        return taken

    many, one = asyncio.create_task(take("many", 2)), asyncio.create_task(take("one", 1))
    await asyncio.sleep(0)
    assert order == [], "who asks for little does not pass who asks for much"
    scratch.give(first[:1])
    taken = await many
    assert order == ["many"]
    one.cancel()
    await asyncio.wait([one])
    scratch.give([*taken, *first[1:]])
    assert scratch.num_taken == 0
    assert len(await scratch.take(3)) == 3


async def test_a_cancelled_wait_gives_back_what_it_has_just_got() -> None:
    scratch = Scratch(64, 1)
    (held,) = await scratch.take(1)
    waiting = asyncio.create_task(scratch.take(1))
    await asyncio.sleep(0)
    scratch.give([held])
    waiting.cancel()
    await asyncio.wait([waiting])
    assert scratch.num_taken == 0


@pytest.mark.parametrize(
    ("nbytes", "count"), [(1 << 30, MIN_BUFFERS), (SCRATCH_BYTES // 32, 32), (64, MAX_BUFFERS)], ids=str
)
def test_how_many_buffers_there_are(nbytes: int, count: int) -> None:
    assert Scratch(nbytes).count == count
