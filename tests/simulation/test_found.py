"""What the simulation has found, each in the fewest steps that show it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexEngine, MissReason
from kvortex.hashing import Namespace
from kvortex.index import pack_keys
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.testing.simulation import VirtualClockLoop
from kvortex.tiering import LoadFetch
from kvortex.tiers import MemoryTier, Tier, WriteRequest
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, Parts, chain, make_cache, small_config

FaultOf = Callable[[Direction, int, bytes], TierFault | None]


def in_virtual_time(scene: Coroutine[Any, Any, None]) -> None:
    """Whoever waits for ever is a NothingLeftToDoError, at once."""
    loop = VirtualClockLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(scene)


class Scene:
    """An engine over an empty pool, and a tier that has a chain."""

    def __init__(self, fault_of: FaultOf | None = None, **settings: object) -> None:
        self.hashes = chain(4)
        self.engine = KVortexEngine(small_config(**settings), Parts(make_tier=self._make_tier(fault_of)))
        self.engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        assert self.engine._tiering is not None
        self.tiering = self.engine._tiering
        self.keys = pack_keys(self.hashes)

    def _make_tier(self, fault_of: FaultOf | None) -> Callable[[Namespace], Tier]:
        def make_tier(namespace: Namespace) -> Tier:
            self.namespace = namespace
            self.inner = MemoryTier(1 << 20, namespace=namespace.digest)
            self.tier = FaultInjectingTier(self.inner, fault_of or (lambda *_: None))
            return self.tier

        return make_tier

    async def __aenter__(self) -> "Scene":
        await self.engine.flush()
        payload = np.arange(BLOCK_NBYTES, dtype=np.uint8)
        digest = payload_digest(payload)
        await self.inner.write([WriteRequest(h, payload, digest, BLOCK_NBYTES) for h in self.hashes])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tier.release()
        await self.engine.shutdown()


def test_a_fetch_that_is_given_up_before_its_first_step_blocks_nobody() -> None:
    async def scene() -> None:
        async with Scene() as s:
            s.tiering.fetch(s.keys).cancel()
            await asyncio.sleep(1)
            assert await s.engine.prefetch(s.hashes) == 4

    in_virtual_time(scene())


def test_a_block_that_is_awaited_anew_is_not_given_up_by_those_who_awaited_it_before() -> None:
    held = {0: None, 1: TierFault.HANG, 2: TierFault.HANG}  # the first block, the second, the first again

    async def scene() -> None:
        async with Scene(lambda direction, number, key: held[number], tier={"timeout_s": 1.0}) as s:
            first = s.tiering.fetch(s.keys[:2])
            await asyncio.sleep(0.5)
            s.engine.clear()
            again = asyncio.create_task(s.engine.prefetch(s.hashes[:1]))
            await asyncio.sleep(0.6)
            assert await first.wait(timeout_s=0.0) == []  # its time is over
            assert not again.done()
            s.tier.release()
            assert await again == 1

    in_virtual_time(scene())


def test_a_chain_that_names_a_block_twice_keeps_no_place_among_the_fetches() -> None:
    async def scene() -> None:
        async with Scene(tier={"fetch_blocks": 4}) as s:
            for _ in range(5):
                assert await s.engine.prefetch([s.hashes[0], s.hashes[0]]) == 2
                s.engine.clear()

    in_virtual_time(scene())


def test_a_deadline_is_told_by_the_loops_clock() -> None:
    async def scene() -> None:
        async with Scene(lambda *_: TierFault.HANG, tier={"timeout_s": 1e6}) as s:
            began_s = asyncio.get_running_loop().time()
            arrival = LoadFetch(s.tiering, s.keys, None, 3600.0)
            await asyncio.sleep(3000.0)
            await arrival.wait(s.keys)
            assert asyncio.get_running_loop().time() - began_s == pytest.approx(3600.0)
            assert arrival.name_misses((MissReason.PENDING,) * 4) == (MissReason.DEADLINE,) * 4

    in_virtual_time(scene())


def test_a_flush_ends_with_the_engine() -> None:
    async def scene() -> None:
        async with Scene(lambda direction, *_: TierFault.HANG if direction is Direction.SAVE else None) as s:
            await s.engine.prefetch(s.hashes)
            await s.inner.delete(s.hashes)
            s.tiering.used(s.keys)
            flushing = asyncio.create_task(s.engine.flush())
            await asyncio.sleep(1)
            assert not flushing.done()
            await s.engine.shutdown()
            await flushing

    in_virtual_time(scene())


def test_a_load_ends_although_what_hangs_holds_every_place_among_the_fetches() -> None:
    async def scene() -> None:
        async with Scene(lambda *_: TierFault.HANG, tier={"fetch_blocks": 2, "timeout_s": 1.0}) as s:
            began_s = asyncio.get_running_loop().time()
            loaded = await s.engine.load_blocks(s.hashes, range(4))
            assert loaded.num_loaded == 0
            assert asyncio.get_running_loop().time() - began_s == pytest.approx(1.0)
            await s.engine.load_blocks(s.hashes, range(4))

    in_virtual_time(scene())


def test_a_read_that_is_cancelled_before_its_first_step_gives_its_extents_back() -> None:
    async def scene() -> None:
        async with Scene() as s:
            s.tiering.fetch(s.keys)
            assert s.tiering.fetches._reading == set(s.hashes)
            await s.tiering.aclose()  # before the loop's next turn; pools at zero is checked after every test

    in_virtual_time(scene())
