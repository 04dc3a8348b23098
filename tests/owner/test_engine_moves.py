"""Engines whose owner is started anew: they move to the pool of the new one, and nothing of the old one stays."""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, SaveOutcome
from kvortex.config import KIB, MIB
from kvortex.errors import InvalidBlockIdError
from kvortex.memory import PinnedPool
from kvortex.owner import OwnerClient, RemoteControl, following, server
from kvortex.owner import client as client_module
from kvortex.owner.protocol import VERSION
from kvortex.planes import data as data_module
from kvortex.planes.data import DataPlane
from kvortex.tiers import MemoryTier
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, Parts, chain, contents, make_cache, wipe
from tests.groups_support import CACHES, places, request, tables
from tests.owner.client_program import Churn, config_of
from tests.owner.owner_support import Holding, LocalOwner, read_line, spawn, wait_until

DEADLINE_S = 0.5
RESTARTS = int(os.environ.get("KVORTEX_RESTARTS", "6"))
"""How often the owner is killed; more of them for a long run."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv.sock"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients look and ask more often than they do elsewhere."""
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(client_module, "LAST_RETRY_S", 0.05)
    monkeypatch.setattr(following, "LOOK_INTERVAL_S", 0.02)
    monkeypatch.setattr(following, "JOIN_AGAIN_S", 0.05)


class Held(NamedTuple):
    """What this process holds of the system."""

    num_descriptors: int
    mapped: frozenset[str]
    threads: tuple[str, ...]

    @classmethod
    def now(cls) -> "Held":
        lines = Path("/proc/self/maps").read_text().splitlines()
        maps = [line.split("/memfd:")[1].split()[0] for line in lines if "/memfd:kvortex" in line]
        threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("kvortex"))
        assert len(maps) == len(set(maps)), "a pool is mapped twice"
        return cls(len(os.listdir("/proc/self/fd")), frozenset(maps), tuple(threads))


@pytest.fixture
def nothing_more() -> Iterator[None]:
    """At the end the process holds what it held before."""
    before = Held.now()
    yield
    with contextlib.suppress(AssertionError):
        wait_until(lambda: Held.now() == before, 3.0)
    assert Held.now() == before


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    due_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < due_s, "it did not come true"
        await asyncio.sleep(0.005)


def client_of(engine: KVortexEngine) -> OwnerClient:
    assert isinstance(engine._control, RemoteControl)
    return engine._control.client


def data_of(engine: KVortexEngine) -> DataPlane:
    assert engine._data is not None
    return engine._data


async def moved(engine: KVortexEngine, before: str) -> None:
    """Wait until the engine has left the pool with this label, and is in another one."""
    await until(lambda: client_of(engine).label != before and client_of(engine).is_connected)
    assert not data_of(engine).is_away


@contextlib.asynccontextmanager
async def connected(
    path: Path, cache: dict[str, torch.Tensor] | None = None, parts: Parts | None = None, **changes: Any
) -> AsyncIterator[KVortexEngine]:
    config = config_of(str(path), DEADLINE_S).replace(**changes)
    async with KVortexEngine.create(config, parts) as engine:
        engine.register_kv_caches(cache or make_cache(seed=1), BLOCK_SIZE)
        try:
            yield engine
        finally:
            if isinstance(parts, Holding):
                parts.release()


async def check_serves(engine: KVortexEngine, cache: dict[str, torch.Tensor], salt: int = 0) -> None:
    """It saves, finds and loads, byte for byte."""
    hashes = chain(12, salt)
    assert (await engine.save_blocks(hashes, range(12))).ok
    await check_loads(engine, cache, salt)


async def check_loads(engine: KVortexEngine, cache: dict[str, torch.Tensor], salt: int = 0) -> None:
    hashes = chain(12, salt)
    assert engine.match_prefix(hashes) == 12
    wipe(cache, range(20, 32))
    assert (await engine.load_blocks(hashes, range(20, 32))).ok
    assert contents(cache, range(20, 32)) == contents(cache, range(12))


