"""One seed: clients use an engine with a faulty executor and tier; checks what each client sees."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from kvortex import BlockHash, MissReason, SaveOutcome
from kvortex.errors import EngineStateError
from kvortex.index import pack_keys
from kvortex.testing.simulation import VirtualClockLoop
from kvortex.tiering.keys import key_as_is
from kvortex.tiers import WriteRequest
from kvortex.tiers.payload import payload_digest
from tests.simulation.executor import ExecutorFaults
from tests.simulation.harm import Harm
from tests.simulation.life import Life
from tests.simulation.scenario import (
    BLOCK_NBYTES,
    BLOCK_SIZE,
    BLOCKS_EACH,
    CHAINS,
    CLIENTS,
    LAYERS,
    TIMEOUT_S,
    WIDTH,
    Scenario,
    chains,
    content,
    is_lossy,
    name_of,
)
from tests.simulation.seeded_world import SeededWorld, order_of
from tests.simulation.tier import WIDTH as TIER_WIDTH
from tests.simulation.tier import Store, TierFaults

SLACK_S = 1.0  # what transfers may take beside a deadline, stalled ones included
LONGEST_S = 60.0  # of any call, while the tier hangs
THEFTS = 200  # at most, in a life


class World(SeededWorld):
    """One or more lives of an engine."""

    runner = "tests.simulation.run"

    def __init__(self, seed: int) -> None:
        self.scenario = Scenario.drawn(random.Random(f"{seed}/scenario"))
        loop = VirtualClockLoop(shuffle=order_of(seed, shuffled=self.scenario.shuffled))
        super().__init__(seed, loop, self.scenario)
        self._harm = Harm()
        self._store: Store | None = None
        backing = torch.zeros(CLIENTS * BLOCKS_EACH, LAYERS, BLOCK_SIZE, WIDTH)
        self._tensors = {f"layers.{i}": backing[:, i] for i in range(LAYERS)}
        self._cache = backing.numpy().view(np.uint8).reshape(len(backing), BLOCK_NBYTES)
        self._save_spans: dict[bytes, list[list[float]]] = {}
        self._last_asked_s: dict[bytes, float] = {}  # by a load or a prefetch
        self._invalidated: set[bytes] = set()
        self._num_forgotten = 0  # calls that have taken blocks from the pool
        self._lives: list[Life] = []

    def _check(self) -> None:
        for life in self._lives:
            life.check()

    def _let_go(self) -> None:
        for life in self._lives:
            life.engine._data = None

    def _may_log(self, text: str) -> bool:
        late = "extents still held" in text and any(life.tier.moving for life in self._lives)
        return "cannot be used" in text or late

    # -- lives -----------------------------------------------------------------------------------------

    async def _main(self) -> None:
        for number in range(self.scenario.lives):
            await self._live(number)
        self._complain_of_tasks()

    async def _live(self, number: int) -> None:
        name = f"{self.seed}/{number}"
        life = Life(name, self.scenario, self._tensors, self._cache, self._store, self._harm, self.complain)
        self._lives.append(life)
        self._store = life.store
        assert self._store is not None
        await self._store.open()
        if self.scenario.warm and not number:
            await self._warm_up(life)
        dice = random.Random(f"{name}/life")
        clients = [
            asyncio.create_task(self._client(life, n, random.Random(f"{name}/{n}")), name=f"client {n}")
            for n in range(CLIENTS)
        ]
        thief = asyncio.create_task(self._steal(dice), name="thief")
        if self.scenario.shutdown:
            await asyncio.sleep(dice.uniform(0.0, 1.0))
            self.note("shutdown")
            await self._bounded("shutdown", life.engine.shutdown, self._longest_s(life) + life.tier.hang_s)
            self.tally["shutdown in the middle"] += 1
        for client in clients:
            await client
        thief.cancel()
        await asyncio.wait([thief])
        if not self.scenario.shutdown:
            await self._come_to_rest(life)
        await self._bounded("shutdown", life.engine.shutdown, self._longest_s(life) + life.tier.hang_s)
        await asyncio.sleep(2 * life.tier.hang_s)
        if left := life.control.allocator.leak_report():
            self.complain(f"after the shutdown the pool holds {left}")
        if life.ledger.uses:
            self.complain(f"after the shutdown {len(life.ledger.uses)} transfers go on")
        self._count(life)

    async def _warm_up(self, life: Life) -> None:
        """The store has every block, as others have left them there."""
        assert self._store is not None
        blocks = [block_hash for chain in chains()[:CHAINS] for block_hash in chain]
        dice = random.Random(f"{self.seed}/warm")
        for block_hash in dice.sample(blocks, len(blocks)):
            payload = content(block_hash)
            packs = life.encodings.pack_any
            key = key_as_is(block_hash) if packs else bytes(block_hash)
            await self._store.write([WriteRequest(key, payload, payload_digest(payload), BLOCK_NBYTES)])

    def _longest_s(self, life: Life) -> float:
        """What a call may take; where what hangs can hold every place among the fetches, others wait for its end."""
        held_up = life.engine.config.tier.fetch_blocks <= TIER_WIDTH
        return LONGEST_S + (40 * life.tier.hang_s if held_up else 0.0)

    async def _come_to_rest(self, life: Life) -> None:
        """With the faults gone the engine works as if nothing had been."""
        life.executor.faults = ExecutorFaults()
        life.tier.faults = TierFaults()
        self.note("rest")
        await asyncio.sleep(2 * life.tier.hang_s)
        await self._bounded("flush", life.engine.flush)
        await asyncio.sleep(2 * life.tier.hang_s)
        life.check_at_rest()
        hashes, ids = list(chains()[CHAINS][:4]), list(range(4))
        self._write(hashes, ids)
        saved = await life.engine.save_blocks(hashes, ids)
        if not saved.ok:
            self.complain(f"an idle engine cannot save: {saved.counts()}")
        await self._check_hits(life, hashes)
        await life.engine.flush()
        await asyncio.sleep(2 * life.tier.hang_s)
        if life.tiering.backing.state.usable:
            await self._check_tier(life)
        await life.engine.flush()
        await asyncio.sleep(2 * life.tier.hang_s)
        life.check_at_rest()

    async def _check_tier(self, life: Life) -> None:
        """What the tier has can be had."""
        tried = 0
        assert self._store is not None
        if self._store.used_bytes + 8 * BLOCK_NBYTES > self._store.capacity_bytes:
            return  # what is evicted to make room could drive out what is fetched
        for block_hash in (block_hash for chain in chains() for block_hash in chain):
            key = pack_keys([block_hash])
            there = life.tiering.known(key)[0] and not life.control.index.prefix_length([block_hash])
            if there and block_hash not in self._harm.corrupted and tried < 2:
                tried += 1
                self.tally["only in the tier at the end"] += 1
                await self._check_hits(life, [block_hash])
                await life.engine.flush()

    async def _check_hits(self, life: Life, hashes: list[BlockHash]) -> None:
        ids = list(range(len(hashes)))
        self._write(hashes, ids, garbage=True)
        loaded = await life.engine.load_blocks(hashes, ids, deadline_s=LONGEST_S)
        if not loaded.ok:
            self.complain(f"an idle engine does not load {list(map(name_of, hashes))}: {loaded.miss_counts()}")
        self._check_bytes(hashes, ids, loaded.outcomes)

    def _count(self, life: Life) -> None:
        figures = life.tiering.figures()
        for name in ("written_blocks", "failed_writes", "fetched_blocks", "shed_blocks", "demoted_blocks"):
            self.tally[name] += getattr(figures, name)
        self.tally["evicted"] += life.control.index.evicted_blocks

    async def _steal(self, dice: random.Random) -> None:
        """Others lose and delete blocks of the store."""
        assert self._store is not None
        for _ in range(THEFTS):
            await asyncio.sleep(dice.uniform(0.01, 0.1))
            kept = list(self._store._kept)
            if kept and dice.random() < self.scenario.loss:
                await self._store.delete([dice.choice(kept)])
                self.tally["stolen"] += 1

    # -- clients ---------------------------------------------------------------------------------------

    async def _client(self, life: Life, number: int, dice: random.Random) -> None:
        mine = range(number * BLOCKS_EACH, (number + 1) * BLOCKS_EACH)
        calls = [self._save, self._load, self._prefetch, self._look, self._flush, self._clear, self._pin]
        calls += [self._invalidate, self._clear_tiers]
        with contextlib.suppress(EngineStateError):  # the engine has been shut down
            for _ in range(self.scenario.rounds):
                if dice.random() < 0.3:
                    await asyncio.sleep(dice.choice((0.0, 0.001, 0.1)))
                (call,) = dice.choices(calls, (35, 35, 12, 6, 4, 1, 8, 3, 1))
                chain = chains()[dice.randrange(CHAINS)]
                start = dice.choice((0, 0, 0, 3))
                hashes = list(chain[start : start + dice.randint(1, len(chain) - start)])
                if dice.random() < 0.05:
                    hashes[-1] = hashes[0]
                self.tally["calls"] += 1
                await call(life, dice, hashes, dice.sample(mine, len(hashes)))

    async def _bounded(self, name: str, call: Callable[[], Awaitable[Any]], within_s: float = LONGEST_S) -> Any:
        began_s = self._loop.time()
        try:
            async with asyncio.timeout(10 * within_s):
                return await call()
        except TimeoutError:
            self.complain(f"{name} does not come to an end")
        finally:
            if self._loop.time() - began_s > within_s:
                self.complain(f"{name} took {self._loop.time() - began_s:.2f} s, not at most {within_s:.2f}")

    async def _perhaps_cancelled(
        self,
        dice: random.Random,
        name: str,
        call: Callable[[], Awaitable[Any]],
        hashes: Sequence[BlockHash],
        within_s: float,
    ) -> Any:
        """The call's result, or None if it was cancelled, at once or in a while."""
        task = asyncio.create_task(self._bounded(name, call, within_s), name=name)
        if dice.random() < 0.25:
            await asyncio.sleep(dice.choice((0.0, dice.uniform(0, 0.005), dice.uniform(0, 1.0))))
            if not task.done():
                self._harm.fail(hashes)
                self.tally[f"cancelled {name}"] += 1
                task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            self.note(f"cancelled {name} {span_of(hashes)}")
            return None

    async def _save(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        self._write(hashes, ids)
        span = [self._loop.time(), np.inf]
        for block_hash in hashes:
            self._save_spans.setdefault(block_hash, []).append(span)
        self.note(f"save {span_of(hashes)} from {ids}")
        try:
            call = partial(life.engine.save_blocks, hashes, ids)
            result = await self._perhaps_cancelled(dice, "save", call, hashes, LONGEST_S)
        finally:
            span[1] = self._loop.time()
            self._take_back(life, ids)
        if result is None:
            return
        self.note(f"saved {span_of(hashes)}: {dict(result.counts())}")
        for block_hash, outcome in zip(hashes, result.outcomes, strict=True):
            self.tally[f"save {outcome}"] += 1
            unfounded = outcome is SaveOutcome.FAILED and block_hash not in self._harm.failed
            if unfounded or outcome is SaveOutcome.TOO_LOSSY:
                self.complain(f"the save of {name_of(block_hash)} is {outcome} for no reason")

    async def _load(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        self._write(hashes, ids, garbage=True)
        deadline_s = dice.choice((..., None, 0.0, 0.01, 0.2))
        due_s = life.engine.config.tier.load_deadline_s if deadline_s is ... else deadline_s
        began_s = self._loop.time()
        absent = ~life.control.index.contains_mask(pack_keys(hashes))
        self._last_asked_s.update(dict.fromkeys(hashes, began_s))
        self.note(f"load {span_of(hashes)} to {ids}, deadline {due_s}")
        try:
            call = partial(life.engine.load_blocks, hashes, ids, deadline_s=deadline_s)
            within_s = self._longest_s(life) if due_s is None else due_s + SLACK_S
            result = await self._perhaps_cancelled(dice, "load", call, hashes, within_s)
            if result is not None:
                self.note(f"loaded {span_of(hashes)}: {[o and o.value for o in result.outcomes]}")
                self._check_bytes(hashes, ids, result.outcomes)
                for block_hash, outcome, was_absent in zip(hashes, result.outcomes, absent.tolist(), strict=True):
                    self._check_reason(life, block_hash, outcome, began_s, due_s, was_absent)
        finally:
            self._take_back(life, ids)

    def _check_reason(
        self,
        life: Life,
        block_hash: BlockHash,
        outcome: MissReason | None,
        began_s: float,
        due_s: float | None,
        was_absent: bool,
    ) -> None:
        """A miss may only blame what has happened."""
        self.tally[f"load {outcome or 'hit'}"] += 1
        now_s = self._loop.time()
        overdue = due_s is not None and now_s >= began_s + due_s
        reads = [s for s in life.tier.read_spans.get(block_hash, []) if s[0] <= now_s and s[1] >= began_s]
        saves = [s for s in self._save_spans.get(block_hash, []) if s[0] <= now_s and s[1] >= began_s]
        founded = {
            MissReason.CORRUPT: block_hash in self._harm.corrupted,
            MissReason.TRANSFER_FAILED: block_hash in self._harm.failed,
            MissReason.TOO_LOSSY: is_lossy(block_hash) and self.scenario.settings["codec"]["name"] != "raw",
            MissReason.DEADLINE: overdue or block_hash in self._harm.late,
            MissReason.NOT_FETCHED: block_hash in life.tier.said_there,
            MissReason.INVALIDATED: block_hash in self._invalidated,
            MissReason.EVICTED: life.control.index.evicted_blocks > 0,
            MissReason.PENDING: bool(reads or saves),
        }
        if outcome is not None and not founded.get(outcome, True):
            self.complain(f"the load of {name_of(block_hash)} is missed as {outcome} for no reason")
        arrives = any(s[0] <= began_s + (due_s or 0) and s[1] >= now_s and now_s < s[0] + TIMEOUT_S for s in reads)
        awaited = was_absent and arrives and len(reads) == 1 and not saves and not self.scenario.tier_faults.stale
        awaited = awaited and self._last_asked_s[block_hash] <= began_s  # else it may come for somebody else
        if outcome is MissReason.PENDING and overdue and awaited:
            self.complain(f"{name_of(block_hash)} was on its way when the deadline passed, and is missed as {outcome}")

    async def _prefetch(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        self.note(f"prefetch {span_of(hashes)}")
        self._last_asked_s.update(dict.fromkeys(hashes, self._loop.time()))
        found = await self._perhaps_cancelled(
            dice, "prefetch", partial(life.engine.prefetch, hashes), (), self._longest_s(life)
        )
        self.note(f"prefetched {span_of(hashes)}: {found}")

    async def _look(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        known = life.engine.check_blocks(hashes)
        if len(known) != len(hashes) or life.engine.match_prefix(hashes) > len(hashes):
            self.complain("a look-up answers another question")
        life.engine.get_stats()

    async def _flush(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        await self._perhaps_cancelled(dice, "flush", life.engine.flush, (), LONGEST_S)

    async def _clear(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        self.note("clear")
        self._num_forgotten += 1
        life.engine.clear()
        if len(life.control.index):
            self.complain("a cleared engine still has blocks")

    async def _pin(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        ttl_s, before = dice.choice((0.01, 0.5, 2.0)), self._num_forgotten
        lease = life.engine.pin(hashes, ttl_s=ttl_s)
        self.note(f"lease of {lease.num_blocks} of {span_of(hashes)} for {ttl_s} s")
        self.tally["leased"] += lease.num_blocks
        await asyncio.sleep(dice.uniform(0.0, 0.9) * ttl_s)
        leased = hashes[: lease.num_blocks]
        is_lost = life.control.index.prefix_length(leased) < lease.num_blocks
        if is_lost and before == self._num_forgotten and self._harm.corrupted.isdisjoint(leased) and not lease.is_over:
            self.complain(f"leased blocks of {span_of(leased)} have left the pool")
        if dice.random() < 0.5:
            lease.release()

    async def _invalidate(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        self.note(f"invalidate {span_of(hashes)}")
        await self._forget(life, dice, "invalidate", partial(life.engine.invalidate, hashes), hashes)

    async def _clear_tiers(self, life: Life, dice: random.Random, hashes: list[BlockHash], ids: list[int]) -> None:
        self.note("clear all")
        every = [block_hash for chain in chains()[:CHAINS] for block_hash in chain]
        await self._forget(life, dice, "clear", partial(life.engine.clear, tiers=True), every)

    async def _forget(
        self,
        life: Life,
        dice: random.Random,
        name: str,
        call: Callable[[], Awaitable[Any]],
        hashes: Sequence[BlockHash],
    ) -> None:
        """What was saved before is not found any more."""
        began_s = self._loop.time()
        self._num_forgotten += 1
        self._invalidated.update(hashes)
        is_sure = await self._perhaps_cancelled(dice, name, call, (), LONGEST_S)
        self._num_forgotten += 1
        self.note(f"{name} is {'done' if is_sure else 'not sure'}")
        self.tally[f"{name} {is_sure}"] += 1
        if is_sure is None or life.engine.is_shut_down:
            return
        now_s = self._loop.time()
        spans = self._save_spans
        old = [h for h in hashes if not any(s[0] <= now_s and s[1] >= began_s for s in spans.get(h, []))]
        if life.control.index.contains_mask(pack_keys(old)).any():
            self.complain(f"{name}: forgotten blocks are still in the pool")
        earlier = any(other.tier.moving for other in self._lives if other is not life)
        if is_sure and not earlier and not self.scenario.tier_faults.stale and life.tiering.known(pack_keys(old)).any():
            self.complain(f"{name}: forgotten blocks are still in the tier")

    # -- the cache -------------------------------------------------------------------------------------

    def _write(self, hashes: Sequence[BlockHash], ids: Sequence[int], *, garbage: bool = False) -> None:
        for block_hash, block_id in zip(hashes, ids, strict=True):
            self._harm.hash_at[block_id] = block_hash
            self._cache[block_id] = 0xEE if garbage else content(block_hash)

    def _take_back(self, life: Life, ids: list[int]) -> None:
        """The caller has control again: nothing may touch its blocks."""
        if life.executor.touches(ids):
            self.complain(f"a call has returned, and a transfer touches its blocks {ids}")
        self._cache[ids] = 0xDD

    def _check_bytes(
        self, hashes: Sequence[BlockHash], ids: Sequence[int], outcomes: Sequence[MissReason | None]
    ) -> None:
        for block_hash, block_id, outcome in zip(hashes, ids, outcomes, strict=True):
            if outcome is None and not np.array_equal(self._cache[block_id], content(block_hash)):
                self.complain(f"wrong bytes for {name_of(block_hash)}")


def span_of(hashes: Sequence[bytes]) -> str:
    return f"{name_of(hashes[0])}-{name_of(hashes[-1])}" if hashes else "nothing"
