"""Lower tiers behind the pool of an owner: what its clients may ask, and what they are told."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexConfig
from kvortex.errors import ConfigError, OwnerError
from kvortex.memory import SharedMemory
from kvortex.owner.caches import Caches
from kvortex.owner.client import OwnerLost
from kvortex.owner.protocol import Kind, TierCall, numbers
from kvortex.owner.session import Session
from kvortex.owner.tickets import AWAITED, IN_TIER, TicketState
from kvortex.owner.tiering import RemoteCalls
from kvortex.owner.tiers import OwnerTiers
from kvortex.planes.control import ControlPlane
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.tiers import MemoryTier, ReadOutcome, ReadRequest
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction
from tests.owner.owner_support import (
    NO_FLAGS,
    Client,
    Keys,
    make_caches,
    some_keys,
)

BLOCK = 4096
TIER_BYTES = 64 << 20
OF_EMPTY_BLOCK = payload_digest(np.zeros(BLOCK, np.uint8))
FaultOf = Callable[[Direction, int, bytes], TierFault | None]


def hung_reads(direction: Direction, number: int, key: bytes) -> TierFault | None:
    return TierFault.HANG if direction is Direction.LOAD else None


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    due_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < due_s, "it did not come true"
        await asyncio.sleep(0.001)


# -- sessions over a tier, on the loop of the test ---------------------------------------------------


class Bench:
    """Caches whose blocks are all zeros, in a pool of 16, over a tier each.

    Args:
        fault_of: what goes wrong in the tiers.
        changes: other settings.
    """

    def __init__(self, fault_of: FaultOf, **changes: Any) -> None:
        pool = {"bytes": 16 * BLOCK, "pin_piece_bytes": 16 * BLOCK}
        config = KVortexConfig(pool=pool, eviction={"watermark": 1.0}, **changes)
        self.fault_of = fault_of
        self.made: list[FaultInjectingTier] = []
        self.memory = SharedMemory.create(16 * BLOCK)
        self.control = ControlPlane.from_config(config, 16 * BLOCK, ())
        self.tiers = OwnerTiers(config, self.control, self.memory, self.make_tier)
        self.caches = Caches(self.control, self.tiers)
        self.clients: list[Client] = []

    def make_tier(self, config: KVortexConfig, namespace: bytes) -> FaultInjectingTier:
        self.made.append(FaultInjectingTier(MemoryTier(TIER_BYTES, namespace=namespace), self.fault_of))
        return self.made[-1]

    def client(self) -> Client:
        self.clients.append(Client(self.caches).add())
        return self.clients[-1]

    async def put_into_tier(self, keys: Keys) -> None:
        """The tier has these blocks, and the pool has none."""
        self.save(client := self.client(), keys)
        await self.tiers.flush()
        client.session.close()
        self.control.clear()

    @staticmethod
    def save(client: Client, keys: Keys) -> None:
        _, slots, *_ = client.plan_save(keys)
        client.finish_save(slots, np.full(len(slots), OF_EMPTY_BLOCK, np.uint64))

    @property
    def arriving(self) -> int:
        return self.clients[0].session.cache.tiering.fetches.num_arriving

    async def aclose(self) -> None:
        for client in self.clients:
            for offset in client.session.close():
                self.control.free(offset)
        await self.tiers.aclose()
        self.control.close()
        self.memory.close()


@contextlib.asynccontextmanager
async def bench(fault_of: FaultOf = lambda *_: None, **changes: Any) -> AsyncIterator[Bench]:
    made = Bench(fault_of, **changes)
    try:
        yield made
    finally:
        await made.aclose()
        assert made.control.index.num_pending == 0
        assert made.control.allocator.leak_report() == ""


def fetch(client: Client, keys: Keys) -> tuple[int, list[int]]:
    number, flags = client.ask(Kind.FETCH, numbers(False), keys, np.zeros(len(keys), np.uint8))
    return int(number[0]), flags.tolist()


def calls(client: Client) -> list[list[int]]:
    return client.ask(Kind.CALLS)[0].reshape(-1, 3).tolist()


async def result(client: Client, call: TierCall, keys: Keys) -> bool:
    (number,) = client.ask(Kind.TIER_CALL, numbers(call), keys)
    found: list[list[int]] = []
    await until(lambda: found.extend(row for row in calls(client) if row[0] == number[0] and row[2]) or found)
    return found[0][2] == TicketState.DONE


KEYS = some_keys(6)
GROUPS = np.zeros(6, np.uint8)
WRONG_FRAMES = {
    "a fetch of a group that the cache has not": (Kind.FETCH, (numbers(0), KEYS, np.full(6, 1, np.uint8))),
    "a fetch with fewer groups than keys": (Kind.FETCH, (numbers(0), KEYS, GROUPS[:5])),
    "a fetch of half a key": (Kind.FETCH, (numbers(0), KEYS.ravel()[:6], GROUPS[:1])),
    "a fetch without options": (Kind.FETCH, (numbers(), KEYS, GROUPS)),
    "the end of a fetch that is not open": (Kind.END_FETCH, (numbers(77, 1),)),
    "the end of a call that is no fetch": (Kind.END_FETCH, (numbers(2, 1),)),
    "the end of a fetch without options": (Kind.END_FETCH, (numbers(1),)),
    "a call that there is not": (Kind.TIER_CALL, (numbers(99), KEYS)),
    "a call without a number": (Kind.TIER_CALL, (numbers(), KEYS)),
    "a call for half a key": (Kind.TIER_CALL, (numbers(TierCall.INVALIDATE), KEYS.ravel()[:6])),
    "a question for half a key": (Kind.TIER_KNOWN, (KEYS.ravel()[:6],)),
    "events before they are watched": (Kind.EVENTS, ()),
    "places of half a key": (Kind.PLACES, (KEYS.ravel()[:6],)),
}


@pytest.mark.parametrize("what", list(WRONG_FRAMES))
async def test_a_wrong_frame_to_the_tier_changes_nothing(what: str) -> None:
    """This client has fetch 1 and call 2 in flight."""
    async with bench(hung_reads) as made:
        await made.put_into_tier(KEYS)
        client = made.client()
        assert fetch(client, KEYS) == (1, [IN_TIER | AWAITED] * 6)
        assert client.ask(Kind.TIER_CALL, numbers(TierCall.READY), KEYS[:0])[0].tolist() == [2]
        await until(lambda: made.made[0].num_held == 6)
        before = (made.control.allocator.allocated_bytes, made.control.index.num_pending, made.arriving)
        assert before == (6 * BLOCK, 6, 6)
        kind, fields = WRONG_FRAMES[what]
        with pytest.raises(OwnerError):
            client.ask(kind, *fields)
        assert (made.control.allocator.allocated_bytes, made.control.index.num_pending, made.arriving) == before
        assert calls(client) == [[1, 0, TicketState.RUNNING], [2, 0, TicketState.DONE]]
        made.made[0].release()
        await until(lambda: calls(client) == [[1, 6, TicketState.DONE]])
        assert client.ask(Kind.END_FETCH, numbers(1, False))[1].tolist() == [IN_TIER] * 6
        assert client.found(KEYS) == [True] * 6


TIER_KINDS = [Kind.TIER_KNOWN, Kind.FETCH, Kind.END_FETCH, Kind.TIER_CALL, Kind.CALLS, Kind.TIER_FIGURES]


@pytest.mark.parametrize("kind", TIER_KINDS)
@pytest.mark.leaves_extents
def test_nothing_can_be_asked_of_a_tier_that_there_is_not(kind: Kind) -> None:
    with pytest.raises(OwnerError, match="is no request"):
        Client(make_caches(1 << 20)).add().session.answer(kind, [])


async def test_a_client_that_goes_away_in_the_middle_of_a_fetch_leaves_nothing() -> None:
    reads: list[bytes] = []

    def hung(direction: Direction, number: int, key: bytes) -> TierFault | None:
        if direction is Direction.LOAD:
            reads.append(key)
        return hung_reads(direction, number, key)

    async with bench(hung, tier={"fetch_blocks": 2}) as made:
        await made.put_into_tier(KEYS)
        client = made.client()
        assert fetch(client, KEYS)[0]
        for call in TierCall:
            client.ask(Kind.TIER_CALL, numbers(call), KEYS[:0])
        await until(lambda: made.made[0].num_held == 2)
        assert client.session.close() == []
        assert made.control.allocator.allocated_bytes == 2 * BLOCK, "the tier still writes to what it reads into"
        made.made[0].release()
        await until(lambda: not made.made[0].num_held and not made.control.index.num_pending)
        assert len(reads) == 2, "the reads that had not begun do not begin"
        assert made.arriving == 0
        made.control.clear()
        assert made.control.allocator.allocated_bytes == 0


async def test_a_client_that_goes_away_leaves_another_what_both_fetch() -> None:
    async with bench(hung_reads, tier={"fetch_blocks": 2}) as made:
        await made.put_into_tier(KEYS)
        gone, other = made.client(), made.client()
        fetch(gone, KEYS)
        number, flags = fetch(other, KEYS[1:4])
        assert flags == [IN_TIER | AWAITED] * 3
        gone.session.close()
        await until(lambda: made.made[0].release() or calls(other)[0][2])
        assert other.ask(Kind.END_FETCH, numbers(number, False))[1].tolist() == [IN_TIER] * 3
        assert other.found(KEYS)[1:] == [True] * 3 + [False] * 2


async def test_a_fetch_that_is_refused_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.owner.tickets.MAX_TICKETS", 1)
    async with bench(hung_reads, tier={"fetch_blocks": 2}) as made:
        await made.put_into_tier(KEYS)
        client = made.client()
        fetch(client, KEYS[:2])
        await until(lambda: made.made[0].num_held == 2)
        with pytest.raises(OwnerError, match="calls in flight"):
            fetch(client, KEYS)
        client.session.close()
        assert made.arriving == 2, "only those whose reads have begun"


class LateTier(MemoryTier):
    """Its reads have the bytes, and say so when they are told to."""

    def __init__(self, namespace: bytes) -> None:
        super().__init__(TIER_BYTES, namespace=namespace)
        self.may_say = asyncio.Event()
        self.num_read = 0

    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        outcomes = await super().read([replace(request, on_settled=None) for request in requests])
        self.num_read += len(requests)
        await self.may_say.wait()
        for request, outcome in zip(requests, outcomes, strict=True):
            request.settle(outcome)
        return outcomes


@pytest.mark.parametrize(
    "call",
    [TierCall.CLEAR, TierCall.INVALIDATE],
)
async def test_what_is_on_its_way_from_the_tier_while_it_is_forgotten_is_not_found(
    call: TierCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[LateTier] = []
    monkeypatch.setattr(Bench, "make_tier", lambda self, config, name: late.append(LateTier(name)) or late[0])
    async with bench() as made:
        await made.put_into_tier(KEYS)
        reader, other = made.client(), made.client()
        fetch(reader, KEYS)
        await until(lambda: late[0].num_read == 6)
        in_pool = (Kind.CLEAR,) if call is TierCall.CLEAR else (Kind.INVALIDATE, KEYS)
        other.ask(*in_pool)
        assert await result(other, call, KEYS)
        other.ask(*in_pool)
        late[0].may_say.set()
        await until(lambda: not made.control.index.num_pending)
        assert other.found(KEYS) == [False] * 6


# -- events ------------------------------------------------------------------------------------------


async def test_a_watcher_that_does_not_ask_is_told_so_and_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.owner.events.MAX_EVENTS", 4)
    async with bench() as made:
        watching, other = made.client(), made.client()
        watching.ask(Kind.WATCH)
        made.save(other, KEYS)
        await made.tiers.flush()
        removed, was_overdue, written, lost = watching.ask(Kind.EVENTS)
        assert was_overdue.tolist() == [1]
        assert not removed.size
        assert not written.size
        assert not lost.size
        for keys in (some_keys(3, 1), some_keys(4, 2)):
            made.save(other, keys)
            await made.tiers.flush()
            removed, was_overdue, written, _ = watching.ask(Kind.EVENTS)
            assert was_overdue.tolist() == [0]
            assert {key.tobytes() for key in written.reshape(-1, 4)} == {key.tobytes() for key in keys}
        other.ask(Kind.CLEAR)
        assert watching.ask(Kind.EVENTS)[1].tolist() == [1], "13 blocks have left the pool"
        made.save(other, KEYS[:4])
        await made.tiers.flush()
        other.ask(Kind.CLEAR)
        assert watching.ask(Kind.EVENTS)[0].size == 4


async def test_an_offset_is_said_to_be_free_before_it_is_given_away_again() -> None:
    async with bench() as made:
        watching, other = made.client(), made.client()
        watching.ask(Kind.WATCH)
        known: dict[int, bytes] = {}  # offset -> key, as the watching client knows the pool
        for salt in range(8):
            keys = some_keys(5, salt)
            _, slots, offsets, _, positions, removed = watching.plan_save(keys)
            for offset in removed.tolist():
                known.pop(offset, None)
            assert known.keys().isdisjoint(offsets.tolist())
            known.update(zip(offsets.tolist(), (keys[n].tobytes() for n in positions), strict=True))
            watching.finish_save(slots, np.full(len(slots), OF_EMPTY_BLOCK, np.uint64))
            made.save(other, some_keys(4, 100 + salt))
        for offset in watching.ask(Kind.EVENTS)[0].tolist():
            known.pop(offset, None)
        asked = np.concatenate([some_keys(5, salt) for salt in range(8)])
        found, removed = watching.ask(Kind.PLACES, asked)
        assert not removed.size
        assert set(found[~np.array(watching.found(asked))].tolist()) == {-1}
        places = {offset: key.tobytes() for offset, key in zip(found.tolist(), asked, strict=True) if offset >= 0}
        assert places == known
        assert known


# -- smaller pools -----------------------------------------------------------------------------------


@pytest.fixture
def caches() -> Iterator[Caches]:
    made = make_caches(16 * BLOCK)
    yield made
    made.control.clear()


def test_a_pool_that_serves_several_engines_does_not_shrink(caches: Caches) -> None:
    client = Client(caches).add()
    client.save(KEYS)
    with pytest.raises(ConfigError, match="the pool serves several engines"):
        client.ask(Kind.SHRINK, numbers(0))
    assert caches.control.allocator.capacity_bytes == 16 * BLOCK
    assert client.found(KEYS) == [True] * 6


@pytest.mark.parametrize("nbytes", [0, 1, 6 * BLOCK, 7 * BLOCK + 1, 16 * BLOCK, 17 * BLOCK, -1])
def test_the_pool_of_one_engine_shrinks(caches: Caches, nbytes: int) -> None:
    client, saving, allocator = Client(caches), some_keys(2, 1), caches.control.allocator
    client.session = Session(caches, client.process, 7, is_sole=True)
    client.add().save(KEYS)
    _, slots, written, *_ = client.plan_save(saving)
    pinned, *_ = client.ask(Kind.PLAN_LOAD, KEYS[4:])
    offsets, _ = client.ask(Kind.PLACES, KEYS)
    client.ask(Kind.SHRINK, numbers(nbytes))
    capacity = allocator.capacity_bytes
    assert capacity == (nbytes // 128 * 128 if 0 <= nbytes < 16 * BLOCK else 16 * BLOCK)
    assert client.found(KEYS) == (offsets + BLOCK <= capacity).tolist()
    client.finish_save(slots)
    assert client.found(saving) == (written + BLOCK <= capacity).tolist()
    client.ask(Kind.FINISH_LOAD, pinned, NO_FLAGS)
    client.ask(Kind.SHRINK, numbers(17 * BLOCK))
    client.save(some_keys(20, 2))
    assert allocator.capacity_bytes == capacity
    assert allocator.allocated_bytes == capacity // BLOCK * BLOCK
    assert (client.ask(Kind.PLACES, some_keys(20, 2))[0] + BLOCK <= capacity).all() or not capacity


# -- calls of a client -------------------------------------------------------------------------------


class Answers:
    """A client whose answers are given, in order; an error is raised."""

    def __init__(self, *answers: list[Any] | Exception) -> None:
        self.answers = list(answers)
        self.generation = 0

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ask(self, *_: Any) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def calls_over(client: Answers) -> RemoteCalls:
    return RemoteCalls(SimpleNamespace(client=client, own=lambda keys: keys))  # type: ignore[arg-type]


def test_a_call_ends_although_a_later_connection_gives_its_number_again() -> None:
    flags = np.full(1, AWAITED, np.uint8)
    client = Answers([numbers(1), flags], [numbers(1), flags], [numbers(1, 0, TicketState.RUNNING)])
    made = calls_over(client)
    before = made.fetch(some_keys(1), np.zeros(1, np.uint8))
    client.generation = 1
    after = made.fetch(some_keys(1), np.zeros(1, np.uint8))
    made.ask()
    assert before.state is TicketState.FAILED
    assert after.state is TicketState.RUNNING


def test_a_call_ends_although_the_owner_is_lost_when_its_end_is_asked_for() -> None:
    flags = np.full(1, AWAITED, np.uint8)
    client = Answers([numbers(1), flags], [numbers(1, 1, TicketState.DONE)], OwnerLost("it is gone"))
    made = calls_over(client)
    call = made.fetch(some_keys(1), np.zeros(1, np.uint8))
    made.ask()
    assert call.is_over
    assert len(made) == 0