class Owners:
    """Owners in this process, one after another at one socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner: LocalOwner | None = None

    def start(self, *arguments: Any, **changes: Any) -> LocalOwner:
        """End the owner that there is, and start another."""
        self.stop()
        self.owner = LocalOwner(self.path, *arguments, **changes)
        return self.owner

    def stop(self) -> None:
        if self.owner is not None:
            self.owner.stop()
            self.owner = None


class KilledOwners:
    """Owners in processes of their own, one after another at one socket; each is killed before the next one starts.

    Args:
        process: the program that forks them.
        path: of the socket.
    """

    def __init__(self, process: "subprocess.Popen[str]", path: Path) -> None:
        self._process = process
        self._path = path
        self.pid = 0

    def start(self, pool_bytes: int = 4 * MIB, **settings: Any) -> None:
        self.kill()
        assert self._process.stdin is not None
        pool = {"bytes": pool_bytes, "pin_piece_bytes": 256 * KIB}
        self._process.stdin.write(json.dumps([str(self._path), {"pool": pool, **settings}]) + "\n")
        self._process.stdin.flush()
        self.pid = int(read_line(self._process))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        if self.pid:
            os.kill(self.pid, number)

    def serves(self, engine: KVortexEngine) -> bool:
        return client_of(engine).owner_pid == self.pid and client_of(engine).is_connected


@pytest.fixture(scope="module")
def program() -> Iterator["subprocess.Popen[str]"]:
    process = spawn(["-m", "tests.owner.owner_program"])
    yield process
    process.communicate(timeout=20)


@pytest.fixture
def killed(program: "subprocess.Popen[str]", path: Path) -> Iterator[KilledOwners]:
    made = KilledOwners(program, path)
    yield made
    made.kill()


@pytest.fixture
def owners(path: Path) -> Iterator[Owners]:
    made = Owners(path)
    yield made
    made.stop()


# -- moving ------------------------------------------------------------------------------------------


async def test_an_engine_saves_and_hits_again_after_its_owner_was_killed(
    path: Path, killed: KilledOwners, monkeypatch: pytest.MonkeyPatch, nothing_more: None
) -> None:
    """As often as clients look elsewhere: it takes some seconds."""
    monkeypatch.undo()
    cache = make_cache(seed=1)
    before = contents(cache, range(64))
    killed.start()
    async with connected(path, cache) as engine:
        await check_serves(engine, cache)
        saved = engine.get_stats()
        lease = engine.pin(chain(12), ttl_s=60)
        label = client_of(engine).label
        killed.kill()
        assert engine.match_prefix(chain(12)) == 0
        killed.start(8 * MIB)
        start_s = time.monotonic()
        await moved(engine, label)
        assert time.monotonic() - start_s < 5.0
        assert killed.serves(engine)
        assert engine.match_prefix(chain(12)) == 0
        assert engine.miss_reason(chain(1)[0]) is MissReason.NEVER_STORED
        await check_serves(engine, cache)
        assert lease.is_over
        with engine.pin(chain(12), ttl_s=60) as again:
            lease.release()
            assert (again.num_blocks, again.is_over) == (12, False)
        stats = engine.get_stats()
        assert stats.bytes_saved == 2 * saved.bytes_saved
        assert stats.hits == 2 * saved.hits
        assert stats.pools[0].capacity_bytes == stats.pools[0].pinned_bytes == 8 * MIB
        assert stats.pools[0].allocated_bytes == 12 * BLOCK_NBYTES
        assert Held.now().mapped == {client_of(engine).label}
        await engine.wait_pinned()
    unused = [*range(20), *range(32, 64)]
    assert contents(cache, unused) == [before[block] for block in unused], "the new memory was proven without a write"


async def test_an_engine_that_asks_nothing_moves_too(owners: Owners, nothing_more: None) -> None:
    owners.start()
    async with connected(owners.path) as engine:
        label = client_of(engine).label
        second = owners.start()
        await moved(engine, label)
        assert second.owner.num_clients == 1
        assert Held.now().mapped == {client_of(engine).label}
    owners.stop()


def test_an_engine_with_a_loop_of_its_own_moves(path: Path, killed: KilledOwners, nothing_more: None) -> None:
    cache = make_cache(seed=1)
    hashes = chain(12)
    killed.start()
    with KVortexEngine.create_sync(config_of(str(path), DEADLINE_S)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert engine.save_blocks(hashes, range(12)).ok
        killed.start()
        wait_until(lambda: engine.save_blocks(hashes, range(12)).num_stored == 12)
        assert engine.match_prefix(hashes) == 12
        wipe(cache, range(20, 32))
        assert engine.load_blocks(hashes, range(20, 32)).ok
        assert contents(cache, range(20, 32)) == contents(cache, range(12))


@pytest.mark.parametrize("codec", ["raw", "fp8"])
@pytest.mark.parametrize("name", list(CACHES))
async def test_groups_of_layers_move(owners: Owners, name: str, codec: str) -> None:
    mine = CACHES[name]()
    mine.fill_with_numbers(1)
    shared = name != "apart"
    here, there = tables(12, places(shared, 0)), tables(12, places(shared, 1))
    owners.start()
    async with KVortexEngine.create(config_of(str(owners.path)).replace(codec=codec)) as engine:
        mine.register(engine)
        before = mine.snapshot()
        assert (await engine.save_blocks(request(12), here)).ok
        label = client_of(engine).label
        owners.start({"bytes": 8 << 20, "pin_piece_bytes": 512 * KIB})
        await moved(engine, label)
        assert mine.snapshot() == before, "the cache was only read"
        assert engine.match_prefix(request(12)) == 0
        assert (await engine.save_blocks(request(12), here)).ok
        assert engine.match_prefix(request(12)) == 12
        assert (await engine.load_blocks(request(12), there)).ok
        assert (await engine.load_blocks(request(12), here)).ok
        assert mine.blocks(there) == mine.blocks(here)


async def test_blocks_that_the_disk_has_are_hit_again(
    path: Path, killed: KilledOwners, tmp_path: Path, nothing_more: None
) -> None:
    cache, disk = make_cache(seed=1), str(tmp_path / "blocks")
    killed.start(disk=disk)
    async with connected(path, cache) as engine:
        await check_serves(engine, cache)
        await engine.flush()
        label = client_of(engine).label
        killed.start(disk=disk)
        await moved(engine, label)
        assert await engine.wait_tier()
        await check_loads(engine, cache)
        await check_serves(engine, cache, salt=1)
        figures = engine.get_stats().tiering
        assert figures is not None
        assert figures.fetched_blocks == 12


@pytest.mark.slow
async def test_an_engine_follows_owners_that_are_killed_over_and_over(
    path: Path, killed: KilledOwners, nothing_more: None
) -> None:
    """At any moment, while it moves, too. What it holds of the system stays the same."""
    moments = random.Random(0)
    held: list[Held] = []
    killed.start(512 * KIB)
    async with KVortexEngine.create(config_of(str(path), DEADLINE_S)) as engine:
        work = Churn(engine, 0)

        async def churn(seconds: float) -> None:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                await work.step()

        for _ in range(RESTARTS):
            for _ in range(moments.randrange(1, 4)):
                kill = asyncio.get_running_loop().call_later(moments.uniform(0.0, 0.1), killed.kill)
                await churn(moments.uniform(0.0, 0.2))
                kill.cancel()
                killed.start(512 * KIB)
            await until(lambda: killed.serves(engine))
            loaded = work.num_loaded
            while work.num_loaded == loaded:
                await work.step()
            await until(lambda: Held.now().mapped == {client_of(engine).label})
            held.append(Held.now())
    assert {(now.num_descriptors, now.threads) for now in held} == {(held[0].num_descriptors, held[0].threads)}


# -- calls under way ---------------------------------------------------------------------------------


async def test_transfers_in_flight_end_in_the_old_memory(owners: Owners, nothing_more: None) -> None:
    cache, parts = make_cache(seed=1), Holding()
    owners.start()
    async with connected(owners.path, cache, parts) as engine:
        await check_serves(engine, cache)
        old = client_of(engine).label
        wipe(cache, range(20, 32))
        parts.is_held = True
        loading = asyncio.create_task(engine.load_blocks(chain(12), range(20, 32)))
        saving = asyncio.create_task(engine.save_blocks(chain(12, 1), range(40, 52)))
        await until(lambda: parts.num_held >= 2)
        owners.start()
        await until(lambda: data_of(engine).is_away)
        await asyncio.sleep(0.1)
        assert Held.now().mapped == {old}, "it waits for them"
        assert set((await engine.save_blocks(chain(4, 2), range(4))).outcomes) == {SaveOutcome.FAILED}
        assert set((await engine.load_blocks(chain(4), range(60, 64))).outcomes) == {MissReason.OWNER_LOST}
        with pytest.raises(InvalidBlockIdError):
            await engine.save_blocks(chain(4), range(20, 24))
        parts.release()
        assert (await loading).ok
        assert contents(cache, range(20, 32)) == contents(cache, range(12))
        assert set((await saving).outcomes) == {SaveOutcome.FAILED}
        await moved(engine, old)
        await until(lambda: Held.now().mapped == {client_of(engine).label})
        assert engine.match_prefix(chain(12, 1)) == 0
        await check_serves(engine, cache)
    owners.stop()


async def test_a_call_that_waits_for_its_turn_goes_on_in_the_new_pool_with_its_claims(owners: Owners) -> None:
    cache = make_cache(seed=1)
    owners.start()
    async with connected(owners.path, cache, transfer={"max_outstanding_requests": 1}) as engine:
        await check_serves(engine, cache)
        await engine._queue.acquire()
        try:
            saving = asyncio.create_task(engine.save_blocks(chain(12), range(12)))
            await asyncio.sleep(0)
            label = client_of(engine).label
            owners.start()
            await moved(engine, label)
            with pytest.raises(InvalidBlockIdError):
                async with asyncio.timeout(5):
                    await engine.load_blocks(chain(4), range(4))
        finally:
            engine._queue.release()
        assert (await saving).ok
        await check_loads(engine, cache)


async def test_a_save_in_two_pools_says_what_has_gone(owners: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first part was stored in the pool of an owner that is no more."""
    monkeypatch.setattr("kvortex.engine.calls.FIRST_PART_BLOCKS", 4)
    monkeypatch.setattr("kvortex.engine.calls.FIRST_PART_BYTES", 4 * BLOCK_NBYTES)
    owners.start()
    async with connected(owners.path) as engine:
        label, plan_save, plans = client_of(engine).label, RemoteControl.plan_save, []

        def plan(self: RemoteControl, *arguments: Any, **options: Any) -> Any:
            plans.append(plan_save(self, *arguments, **options))
            return plans[-1]

        monkeypatch.setattr(RemoteControl, "plan_save", plan)
        start = DataPlane.start

        async def start_slowly(self: DataPlane, *arguments: Any, **options: Any) -> Any:
            request = await start(self, *arguments, **options)
            if len(plans) == 1:
                await request.settled.wait()
                owners.start()
                await moved(engine, label)
            return request

        monkeypatch.setattr(DataPlane, "start", start_slowly)
        result = await engine.save_blocks(chain(12), range(12))
        assert result.outcomes == (SaveOutcome.GONE,) * 4 + (SaveOutcome.STORED,) * 8
        assert engine.check_blocks(chain(12)).tolist() == [False] * 4 + [True] * 8


