"""Engines over an owner with a disk: what outlives it, who finds it again, and the owners of one engine."""

import asyncio
import contextlib
import gc
import os
import select
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, ModelIdentity
from kvortex.config import KIB, MIB
from kvortex.errors import ConfigError
from kvortex.owner import OwnerClient
from kvortex.owner.child import OwnerProcess
from kvortex.owner.tiering import RemoteCalls
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.tiers import MemoryTier
from kvortex.types import Direction
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, chain, contents, make_cache, small_config, wipe
from tests.owner.owner_support import (
    LocalOwner,
    local_owner,
    read_line,
    spawn,
)

BLOCK = 4096
TIER_BYTES = 64 << 20
MODEL = ModelIdentity(model="a", weights_revision="1")


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    due_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < due_s, "it did not come true"
        await asyncio.sleep(0.001)


def stored_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.kv1"))


# -- engines -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def engine_of(
    cache: dict[str, torch.Tensor], owner: Path | None, model: ModelIdentity = MODEL, **changes: Any
) -> AsyncIterator[KVortexEngine]:
    where = {} if owner is None else {"owner": {"socket": owner, "deadline_s": 60.0}}
    async with KVortexEngine.create(small_config(identity=model, **where, **changes)) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert await engine.wait_tier()
        yield engine


async def save(engine: KVortexEngine, num_blocks: int = 12, salt: int = 0) -> list[bytes]:
    hashes = chain(num_blocks, salt)
    assert (await engine.save_blocks(hashes, range(num_blocks))).ok
    return hashes


async def check_loads(engine: KVortexEngine, cache: dict[str, torch.Tensor], hashes: list[bytes]) -> None:
    """It finds all of a chain that was saved from the first blocks of the cache."""
    there = range(20, 20 + len(hashes))
    wipe(cache, there)
    assert (await engine.load_blocks(hashes, there)).ok
    assert contents(cache, there) == contents(cache, range(len(hashes)))


async def test_owners_and_engines_without_one_find_each_others_blocks_on_disk(tmp_path: Path) -> None:
    path, disk, cache, theirs = tmp_path / "kv.sock", tmp_path / "blocks", make_cache(), make_cache(seed=1)
    with local_owner(path, disk=str(disk)):
        async with engine_of(cache, path) as first, engine_of(theirs, path) as second:
            await save(first)
            await save(second, 8, salt=1)
            await first.flush()
            assert len(stored_files(disk)) == 20
    with local_owner(path, {"bytes": 1 * MIB, "pin_piece_bytes": 64 * KIB}, disk=str(disk)):
        async with engine_of(cache, path) as first, engine_of(theirs, path) as second:
            assert second.match_prefix(chain(8, 1)) == 8
            await check_loads(first, cache, chain(12))
            await check_loads(second, theirs, chain(8, 1))
    async with engine_of(cache, None, disk=str(disk)) as alone:
        await check_loads(alone, cache, chain(12))
        await save(alone, salt=2)
        await alone.flush()
    with local_owner(path, disk=str(disk)):
        async with engine_of(cache, path) as engine:
            await check_loads(engine, cache, chain(12, 2))
            figures = engine.get_stats().tiering
            assert (figures.fetched_blocks, figures.written_blocks) == (12, 0)


async def test_victims_of_two_models_go_to_their_own_tiers_and_come_back(tmp_path: Path) -> None:
    tiers: dict[bytes, MemoryTier] = {}

    def make_tier(config: KVortexConfig, namespace: bytes) -> MemoryTier:
        return tiers.setdefault(namespace, MemoryTier(TIER_BYTES, namespace=namespace))

    def chains(n: int) -> list[list[bytes]]:  # the same hashes, but the last ones of each model are its own
        return [chain(4, salt + 100 * n * (salt >= 20)) for salt in range(30)]

    pool = {"bytes": 160 * BLOCK_NBYTES, "pin_piece_bytes": 16 * BLOCK_NBYTES}
    settings = {"eviction": {"watermark": 0.5, "ratio": 0.2}, "tier": {"inclusion": "exclusive"}}
    caches = [make_cache(seed=1), make_cache(seed=2)]
    other = ModelIdentity(model="b", weights_revision="1")
    with local_owner(tmp_path / "kv.sock", pool, make_tier, **settings) as owner:
        async with engine_of(caches[0], owner.path) as first, engine_of(caches[1], owner.path, other) as second:
            engines = [first, second]
            for of_each in zip(chains(0), chains(1), strict=True):
                for engine, hashes in zip(engines, of_each, strict=True):
                    assert (await engine.save_blocks(hashes, range(4))).ok
                    await engine.flush()
            figures = [engine.get_stats().tiering for engine in engines]
            assert all(f.written_blocks == f.demoted_blocks > 0 == f.shed_blocks for f in figures)
            for n, engine in enumerate(engines):
                assert not any(engine.check_blocks(hashes).any() for hashes in chains(1 - n)[20:])
                for hashes in chains(n):
                    await check_loads(engine, caches[n], hashes)
                    await engine.flush()
            assert all(engine.get_stats().tiering.fetched_blocks > 0 for engine in engines)
            for n, tier in enumerate(tiers.values()):
                assert set() < tier._kept.keys() <= {h for hashes in chains(n) for h in hashes}


