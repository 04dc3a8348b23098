"""A client of an owner: it saves, loads, fetches and forgets blocks, and checks what it gets."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import OwnerError
from kvortex.index import STORED
from kvortex.owner.control import RemoteControl, scratch_of
from kvortex.owner.protocol import Kind
from kvortex.owner.tiering import RemoteTiering
from kvortex.tiering.keys import split_keys
from kvortex.tiers.payload import payload_digest
from kvortex.types import MissReason, SaveOutcome
from tests.simulation.owner_client import Machine, SimulatedClient
from tests.simulation.owner_machine import MachineProcess, Transfer
from tests.simulation.owner_mirror import Mirror
from tests.simulation.owner_record import Identity, Record, content
from tests.simulation.owner_scenario import LONGEST_CHAIN, NUM_HASHES, PRIORITIES, QUOTAS, Scenario, shape_of

LONGEST_S = 120.0  # of any call
SCRATCH_BYTES = 512


class PlayersWorld(Machine):
    """What a player needs of the world."""

    scenario: Scenario
    record: Record
    complain: Callable[[str], None]
    note: Callable[[str], None]

    def new_token(self) -> int:
        """Another number, for a client that has forgotten everything."""
        raise NotImplementedError


def is_intact(digest: int, payload: NDArray[np.uint8]) -> bool:
    """What a data plane says of a block that it has loaded."""
    return payload_digest(payload) == digest


class Player:
    """One client. Its operations may be cancelled at any time, when its process dies.

    Args:
        world: the world.
        name: for messages.
        namespace: number of its namespace.
        process: its process.
        writer: the process whose device writes for it.
        dice: seeded.
    """

    client: SimulatedClient
    control: RemoteControl

    def __init__(
        self,
        world: PlayersWorld,
        name: str,
        namespace: int,
        process: MachineProcess,
        writer: MachineProcess,
        dice: random.Random,
    ) -> None:
        self.name = name
        self.namespace = namespace
        self.process = process
        self.writer = writer
        self.tiering: RemoteTiering | None = None
        self.calls: list[asyncio.Task[Any]] = []
        self.is_dead = self.is_in = False
        self._world = world
        self._dice = dice
        self._shape = shape_of(namespace)
        is_usual = dice.random() < 0.8
        usual, other = world.scenario.ranks[namespace], (dice.choice(PRIORITIES), dice.choice(QUOTAS))
        self.priority, self.quota = usual if is_usual else other
        self._token = 0
        self._saving: set[int] = set()
        self._mirror: Mirror | None = None
        self._of_writer: SimulatedClient | None = None

    # -- life --------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Connect to the owner, or to another one.

        Raises:
            ConnectionRefusedError, OwnerError: there is none, or it is lost.
        """
        self.is_in = False
        if self.writer is not self.process and (self._of_writer is None or self._of_writer.owner.is_over):
            if self._of_writer is not None:
                self._of_writer.close()
            self._of_writer = await SimulatedClient.connect(self._world, self.writer, self._dice, 0.0)
            self._of_writer.ask(Kind.WRITER, self.name.encode())
        client = await SimulatedClient.connect(self._world, self.process, self._dice, 0.0)
        if self._of_writer is not None and self._of_writer.owner is not client.owner:
            client.close()
            raise ConnectionRefusedError("the owner was started anew once more")
        before, self.client = getattr(self, "client", None), client
        try:
            if self._dice.random() < 0.3:
                await self._test_memory()
            client.lost = self._world.scenario.lost
            if before is not None and hasattr(self, "control") and self._dice.random() < 0.7:
                self.control.move_to(client)
                self._world.tally["moved to another owner"] += 1
            else:
                shape = self._shape
                writers = [self.name] if self.writer is not self.process else []
                self.control = RemoteControl(
                    client,
                    shape.digest,
                    shape.sizes,
                    shape.encodings,
                    shape.groups,
                    writers=writers,
                    priority=self.priority,
                    quota_bytes=self.quota,
                )
                self._token, self._saving, self._mirror = 0, set(), None
                self.tiering = RemoteTiering(self.control) if self.control.tier else None
                if self._dice.random() < 0.5:
                    self._mirror = Mirror(self.control, self._world.complain)
        except OwnerError:
            client.close()
            raise
        if before is not None:
            before.close()
        self.is_in = True

    async def _test_memory(self) -> None:
        """As a new engine does, with memory that is no block's."""
        try:
            offset = scratch_of(self.client, SCRATCH_BYTES)
        except OwnerError:
            return
        blocks = [(offset, SCRATCH_BYTES, 0)]
        transfer = Transfer(self.client.owner, f"a test of {self.name}", blocks, self._dice, 1.0)
        await asyncio.wait([self.process.start(transfer).done])
        self.client.tell(Kind.SCRATCH_DONE)
        self._world.tally["tests of memory"] += 1

    async def live(self) -> None:
        """One call after another, or several at once."""
        for _ in range(self._world.scenario.rounds):
            await asyncio.sleep(self._dice.choice((0.0, 0.001, 0.02, 0.3)))
            if (self.client.is_replaced or not self.is_in) and self._dice.random() < 0.7:
                with contextlib.suppress(ConnectionRefusedError, OwnerError):
                    await self.join()
            call = self._start(self._draw_call())
            if self._dice.random() < 0.6:
                await asyncio.wait([call])
        if self.calls:
            await asyncio.wait(self.calls)

    def _draw_call(self) -> Callable[[], Awaitable[None]]:
        calls = [self.save, self.load, self.fetch, self.look, self.hold, self.invalidate, self.clear, self.forget]
        (call,) = self._dice.choices(calls, (34, 22, 22, 7, 4, 8, 4, 1))
        return call

    def _start(self, call: Callable[[], Awaitable[None]]) -> "asyncio.Task[Any]":
        self.calls = [other for other in self.calls if not other.done()]
        task = asyncio.get_running_loop().create_task(self._bounded(call))
        self.calls.append(task)
        return task

    async def _bounded(self, call: Callable[[], Awaitable[None]]) -> None:
        name = getattr(call, "__name__", "a call")
        self._world.tally[name] += 1
        try:
            async with asyncio.timeout(LONGEST_S):
                await call()
        except TimeoutError:
            self._world.complain(f"{name} of {self.name} takes longer than {LONGEST_S} s")

    def die(self) -> None:
        """Its process dies: nothing is asked any more; its devices write garbage until their processes have ended."""
        self.is_dead = True
        for call in self.calls:
            call.cancel()
        if hasattr(self, "client"):
            self.client.vanish()
        self.process.doom()
        self.writer.doom()

    def end_writer(self) -> None:
        """The process that writes for it ends."""
        if self._of_writer is not None:
            self._of_writer.vanish()
        self.writer.end()

    async def leave(self) -> None:
        """End in order."""
        self.is_dead = True
        if self.tiering is not None:
            await self.tiering.aclose()
        await self.client.aclose()
        self.process.end()
        self.end_writer()

    # -- blocks ------------------------------------------------------------------------------------

    def _some_blocks(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """A part of a chain, of all groups."""
        start = self._dice.choice((0, 0, self._dice.randrange(NUM_HASHES)))
        stop = min(start + self._dice.randint(1, LONGEST_CHAIN), NUM_HASHES)
        return self.blocks(start, stop)

    def blocks(self, start: int, stop: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Keys, `uint64 [n, 4]`, and groups, `uint8 [n]`, of the blocks of these hashes."""
        keys = self._shape.keys[:, start:stop].reshape(-1, 4)
        return keys, np.repeat(np.arange(len(self._shape.sizes), dtype=np.uint8), stop - start)

    def _identities(self, keys: NDArray[np.uint64]) -> list[Identity]:
        return [Identity(self.namespace, key, self._token) for key in split_keys(keys)]

    def _payload_bytes(self, forms: NDArray[np.uint8] | None, count: int) -> list[int]:
        return [self._shape.encodings.payloads[form] for form in ([0] * count if forms is None else forms.tolist())]

    async def save(self) -> None:
        keys, groups = self._some_blocks()
        await self.save_blocks(keys, groups, as_is=self._dice.random() < 0.2)

    async def save_blocks(
        self, keys: NDArray[np.uint64], groups: NDArray[np.uint8], *, as_is: bool = False
    ) -> list[SaveOutcome]:
        """Returns the outcomes."""
        control, owner = self.control, self.control.client.owner  # type: ignore[attr-defined]
        identities, pool_keys = self._identities(keys), split_keys(control.own(keys))
        ids = np.arange(len(keys), dtype=np.int32)
        plan = control.plan_save(keys, ids, "save", groups=groups, as_is=as_is)
        places, count, mirror = plan.positions.tolist(), len(plan.slots), self._mirror
        if mirror is not None:
            mirror.planned(plan.transfer.offsets.tolist())
        numbers = [self._world.record.write(identities[place], pool_keys[place]) for place in places]
        self._saving.update(numbers)
        sizes = self._payload_bytes(plan.transfer.forms, count)
        blocks = list(zip(plan.transfer.offsets.tolist(), sizes, numbers, strict=True))
        self._world.note(f"{self.name} saves {len(keys)} blocks, {count} to {plan.transfer.offsets.tolist()}")
        good = np.ones(0, dtype=np.bool_)
        if blocks:
            transfer = Transfer(owner, f"a save of {self.name}", blocks, self._dice, self._world.scenario.harm)
            await asyncio.wait([self.writer.start(transfer).done])
            await asyncio.sleep(self._dice.choice((0.0, 0.01)))  # the worker's report is on its way
            good = transfer.good
        digests = np.array([payload_digest(content(number, nbytes)) for _, nbytes, number in blocks], dtype=np.uint64)
        lossy = np.array([not ok and self._dice.random() < 0.3 for ok in good.tolist()], dtype=np.bool_)
        tried = np.array([ok or lost or self._dice.random() < 0.7 for ok, lost in zip(good, lossy, strict=True)])
        self._saving.difference_update(numbers)
        outcomes = list(control.finish_save(plan, digests, good, lossy, tried.astype(np.bool_)))
        if mirror is not None:
            mirror.saved(keys)
        for state, outcome in zip(plan.states.tolist(), outcomes, strict=True):
            self._world.tally[f"save {outcome}"] += 1
            if (outcome is SaveOutcome.ALREADY_STORED) != (state == STORED):
                self._world.complain(f"a save of {self.name} is {outcome}, and its state was {state}")
        self._world.note(f"{self.name} has saved: {[outcome.value for outcome in outcomes]}")
        return outcomes

    async def load(self) -> None:
        await self.load_blocks(self._some_blocks()[0])

    async def load_blocks(self, keys: NDArray[np.uint64]) -> list[MissReason | None]:
        """Returns the outcomes. What is read was written for this block, and not forgotten before the load began."""
        control, record = self.control, self._world.record
        owner, link = control.client.owner, control.client.link  # type: ignore[attr-defined]
        identities = self._identities(keys)
        least = [record.least(identity) for identity in identities]
        plan = control.plan_load(keys, np.arange(len(keys), dtype=np.int32))
        offsets, places = plan.transfer.offsets.tolist(), plan.positions.tolist()
        sizes = self._payload_bytes(plan.transfer.forms, len(offsets))
        who = f"a load of {self.name}"
        uses = [owner.ledger.begin(who, *place, writes=False) for place in zip(offsets, sizes, strict=True)]
        link.reads += uses
        payloads = [np.empty(nbytes, dtype=np.uint8) for nbytes in sizes]
        for half in (0, 1) if offsets else ():
            await asyncio.sleep(self._dice.choice((0.0, 0.01, self._dice.uniform(0.0, 1.0))))
            for payload, offset in zip(payloads, offsets, strict=True):
                start, stop = (half * (payload.size // 16) * 8, (payload.size if half else payload.size // 16 * 8))
                payload[start:stop] = owner.pool[offset + start : offset + stop]
        for use in uses:
            if use in link.reads:
                link.reads.remove(use)
                owner.end_use(use)
        digests = plan.pins.digests.tolist()
        intact = np.array([is_intact(*pair) for pair in zip(digests, payloads, strict=True)], dtype=np.bool_)
        for place, is_good, payload in zip(places, intact.tolist(), payloads, strict=True):
            written = record.written_in(payload) if is_good else None
            if is_good and (written is None or written.identity != identities[place]):
                self._world.complain(f"{self.name} has loaded wrong bytes: {written} for {identities[place]}")
            elif written is not None and (written.begun < least[place] or written.is_forgotten):
                self._world.complain(f"{self.name} has loaded what was forgotten")
        outcomes = list(control.finish_load(plan, intact))
        for outcome in outcomes:
            self._world.tally[f"load {outcome or 'hit'}"] += 1
        self._world.note(f"{self.name} has loaded: {[outcome and outcome.value for outcome in outcomes]}")
        return outcomes

    async def fetch(self) -> None:
        keys, groups = self._some_blocks()
        if self.tiering is not None:
            fetch = self.tiering.fetch(keys, groups)
            self._world.note(f"{self.name} fetches {len(keys)} blocks: {fetch.num_pending} come")
            self._world.tally["fetches that wait"] += fetch.num_pending > 0
            late = await fetch.wait(timeout_s=self._dice.choice((None, None, 0.0, 0.1)))
            if late and self._dice.random() < 0.5:
                fetch.cancel()
        await self.load_blocks(keys)

    async def hold(self) -> None:
        keys, _ = self._some_blocks()
        control = self.control
        held = control.hold(keys)
        await asyncio.sleep(self._dice.uniform(0.0, 1.0))
        control.release(held.slots)

    async def look(self) -> None:
        keys, _ = self._some_blocks()
        control, index = self.control, self.control.index
        found = index.contains_mask(keys)
        length = index.prefix_length(keys)
        control.client.owner.check_all_visible()  # type: ignore[attr-defined]
        if len(found) != len(keys) or length > len(keys) or len(index.states(keys)) != len(keys):
            self._world.complain("a look-up answers another question")
        index.miss_reason(split_keys(keys)[0])
        control.places(keys)
        control.touch(keys)
        control.allocator.figures()
        if self.tiering is not None:
            self.tiering.known(keys)
            self.tiering.figures()

    # -- forgetting --------------------------------------------------------------------------------

    async def invalidate(self) -> None:
        """As an engine does it."""
        keys, _ = self._some_blocks()
        begun, control, tiering = self._world.record.tick(), self.control, self.tiering
        identities = self._identities(keys)
        is_sure = await self._forget(
            lambda: control.invalidate(keys),
            (lambda forget: tiering.invalidate(keys, forget)) if tiering is not None else None,
        )
        self._world.note(f"{self.name} has invalidated {len(keys)} blocks: {is_sure}")
        if is_sure:
            self._world.record.forget(identities, begun)
            control.client.owner.check_forgotten()  # type: ignore[attr-defined]

    async def clear(self) -> None:
        """The same for all blocks of its namespace, of other clients as well."""
        begun, control, tiering = self._world.record.tick(), self.control, self.tiering
        is_sure = await self._forget(control.clear, tiering.clear if tiering is not None else None)
        self._world.note(f"{self.name} has cleared its namespace: {is_sure}")
        if is_sure:
            self._world.record.clear(self.namespace, begun)
            control.client.owner.check_forgotten()  # type: ignore[attr-defined]

    async def _forget(
        self, of_pool: Callable[[], None], of_tier: Callable[[Callable[[], None]], Coroutine[Any, Any, bool]] | None
    ) -> bool:
        token = self._token
        try:
            of_pool()
            if of_tier is None:
                return True
            is_sure = await of_tier(of_pool)
        except OwnerError:
            return False
        is_sure = is_sure and token == self._token
        self._world.tally[f"forgotten for sure: {is_sure}"] += 1
        return is_sure

    async def forget(self) -> None:
        """It finds nothing any more of what was saved before, those in flight included."""
        self.control.forget()
        self._token = self._world.new_token()
        for number in self._saving:
            self._world.record[number].is_forgotten = True
        self._world.note(f"{self.name} forgets everything")