async def test_the_loop_goes_on_while_a_new_owner_does_not_answer(
    path: Path, killed: KilledOwners, monkeypatch: pytest.MonkeyPatch, nothing_more: None
) -> None:
    """It hangs when it has been found, and is asked."""
    introduce, asked = RemoteControl.introduce, threading.Event()

    def stop_before(self: RemoteControl, client: OwnerClient) -> None:
        if not asked.is_set():
            asked.set()
            killed.send(signal.SIGSTOP)
        introduce(self, client)

    monkeypatch.setattr(RemoteControl, "introduce", stop_before)
    killed.start()
    async with connected(path) as engine:
        label = client_of(engine).label
        killed.start()
        longest_s, last_s = 0.0, time.monotonic()
        end_s = last_s + 4 * DEADLINE_S
        while last_s < end_s:
            await asyncio.sleep(0.005)
            assert engine.match_prefix(chain(12)) == 0
            last_s, longest_s = time.monotonic(), max(longest_s, time.monotonic() - last_s)
        assert asked.is_set()
        assert longest_s < DEADLINE_S / 2
        killed.send(signal.SIGCONT)
        await moved(engine, label)


# -- new owners that are of no use -------------------------------------------------------------------


def in_memory(config: KVortexConfig, namespace: bytes) -> MemoryTier:
    return MemoryTier(1 << 20, namespace=namespace)