class HangingOwner(LocalOwner):
    """An owner over a tier that hangs, in this direction."""

    def __init__(self, path: Path, direction: Direction) -> None:
        self.tier: FaultInjectingTier | None = None
        self.hung = direction
        super().__init__(path, make_tier=self.make_tier, tier={"timeout_s": 600.0})

    def make_tier(self, config: KVortexConfig, namespace: bytes) -> FaultInjectingTier:
        hangs = lambda direction, *_: TierFault.HANG if direction is self.hung else None  # noqa: E731
        self.tier = FaultInjectingTier(MemoryTier(TIER_BYTES, namespace=namespace), hangs)
        return self.tier

    @property
    def num_held(self) -> int:
        return self.tier.num_held if self.tier is not None else 0


async def test_a_load_that_waits_for_the_tier_ends_when_its_owner_ends(tmp_path: Path) -> None:
    owner = HangingOwner(tmp_path / "kv.sock", Direction.LOAD)
    with contextlib.ExitStack() as stack:
        stack.callback(owner.stop)
        async with engine_of(make_cache(), owner.path, tier={"load_deadline_s": None}) as engine:
            hashes = await save(engine)
            await engine.flush()
            owner.clear()
            load = asyncio.create_task(engine.load_blocks(hashes, range(12)))
            await until(lambda: owner.num_held == 12)
            await asyncio.to_thread(stack.close)
            result = await asyncio.wait_for(load, 30)
            assert result.miss_counts() == {MissReason.OWNER_LOST: 12}
            assert not await engine.wait_tier()
            await asyncio.wait_for(engine.flush(), 30)


@pytest.mark.parametrize("call", ["flush", "invalidate"])
async def test_calls_that_wait_for_the_tier_end_when_their_engine_ends(tmp_path: Path, call: str) -> None:
    """As they do without an owner."""
    owner = HangingOwner(tmp_path / "kv.sock", Direction.SAVE)
    with contextlib.ExitStack() as stack:
        stack.callback(owner.stop)
        async with engine_of(make_cache(), owner.path) as engine:
            hashes = await save(engine)
            await until(lambda: owner.num_held == 12)
            waiting = asyncio.ensure_future(engine.flush() if call == "flush" else engine.invalidate(hashes))
            await asyncio.sleep(0)
        try:
            assert not await asyncio.wait_for(waiting, 3)
        finally:
            await asyncio.to_thread(stack.close)


async def test_calls_that_wait_for_the_tier_end_although_asking_how_far_they_are_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unexpected: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unexpected.append(context))

    def fail(self: RemoteCalls) -> None:
        raise RuntimeError("unexpected")

    with local_owner(tmp_path / "kv.sock", disk=str(tmp_path / "blocks")) as owner:
        async with engine_of(make_cache(), owner.path) as engine:
            await save(engine)
            with monkeypatch.context() as broken:
                broken.setattr(RemoteCalls, "ask", fail)
                async with asyncio.timeout(30):
                    await engine.flush()
            await save(engine, salt=1)
            await engine.flush()
            assert len(stored_files(tmp_path / "blocks")) == 24
            gc.collect()
    assert ["unexpected" in str(context["exception"]) for context in unexpected] == [True]


async def test_what_one_engine_forgets_is_gone_from_the_disk_for_all(tmp_path: Path) -> None:
    path, disk = tmp_path / "kv.sock", tmp_path / "blocks"
    with local_owner(path, disk=str(disk)) as owner:
        async with engine_of(make_cache(), path) as first, engine_of(make_cache(), path) as second:
            hashes = await save(first)
            await first.flush()
            assert len(stored_files(disk)) == 12
            assert await second.invalidate(hashes[8:])
            owner.clear()
            assert len(stored_files(disk)) == 8
            assert first.match_prefix(hashes) == 8
            assert (await first.load_blocks(hashes, range(12))).num_loaded == 8
            assert await second.clear(tiers=True)
            assert stored_files(disk) == []
            assert first.match_prefix(hashes) == 0
            assert (await first.load_blocks(hashes, range(12))).num_loaded == 0
            await save(first)
            await first.flush()
            assert second.match_prefix(hashes) == len(stored_files(disk)) == 12


