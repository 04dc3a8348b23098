"""Tiers behind each other, on several hosts that share the last one: who touches which bytes when, and what is read."""

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError
from kvortex.testing.simulation import VirtualClockLoop
from kvortex.tiering.chain import ChainTier
from kvortex.tiering.chain_parts import Takes
from kvortex.tiers import ReadOutcome, ReadRequest, WriteOutcome, WriteRequest
from kvortex.tiers.payload import address_of, payload_digest
from tests.simulation.harm import Harm
from tests.simulation.ledger import Use
from tests.simulation.seeded_world import SeededWorld, order_of
from tests.simulation.tier import SimulatedTier, Store, TierFaults

NAMESPACE: Final = bytes(32)
KEYS: Final = [bytes([number]) * 32 for number in range(1, 25)]
SIZES: Final = (512, 776, 1024)
ROOM: Final = max(SIZES)
HOSTS, CLIENTS, AT_A_TIME = 2, 3, 5
TIMEOUT_S = 1.0
LONGEST_S = 90.0  # of any call, while tiers hang
REST_S = 300.0
UNTOUCHED = 0xC3


def payload_of(key: bytes) -> NDArray[np.uint8]:
    """The bytes that belong to a key."""
    return np.random.default_rng(key[0]).integers(0, 256, SIZES[key[0] % len(SIZES)], dtype=np.uint8)


PAYLOADS: Final = {key: payload_of(key) for key in KEYS}


class SharedTier(SimulatedTier):
    """One to whose store other hosts write."""

    name = "shared"
    finds_more = True


class Uses:
    """Which bytes tiers touch, and which of a host's bytes they may touch at all.

    Args:
        memory: the host's.
        complain: is told what is wrong.
    """

    def __init__(self, memory: NDArray[np.uint8], complain: Callable[[str], None]) -> None:
        self._begin, self._end = address_of(memory), address_of(memory) + memory.size
        self._complain = complain
        self._granted: set[int] = set()
        self.uses: set[Use] = set()

    def grant(self, address: int) -> None:
        """A call gets a client's buffer."""
        self._granted.add(address)

    def settle(self, address: int) -> None:
        """A call gives it back."""
        self._granted.discard(address)
        for use in self.uses:
            if use.offset == address:
                self._complain(f"a buffer is given back, and {use.who} still touches it")

    def begin(self, who: str, offset: int, nbytes: int, *, writes: bool) -> Use:
        """A tier begins to touch bytes; `offset` is an address."""
        if self._begin <= offset < self._end and offset not in self._granted:
            self._complain(f"{who} begins to touch a buffer that was given back")
        for use in self.uses:
            if (writes or use.writes) and offset < use.offset + use.nbytes and use.offset < offset + nbytes:
                self._complain(f"{who} and {use.who} touch the same bytes at the same time")
        new = Use(who, offset, nbytes, writes)
        self.uses.add(new)
        return new

    def end(self, use: Use) -> None:
        self.uses.remove(use)


@dataclass(frozen=True, slots=True)
class ChainScenario:
    """What a seed is made of, beside its dice."""

    middle: Takes | None
    """What the second of three tiers takes; None if there are two."""
    last: Takes
    copies_forward: bool
    faults: tuple[TierFaults, ...]
    blocks: tuple[int, ...]
    """Blocks for which each tier has room."""
    rounds: int
    loss: float
    closes: bool
    """In the middle of everything."""
    shuffled: bool

    @classmethod
    def drawn(cls, dice: random.Random) -> "ChainScenario":
        def chance(most: float) -> float:
            return dice.choice((0.0, 0.0, most / 4, most))

        def faults() -> TierFaults:
            return TierFaults(
                slow=chance(0.3),
                hang=chance(0.1),
                fail=chance(0.1),
                short=chance(0.05),
                lie=chance(0.05),
                full=chance(0.1),
                unopened=chance(0.1),
                stale=chance(0.1),
            )

        middle = dice.choice((None, *Takes))
        return cls(
            middle=middle,
            last=dice.choice((Takes.ALWAYS, Takes.ALWAYS, Takes.SECOND_TOUCH)),
            copies_forward=dice.random() < 0.8,
            faults=tuple(faults() for _ in range(2 if middle is None else 3)),
            blocks=(dice.choice((2, 6, 30)), dice.choice((4, 12, 30)), dice.choice((12, 30, 60))),
            rounds=dice.randint(4, 14),
            loss=dice.choice((0.0, 0.1, 0.4)),
            closes=dice.random() < 0.2,
            shuffled=dice.random() < 0.5,
        )