def of_another_user(patch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    patch.setattr(server.os, "geteuid", lambda: uid + 1)


REFUSALS: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None], str]] = {
    "a smaller pool": (
        {"pool": {"bytes": 4 * KIB, "pin_piece_bytes": 4 * KIB}, "make_tier": in_memory},
        lambda patch: None,
        "a block takes 8192 bytes, the pool has 4096",
    ),
    "no tier": ({}, lambda patch: None, "its lower tier is none, not memory"),
    "another version": (
        {},
        lambda patch: patch.setattr(server, "VERSION", VERSION + 1),
        f"the owner speaks version {VERSION + 1} of the protocol, and this engine {VERSION}: restart the older one",
    ),
    "another user": ({}, of_another_user, "the pool belongs to user"),
}


@pytest.mark.parametrize("what", list(REFUSALS))
async def test_a_new_owner_that_refuses_is_said_once_and_the_next_may_serve(
    owners: Owners, what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, nothing_more: None
) -> None:
    changes, patch, message = REFUSALS[what]
    cache = make_cache(seed=1)
    owners.start(make_tier=in_memory)
    async with connected(owners.path, cache) as engine:
        await check_serves(engine, cache)
        label = client_of(engine).label
        with monkeypatch.context() as patched:
            patch(patched)
            owners.start(**changes)
            await until(lambda: message in caplog.text)
            await asyncio.sleep(0.3)
            held = Held.now()
            await asyncio.sleep(0.5)
            assert Held.now().num_descriptors <= held.num_descriptors + 2  # a connection may be under way
            assert client_of(engine).label == label
            assert engine.match_prefix(chain(12)) == 0
            assert set((await engine.save_blocks(chain(12), range(12))).outcomes) == {SaveOutcome.FAILED}
            said = [r for r in caplog.records if message in r.getMessage() and r.name.startswith("kvortex.owner")]
            assert [r.levelno for r in said if r.name != server.__name__] == [logging.WARNING]
            owners.stop()
        owners.start(make_tier=in_memory)
        await moved(engine, label)
        await check_serves(engine, cache)
    owners.stop()


