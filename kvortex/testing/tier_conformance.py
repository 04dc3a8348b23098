"""The conformance suite of tiers: subclass `TierConformance` once for each tier. Needs pytest and pytest-asyncio.

    class TestMyTier(TierConformance):
        def make_tier(self, root, namespace, capacity_bytes): ...
        def raw_keys(self, tier): ...
        ...

The raw accessors (`raw_keys`, `raw_read`, `raw_write`) bypass the tier: they inspect and damage its stored bytes.
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kvortex.codecs import Codec
from kvortex.errors import EngineStateError, InvalidHashError
from kvortex.kernels.digest import digest_reference
from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, Tier, WriteOutcome, WriteRequest, as_bytes
from kvortex.types import MissReason, SaveOutcome

NAMESPACE = bytes(range(32))
OTHER_NAMESPACE = bytes(range(1, 33))
NBYTES = 3 * 4096
ROOMY_BYTES = 1 << 30

# Bytes of payloads: whole pages, just above and below a page, less than two words, and a part of a page at the end.
SIZES = (NBYTES, 4096, 4097, 4095, 1, 7, 8, 5000, 65536 + 128)


def key_of(number: int) -> bytes:
    """Return the key of test block `number`. Keys of small numbers have no common prefix."""
    return random.Random(number).randbytes(32)


def payload_of(key: bytes, nbytes: int = NBYTES) -> bytes:
    """Return the only correct payload of a key, so a test needs to remember no payloads."""
    return random.Random(key).randbytes(nbytes)


def digest_of(payload: bytes) -> int:
    """Return the digest of a payload, by the reference implementation."""
    return digest_reference(payload + bytes(-len(payload) % 8))


def write_request(
    number: int, nbytes: int = NBYTES, on_settled: Callable[[WriteOutcome], None] | None = None
) -> WriteRequest:
    """Return a write of test block `number`, with a raw size and a codec that differ from the defaults."""
    payload = payload_of(key_of(number), nbytes)
    return WriteRequest(key_of(number), payload, digest_of(payload), 2 * nbytes, Codec.FP8, on_settled)


def read_request(number: int, nbytes: int = NBYTES) -> ReadRequest:
    """Return a read of test block `number` into its own buffer, which is filled with 0xAA."""
    return ReadRequest(key_of(number), np.full(nbytes, 0xAA, dtype=np.uint8))


def is_right(request: ReadRequest, outcome: ReadOutcome) -> bool:
    """Return True if the read was a hit and the buffer has exactly the payload of the key."""
    payload = as_bytes(request.buffer)[: outcome.payload_bytes].tobytes()
    return outcome.reason is None and payload == payload_of(request.key, outcome.payload_bytes)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until a condition holds for which there is no event. `TimeoutError` after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - a test double for any tier has no event to wait for
            await asyncio.sleep(0.001)


class TierConformance(ABC):
    """The suite. A tier that follows the contract passes all tests."""

    keeps_blocks_after_closing: ClassVar[bool] = False
    """True if a new tier object over the same root finds the blocks of the closed one."""

    seals: ClassVar[bool] = False
    """True if the tier seals its blocks: what it cannot open is a miss and stays, and the next write replaces it."""

    @abstractmethod
    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        """Make a tier that is not opened yet.

        Args:
            root: folder of the tier: empty, or used by a closed tier before.
            namespace: the tier's namespace, 32 bytes.
            capacity_bytes: bytes that the tier may store.
        """

    @abstractmethod
    def raw_keys(self, tier: Tier) -> set[bytes]:
        """Return the keys of all blocks that are in the tier's storage."""

    @abstractmethod
    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        """Return the stored bytes of a block."""

    @abstractmethod
    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        """Replace the stored bytes of a block."""

    def tier(self, root: Path, *, namespace: bytes = NAMESPACE, capacity_bytes: int = ROOMY_BYTES) -> Tier:
        """Make a tier that is not opened yet, by default with room for all test blocks."""
        return self.make_tier(root, namespace, capacity_bytes)

    # -- bytes -----------------------------------------------------------------------------------------

    async def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            writes = [write_request(n, nbytes) for n, nbytes in enumerate(SIZES)]
            assert await tier.write(writes) == [WriteOutcome(SaveOutcome.STORED)] * len(SIZES)
            reads = [read_request(n, nbytes) for n, nbytes in enumerate(SIZES)]
            outcomes = await tier.read(reads)
            for request, outcome, nbytes, written in zip(reads, outcomes, SIZES, writes, strict=True):
                assert is_right(request, outcome)
                assert outcome == ReadOutcome(None, nbytes, 2 * nbytes, Codec.FP8, written.digest)

    @pytest.mark.parametrize("offset", [0, 1, 128, 512])
    @pytest.mark.parametrize("spare", [0, 1, 4096, 10000])
    async def test_buffers_of_any_alignment_and_length(self, tmp_path: Path, offset: int, spare: int) -> None:
        async with self.tier(tmp_path) as tier:
            for number, nbytes in enumerate(SIZES):
                memory = aligned(nbytes + spare + 2 * 4096)
                memory[:] = 0xAA
                source = memory[4096 + offset :][:nbytes]
                source[:] = np.frombuffer(payload_of(key_of(number), nbytes), dtype=np.uint8)
                write = WriteRequest(key_of(number), source, digest_of(source.tobytes()), nbytes)
                assert await tier.write([write]) == [WriteOutcome(SaveOutcome.STORED)]
                memory[:] = 0xAA
                read = ReadRequest(key_of(number), memory[4096 + offset :][: nbytes + spare])
                (outcome,) = await tier.read([read])
                assert is_right(read, outcome)
                assert outcome.payload_bytes == nbytes
                assert (memory[: 4096 + offset] == 0xAA).all()
                assert (memory[4096 + offset + nbytes + spare :] == 0xAA).all()

    async def test_a_write_does_not_change_or_keep_the_payload(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            payload = bytearray(payload_of(key_of(0)))
            await tier.write([WriteRequest(key_of(0), payload, digest_of(bytes(payload)), NBYTES)])
            assert payload == payload_of(key_of(0))
            payload[:] = bytes(NBYTES)
            request = read_request(0)
            assert is_right(request, (await tier.read([request]))[0])

    async def test_the_first_write_of_a_key_stays(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            assert (await tier.write([write_request(0)]))[0].outcome is SaveOutcome.STORED
            other = payload_of(key_of(1))
            again = await tier.write([WriteRequest(key_of(0), other, digest_of(other), NBYTES)])
            assert again[0].outcome is SaveOutcome.ALREADY_STORED
            request = read_request(0)
            assert is_right(request, (await tier.read([request]))[0])

    async def test_a_key_named_twice_in_a_write_is_stored_once(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            outcomes = Counter(o.outcome for o in await tier.write([write_request(0) for _ in range(8)]))
            assert outcomes[SaveOutcome.STORED] == 1
            assert outcomes[SaveOutcome.ALREADY_STORED] + outcomes[SaveOutcome.PENDING] == 7
            assert len(self.raw_keys(tier)) == 1

    async def test_a_key_named_twice_in_a_read_is_read_twice(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0)])
            requests = [read_request(0), read_request(0)]
            assert all(map(is_right, requests, await tier.read(requests)))

    async def test_empty_batches(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            assert await tier.read([]) == []
            assert await tier.write([]) == []
            assert await tier.delete([]) == []
            assert await tier.find([]) == []
            assert tier.lookup([]) == []

    # -- misses ----------------------------------------------------------------------------------------

    async def test_outcomes_are_in_the_order_of_the_call(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n) for n in range(0, 40, 2)])
            requests = [read_request(n) for n in range(40)]
            outcomes = await tier.read(requests)
            for number, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
                if number % 2:
                    assert (outcome.reason, outcome.cause) == (MissReason.NEVER_STORED, Cause.ABSENT)
                else:
                    assert is_right(request, outcome)

    async def test_a_buffer_that_is_too_small_is_a_miss_and_the_block_stays(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0), write_request(1, 5000)])
            memory = aligned(NBYTES)
            for number, room in ((0, NBYTES - 1), (0, 100), (1, 4999)):
                memory[:] = 0xAA
                (outcome,) = await tier.read([ReadRequest(key_of(number), memory[:room])])
                assert (outcome.reason, outcome.cause) == (MissReason.TRANSFER_FAILED, Cause.BUFFER_TOO_SMALL)
                assert (memory[room:] == 0xAA).all()
            requests = [read_request(0), read_request(1, 5000)]
            assert all(map(is_right, requests, await tier.read(requests)))

    async def test_a_wrong_digest_is_found_when_the_block_is_read(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            payload = payload_of(key_of(0))
            await tier.write([WriteRequest(key_of(0), payload, digest_of(payload) ^ 1, NBYTES)])
            await self.expect_corrupt(tier, 0)

    @pytest.mark.parametrize("position", [0, 0.3, 0.5, 0.9, 1])
    async def test_a_flipped_bit_is_a_miss_and_the_block_is_removed(self, tmp_path: Path, position: float) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0), write_request(1)])
            data = bytearray(self.raw_read(tier, key_of(0)))
            data[round(position * (len(data) - 1))] ^= 4
            self.raw_write(tier, key_of(0), bytes(data))
            await self.expect_refused(tier, 0)
            request = read_request(1)
            assert is_right(request, (await tier.read([request]))[0])
            await self.expect_written_anew(tier, 0)

    @pytest.mark.parametrize("change", [-NBYTES, -4096, -8, -1, 1, 8, 4096])
    async def test_a_block_of_another_length_is_a_miss(self, tmp_path: Path, change: int) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0)])
            data = self.raw_read(tier, key_of(0))
            self.raw_write(tier, key_of(0), data[:change] if change < 0 else data + bytes(change))
            await self.expect_refused(tier, 0, room=2 * NBYTES)
            await self.expect_written_anew(tier, 0)

    async def test_blocks_that_trade_places_are_misses(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0), write_request(1)])
            first, second = self.raw_read(tier, key_of(0)), self.raw_read(tier, key_of(1))
            self.raw_write(tier, key_of(0), second)
            self.raw_write(tier, key_of(1), first)
            await self.expect_refused(tier, 0)
            await self.expect_refused(tier, 1)

    async def test_foreign_bytes_of_the_same_length_are_a_miss(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0)])
            size = len(self.raw_read(tier, key_of(0)))
            self.raw_write(tier, key_of(0), payload_of(key_of(9), size))
            await self.expect_refused(tier, 0)

    async def expect_corrupt(self, tier: Tier, number: int, room: int = NBYTES) -> None:
        """Check that a read of test block `number` is a miss and is counted, and that the block is gone afterwards."""
        before = tier.stats()
        (outcome,) = await tier.read([read_request(number, room)])
        assert (outcome.reason, outcome.cause) == (MissReason.CORRUPT, Cause.CORRUPT)
        after = tier.stats()
        assert after.misses[MissReason.CORRUPT] == before.misses[MissReason.CORRUPT] + 1
        assert after.removed_corrupt == before.removed_corrupt + 1
        assert key_of(number) not in self.raw_keys(tier)
        assert tier.lookup([key_of(number)]) == [0]
        assert await tier.find([key_of(number)]) == [0]

    async def expect_refused(self, tier: Tier, number: int, room: int = NBYTES) -> None:
        """The same for a block that somebody has changed. A tier that seals cannot know whose block it is, so it does
        not remove it, but writes over it."""
        if not self.seals:
            await self.expect_corrupt(tier, number, room)
            return
        before = tier.stats()
        request = read_request(number, room)
        (outcome,) = await tier.read([request])
        assert (outcome.reason, outcome.cause) == (MissReason.AUTH, Cause.AUTH)
        assert set(as_bytes(request.buffer).tolist()) <= {0, 0xAA}  # nothing of what is not authentic
        after = tier.stats()
        assert after.misses[MissReason.AUTH] == before.misses[MissReason.AUTH] + 1
        assert after.removed_corrupt == before.removed_corrupt
        assert key_of(number) in self.raw_keys(tier)
        assert tier.lookup([key_of(number)]) == [0]

    async def expect_written_anew(self, tier: Tier, number: int) -> None:
        """Check that a write of test block `number` is needed, and brings it back."""
        assert (await tier.write([write_request(number)]))[0].outcome is SaveOutcome.STORED
        request = read_request(number)
        assert is_right(request, (await tier.read([request]))[0])
        assert tier.lookup([key_of(number)])[0] >= NBYTES

    # -- asking ----------------------------------------------------------------------------------------

    async def test_lookup_and_find(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n, nbytes) for n, nbytes in enumerate(SIZES)])
            keys = [key_of(n) for n in range(len(SIZES) + 1)]
            for rooms in (tier.lookup(keys), await tier.find(keys)):
                assert rooms[-1] == 0
                requests = [read_request(n, room) for n, room in enumerate(rooms[:-1])]
                assert all(map(is_right, requests, await tier.read(requests)))

    async def test_delete(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0), write_request(1)])
            assert await tier.delete([key_of(0), key_of(7)]) == [True, False]
            assert await tier.delete([key_of(0)]) == [False]
            assert self.raw_keys(tier) == {key_of(1)}
            assert tier.lookup([key_of(0)]) == [0]
            assert list(map(bool, await tier.find([key_of(0), key_of(1)]))) == [False, True]
            (outcome,) = await tier.read([read_request(0)])
            assert outcome.reason in (MissReason.NEVER_STORED, MissReason.EVICTED)

    async def test_scan_finds_every_block_once(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n) for n in range(50)])
            found = [block async for block in tier.scan()]
            assert sorted(block.key for block in found) == sorted(key_of(n) for n in range(50))
            assert sum(block.stored_bytes for block in found) == tier.used_bytes
            assert all(block.last_use_s > 0 for block in found)

    # -- capacity --------------------------------------------------------------------------------------

    async def test_the_least_recently_used_make_room(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path / "measured") as tier:
            await tier.write([write_request(0)])
            one = tier.used_bytes
        async with self.tier(tmp_path / "bounded", capacity_bytes=4 * one) as tier:
            for number in range(4):
                await tier.write([write_request(number)])
            await tier.read([read_request(0)])
            coldest = [block.key for block in tier.coldest([NBYTES] * 2)]
            assert coldest in ([], [key_of(1), key_of(2)]), "none where the store evicts"
            for number in (4, 5):
                assert (await tier.write([write_request(number)]))[0].outcome is SaveOutcome.STORED
            assert tier.used_bytes == tier.capacity_bytes == 4 * one
            assert self.raw_keys(tier) == {key_of(n) for n in (0, 3, 4, 5)}
            assert tier.stats().evicted_blocks == 2
            assert tier.stats().num_blocks == 4
            assert len(tier.coldest([NBYTES])) == len(coldest) // 2

    async def test_a_block_larger_than_the_tier_is_refused_and_evicts_nothing(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path, capacity_bytes=2 * NBYTES) as tier:
            await tier.write([write_request(0)])
            (outcome,) = await tier.write([write_request(1, 3 * NBYTES)])
            assert (outcome.outcome, outcome.cause) == (SaveOutcome.NO_SPACE, Cause.NO_SPACE)
            assert self.raw_keys(tier) == {key_of(0)}

    # -- buffers, deadlines, cancelling ----------------------------------------------------------------

    async def test_buffers_settle_once_with_the_outcome_before_the_call_returns(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            written: list[WriteOutcome] = []
            outcomes = await tier.write([write_request(n, on_settled=written.append) for n in (0, 1, 1)])
            assert Counter(written) == Counter(outcomes)
            settled: list[ReadOutcome] = []
            reads = [ReadRequest(key_of(n), bytearray(NBYTES), settled.append) for n in (0, 1, 2)]
            returned = await tier.read(reads)
            assert Counter(settled) == Counter(returned)
            assert all(outcome.settled for outcome in outcomes)
            assert all(outcome.settled for outcome in returned)
            assert tier.stats().unsettled == 0

    async def test_a_deadline_that_has_passed(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n) for n in range(64)])
            settled: list[int] = []
            requests = [
                ReadRequest(key_of(n), bytearray(NBYTES), lambda _, number=n: settled.append(number))  # type: ignore[misc]
                for n in range(64)
            ]
            outcomes = await tier.read(requests, deadline_s=0.0)
            for request, outcome in zip(requests, outcomes, strict=True):
                if outcome.reason is None:
                    assert is_right(request, outcome)
                else:
                    assert (outcome.reason, outcome.cause) == (MissReason.DEADLINE, Cause.DEADLINE)
            assert len(settled) >= sum(outcome.settled for outcome in outcomes)
            await until(lambda: len(settled) == 64)
            assert sorted(settled) == list(range(64))
            assert tier.stats().misses[MissReason.DEADLINE] == sum(o.reason is not None for o in outcomes)

    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
    async def test_cancelling_a_read_settles_every_buffer_once(self, tmp_path: Path, turns: int) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n) for n in range(64)])
            settled: Counter[int] = Counter()
            requests = [ReadRequest(key_of(n), bytearray(NBYTES), partial(_count, settled, n)) for n in range(64)]
            task = asyncio.create_task(tier.read(requests))
            for _ in range(turns):
                await asyncio.sleep(0)
            was_started = turns > 0
            task.cancel()
            await asyncio.wait([task])
            if was_started:
                await until(lambda: len(settled) == 64)
                assert set(settled.values()) == {1}
            assert tier.stats().unsettled == 0
            request = read_request(0)
            assert is_right(request, (await tier.read([request]))[0])

    @pytest.mark.parametrize("turns", [1, 2, 5])
    async def test_cancelling_a_write_leaves_whole_blocks_only(self, tmp_path: Path, turns: int) -> None:
        async with self.tier(tmp_path) as tier:
            settled: Counter[int] = Counter()
            requests = [write_request(n, on_settled=partial(_count, settled, n)) for n in range(64)]
            task = asyncio.create_task(tier.write(requests))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: len(settled) == 64)
            assert set(settled.values()) == {1}
            reads = [read_request(n) for n in range(64)]
            for request, outcome in zip(reads, await tier.read(reads), strict=True):
                assert is_right(request, outcome) or outcome.cause is Cause.ABSENT
            again = {outcome.outcome for outcome in await tier.write([write_request(n) for n in range(64)])}
            assert again <= {SaveOutcome.STORED, SaveOutcome.ALREADY_STORED}

    async def test_many_callers_at_once_only_ever_see_right_bytes(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path, capacity_bytes=20 * 2 * NBYTES) as tier:

            async def caller(seed: int) -> None:
                rng = random.Random(seed)
                for _ in range(25):
                    numbers = [rng.randrange(40) for _ in range(rng.randrange(1, 6))]
                    kind = rng.random()
                    if kind < 0.45:
                        await tier.write([write_request(n) for n in numbers])
                    elif kind < 0.9:
                        requests = [read_request(n) for n in numbers]
                        for request, outcome in zip(requests, await tier.read(requests), strict=True):
                            assert is_right(request, outcome) or outcome.cause is Cause.ABSENT
                    else:
                        await tier.delete([key_of(n) for n in numbers])

            await asyncio.gather(*(caller(seed) for seed in range(6)))
            assert tier.used_bytes <= tier.capacity_bytes
            assert len(self.raw_keys(tier)) == tier.stats().num_blocks
            stats = tier.stats()
            assert stats.misses[MissReason.CORRUPT] == stats.misses[MissReason.TRANSFER_FAILED] == 0

    # -- life, namespaces, misuse ----------------------------------------------------------------------

    async def test_life(self, tmp_path: Path) -> None:
        never_opened = self.tier(tmp_path / "a")
        with pytest.raises(EngineStateError):
            await never_opened.read([read_request(0)])
        await never_opened.aclose()
        tier = self.tier(tmp_path / "b")
        await tier.open()
        await tier.open()
        await tier.aclose()
        await tier.aclose()
        for use in (tier.open(), tier.read([]), tier.write([]), tier.delete([]), tier.find([])):
            with pytest.raises(EngineStateError):
                await use

    async def test_closing_ends_calls_under_way(self, tmp_path: Path) -> None:
        tier = self.tier(tmp_path)
        await tier.open()
        await tier.write([write_request(n) for n in range(64)])
        settled: Counter[int] = Counter()
        requests = [ReadRequest(key_of(n), bytearray(NBYTES), partial(_count, settled, n)) for n in range(64)]
        task = asyncio.create_task(tier.read(requests))
        await asyncio.sleep(0)
        await tier.aclose()
        for request, outcome in zip(requests, await task, strict=True):
            assert is_right(request, outcome) or outcome.cause is Cause.CLOSED
        assert set(settled.values()) == {1}
        assert len(settled) == 64

    async def test_a_new_object_finds_what_the_last_one_kept(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n) for n in range(10)])
        async with self.tier(tmp_path) as tier:
            requests = [read_request(n) for n in range(10)]
            outcomes = await tier.read(requests)
            if self.keeps_blocks_after_closing:
                assert all(map(is_right, requests, outcomes))
                await until(lambda: tier.stats().scan.complete)
                assert all(tier.lookup([key_of(n) for n in range(10)]))
            else:
                assert all(outcome.reason is MissReason.NEVER_STORED for outcome in outcomes)

    async def test_namespaces_do_not_meet(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as mine, self.tier(tmp_path, namespace=OTHER_NAMESPACE) as other:
            await mine.write([write_request(0), write_request(1)])
            assert await other.find([key_of(0)]) == [0]
            assert (await other.read([read_request(0)]))[0].cause is Cause.ABSENT
            assert await other.delete([key_of(0)]) == [False]
            assert [block async for block in other.scan()] == []
            payload = payload_of(key_of(5))
            assert (await other.write([WriteRequest(key_of(0), payload, digest_of(payload), NBYTES)]))[
                0
            ].outcome is SaveOutcome.STORED
            requests = [read_request(0), read_request(1)]
            assert all(map(is_right, requests, await mine.read(requests)))

    async def test_misuse_raises_and_starts_nothing(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            settled: list[object] = []
            good = write_request(0, on_settled=settled.append)
            for keys in ([b"short"], [key_of(0), bytes(33)]):
                with pytest.raises(InvalidHashError):
                    await tier.find(keys)
                with pytest.raises(InvalidHashError):
                    await tier.delete(keys)
                with pytest.raises(InvalidHashError):
                    await tier.write([good, WriteRequest(keys[-1], b"payload!", 0, 8)])
            for bad in (
                WriteRequest(key_of(1), b"", 0, 8),
                WriteRequest(key_of(1), b"payload!", 1 << 64, 8),
                WriteRequest(key_of(1), b"payload!", 0, -1),
                WriteRequest(key_of(1), np.zeros((8, 8), dtype=np.uint8)[:, ::2], 0, 8),
            ):
                with pytest.raises(ValueError):  # noqa: PT011 - the contract names the type only
                    await tier.write([good, bad])
            reads = [ReadRequest(key_of(0), bytearray(8), settled.append), ReadRequest(key_of(1), memoryview(b"fixed"))]
            with pytest.raises(ValueError, match="writable"):
                await tier.read(reads)
            assert settled == []
            assert self.raw_keys(tier) == set()

    async def test_figures_add_up(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(0), write_request(1)])
            await tier.write([write_request(1)])
            await tier.read([read_request(n) for n in range(5)])
            stats = tier.stats()
            assert stats.name == tier.name
            assert stats.hits == 2
            assert sum(stats.misses.values()) == stats.causes[Cause.ABSENT] == 3
            assert stats.writes[SaveOutcome.STORED] == 2
            assert stats.writes[SaveOutcome.ALREADY_STORED] == 1
            assert stats.read_bytes == stats.written_bytes == 2 * NBYTES
            assert stats.num_blocks == 2
            assert 2 * NBYTES <= stats.used_bytes == tier.used_bytes <= stats.capacity_bytes == tier.capacity_bytes


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Return memory of `nbytes` that starts at a page boundary, as the pinned pool does."""
    memory = np.empty(nbytes + 4096, dtype=np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + nbytes]


def _count(settled: Counter[int], number: int, _: object) -> None:
    settled[number] += 1
