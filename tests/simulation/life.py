"""One engine in a simulated world, and its invariants, checked at every step."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex import BlockHash, KVortexConfig, KVortexEngine
from kvortex.hashing import Namespace
from kvortex.index import Reservation, table
from kvortex.planes.plans import FetchPlan, LoadPlan
from kvortex.sched import HostExecutor, TransferExecutor
from kvortex.tiering.keys import key_as_is
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction
from tests.engine_support import Parts
from tests.simulation.executor import SimulatedExecutor
from tests.simulation.harm import Harm
from tests.simulation.ledger import Ledger
from tests.simulation.scenario import BLOCK_NBYTES, BLOCK_SIZE, TIMEOUT_S, Scenario, chains, content, name_of
from tests.simulation.tier import SimulatedTier, Store


class Life:
    """An engine, from its registration to the end of its last late move.

    Args:
        name: of its dice.
        scenario: its settings and faults.
        tensors: the paged cache; `cache` is the same memory as `uint8 [num_blocks, bytes]`.
        store: what its tier serves; one is made if there is none.
        harm: of the world.
        complain: is told what is wrong.
    """

    def __init__(
        self,
        name: str,
        scenario: Scenario,
        tensors: dict[str, torch.Tensor],
        cache: NDArray[np.uint8],
        store: Store | None,
        harm: Harm,
        complain: Callable[[str], None],
    ) -> None:
        self.store = store
        self.offered = 0
        self._name = name
        self._scenario = scenario
        self._cache = cache
        self._harm = harm
        self._complain = complain
        self._seen = -1
        self._forgotten: Counter[bytes] = Counter()  # how often each block was
        self._forgotten_before: dict[int, int] = {}  # slot -> how often its block was, when it was reserved
        common = KVortexConfig(transfer={"self_test": False}, pool={"numa_aware": False}, tier={"timeout_s": TIMEOUT_S})
        parts = Parts(wrap_executor=self._wrap, make_tier=self._make_tier)
        self.engine = KVortexEngine(common.replace(**scenario.settings), parts)
        self.engine.register_kv_caches(tensors, BLOCK_SIZE)
        assert self.engine._tiering is not None
        self.tiering = self.engine._tiering
        self._offer, self.tiering.writes.offer = self.tiering.writes.offer, self._watch_offer  # type: ignore[method-assign]

    def _wrap(self, inner: TransferExecutor) -> TransferExecutor:
        assert isinstance(inner, HostExecutor)
        dice = random.Random(f"{self._name}/executor")
        self.executor = SimulatedExecutor(inner, dice, self._scenario.executor_faults, self._harm)
        return self.executor

    def _make_tier(self, namespace: Namespace) -> SimulatedTier:
        data, control = self.engine._data, self.engine._control
        assert data is not None
        assert control is not None
        self.control = control
        self.pool = data.pool.bytes
        self.encodings = data.encodings
        self.ledger = Ledger(control, self._complain, self._became_visible)
        self.executor.watch(self.pool, self._cache, self.ledger, data.encodings.payloads)
        self._plan_fetch, control.plan_fetch = control.plan_fetch, self._watch_fetch  # type: ignore[method-assign]
        self._finish_load, control.finish_load = control.finish_load, self._watch_load  # type: ignore[method-assign]
        self._reserve, control.index.reserve = control.index.reserve, self._watch_reserve  # type: ignore[method-assign]
        self._forget, control.invalidate = control.invalidate, self._watch_forget  # type: ignore[method-assign]
        if self.store is None:
            self.store = Store(self._scenario.store_blocks * BLOCK_NBYTES, namespace=namespace.digest)
        names = {key: h for chain in chains() for h in chain for key in (h, key_as_is(h))}
        dice = random.Random(f"{self._name}/tier")
        self.tier = SimulatedTier(
            self.store,
            self.pool,
            self.ledger,
            self._harm,
            dice,
            self._scenario.tier_faults,
            hang_s=TIMEOUT_S * dice.choice((dice.uniform(1.2, 5.0), 300.0)),
            hash_of=names.__getitem__,
            waits_at_end=dice.random() < 0.5,
        )
        return self.tier

    # -- what is watched -------------------------------------------------------------------------------

    def _watch_fetch(self, keys: NDArray[np.uint64], forms: NDArray[np.uint8], owner: str, **named: Any) -> FetchPlan:
        plan = self._plan_fetch(keys, forms, owner, **named)
        for position in plan.positions.tolist():
            span = [asyncio.get_running_loop().time(), np.inf]
            self.tier.read_spans.setdefault(keys[position].tobytes(), []).append(span)
        return plan

    def _watch_reserve(self, keys: NDArray[np.uint64], form: int = 0) -> Reservation:
        reservation = self._reserve(keys, form)
        for key, slot in zip(keys, reservation.slots.tolist(), strict=True):
            self._forgotten_before[slot] = self._forgotten[key.tobytes()]
        return reservation

    def _watch_forget(self, keys: NDArray[np.uint64]) -> None:
        self._forgotten.update(key.tobytes() for key in keys)
        self._forget(keys)

    def _watch_load(
        self, plan: LoadPlan, intact: NDArray[np.bool_] | None = None, succeeded: NDArray[np.bool_] | None = None
    ) -> Any:
        outcomes = self._finish_load(plan, intact, succeeded)
        if intact is None or succeeded is None:
            return outcomes
        wrong = plan.pins.hits[succeeded & ~intact]
        if (self.control.index._table.rows["state"][wrong] == table.COMMITTED).any():
            self._complain("a block that turned out to be wrong can still be loaded")
        return outcomes

    def _watch_offer(self, keys: NDArray[np.uint64], used_s: NDArray[np.float64]) -> None:
        tiering = self.tiering
        writes = tiering.writes
        offered = [key.tobytes() for key in keys]
        new = [key for key in offered if key not in writes._queue and not writes._is_barred(key)]
        refused = tiering.backing.guard.writes.refuses
        room = self.engine.config.tier.queue_blocks - len(tiering.writes._queue)
        before = tiering.writes.shed_blocks
        self.offered += len(set(new))
        self.ledger.changes += 1
        self._offer(keys, used_s)
        usable = not refused and (tiering.backing.state.usable or not tiering.backing.state.is_known)
        shed, least = tiering.writes.shed_blocks - before, max(len(set(new)) - room, 0)
        most = len(keys) if self.engine.config.tier.shed == "oldest" else max(len(new) - room, 0)
        if usable and not least <= shed <= most:
            self._complain(f"{len(new)} blocks offered with room for {room}: {shed} shed")

    # -- what must hold --------------------------------------------------------------------------------

    def _became_visible(self, slots: Any, offsets: Any, forms: Any, digests: Any) -> None:
        """What can be loaded from now on is what was saved."""
        rows = self.control.index._table.rows
        sizes = np.array(self.encodings.payloads)[np.broadcast_to(forms, (len(slots),))]
        for slot, offset, nbytes, digest in zip(slots, offsets, sizes.tolist(), digests, strict=True):
            block_hash = rows[slot]["key"].tobytes()
            is_visible = rows[slot]["state"] == table.COMMITTED and rows[slot]["offset"] == offset
            if is_visible and self._forgotten_before[int(slot)] < self._forgotten[block_hash]:
                self._complain(f"block {name_of(block_hash)} was forgotten while it was being stored, and is visible")
            if block_hash in self._harm.corrupted:
                continue
            payload = self.pool[offset : offset + nbytes]
            if payload_digest(payload) != int(digest):
                self._complain(f"block {name_of(block_hash)} is visible, and its bytes are not what its digest says")
            if payload.size == BLOCK_NBYTES and not np.array_equal(payload, content(BlockHash(block_hash))):
                self._complain(f"block {name_of(block_hash)} is visible with another's bytes")

    def check(self) -> None:
        """After every pass of the loop in which something of this may have changed."""
        if self._seen == self.ledger.changes:
            return
        self._seen = self.ledger.changes
        complain, engine, tiering = self._complain, self.engine, self.tiering
        index, held = self.control.index._table, self.control.allocator._allocated
        rows = index.rows[: int(index.totals[table.SLOTS_USED])]
        state, pins = rows["state"], rows["pins"]
        committed = state == table.COMMITTED
        visible = np.flatnonzero(committed | (state == table.DROPPED))
        offsets = rows["offset"][visible].tolist()
        if len(set(offsets)) < len(offsets):
            complain("two blocks have the same extent")
        for offset, nbytes in zip(offsets, rows["nbytes"][visible].tolist(), strict=True):
            if held.get(offset, (0, ""))[0] != nbytes:
                complain(f"a block of {nbytes} bytes lies at {offset}, which is not allocated like that")
        if self.control.index.committed_bytes != int(rows["nbytes"][committed].sum()):
            complain("the index has miscounted its bytes")
        # Every extent is a block's, a reservation's, or waits for the tier after its eviction.
        moving = self.tier.moving
        demoted = len(tiering.writes._demoted) + sum(not move.reads for move in moving) * tiering.is_exclusive
        if len(held) != len(offsets) + self.control.index.num_pending + demoted:
            complain(
                f"{len(held)} extents are allocated: {len(offsets)} of blocks, {self.control.index.num_pending} "
                f"of reservations, {demoted} of what was evicted"
            )
        if tiering.is_exclusive:
            self._check_demoted(held, set(offsets))
        data = engine._data
        if data is not None and hasattr(data, "_scheduler"):
            loads = [r for r in data._scheduler._unsettled if r.direction is Direction.LOAD]
            pinned = sum(len(r.offsets) for r in loads)
            pinned += 0 if tiering.is_exclusive else sum(not move.reads for move in moving)
            pinned += sum(len(lease._slots) for lease in engine._leases.open) if engine._leases is not None else 0
            if int(pins[committed | (state == table.DROPPED)].sum()) != pinned:
                complain(f"{int(pins[visible].sum())} pins for {pinned} blocks that move")
        self._check_bounds()

    def _check_demoted(self, held: dict[int, tuple[int, str]], others: set[int]) -> None:
        tiering = self.tiering
        waiting = {block.offset: block.nbytes for block in tiering.writes._demoted}
        waiting |= {m.use.offset: held.get(m.use.offset, (0, ""))[0] for m in self.tier.moving if not m.reads}
        if not others.isdisjoint(waiting):
            self._complain("an evicted block that waits for the tier shares its extent")
        if sum(waiting.values()) != tiering.writes._demoted_bytes:
            self._complain(f"{sum(waiting.values())} bytes wait for the tier, not {tiering.writes._demoted_bytes}")

    def _check_bounds(self) -> None:
        tiering, config, complain = self.tiering, self.engine.config, self._complain
        if len(tiering.writes._queue) > config.tier.queue_blocks:
            complain(f"{len(tiering.writes._queue)} blocks wait to be written")
        if tiering.writes._demoted_bytes > self.control.allocator.capacity_bytes // 10:
            complain(f"{tiering.writes._demoted_bytes} bytes wait to be written")
        reads = sum(move.reads for move in self.tier.moving)
        if reads > config.tier.fetch_blocks:
            complain(f"{reads} blocks are on their way from the tier")
        counted = tiering.writes.written_blocks, tiering.writes.failed_writes, tiering.fetches.fetched_blocks
        if counted != (self.tier.writes_stored, self.tier.writes_refused, self.tier.good_reads):
            complain(f"written, failed, fetched: counted {counted}, the tier says otherwise")
        offered = tiering.writes.demoted_blocks if tiering.is_exclusive else self.offered
        if counted[0] + counted[1] > offered:
            complain(f"{counted[0] + counted[1]} blocks written or failed of {offered} offered")

    def check_at_rest(self) -> None:
        """When nobody waits and nothing moves, nothing is held but what can be loaded."""
        tiering, complain = self.tiering, self._complain
        index = self.control.index._table
        left = {
            "pins": int(index.rows["pins"][: int(index.totals[table.SLOTS_USED])].sum()),
            "reservations": self.control.index.num_pending,
            "blocks on their way": len(tiering.fetches._wanted) + len(tiering.fetches._reading),
            "blocks that wait to be written": len(tiering.writes._queue) + len(tiering.writes._demoted),
            "blocks being written": tiering.writes._writing,
            "evicted bytes": tiering.writes._demoted_bytes,
            "calls that read": tiering.fetches._num_reads,
            "blocks that wait to be read": len(tiering.fetches._queue) + len(tiering.fetches._unknown),
            "uses": len(self.ledger.uses),
        }
        if any(left.values()):
            complain(f"at rest there are left: { {name: n for name, n in left.items() if n} }")
        figures = tiering.figures()
        done = figures.written_blocks + figures.failed_writes
        if figures.usable and tiering.is_exclusive and done != figures.demoted_blocks:
            complain(f"{figures.demoted_blocks} blocks were evicted to the tier, {done} written or failed")
        if figures.usable and figures.waiting_blocks:
            complain(f"{figures.waiting_blocks} blocks wait for nothing")
