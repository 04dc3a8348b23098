"""Several tiers as one: blocks are in all of them, and none of them can do harm to the others."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kvortex import KVortexConfig, KVortexEngine, MissReason
from kvortex.errors import ConfigError, EngineStateError
from kvortex.layout import PagedCache
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    TierConformance,
    is_right,
    key_of,
    read_request,
    until,
    write_request,
)
from kvortex.tiering import chain as chain_module
from kvortex.tiering.chain import ChainTier
from kvortex.tiering.chain_parts import Takes
from kvortex.tiers import Cause, ReadOutcome, ReadRequest, Tier, breaker
from kvortex.tiers.frame import SHORT_HEADER_BYTES, frame_bytes
from kvortex.types import SaveOutcome
from tests.engine_support import BLOCK_SIZE, chain, contents, make_cache, small_config
from tests.tiers.object_support import DictTier, UnlistedTier, failing, hanging, keys_in

TIMEOUT_S = 1.0
STORED_BYTES = NBYTES + SHORT_HEADER_BYTES
STORES: dict[Path, tuple[dict[str, bytes], dict[str, bytes]]] = {}


class TestChain(TierConformance):
    """Two tiers of half the capacity each."""

    keeps_blocks_after_closing = True

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        parts = STORES.setdefault(root, ({}, {}))
        half = capacity_bytes // 2
        tiers = [(DictTier(objects, namespace=namespace, capacity_bytes=half), "always") for objects in parts]
        return ChainTier(tiers, timeout_s=20.0)

    async def test_a_block_larger_than_the_tier_is_refused_and_evicts_nothing(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path, capacity_bytes=4 * NBYTES) as tier:
            await tier.write([write_request(0)])
            (outcome,) = await tier.write([write_request(1, 3 * NBYTES)])
            assert (outcome.outcome, outcome.cause) == (SaveOutcome.NO_SPACE, Cause.NO_SPACE)
            assert self.raw_keys(tier) == {key_of(0)}

    async def test_scan_finds_every_block_once(self, tmp_path: Path) -> None:
        async with self.tier(tmp_path) as tier:
            await tier.write([write_request(n) for n in range(50)])
            found = [block async for block in tier.scan()]
            assert sorted(block.key for block in found) == sorted(key_of(n) for n in range(50))
            assert 2 * sum(block.stored_bytes for block in found) == tier.used_bytes

    @staticmethod
    def parts(tier: Tier) -> list[DictTier]:
        return [cast(DictTier, link.tier) for link in cast(ChainTier, tier).links]

    def raw_keys(self, tier: Tier) -> set[bytes]:
        return keys_in(self.parts(tier)[0])

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        part = self.parts(tier)[0]
        return part.objects[part._name(key)]

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        for part in self.parts(tier):
            part.objects[part._name(key)] = data


class Bench:
    """A chain over dicts.

    Args:
        takes: what each tier takes.
        room: blocks that each tier has room for; None for no limit.
    """

    def __init__(
        self, *takes: str, room: Sequence[int | None] = (), timeout_s: float = TIMEOUT_S, **named: Any
    ) -> None:
        capacities = [None if count is None else count * STORED_BYTES for count in room] or [None] * len(takes)
        self.parts = [DictTier({}, namespace=NAMESPACE, capacity_bytes=nbytes) for nbytes in capacities]
        tiers = [(part, Takes(one)) for part, one in zip(self.parts, takes, strict=True)]
        self.tier = ChainTier(tiers, timeout_s, **named)

    async def __aenter__(self) -> "Bench":
        await self.tier.open()
        await self.tier.scanned()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tier.aclose()

    def has(self, number: int) -> list[bool]:
        """Which of the tiers have test block `number`."""
        return [key_of(number) in keys_in(part) for part in self.parts]

    def lose(self, part: int, numbers: Sequence[int]) -> None:
        """Take test blocks away from a tier, which does not know."""
        for number in numbers:
            del self.parts[part].objects[self.parts[part]._name(key_of(number))]

    async def read(self, *numbers: int, deadline_s: float | None = None) -> list[ReadOutcome]:
        """Outcomes of a read; each hit is checked."""
        requests = [read_request(number) for number in numbers]
        outcomes = await self.tier.read(requests, deadline_s=deadline_s)
        assert all(o.reason is not None or is_right(r, o) for r, o in zip(requests, outcomes, strict=True))
        return outcomes

    async def copied(self) -> None:
        await until(lambda: not self.tier._copies)


@pytest.fixture
def paused_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 3600.0)


async def test_every_tier_gets_every_block_and_the_first_is_read() -> None:
    async with Bench("always", "always", "always") as bench:
        assert {o.outcome for o in await bench.tier.write([write_request(n) for n in range(20)])} == {
            SaveOutcome.STORED
        }
        assert all(bench.has(n) == [True] * 3 for n in range(20))
        await bench.read(*range(20))
        assert [part.calls.count("get") for part in bench.parts] == [20, 0, 0]


async def test_what_one_tier_has_lost_another_has_and_the_first_gets_it_back() -> None:
    async with Bench("always", "always", "always") as bench:
        await bench.tier.write([write_request(n) for n in range(8)])
        bench.lose(0, range(8))
        bench.lose(1, range(4))
        outcomes = await bench.read(*range(8), 99)
        assert [o.reason for o in outcomes] == [None] * 8 + [MissReason.NEVER_STORED]
        await bench.copied()
        assert all(bench.has(n) == [True] * 3 for n in range(8))
        assert bench.tier._copied_bytes == 0


async def test_a_damaged_block_is_read_from_the_next_and_mended() -> None:
    async with Bench("always", "always") as bench:
        await bench.tier.write([write_request(0)])
        first = bench.parts[0]
        name = first._name(key_of(0))
        first.objects[name] = first.objects[name][:-1] + b"?"
        assert [o.reason for o in await bench.read(0)] == [None]
        await bench.copied()
        assert first.objects[name] == bench.parts[1].objects[name]
        assert first.stats().removed_corrupt == 1
        for part in bench.parts:
            part.objects[name] = b"damaged"
        (outcome,) = await bench.read(0)
        assert (outcome.reason, outcome.cause) == (MissReason.CORRUPT, Cause.CORRUPT)


async def test_copies_are_not_made_of_what_is_fetched_for_good_nor_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for options, most in (({"copies_forward": False}, 0), ({}, 2)):
        monkeypatch.setattr(chain_module, "COPY_BYTES", 2 * NBYTES)
        async with Bench("always", "always", **options) as bench:
            await bench.tier.write([write_request(n) for n in range(8)])
            bench.lose(0, range(8))
            assert all(o.reason is None for o in await bench.read(*range(8)))
            await bench.copied()
            assert sum(bench.has(n)[0] for n in range(8)) == most


async def test_a_tier_may_take_only_what_is_used_again() -> None:
    async with Bench("always", "second_touch") as bench:
        await bench.tier.write([write_request(n) for n in range(4)])
        assert [bench.has(n) for n in range(4)] == [[True, False]] * 4
        await bench.tier.touch([key_of(1), key_of(2), key_of(77)], [1.0, 2.0, 3.0])
        await bench.copied()
        assert [bench.has(n)[1] for n in range(4)] == [False, True, True, False]
        bench.lose(0, [1])
        assert [o.reason for o in await bench.read(1)] == [None]


async def write_one_by_one(bench: Bench, *numbers: int) -> None:
    """Each is used later than the one before it."""
    for number in numbers:
        (outcome,) = await bench.tier.write([write_request(number)])
        assert outcome.outcome.is_stored
        await bench.copied()


async def test_an_exclusive_tier_has_what_the_tier_in_front_has_evicted() -> None:
    async with Bench("always", "evicted", room=[4, 4]) as bench:
        await write_one_by_one(bench, *range(4))
        assert [bench.has(n) for n in range(4)] == [[True, False]] * 4
        await write_one_by_one(bench, *range(4, 7))
        assert [bench.has(n) for n in range(7)] == [[False, True]] * 3 + [[True, False]] * 4
        assert bench.tier.lookup([key_of(n) for n in range(7)]) == [NBYTES] * 7
        stats = bench.tier.stats()
        assert (stats.num_blocks, stats.evicted_blocks) == (7, 0)
        assert [o.reason for o in await bench.read(0)] == [None]  # it comes forward, and pushes another one back
        await bench.copied()
        assert [bench.has(n) for n in range(7)] == [[True, False]] + [[False, True]] * 3 + [[True, False]] * 3
        await write_one_by_one(bench, 7, 8)
        assert bench.tier.lookup([key_of(1), key_of(2)]) == [0, NBYTES], "the coldest of all is lost"
        assert bench.tier.stats().evicted_blocks == 1


async def test_many_blocks_at_once_push_as_many_back() -> None:
    async with Bench("always", "evicted", "evicted", room=[8, 8, None]) as bench:
        for start in range(0, 48, 8):
            writes = [bench.tier.write([write_request(n)]) for n in range(start, start + 8)]
            assert all(outcome.outcome.is_stored for (outcome,) in await asyncio.gather(*writes))
            await bench.copied()
        assert bench.tier.lookup([key_of(n) for n in range(48)]) == [NBYTES] * 48
        assert all(0 < len(part.objects) <= 8 for part in bench.parts[:2])
        assert all(outcome.reason is None for outcome in await bench.read(*range(48)))
        await bench.copied()


@pytest.mark.parametrize("how", [failing, hanging])
@pytest.mark.usefixtures("paused_for_good")
async def test_a_sick_exclusive_tier_does_not_keep_the_one_in_front_from_storing(how: Any) -> None:
    async with Bench("always", "evicted", room=[4, None], timeout_s=0.4) as bench:
        await write_one_by_one(bench, *range(4))
        bench.parts[1].before = how("put")
        await write_one_by_one(bench, *range(4, 12))
        assert [bench.has(n)[0] for n in range(4, 12)] == [False] * 4 + [True] * 4
        assert not bench.parts[1].objects


async def test_what_comes_from_behind_an_exclusive_tier_passes_it_by() -> None:
    async with Bench("always", "evicted", "always", room=[2, None, None]) as bench:
        await write_one_by_one(bench, 0)
        bench.lose(0, [0])
        assert [o.reason for o in await bench.read(0)] == [None]
        await bench.copied()
        assert bench.has(0) == [True, False, True]


async def test_a_block_that_does_not_come_forward_stays_where_it_is() -> None:
    async with Bench("always", "evicted", room=[2, None]) as bench:
        await write_one_by_one(bench, *range(4))
        bench.parts[0].before = failing("put")
        assert [o.reason for o in await bench.read(0)] == [None]
        await bench.copied()
        assert bench.has(0) == [False, True]


def held(tier: DictTier, kind: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold a tier's calls of a kind; returns what tells that one has begun, and what lets them go on."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def before(call: str, name: str) -> None:
        if call == kind:
            begun.set()
            await go_on.wait()

    tier.before = before
    return begun, go_on


async def test_what_is_used_while_it_is_pushed_back_pushes_no_other_out() -> None:
    async with Bench("always", "evicted", room=[2, None]) as bench:
        await write_one_by_one(bench, 0, 1)
        begun, go_on = held(bench.parts[1], "put")
        writing = asyncio.create_task(bench.tier.write([write_request(2)]))
        await begun.wait()
        await bench.parts[0].touch([key_of(0)], [time.time()])
        go_on.set()
        await writing
        assert [bench.has(n) for n in range(3)] == [[False, True], [True, False], [True, False]]


async def test_writes_that_come_together_wait_for_the_same_blocks_to_be_pushed_back() -> None:
    async with Bench("always", "evicted", room=[2, None]) as bench:
        await write_one_by_one(bench, 0, 1)
        begun, go_on = held(bench.parts[1], "put")
        writing = [asyncio.create_task(bench.tier.write([write_request(n)])) for n in (2, 3)]
        await begun.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert [bench.has(n) for n in range(4)] == [[True, False]] * 2 + [[False, False]] * 2
        go_on.set()
        await asyncio.gather(*writing)
        assert [bench.has(n) for n in range(4)] == [[False, True]] * 2 + [[True, False]] * 2


async def test_a_block_that_is_pushed_back_before_it_is_read_is_read_there() -> None:
    async with Bench("always", "evicted", room=[2, None]) as bench:
        await write_one_by_one(bench, 0, 1)
        bench.parts[1].finds_more = False  # so it is not asked for what it is not known to have
        begun, go_on = held(bench.parts[0], "get")
        reading = asyncio.create_task(bench.read(0))
        await begun.wait()
        name = bench.parts[0]._name(key_of(0))
        bench.parts[1].objects[name] = bench.parts[0].objects.pop(name)
        go_on.set()
        assert [outcome.reason for outcome in await reading] == [None]


async def test_what_is_deleted_while_it_is_pushed_back_does_not_come_again() -> None:
    async with Bench("always", "evicted", room=[2, None]) as bench:
        await write_one_by_one(bench, 0, 1)
        begun, go_on = held(bench.parts[1], "put")
        writing = asyncio.create_task(bench.tier.write([write_request(2)]))
        await begun.wait()
        deleting = asyncio.create_task(bench.tier.delete([key_of(0)]))
        await asyncio.sleep(0.01)
        go_on.set()
        assert await deleting == [True]
        await writing
        await bench.copied()
        assert bench.has(0) == [False, False]


async def test_a_full_tier_does_not_keep_the_others_from_storing() -> None:
    full, roomy = DictTier({}, namespace=NAMESPACE, capacity_bytes=100), DictTier({}, namespace=NAMESPACE)
    async with ChainTier([(full, "always"), (roomy, "always")], TIMEOUT_S) as tier:
        assert (await tier.write([write_request(0)]))[0].outcome is SaveOutcome.STORED
        request = read_request(0)
        assert is_right(request, (await tier.read([request]))[0])
    async with ChainTier([(DictTier({}, namespace=NAMESPACE, capacity_bytes=9), "always")], TIMEOUT_S) as tier:
        (outcome,) = await tier.write([write_request(0)])
        assert (outcome.outcome, outcome.cause) == (SaveOutcome.NO_SPACE, Cause.NO_SPACE)


@pytest.mark.parametrize("sick", [0, 1])
@pytest.mark.parametrize("how", [failing, hanging])
@pytest.mark.usefixtures("paused_for_good")
async def test_a_sick_tier_is_passed_over(sick: int, how: Any) -> None:
    async with Bench("always", "always", timeout_s=0.4) as bench:
        await bench.tier.write([write_request(n) for n in range(4)])
        bench.parts[sick].before = how("get", "put", "find", "delete")
        async with asyncio.timeout(5):
            for _ in range(4):
                outcomes = await bench.read(*range(4))
            assert all(o.reason is None for o in outcomes)
            for number in range(10, 14):
                (written,) = await bench.tier.write([write_request(number)])
                assert written.outcome is SaveOutcome.STORED
            assert bench.has(13)[1 - sick]
            assert (await bench.tier.find([key_of(0), key_of(99)])) == [NBYTES, 0]
            assert bench.tier.lookup([key_of(0)]) == [NBYTES]
        figures = bench.tier.links[sick].figures()
        assert figures.breakers["writes"].state == "open"
        assert bench.tier.links[1 - sick].figures().breakers["writes"].state == "closed"


@pytest.mark.parametrize("bad", [0, 1])
async def test_a_tier_that_cannot_be_opened_is_left_out(bad: int) -> None:
    bench = Bench("always", "always")
    bench.parts[bad].before = failing("connect", error=ConfigError("no password"))
    async with bench:
        assert [link.figures().usable for link in bench.tier.links] == [bad != 0, bad != 1]
        await bench.tier.write([write_request(0)])
        assert [o.reason for o in await bench.read(0)] == [None]
        assert await bench.tier.delete([key_of(0)]) == [True]


async def test_none_can_be_opened() -> None:
    bench = Bench("always", "always")
    for part in bench.parts:
        part.before = failing("connect", error=ConfigError("no password"))
    with pytest.raises(ConfigError, match="dict: no password; dict: no password"):
        await bench.tier.open()
    with pytest.raises(EngineStateError, match="not open"):
        await bench.tier.read([])
    await bench.tier.aclose()


async def test_a_tier_that_opens_late_comes_late() -> None:
    bench = Bench("always", "always")
    opens = asyncio.Event()

    async def before(call: str, name: str) -> None:
        if call == "connect":
            await opens.wait()

    bench.parts[0].before = before
    async with bench:
        await bench.tier.write([write_request(0)])
        assert bench.has(0) == [False, True]
        opens.set()
        await until(lambda: bench.tier.links[0].is_open)
        assert [o.reason for o in await bench.read(0)] == [None]
        await bench.copied()
        assert bench.has(0) == [True, True]


async def test_what_is_deleted_is_not_copied_back() -> None:
    async with Bench("always", "always") as bench:
        await bench.tier.write([write_request(0)])
        bench.lose(0, [0])
        writes = asyncio.Event()

        async def before(call: str, name: str) -> None:
            if call == "put":
                await writes.wait()

        bench.parts[0].before = before
        assert [o.reason for o in await bench.read(0)] == [None]
        delete = asyncio.create_task(bench.tier.delete([key_of(0)]))
        await asyncio.sleep(0.05)
        assert not delete.done()
        writes.set()
        assert await delete == [True]
        assert bench.has(0) == [False, False]


async def test_one_that_does_not_delete_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Bench("always", "always") as bench:
        await bench.tier.write([write_request(0)])

        async def delete(*_: object, **__: object) -> list[bool]:
            raise OSError("no")

        monkeypatch.setattr(bench.parts[1], "delete", delete)
        assert await bench.tier.delete([key_of(0)]) == [False]


async def test_a_late_block_is_settled_when_its_tier_lets_go() -> None:
    """A tier that keeps its buffer: nobody else may write into it."""
    async with Bench("always", "always", timeout_s=0.2) as bench:
        await bench.tier.write([write_request(0)])
        kept: list[ReadRequest] = []

        async def read(requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
            kept.extend(requests)
            await asyncio.sleep(deadline_s or 0)
            return [ReadOutcome(MissReason.DEADLINE, cause=Cause.DEADLINE, settled=False) for _ in requests]

        bench.parts[0].read = read  # type: ignore[method-assign]
        settled: list[ReadOutcome] = []
        (outcome,) = await bench.tier.read([ReadRequest(key_of(0), bytearray(NBYTES), settled.append)])
        assert (outcome.reason, outcome.settled) == (MissReason.DEADLINE, False)
        assert settled == []
        kept[0].settle(ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.IO_ERROR))
        assert [o.cause for o in settled] == [Cause.IO_ERROR]
        assert [o.reason for o in await bench.read(0)] == [None]  # the first one's reads are paused now


@pytest.mark.parametrize("seed", range(9))
async def test_a_storm(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Tiers that fail, hang and are slow; calls with deadlines, and cancelled ones: every buffer comes back once."""
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 0.02)
    dice = random.Random(seed)
    middle = dice.choice(("always", "second_touch", "evicted"))
    room = [20, None, None] if middle == "evicted" else []
    async with Bench("always", middle, "always", room=room, timeout_s=0.3) as bench:

        async def before(call: str, name: str) -> None:
            roll = dice.random()
            if roll < 0.02:
                await asyncio.sleep(60)
            elif roll < 0.1:
                raise ConnectionError("now and then")
            else:
                await asyncio.sleep(dice.choice((0, 0, 0.001, 0.02)))

        for part in bench.parts:
            part.before = before
        asked: Counter[int] = Counter()
        settled: Counter[int] = Counter()
        numbers = itertools.count()

        def note() -> Any:
            number = next(numbers)
            asked[number] += 1
            return lambda _: settled.update([number])

        async def client(mine: random.Random) -> None:
            for _ in range(25):
                blocks = [mine.randrange(30) for _ in range(mine.randint(1, 6))]
                deadline_s = mine.choice((None, None, 0.01, 0.1))
                reads: list[ReadRequest] = []
                kind = mine.random()
                if kind < 0.45:
                    reads = [replace(read_request(n), on_settled=note()) for n in blocks]
                    call: Any = bench.tier.read(reads, deadline_s=deadline_s)
                elif kind < 0.85:
                    writes = [write_request(n, on_settled=note()) for n in blocks]
                    call = bench.tier.write(writes, deadline_s=deadline_s)
                elif kind < 0.93:
                    call = bench.tier.touch([key_of(n) for n in blocks], [float(n) for n in blocks])
                else:
                    call = bench.tier.delete([key_of(n) for n in blocks])
                task = asyncio.create_task(call)
                if mine.random() < 0.2:
                    await asyncio.sleep(mine.choice((0.001, 0.01)))
                    task.cancel()
                await asyncio.wait([task])
                if reads and not task.cancelled():
                    for request, outcome in zip(reads, task.result(), strict=True):
                        assert outcome.reason is not None or is_right(request, outcome)

        async with asyncio.timeout(60):
            await asyncio.gather(*(client(random.Random(f"{seed}/{n}")) for n in range(4)))
        for part in bench.parts:
            part.before = part._turn
        await until(lambda: settled == asked)
        await bench.copied()
        assert bench.tier.stats().unsettled == bench.tier._copied_bytes == 0
        await asyncio.sleep(0.03)
        await bench.tier.delete([key_of(n) for n in range(30)])
        for _ in range(200):  # a breaker that has opened lets one block through from time to time
            await bench.tier.write([write_request(n) for n in range(30)])
            if all(outcome.reason is None for outcome in await bench.read(*range(30))):
                break
            await asyncio.sleep(0.03)
        else:
            raise AssertionError("blocks are lost")