class HostOfChain:
    """One chain, the memory of its clients, and the stores that are its own."""

    def __init__(self, world: "ChainWorld", number: int, shared: Store) -> None:
        scenario, dice = world.scenario, random.Random(f"{world.seed}/host {number}")
        self.memory = np.zeros(CLIENTS * AT_A_TIME * ROOM, dtype=np.uint8)
        self.uses = Uses(self.memory, world.complain)
        self.stores = [
            Store(blocks * ROOM, namespace=NAMESPACE) for blocks in scenario.blocks[: len(scenario.faults) - 1]
        ]
        self.tiers = [
            (SharedTier if store is shared else SimulatedTier)(
                store,
                np.empty(0, dtype=np.uint8),
                self.uses,  # type: ignore[arg-type]
                world.harm,
                random.Random(f"{world.seed}/{number}/{position}"),
                faults,
                hang_s=dice.uniform(1.2, 5.0),
                hash_of=lambda key: key,
                waits_at_end=dice.random() < 0.5,
            )
            for position, (store, faults) in enumerate(zip([*self.stores, shared], scenario.faults, strict=True))
        ]
        for tier in self.tiers:
            tier._pool_address = 0  # the uses are told addresses
            tier.read_spans = defaultdict(lambda: [[0.0, 0.0]])  # of no interest here
        takes = [Takes.ALWAYS, *([] if scenario.middle is None else [scenario.middle]), scenario.last]
        self.chain = ChainTier(
            list(zip(self.tiers, takes, strict=True)), TIMEOUT_S, copies_forward=scenario.copies_forward
        )


