"""A real owner without its socket, over a watched pool and faulty tiers, and what must always hold of it."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.index import table
from kvortex.owner.server import Owner
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.tiering.keys import key_as_is
from kvortex.tiers import MemoryTier, ReadOutcome, ReadRequest, WriteOutcome, WriteRequest
from kvortex.tiers.base import as_bytes
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction
from tests.simulation.ledger import Ledger, Use
from tests.simulation.owner_machine import GARBAGE, Link, MachineProcess
from tests.simulation.owner_ranks import WatchedRanks
from tests.simulation.owner_record import Record
from tests.simulation.owner_scenario import TIMEOUT_S, Scenario
from tests.simulation.tier import Store

SLOW_S = 0.05
LONGEST_ACCEPT_S = 1.0


class SlowStore(Store):
    """A store that outlives the tiers over it. What it has moved it says later, when all may have changed."""

    def __init__(self, nbytes: int, namespace: bytes, dice: random.Random) -> None:
        super().__init__(nbytes, namespace=namespace)
        self._dice = dice

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        outcomes = await super().read(requests)
        await asyncio.sleep(self._dice.choice((0.0, 0.001, SLOW_S)))
        return outcomes

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        outcomes = await super().write(requests)
        await asyncio.sleep(self._dice.choice((0.0, 0.001, SLOW_S)))
        return outcomes

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        deleted = await super().delete(keys)
        await asyncio.sleep(self._dice.choice((0.0, 0.001, 4 * SLOW_S)))
        return deleted


class WatchedTier(FaultInjectingTier):
    """A tier over a store that outlives it; the ledger knows which bytes of the pool it has.

    Args:
        store: the store.
        owner: the owner of the pool.
        dice: seeded.
        scenario: how often what goes wrong.
    """

    def __init__(self, store: SlowStore, owner: "SimulatedOwner", dice: random.Random, scenario: Scenario) -> None:
        super().__init__(store, self._draw, delay_s=SLOW_S)
        self.is_sound = False
        self.lied: set[bytes] = set()
        """Keys of blocks that it has changed while they were read."""
        self.num_writing = 0
        self._owner = owner
        self._dice = dice
        self._scenario = scenario

    def cut_off(self) -> None:
        """Its process was killed: nothing reaches the store any more."""
        namespace = bytes(self._inner.namespace)  # type: ignore[attr-defined]
        self._inner = MemoryTier(1, namespace=namespace)
        self._inner._is_open = True

    def _draw(self, direction: Direction, number: int, key: bytes) -> TierFault | None:
        if self.is_sound:
            return None
        of, roll = self._scenario, self._dice.random()
        for fault, chance in (
            (TierFault.SLOW, of.slow),
            (TierFault.HANG, of.hang),
            (TierFault.FAIL, of.fail),
            (TierFault.LIE, of.lie),
            (TierFault.SHORT, of.lie / 2),
            (TierFault.FULL, of.fail / 2),
        ):
            if roll < chance:
                if fault is TierFault.HANG:
                    hang_s = TIMEOUT_S * self._dice.uniform(0.5, 3.0)
                    asyncio.get_running_loop().call_later(hang_s, self.release)
                if fault is TierFault.LIE and direction is Direction.LOAD:
                    self.lied.add(key)
                return fault
            roll -= chance
        return None

    async def open(self) -> None:
        await asyncio.sleep(self._dice.choice((0.0, 0.0, SLOW_S, 2 * TIMEOUT_S)))
        if self._dice.random() < self._scenario.unopened:
            raise ConfigError("injected: the store cannot be used")
        await super().open()

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        watched = []
        for request in requests:
            use = self._begin("a tier's read", request.buffer, writes=True)
            as_bytes(request.buffer)[:] = GARBAGE
            watched.append(replace(request, on_settled=partial(self._settled, use, request)))
        return await super().read(watched, deadline_s=deadline_s)

    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        watched = []
        for request in requests:
            use = self._begin("a tier's write", request.payload, writes=False)
            watched.append(replace(request, on_settled=partial(self._settled, use, request)))
        return await super().write(watched, deadline_s=deadline_s)

    def _begin(self, who: str, memory: Any, *, writes: bool) -> Use:
        array = as_bytes(memory)
        self.num_writing += not writes
        return self._owner.ledger.begin(who, self._owner.offset_of(array), array.size, writes=writes)

    def _settled(self, use: Use, request: ReadRequest | WriteRequest, outcome: Any) -> None:
        self.num_writing -= not use.writes
        self._owner.end_use(use)
        request.settle(outcome)

    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        await asyncio.sleep(self._dice.choice((0.0, 0.001, SLOW_S)))
        return await super().find(keys, deadline_s=deadline_s)

    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        await asyncio.sleep(self._dice.choice((0.0, SLOW_S, 4 * SLOW_S)))
        if not self.is_sound and self._dice.random() < self._scenario.fail:
            return [False] * len(keys)
        return await super().delete(keys, deadline_s=deadline_s)


class SimulatedOwner(Owner):
    """An owner that is never started: connections are given to it.

    Args:
        scenario: its settings, and the faults of its tiers.
        stores: what its tiers keep, by namespace; outlives it.
        record: what was written.
        dice: seeded.
        complain: is told what is wrong.
        tally: counts what happens.
    """

    def __init__(
        self,
        scenario: Scenario,
        stores: dict[bytes, SlowStore],
        record: Record,
        dice: random.Random,
        complain: Callable[[str], None],
        tally: Counter[str],
    ) -> None:
        self.tiers: dict[bytes, WatchedTier] = {}
        self.is_over = False
        self._scenario = scenario
        self._stores = stores
        self._record = record
        self._dice = dice
        self._complain = complain
        self._seen = -1
        self._links: dict[Link, None] = {}
        super().__init__(KVortexConfig(**scenario.settings), Path("simulated"), self._make_watched)
        self.ranks = WatchedRanks(self.caches, complain, tally)
        self.ledger = Ledger(self.control, complain, self._became_visible)
        nbytes = self._memory.ticket.nbytes
        self.pool = np.frombuffer(self._memory.map(0, nbytes), dtype=np.uint8)

    def _make_watched(self, config: KVortexConfig, namespace: bytes) -> WatchedTier | None:
        if not self._scenario.has_tier:
            return None
        store = self._stores[namespace]
        self.tiers[namespace] = WatchedTier(store, self, self._dice, self._scenario)
        return self.tiers[namespace]

    def offset_of(self, memory: NDArray[np.uint8]) -> int:
        """Where in the pool a view of it begins, in whichever mapping."""
        address = memory.__array_interface__["data"][0]
        for mapped in (self._tiers._pool, self.pool):
            if mapped is not None and 0 <= (offset := address - mapped.__array_interface__["data"][0]) < mapped.size:
                return int(offset)
        raise AssertionError("these bytes are in no pool")

    def end_use(self, use: Use) -> None:
        """Idempotent."""
        if use in self.ledger.uses:
            self.ledger.end(use)

    # -- connections -------------------------------------------------------------------------------

    async def accept(self, process: MachineProcess, number: int) -> Link:
        """A connection of a process.

        Raises:
            ConnectionRefusedError: the owner has ended.
        """
        link = Link(self, process, number, self._dice)
        try:
            self._spawn(self._serve(link))  # type: ignore[arg-type]
            await asyncio.wait([link.begun], timeout=LONGEST_ACCEPT_S)
            if not link.begun.done() or self.is_over:
                raise ConnectionRefusedError("nobody answers")
        except BaseException:
            link.abort()
            raise
        return link

    async def _serve(self, connection: Any) -> None:
        self._links[connection] = None
        try:
            await super()._serve(connection)
        finally:
            del self._links[connection]

    async def _greet(self, connection: Any, pid: int, uid: int) -> int:
        await asyncio.sleep(self._dice.choice((0.0, 0.01)))
        return int(connection.number)

    # -- its end -----------------------------------------------------------------------------------

    async def end(self, *, is_killed: bool) -> None:
        """It ends, in order or not; its tiers settle in any case, since they are not real."""
        self.is_over = True
        if is_killed:
            for tier in self.tiers.values():
                tier.cut_off()
        for use in [use for use in self.ledger.uses if not use.who.startswith("a tier")]:
            self.ledger.end(use)  # whoever has the memory mapped still may use it
        await self.aclose()
        left = self.control.index.num_pending
        if left or self.control.allocator.allocated_bytes or len(self.control.index):
            self._complain(f"an owner ends with {left} reservations and {self.control.allocator.leak_report()}")
        if self.ledger.uses:
            self._complain(f"an owner has ended, and its tiers go on: {[use.who for use in self.ledger.uses]}")

    # -- what must hold ----------------------------------------------------------------------------

    def _lied_about(self, pool_key: bytes) -> bool:
        own = [(np.frombuffer(pool_key, np.uint64) ^ cache.namespace).tobytes() for cache in self.caches]
        tier_keys = {key for one in own for key in (one, key_as_is(one))}
        return any(not tier.lied.isdisjoint(tier_keys) for tier in self.tiers.values())

    def _became_visible(self, slots: Any, offsets: Any, forms: Any, digests: Any) -> None:
        """What can be loaded from now on is what was saved for that key, and was not forgotten."""
        rows = self.control.index._table.rows
        for slot, offset, digest in zip(slots, offsets, digests, strict=True):
            if rows[slot]["state"] == table.COMMITTED and rows[slot]["offset"] == offset:
                self._check_block(rows[slot], int(digest))

    def _check_block(self, row: Any, digest: int) -> None:
        pool_key, offset, form = row["key"].tobytes(), int(row["offset"]), int(row["form"])
        nbytes = self._payload_of(form)
        payload = self.pool[offset : offset + nbytes]
        if payload_digest(payload) != digest:
            if not self._lied_about(pool_key):
                self._complain(f"the block at {offset} is visible, and its bytes are not what its digest says")
            return
        written = self._record.written_in(payload)
        if written is None:
            self._complain(f"the block at {offset} is visible, and nobody has saved it like that")
        elif written.pool_key != pool_key:
            self._complain(f"the block at {offset} is visible with another's bytes")
        elif self._record.is_stale(written):
            self._complain(f"the block at {offset} was forgotten, and is visible")

    def _payload_of(self, form: int) -> int:
        for cache in self.caches:
            if 0 <= form - 2 * cache.first < 2 * cache.num_groups:
                described = np.frombuffer(cache.forms, np.int64).reshape(-1, 3)
                return int(described[form - 2 * cache.first][1])
        raise AssertionError(f"there is no form {form}")

    def check_all_visible(self) -> None:
        """No block that can be found now was forgotten."""
        rows = self.control.index._table.rows[: int(self.control.index._table.totals[table.SLOTS_USED])]
        for row in rows[rows["state"] == table.COMMITTED]:
            self._check_block(row, int(row["digest"]))

    def check_forgotten(self) -> None:
        """Nothing that was forgotten is left, neither in the pool nor in the stores."""
        self.check_all_visible()
        for store in self._stores.values():
            for kept in store._kept.values():
                written = self._record.written_in(kept.payload)
                if written is not None and self._record.is_stale(written):
                    self._complain(f"a block of {written.identity} was forgotten, and is still in the tier")

    @property
    def num_abandoned(self) -> int:
        """Extents of connections that are gone, to which somebody may still write."""
        return sum(len(offsets) for process in self._processes.values() for _, offsets, _ in process._written)

    def check(self) -> None:
        """After every pass of the loop in which something of this may have changed."""
        if self.is_over or self._seen == (changes := self.ledger.changes):
            return
        self._seen = changes
        self.ranks.check()
        index, held = self.control.index._table, self.control.allocator._allocated
        rows = index.rows[: int(index.totals[table.SLOTS_USED])]
        state = rows["state"]
        visible = (state == table.COMMITTED) | (state == table.DROPPED)
        offsets = rows["offset"][visible].tolist()
        if len(set(offsets)) < len(offsets) or not held.keys() >= set(offsets):
            self._complain("two blocks have the same extent, or one has none")
        sessions = [link.session for link in self._links if link.session is not None]
        scratch = sum(session._scratch is not None for session in sessions)
        writing = sum(tier.num_writing for tier in self.tiers.values())
        tierings = [cache.tiering for cache in self.caches if cache.tiering is not None]
        is_exclusive = any(tiering.is_exclusive for tiering in tierings)
        demoted = sum(len(tiering.writes._demoted) for tiering in tierings) + writing * is_exclusive
        pending = self.control.index.num_pending
        if len(held) != len(offsets) + pending + self.num_abandoned + scratch + demoted:
            self._complain(
                f"{len(held)} extents are allocated: {len(offsets)} of blocks, {pending} reserved, "
                f"{self.num_abandoned} of connections that are gone, {scratch} of tests, {demoted} of what was evicted"
            )
        pinned = sum(int(session._pins.rows["count"].sum()) for session in sessions) + writing * (not is_exclusive)
        if int(rows["pins"][visible].sum()) != pinned:
            self._complain(f"{int(rows['pins'][visible].sum())} pins for {pinned} blocks that are read")

    def check_at_rest(self) -> None:
        """When all transfers have settled and all clients are connected, nothing is held but what can be loaded."""
        left = {
            "reservations": self.control.index.num_pending,
            "pins": int(self.control.index._table.rows["pins"].sum()),
            "extents of connections that are gone": self.num_abandoned,
            "uses": len(self.ledger.uses),
        }
        if any(left.values()):
            self._complain(f"at rest there are left: { {name: n for name, n in left.items() if n} }")
        self.ranks.check_at_rest()
        self.check_forgotten()