async def test_an_owner_that_is_started_anew_while_it_is_joined_is_followed(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, nothing_more: None
) -> None:
    cache, scratch_of, entered = make_cache(seed=1), following.scratch_of, threading.Event()
    owners.start()

    def restart(client: OwnerClient, nbytes: int) -> int:
        if not entered.is_set():
            entered.set()
            owners.start()
        return scratch_of(client, nbytes)

    monkeypatch.setattr(following, "scratch_of", restart)
    async with connected(owners.path, cache) as engine:
        entered.clear()
        labels = [client_of(engine).label, owners.start().owner._memory.ticket.label]
        await until(entered.is_set)
        await moved(engine, labels[0])
        assert owners.owner is not None
        await until(lambda: client_of(engine).label == owners.owner.owner._memory.ticket.label)  # type: ignore[union-attr]
        assert client_of(engine).label not in labels
        await check_serves(engine, cache)
        assert Held.now().mapped == {client_of(engine).label}
    owners.stop()


async def test_blocks_that_do_not_arrive_keep_an_engine_away(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nothing_more: None
) -> None:
    cache = make_cache(seed=1)
    owners.start()
    async with connected(owners.path, cache) as engine:
        label = client_of(engine).label
        with monkeypatch.context() as patched:
            wrong = lambda payload: 7  # noqa: E731
            patched.setattr("kvortex.planes.self_test.digest_reference", wrong)
            owners.start()
            await until(lambda: "blocks do not arrive in the new pool as they were sent" in caplog.text)
            assert not Held.now().mapped - {label}
            assert set((await engine.save_blocks(chain(4), range(4))).outcomes) == {SaveOutcome.FAILED}
        await moved(engine, label)
        await check_serves(engine, cache)
        assert owners.owner is not None
        assert owners.owner.allocated_bytes == 12 * BLOCK_NBYTES, "the memory of the proof was given back"
    owners.stop()


class Pinning:
    """A device for which memory is pinned: which addresses are."""

    def __init__(self) -> None:
        self.pinned: set[int] = set()

    def numa_node(self) -> None:
        return None

    def make_current(self) -> None:
        pass

    enter_thread = make_current

    def register_host(self, address: int, nbytes: int) -> None:
        self.pinned.add(address)

    def unregister_host(self, address: int) -> None:
        self.pinned.remove(address)


async def test_the_new_memory_is_pinned_and_the_old_is_not_any_more(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, nothing_more: None
) -> None:
    device = Pinning()

    def make(nbytes: int, **how: Any) -> PinnedPool:
        return PinnedPool(nbytes, **{**how, "device": device})

    def pieces(engine: KVortexEngine) -> set[int]:
        pool = data_of(engine).pool
        return set(range(pool.address, pool.address + pool.capacity_bytes, pool.piece_bytes))

    monkeypatch.setattr(data_module, "PinnedPool", make)
    cache = make_cache(seed=1)
    owners.start()
    async with connected(owners.path, cache) as engine:
        await engine.wait_pinned()
        old, label = data_of(engine).pool, client_of(engine).label
        assert device.pinned == pieces(engine)
        owners.start({"bytes": 2 * MIB, "pin_piece_bytes": 128 * KIB})
        await moved(engine, label)
        await engine.wait_pinned()
        assert data_of(engine).pool is not old
        assert len(device.pinned) == 16
        assert device.pinned == pieces(engine)
        await check_serves(engine, cache)
    assert not device.pinned
    owners.stop()