async def test_what_others_store_is_asked_for() -> None:
    shared: dict[str, bytes] = {}
    other = UnlistedTier(shared, namespace=NAMESPACE)
    tier = ChainTier(
        [(DictTier({}, namespace=NAMESPACE), "always"), (UnlistedTier(shared, namespace=NAMESPACE), "always")],
        TIMEOUT_S,
    )
    async with tier, other:
        assert tier.finds_more
        await other.write([write_request(0)])
        assert tier.lookup([key_of(0)]) == [0]
        request = read_request(0)
        assert is_right(request, (await tier.read([request]))[0])
        assert await tier.find([key_of(0)]) == [NBYTES]
        assert sorted([block.key async for block in tier.scan()]) == [key_of(0)]


async def test_an_engine_over_two_disks(tmp_path: Path) -> None:
    cache, hashes = make_cache(), chain(8)
    fast, large = tmp_path / "fast", tmp_path / "large"
    urls = [f"disk://{fast}?capacity_bytes=1MiB", f"disk://{large}?capacity_bytes=1GiB"]
    config = small_config(tier=urls, identity={"model": "a"})
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        await engine.save_blocks(hashes, range(8))
        await engine.flush()
        stats = engine.get_stats()
        assert [link.num_blocks for link in stats.tiering.links] == [8, 8]
        assert "  disk: 0 read, 8 blocks" in str(stats)
        assert 'kvortex_tier_link_blocks{tier="disk+disk",link="2 disk"} 8' in stats.to_prometheus()
    for path in fast.rglob("*.kv1"):
        path.unlink()
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        assert (await engine.load_blocks(hashes, range(8, 16))).ok
        assert contents(cache, range(8)) == contents(cache, range(8, 16))
        assert [link.hits for link in engine.get_stats().tiering.links] == [0, 8]
        await until(lambda: len(list(fast.rglob("*.kv1"))) == 8)
        assert await engine.invalidate(hashes)
        assert await engine.clear(tiers=True)
        assert [link.num_blocks for link in engine.get_stats().tiering.links] == [0, 0]