# -- owners of one engine ----------------------------------------------------------------------------


def files_at(path: Path) -> list[Path]:
    return [file for file in (path, path.with_name(path.name + ".lock")) if file.exists()]


async def test_the_owner_of_one_engine_writes_what_waits_before_it_ends(tmp_path: Path) -> None:
    path, disk, cache = tmp_path / "kv.sock", tmp_path / "blocks", make_cache()
    config = KVortexConfig(pool={"bytes": 4 * MIB, "pin_piece_bytes": 256 * KIB}, disk=str(disk))
    child = OwnerProcess(config, path)
    try:
        client = OwnerClient(path, 60.0)
        assert (client.pool_bytes, client.piece_bytes) == (4 * MIB, 256 * KIB)
        assert client.owner_pid == child._process.pid
        client.close()
        async with engine_of(cache, path) as engine:
            hashes = await save(engine, 60)
            assert engine.match_prefix(hashes) == 60, "the owner knows that they are saved"
    finally:
        for _ in range(2):
            child.close()
    assert child._process.returncode == 0
    assert files_at(path) == []
    assert len(stored_files(disk)) == 60


def test_the_owner_of_one_engine_is_started_again_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvortex.owner.child.FIRST_RESTART_S", 0.05)
    path = tmp_path / "kv.sock"
    child = OwnerProcess(KVortexConfig(pool={"bytes": 1 * MIB, "pin_piece_bytes": 1 * MIB}), path)
    try:
        for _ in range(2):
            pid = child.pid
            os.kill(pid, signal.SIGKILL)
            due_s = time.monotonic() + 60
            while child.pid == pid:
                assert time.monotonic() < due_s, "no other one was started"
                time.sleep(0.01)
            client = OwnerClient(path, 60.0)
            assert client.owner_pid == child.pid
            client.close()
        os.kill(child.pid, signal.SIGKILL)  # it may be starting another one while it is closed
    finally:
        child.close()
    assert not child._watcher.is_alive()
    assert child._process.returncode is not None


PARENT = """
import sys
from pathlib import Path
from kvortex import KVortexConfig
from kvortex.owner.child import OwnerProcess
config = KVortexConfig(pool={"bytes": 1 << 20, "pin_piece_bytes": 1 << 20})
print(OwnerProcess(config, Path(sys.argv[1]))._process.pid, flush=True)
sys.stdin.readline()
"""


def test_the_owner_of_one_engine_ends_when_the_engine_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "kv.sock"
    parent = spawn(["-c", PARENT, str(path)])
    descriptor = os.pidfd_open(int(read_line(parent)))
    try:
        assert len(files_at(path)) == 2
        parent.kill()
        ended, _, _ = select.select([descriptor], [], [], 60)
        assert ended
        assert files_at(path) == []
    finally:
        os.close(descriptor)
        parent.kill()
        parent.communicate(timeout=60)


@pytest.mark.parametrize("what", ["a tier", "a socket"])
def test_an_owner_of_one_engine_that_cannot_start_leaves_no_process(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / ("kv.sock" if what == "a tier" else "file/kv.sock")
    config = KVortexConfig(pool={"bytes": 1 * MIB}, **({"tier": ["nosuch://here"]} if what == "a tier" else {}))
    with pytest.raises(ConfigError, match="has not started: its message stands above"):
        OwnerProcess(config, path)
    assert [process.poll() is None for process in started] == [False]
    assert ("nosuch" if what == "a tier" else str(path)) in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


async def test_serve_keeps_blocks_on_a_disk_for_the_next_one(tmp_path: Path) -> None:
    path, disk, cache = tmp_path / "kv.sock", tmp_path / "blocks", make_cache()
    for is_first in (True, False):
        options = ["--pool", "4MiB", "--disk", str(disk), "--socket", str(path), "--json"]
        owner = spawn(["-m", "kvortex", "serve", *options])
        try:
            read_line(owner)
            async with engine_of(cache, path) as engine:
                if is_first:
                    assert engine.match_prefix(await save(engine)) == 12
                else:
                    await check_loads(engine, cache, chain(12))
                    assert engine.get_stats().tiering.fetched_blocks == 12
        finally:
            owner.send_signal(signal.SIGTERM)
            _, errors = owner.communicate(timeout=60)
        assert owner.returncode == 0, errors
        assert len(stored_files(disk)) == 12
        assert files_at(path) == []