async def test_a_new_pool_that_cannot_be_pinned_is_not_used(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check = DataPlane._check_arrival

    async def stop_pinning(self: DataPlane, scratch: Callable[[int], int]) -> None:
        self._pinning_stopped(self.pool, 4 * BLOCK_NBYTES)
        await check(self, scratch)

    monkeypatch.setattr(DataPlane, "_check_arrival", stop_pinning)
    owners.start()
    async with connected(owners.path) as engine:
        label, pool = client_of(engine).label, data_of(engine).pool
        owners.start()
        await until(lambda: client_of(engine).label != label)
        assert f"only {4 * BLOCK_NBYTES} of the pool's" in caplog.text
        told: list[int] = []
        data_of(engine)._on_pinning_stopped = told.append
        data_of(engine)._pinning_stopped(pool, 0)  # what is told of the old pool comes too late
        assert not told
        assert set((await engine.save_blocks(chain(4), range(4))).outcomes) == {SaveOutcome.FAILED}


# -- ends --------------------------------------------------------------------------------------------


async def hangs(*_: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("stage", ["the old pool", "the new owner", "the new memory"])
async def test_shutdown_while_it_moves_leaves_nothing(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, stage: str, nothing_more: None
) -> None:
    reached, introduce, close = threading.Event(), RemoteControl.introduce, PinnedPool.close

    def introduce_slowly(self: RemoteControl, client: OwnerClient) -> None:
        introduce(self, client)
        reached.set()
        time.sleep(0.3)

    def close_slowly(self: PinnedPool) -> None:
        reached.set()
        time.sleep(0.3)
        close(self)

    async def check_for_ever(self: DataPlane, scratch: Callable[[int], int]) -> None:
        reached.set()
        await hangs()

    owners.start()
    async with connected(owners.path) as engine:
        if stage == "the old pool":
            monkeypatch.setattr(PinnedPool, "close", close_slowly)
        elif stage == "the new owner":
            monkeypatch.setattr(RemoteControl, "introduce", introduce_slowly)
        else:
            monkeypatch.setattr(DataPlane, "_check_arrival", check_for_ever)
        second = owners.start()
        await until(reached.is_set)
        start_s = time.monotonic()
        await engine.shutdown()
        assert time.monotonic() - start_s < 2.0
        await until(lambda: second.owner.num_clients == 0)
        assert not Held.now().mapped
    owners.stop()


async def test_shutdown_while_the_new_owner_hangs_takes_no_longer_than_its_deadline(
    path: Path, killed: KilledOwners, monkeypatch: pytest.MonkeyPatch, nothing_more: None
) -> None:
    introduce, asked = RemoteControl.introduce, threading.Event()

    def stop_before(self: RemoteControl, client: OwnerClient) -> None:
        killed.send(signal.SIGSTOP)
        asked.set()
        introduce(self, client)

    monkeypatch.setattr(RemoteControl, "introduce", stop_before)
    killed.start()
    async with connected(path) as engine:
        killed.start()
        await until(asked.is_set)
        start_s = time.monotonic()
        await engine.shutdown()
        assert time.monotonic() - start_s < 2 * DEADLINE_S + 0.5


INTERRUPTED = """
import asyncio, sys
from kvortex import KVortexEngine
from kvortex.owner import following
from kvortex.planes.data import DataPlane
from tests.engine_support import BLOCK_SIZE, make_cache
from tests.owner.client_program import config_of

async def check_for_ever(self, scratch):
    print("moving", flush=True)
    await asyncio.Event().wait()

async def main(ends_in_order):
    engine = await KVortexEngine.create(config_of(sys.argv[1], 0.5))
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    DataPlane._check_arrival = check_for_ever
    print("ready", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        if ends_in_order:
            await engine.shutdown()

asyncio.run(main(sys.argv[2] == "in order"))
"""


@pytest.mark.parametrize("how", ["in order", "at once"])
async def test_ctrl_c_while_it_moves_ends_the_program(owners: Owners, how: str) -> None:
    owners.start()
    process = spawn(["-c", INTERRUPTED, str(owners.path), how])
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    second = owners.start()
    assert await asyncio.to_thread(process.stdout.readline) == "moving\n"
    process.send_signal(signal.SIGINT)
    try:
        _, errors = await asyncio.to_thread(process.communicate, timeout=10)
    finally:
        process.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors
    await until(lambda: second.owner.num_clients == 0)