async def test_an_engine_over_a_small_disk_and_an_exclusive_one(tmp_path: Path) -> None:
    cache, hashes, small, large = make_cache(), chain(12), tmp_path / "small", tmp_path / "large"
    nbytes = frame_bytes(PagedCache.from_tensors(cache, BLOCK_SIZE).layouts[0].block_nbytes)
    urls = [f"disk://{small}?capacity_bytes={4 * nbytes}", f"disk://{large}?inclusion=exclusive"]
    config = small_config(tier=urls, identity={"model": "a"})
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        for number in range(12):
            assert (await engine.save_blocks(hashes[number : number + 1], [number])).ok
            await engine.flush()
        assert [link.num_blocks for link in engine.get_stats().tiering.links] == [4, 8]
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        assert engine.match_prefix(hashes) == 12
        assert (await engine.load_blocks(hashes, range(16, 28))).ok
        assert contents(cache, range(12)) == contents(cache, range(16, 28))


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["disk:///a?admission=always", "disk:///b"], r"what the first tier takes is set by tier\.admission"),
        (["disk:///a", "disk:///b?admission=never"], "admission must be one of always, second_touch"),
        (["disk:///a?inclusion=exclusive", "disk:///b"], r"what the first tier takes is set by tier\.inclusion"),
        (["disk:///a", "disk:///b?inclusion=no"], "inclusion must be one of inclusive, exclusive"),
        (["disk:///a", "disk:///b?inclusion=exclusive&admission=always"], "leave admission out"),
        (["disk:///a", 7], "must be a list of texts"),
        (["disk:///a", "nothing"], "is no URL of a tier"),
    ],
)
async def test_what_is_wrong_is_told(urls: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async with KVortexEngine.create(KVortexConfig(tier=urls, identity={"model": "a"})) as engine:
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)


def test_tiers_in_one_text() -> None:
    both = ("disk:///a?fsync=1", "disk:///b?admission=second_touch")
    assert KVortexConfig.from_env({"KVORTEX_TIER": " ".join(both)}).tier.urls == both
    assert KVortexConfig(tier=list(both)) == KVortexConfig(tier={"urls": both})
    assert KVortexConfig(tier="").tier.urls == ()
    assert eval(repr(KVortexConfig(tier=both))) == KVortexConfig(tier=both)