class ChainWorld(SeededWorld):
    """Clients of several hosts read and write through their chains. One seed."""

    runner = "tests.simulation.chain_run"

    def __init__(self, seed: int) -> None:
        self.scenario = ChainScenario.drawn(random.Random(f"{seed}/scenario"))
        loop = VirtualClockLoop(shuffle=order_of(seed, shuffled=self.scenario.shuffled))
        super().__init__(seed, loop, self.scenario)
        self.harm = Harm()
        self._shared = Store(self.scenario.blocks[-1] * ROOM, namespace=NAMESPACE)
        self._hosts: list[HostOfChain] = []
        self._settled: dict[int, int] = {}  # request -> how often it was settled
        self._num_requests = 0

    def _check(self) -> None:
        """Every use and every outcome is looked at when it happens."""

    def _let_go(self) -> None:
        """Nothing here outlives its arrays."""

    def _may_log(self, text: str) -> bool:
        return "cannot be used" in text

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """The breakers go by the virtual clock."""
        with mock.patch("kvortex.tiering.chain_parts.time.monotonic", self._loop.time):
            yield

    async def _main(self) -> None:
        self._hosts = [HostOfChain(self, number, self._shared) for number in range(HOSTS)]
        for store in [self._shared, *(store for host in self._hosts for store in host.stores)]:
            await store.open()
        opened = [host for host in self._hosts if await self._opens(host)]
        dice = random.Random(f"{self.seed}/main")
        thief = asyncio.create_task(self._steal(dice))
        clients = [
            asyncio.create_task(self._client(host, number, random.Random(f"{self.seed}/{host_number}/{number}")))
            for host_number, host in enumerate(opened)
            for number in range(CLIENTS)
        ]
        if self.scenario.closes and opened:
            await asyncio.sleep(dice.uniform(0.0, 0.5))
            await self._bounded("close", opened[0].chain.aclose())
            self.tally["closed in the middle"] += 1
        for client in clients:
            await client
        thief.cancel()
        await asyncio.wait([thief])
        for host in opened:
            for tier in host.tiers:
                tier.faults = TierFaults()
        await asyncio.sleep(REST_S)  # what hangs ends, and no breaker is open any more
        alive = [host for host in opened if not host.chain._is_closed]
        await self._come_to_rest(alive)
        for host in opened:
            await self._bounded("close", host.chain.aclose())
        await asyncio.sleep(20.0)
        self._check_at_end()

    async def _opens(self, host: HostOfChain) -> bool:
        try:
            await self._bounded("open", host.chain.open())
        except ConfigError:
            self.tally["not opened"] += 1
            return False
        return True

    async def _bounded(self, what: str, work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(LONGEST_S):
                return await work
        except TimeoutError:
            self.complain(f"{what} takes longer than {LONGEST_S:g} s")

    async def _steal(self, dice: random.Random) -> None:
        """The shared store loses blocks."""
        while True:
            await asyncio.sleep(dice.uniform(0.01, 0.2))
            if self._shared._kept and dice.random() < self.scenario.loss:
                await self._shared.delete([dice.choice(list(self._shared._kept))])
                self.tally["stolen"] += 1

    # -- clients ---------------------------------------------------------------------------------------

    async def _client(self, host: HostOfChain, number: int, dice: random.Random) -> None:
        calls = {self._read: 5, self._write: 4, self._delete: 1, self._find: 1, self._touch: 2}
        for _ in range(self.scenario.rounds):
            await asyncio.sleep(dice.choice((0.0, dice.uniform(0.0, 0.3))))
            if host.chain._is_closed:
                return
            keys = dice.sample(KEYS, dice.randint(1, AT_A_TIME))
            deadline_s = dice.choice((None, None, 0.05, 0.5))
            (call,) = dice.choices(list(calls), list(calls.values()))
            task = asyncio.create_task(call(host, number, keys, deadline_s))
            if dice.random() < 0.15:
                await asyncio.sleep(dice.uniform(0.0, 0.05))
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._bounded(call.__name__, task)
            if task.cancelled():
                self.tally["cancelled"] += 1
            await self._wait_for_memory(host, number)

    async def _wait_for_memory(self, host: HostOfChain, number: int) -> None:
        """What is late settles in the end; until then the client must not use its memory."""
        mine = self._memory_of(host, number)
        for _ in range(1000):
            if not any(address_of(mine[n]) in host.uses._granted for n in range(AT_A_TIME)):
                return
            await asyncio.sleep(0.1)
        self.complain("a request is never settled")

    def _memory_of(self, host: HostOfChain, number: int) -> NDArray[np.uint8]:
        return host.memory.reshape(CLIENTS, AT_A_TIME, ROOM)[number]

    def _request(self) -> int:
        self._num_requests += 1
        self._settled[self._num_requests] = 0
        return self._num_requests

    async def _read(
        self, host: HostOfChain, number: int, keys: Sequence[bytes], deadline_s: float | None
    ) -> list[ReadOutcome]:
        requests, finals = [], dict[int, ReadOutcome]()
        for key, buffer in zip(keys, self._memory_of(host, number), strict=False):
            request = self._request()
            host.uses.grant(address_of(buffer))

            def settled(
                outcome: ReadOutcome,
                key: bytes = key,
                buffer: NDArray[np.uint8] = buffer,
                request: int = request,
            ) -> None:
                if outcome.reason is None:
                    self._check_bytes(key, buffer[: outcome.payload_bytes], outcome.digest)
                self._settle(host, request, buffer)
                finals[request] = outcome

            requests.append((request, ReadRequest(key, buffer, on_settled=settled)))
        outcomes = await host.chain.read([one for _, one in requests], deadline_s=deadline_s)
        for (request, _), outcome in zip(requests, outcomes, strict=True):
            self._check_settled(request, outcome, finals.get(request))
            self.tally["hit" if outcome.reason is None else f"miss {outcome.reason}"] += 1
        return outcomes

    async def _write(
        self, host: HostOfChain, number: int, keys: Sequence[bytes], deadline_s: float | None
    ) -> list[WriteOutcome]:
        requests, finals = [], dict[int, WriteOutcome]()
        for key, buffer in zip(keys, self._memory_of(host, number), strict=False):
            request, payload = self._request(), PAYLOADS[key]
            buffer[: payload.size] = payload
            host.uses.grant(address_of(buffer))

            def settled(
                outcome: WriteOutcome,
                buffer: NDArray[np.uint8] = buffer,
                request: int = request,
            ) -> None:
                self._settle(host, request, buffer)
                finals[request] = outcome

            digest = payload_digest(payload)
            requests.append(
                (request, WriteRequest(key, buffer[: payload.size], digest, payload.size, on_settled=settled))
            )
        outcomes = await host.chain.write([one for _, one in requests], deadline_s=deadline_s)
        for (request, _), outcome in zip(requests, outcomes, strict=True):
            self._check_settled(request, outcome, finals.get(request))
            self.tally[f"write {outcome.outcome}"] += 1
        return outcomes

    async def _delete(
        self, host: HostOfChain, number: int, keys: Sequence[bytes], deadline_s: float | None
    ) -> list[bool]:
        deleted = await host.chain.delete(keys, deadline_s=deadline_s)
        self.tally["deleted"] += sum(deleted)
        return deleted

    async def _find(self, host: HostOfChain, number: int, keys: Sequence[bytes], deadline_s: float | None) -> list[int]:
        found = await host.chain.find(keys, deadline_s=deadline_s)
        self.tally["found"] += sum(map(bool, found))
        return found

    async def _touch(self, host: HostOfChain, number: int, keys: Sequence[bytes], deadline_s: float | None) -> None:
        await host.chain.touch(keys, [self._loop.time()] * len(keys), deadline_s=deadline_s)
        self.tally["touched"] += len(keys)

    # -- what must hold --------------------------------------------------------------------------------

    def _settle(self, host: HostOfChain, request: int, buffer: NDArray[np.uint8]) -> None:
        """A call gives a buffer back; its client uses it for something else."""
        self._settled[request] += 1
        if self._settled[request] > 1:
            self.complain("a request is settled twice")
        host.uses.settle(address_of(buffer))
        buffer[:] = UNTOUCHED

    def _check_settled(self, request: int, outcome: Any, final: Any) -> None:
        if outcome.settled and (not self._settled[request] or outcome != final):
            self.complain(f"a call says {outcome}, and what was settled is {final}")

    def _check_bytes(self, key: bytes, found: NDArray[np.uint8], digest: int) -> None:
        if payload_digest(found) != digest:
            if key not in self.harm.corrupted | self.harm.failed:
                self.complain(f"block {key[0]} does not fit its digest, and nobody has harmed it")
            self.tally["corrupt"] += 1
        elif not np.array_equal(found, PAYLOADS[key]):
            self.complain(f"wrong bytes of block {key[0]}")

    async def _come_to_rest(self, hosts: Sequence[HostOfChain]) -> None:
        """With the faults gone all tiers serve, and one host finds what another has written."""
        self.note("rest")
        for writer in hosts:
            key = random.Random(f"{self.seed}/rest").choice([key for key in KEYS if key not in self.harm.corrupted])
            for host in hosts:
                await self._delete(host, 0, [key], None)
            (written,) = await self._write(writer, 0, [key], None)
            if not written.outcome.is_stored:
                self.complain(f"tiers at rest do not take a block: {written}")
            for reader in hosts if self.scenario.last is Takes.ALWAYS and writer.chain.links[-1].is_open else [writer]:
                if reader is writer or reader.chain.links[-1].is_open:
                    (read,) = await self._read(reader, 0, [key], None)
                    if read.reason is not None:
                        self.complain(f"tiers at rest do not give a block back: {read}")
                    self.tally["read at rest"] += 1
            await asyncio.sleep(5.0)  # copies
            for host in hosts:
                await self._delete(host, 0, [key], None)
            for host in hosts:
                opened = [tier for tier, link in zip(host.tiers, host.chain.links, strict=True) if link.is_open]
                if any(tier._store.lookup([key])[0] for tier in opened):
                    self.complain("a deleted block is still in a tier")

    def _check_at_end(self) -> None:
        if never := [request for request, count in self._settled.items() if not count]:
            self.complain(f"{len(never)} requests were never settled")
        for host in self._hosts:
            if host.uses.uses:
                self.complain(f"{len(host.uses.uses)} transfers go on after the end")
        for store in [self._shared, *(store for host in self._hosts for store in host.stores)]:
            for key, kept in store._kept.items():
                self._check_bytes(key, kept.payload, kept.digest)
        self._complain_of_tasks()
