"""The engine over a tier that hangs, raises or goes away: every wait ends, and no call loses by another's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
import pytest_asyncio
import torch

from kvortex import KVortexEngine, MissReason
from kvortex.errors import InvalidBlockIdError
from kvortex.hashing import Namespace
from kvortex.index import pack_keys
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.tiering import guard
from kvortex.tiers import MemoryTier, ReadOutcome, ReadRequest, Tier, breaker
from kvortex.types import Direction
from tests.engine_support import BLOCK_SIZE, Parts, chain, contents, make_cache, small_config, wipe

TIMEOUT_S = 0.2  # of the tier
HANGS_S = 60.0  # a test that takes as long waits for ever
NUM_BLOCKS = 256
MakeTier = Callable[[Namespace], Tier]


@pytest_asyncio.fixture(autouse=True)
async def ends_in_time(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(guard, "GRACE_S", 0.1)
    monkeypatch.setattr(guard, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 3600.0)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 3600.0)
    yield


class Bench:
    """An engine over a tier that misbehaves as `fault_of` says, which may be changed on the way."""

    def __init__(self, num_blocks: int = NUM_BLOCKS, **settings: Any) -> None:
        self.fault_of: Callable[[Direction, int, bytes], TierFault | None] = lambda *_: None
        self.asked = dict.fromkeys(Direction, 0)
        self.cache = make_cache(num_blocks)
        self.hashes, self.ids = chain(num_blocks), list(range(num_blocks))
        config = small_config(pool=16 << 20, tier={"timeout_s": TIMEOUT_S}).replace(**settings)
        self.engine = KVortexEngine(config, Parts(make_tier=self._make))
        self.engine.register_kv_caches(self.cache, BLOCK_SIZE)

    def _make(self, namespace: Namespace) -> Tier:
        self.inner = MemoryTier(1 << 30, namespace=namespace.digest)
        self.tier = FaultInjectingTier(self.inner, self._fault_of, delay_s=0.02)
        return self.tier

    def _fault_of(self, direction: Direction, number: int, key: bytes) -> TierFault | None:
        self.asked[direction] += 1
        return self.fault_of(direction, number, key)

    async def with_blocks_on_the_tier_alone(self) -> "Bench":
        assert await self.engine.wait_tier()
        assert (await self.engine.save_blocks(self.hashes, self.ids)).ok
        await self.engine.flush()
        self.engine.clear()
        self.want = contents(self.cache, self.ids)
        wipe(self.cache, self.ids)
        return self

    def hang(self, direction: Direction) -> None:
        self.fault_of = lambda which, *_: TierFault.HANG if which is direction else None

    def heal(self) -> None:
        self.fault_of = lambda *_: None
        self.tier.release()

    async def settled(self) -> None:
        while self.tier.num_held:
            await asyncio.sleep(0.001)

    def pause_is_over(self) -> None:
        """Of both breakers, as if an hour had gone by."""
        for each in (self.engine._tiering.backing.guard.reads, self.engine._tiering.backing.guard.writes):
            each._retry_at_s = 0.0

    async def end(self) -> None:
        self.heal()
        await self.settled()
        await self.engine.shutdown()


# -- reads and writes that hang --------------------------------------------------------------------------


async def test_a_tier_that_hangs_costs_a_load_one_timeout_whatever_its_length() -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await Bench().with_blocks_on_the_tier_alone()
        engine = bench.engine
        bench.hang(Direction.LOAD)
        assert (await engine.load_blocks(bench.hashes, bench.ids)).num_loaded == 0
        assert bench.asked[Direction.LOAD] == engine.config.tier.fetch_blocks, "what waited behind those was given up"
        for _ in range(5):
            misses = (await engine.load_blocks(bench.hashes, bench.ids)).miss_counts()
            assert set(misses) <= {MissReason.NOT_FETCHED, MissReason.PENDING}, "the tier has them all"
            assert misses[MissReason.NOT_FETCHED] > 0
            assert await engine.prefetch(bench.hashes) == 0
            assert not engine.check_blocks(bench.hashes).any(), "nothing is promised that would not be given"
        assert bench.asked[Direction.LOAD] == engine.config.tier.fetch_blocks, "and it is left alone"
        stats = engine.get_stats()
        breakers = stats.tiering.breakers
        assert (breakers["reads"].state, breakers["reads"].opened, breakers["writes"].state) == ("open", 1, "closed")
        assert 'kvortex_tier_breaker_opened_total{tier="memory",calls="reads"} 1' in stats.to_prometheus()
        assert 'kvortex_tier_breaker_open{tier="memory",calls="reads"} 1' in stats.to_prometheus()
        assert "reads are open, 1 times so far" in str(stats)
        await bench.end()


async def test_a_tier_that_is_well_again_is_found_out_by_one_block_and_then_gives_all() -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await Bench().with_blocks_on_the_tier_alone()
        bench.hang(Direction.LOAD)
        await bench.engine.load_blocks(bench.hashes, bench.ids)
        bench.tier.release()
        await bench.settled()
        bench.engine.clear()
        asked = bench.asked[Direction.LOAD]
        bench.pause_is_over()
        assert (await bench.engine.load_blocks(bench.hashes, bench.ids)).num_loaded == 0
        assert bench.asked[Direction.LOAD] == asked + 1, "one block was tried, and hung"
        assert bench.engine.get_stats().tiering.breakers["reads"].opened == 2
        bench.heal()
        await bench.settled()
        bench.pause_is_over()
        assert (await bench.engine.load_blocks(bench.hashes, bench.ids)).ok
        assert contents(bench.cache, bench.ids) == bench.want
        assert bench.engine.get_stats().tiering.breakers["reads"].state == "closed"
        await bench.end()


async def test_writes_that_hang_are_shed_and_reads_go_on() -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await Bench().with_blocks_on_the_tier_alone()
        engine, other = bench.engine, chain(64, salt=1)
        bench.hang(Direction.SAVE)
        asked = bench.asked[Direction.SAVE]
        assert (await engine.save_blocks(other, range(64))).ok
        await engine.flush()
        assert bench.asked[Direction.SAVE] == asked + 16
        figures = engine.get_stats().tiering
        assert (figures.breakers["writes"].state, figures.shed_blocks) == ("open", 64 - 16)
        assert (await engine.load_blocks(bench.hashes, bench.ids)).ok
        await engine.save_blocks(chain(8, salt=2), range(8))
        await engine.flush()
        assert bench.asked[Direction.SAVE] == asked + 16
        bench.heal()
        await bench.settled()
        bench.pause_is_over()
        assert (await engine.load_blocks(other, range(64))).ok  # in use, and some not on the tier: offered again
        await engine.flush()
        assert engine._tiering.known(pack_keys(other)).all()
        await bench.end()


async def test_when_what_hangs_holds_every_place_others_do_not_wait_for_it() -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await Bench(tier={"fetch_blocks": 16}).with_blocks_on_the_tier_alone()
        bench.hang(Direction.LOAD)
        for _ in range(3):
            assert (await bench.engine.load_blocks(bench.hashes, bench.ids)).num_loaded == 0
            bench.pause_is_over()
        assert bench.asked[Direction.LOAD] == 16
        await bench.end()


# -- life ------------------------------------------------------------------------------------------------


class OpensWhenTold(MemoryTier):
    def __init__(self, namespace: Namespace) -> None:
        super().__init__(1 << 20, namespace=namespace.digest)
        self.may_open = asyncio.Event()

    async def open(self) -> None:
        await self.may_open.wait()
        await super().open()


def engine_over(make_tier: MakeTier) -> tuple[KVortexEngine, dict[str, torch.Tensor]]:
    cache = make_cache()
    engine = KVortexEngine(small_config(tier={"timeout_s": TIMEOUT_S}), Parts(make_tier=make_tier))
    engine.register_kv_caches(cache, BLOCK_SIZE)
    return engine, cache


@pytest.mark.parametrize("call", ["load", "prefetch", "flush", "wait_tier", "shutdown"])
async def test_nobody_waits_for_ever_for_a_tier_that_does_not_open(call: str) -> None:
    async with asyncio.timeout(HANGS_S):
        engine, _ = engine_over(OpensWhenTold)
        hashes = chain(10)
        await engine.save_blocks(hashes[:5], range(5))
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "load": lambda: engine.load_blocks(hashes, range(10)),
            "prefetch": lambda: engine.prefetch(hashes),
            "flush": engine.flush,
            "wait_tier": engine.wait_tier,
            "shutdown": engine.shutdown,
        }
        await calls[call]()
        assert (await engine.load_blocks(hashes[:5], range(5))).ok if call != "shutdown" else True
        await engine.shutdown()


async def test_a_tier_that_opens_late_is_used_from_then_on() -> None:
    async with asyncio.timeout(HANGS_S):
        tiers: list[OpensWhenTold] = []

        def make_tier(namespace: Namespace) -> Tier:
            tiers.append(OpensWhenTold(namespace))
            return tiers[0]

        engine, cache = engine_over(make_tier)
        assert not await engine.wait_tier()
        tiers[0].may_open.set()
        while not engine.get_stats().tiering.usable:
            await asyncio.sleep(0.001)
        assert await engine.wait_tier()
        want = contents(cache, range(5))
        await engine.save_blocks(chain(5), range(5))
        await engine.flush()
        engine.clear()
        assert (await engine.load_blocks(chain(5), range(20, 25))).ok
        assert contents(cache, range(20, 25)) == want
        await engine.shutdown()


class RaisesWhenItOpens(MemoryTier):
    def __init__(self, namespace: Namespace, error: Exception) -> None:
        super().__init__(1 << 20, namespace=namespace.digest)
        self._error = error

    async def open(self) -> None:
        await asyncio.sleep(0.05)
        raise self._error


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), OSError(5, "broken"), KeyError("x")])
async def test_a_tier_that_raises_when_it_opens_costs_the_tier_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(HANGS_S):
        engine, _ = engine_over(lambda namespace: RaisesWhenItOpens(namespace, error))
        await engine.save_blocks(chain(10), range(10))
        await engine.flush()
        assert not await engine.wait_tier()
        assert (await engine.load_blocks(chain(10), range(10))).ok
        await engine.shutdown()
    assert "cannot be used" in caplog.text


class RaisesWhenItCloses(MemoryTier):
    def __init__(self, namespace: Namespace) -> None:
        super().__init__(1 << 20, namespace=namespace.digest)

    async def aclose(self) -> None:
        raise RuntimeError("the connection is gone")


class HangsWhenItCloses(RaisesWhenItCloses):
    async def aclose(self) -> None:
        await asyncio.Event().wait()


async def test_a_tier_that_raises_when_it_closes_does_not_keep_the_pool() -> None:
    async with asyncio.timeout(HANGS_S):
        engine, _ = engine_over(RaisesWhenItCloses)
        await engine.save_blocks(chain(10), range(10))
        data = engine._data
        assert data is not None
        with pytest.raises(RuntimeError, match="the connection is gone"):
            await engine.shutdown()
        assert data.pool.bytes.size == 0


async def test_a_tier_that_hangs_when_it_closes_does_not_keep_the_pool() -> None:
    async with asyncio.timeout(HANGS_S):
        engine, _ = engine_over(HangsWhenItCloses)
        await engine.save_blocks(chain(10), range(10))
        data = engine._data
        assert data is not None
        await engine.shutdown()
        assert data.pool.bytes.size == 0


class IgnoresDeadlines(MemoryTier):
    def __init__(self, namespace: Namespace) -> None:
        super().__init__(1 << 20, namespace=namespace.digest)

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        try:
            await asyncio.Event().wait()
        finally:
            for request in requests:
                request.settle(ReadOutcome(MissReason.TRANSFER_FAILED))
        return []


async def test_a_tier_that_ignores_its_deadlines_is_not_waited_for() -> None:
    async with asyncio.timeout(HANGS_S):
        engine, _ = engine_over(IgnoresDeadlines)
        await engine.save_blocks(chain(40), range(40))
        await engine.flush()
        engine.clear()
        assert (await engine.load_blocks(chain(40), range(40))).num_loaded == 0
        assert engine.get_stats().tiering.breakers["reads"].state == "open"
        await engine.shutdown()


class RefusesReads(MemoryTier):
    def __init__(self, namespace: Namespace) -> None:
        super().__init__(1 << 20, namespace=namespace.digest)

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        raise ValueError("not these")


async def test_a_tier_that_raises_instead_of_reading_is_a_miss_and_leaks_nothing() -> None:
    async with asyncio.timeout(HANGS_S):
        engine, _ = engine_over(RefusesReads)
        await engine.save_blocks(chain(40), range(40))
        await engine.flush()
        engine.clear()
        assert (await engine.load_blocks(chain(40), range(40))).num_loaded == 0
        assert engine.get_stats().tiering.arriving_blocks == 0
        await engine.shutdown()


# -- calls that are given up -----------------------------------------------------------------------------


async def hanging_bench() -> Bench:
    """Reads of four blocks are under way and hang, the others wait behind them."""
    bench = await Bench(40, tier={"fetch_blocks": 4, "timeout_s": HANGS_S}).with_blocks_on_the_tier_alone()
    bench.hang(Direction.LOAD)
    return bench


async def asked_for(bench: Bench, count: int) -> None:
    while bench.asked[Direction.LOAD] < count:
        await asyncio.sleep(0.001)


def call_of(bench: Bench, call: str) -> "asyncio.Task[Any]":
    calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "prefetch": lambda: bench.engine.prefetch(bench.hashes),
        "load": lambda: bench.engine.load_blocks(bench.hashes, bench.ids),
        "load with a deadline": lambda: bench.engine.load_blocks(bench.hashes, bench.ids, deadline_s=HANGS_S),
    }
    return asyncio.ensure_future(calls[call]())


CALLS = ["prefetch", "load", "load with a deadline"]


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_is_given_up_takes_no_blocks_from_another(call: str) -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await hanging_bench()
        given_up = call_of(bench, call)
        await asked_for(bench, 4)
        other = asyncio.ensure_future(bench.engine.prefetch(bench.hashes))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        assert given_up.cancelled()
        bench.heal()
        assert await other == 40
        assert (await bench.engine.load_blocks(bench.hashes, bench.ids)).ok
        assert contents(bench.cache, bench.ids) == bench.want
        await bench.end()


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_is_given_up_stops_fetching(call: str) -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await hanging_bench()
        given_up = call_of(bench, call)
        await asked_for(bench, 4)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        bench.heal()
        await bench.settled()
        await asyncio.sleep(0)
        assert bench.asked[Direction.LOAD] == 4
        figures = bench.engine.get_stats().tiering
        assert (figures.fetched_blocks, figures.arriving_blocks) == (4, 0)
        assert await bench.engine.prefetch(bench.hashes) == 40
        await bench.end()


async def test_a_load_that_cannot_begin_fetches_nothing() -> None:
    async with asyncio.timeout(HANGS_S):
        bench = await hanging_bench()
        busy = asyncio.ensure_future(bench.engine.load_blocks(bench.hashes[:8], bench.ids[:8]))
        await asked_for(bench, 4)
        with pytest.raises(InvalidBlockIdError):
            await bench.engine.load_blocks(bench.hashes[8:], bench.ids[:32])
        bench.heal()
        assert (await busy).ok
        assert bench.asked[Direction.LOAD] == 8
        await bench.end()
