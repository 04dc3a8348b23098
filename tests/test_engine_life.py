"""How engines begin and end: whole or not at all, on one loop, and also when everything around them ends first."""

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from kvortex import EngineParts, KVortexConfig, KVortexEngine, ModelIdentity
from kvortex.engine.sync import SyncEngine
from kvortex.errors import ConfigError, EngineStateError
from kvortex.hashing import Namespace
from kvortex.memory import PinnedPool
from kvortex.planes.control import ControlPlane
from kvortex.planes.data import DataPlane
from kvortex.testing import Fault
from kvortex.tiers import MemoryTier
from tests.engine_support import (
    BLOCK_NBYTES,
    BLOCK_SIZE,
    Parts,
    chain,
    contents,
    make_cache,
    running_engine,
    small_config,
)

# -- pools of few blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 1.5, 2, 3])
async def test_a_pool_of_few_blocks_works(blocks: float) -> None:
    config = small_config(pool=int(blocks * BLOCK_NBYTES), transfer={"self_test": True})
    cache = make_cache()
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        for salt in range(3):
            assert (await engine.save_blocks(chain(1, salt), [salt])).ok
            assert (await engine.load_blocks(chain(1, salt), [40])).ok
            assert contents(cache, [40]) == contents(cache, [salt])


@pytest.mark.parametrize("pool_bytes", [4096, BLOCK_NBYTES - 1])
async def test_a_pool_that_holds_no_block_is_refused(pool_bytes: int) -> None:
    async with KVortexEngine.create(KVortexConfig(pool=pool_bytes)) as engine:
        with pytest.raises(ConfigError, match=r"raise pool\.bytes"):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)


async def test_a_piece_that_holds_no_block_is_refused() -> None:
    async with KVortexEngine.create(KVortexConfig(pool={"pin_piece_bytes": 4096})) as engine:
        with pytest.raises(ConfigError, match=r"raise pool\.pin_piece_bytes"):
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)


# -- caches of any provenance ------------------------------------------------------------------------


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.randn(2, 64, BLOCK_SIZE, 2, 16)


CACHES: dict[str, Callable[[], torch.Tensor]] = {
    "made in inference mode": inference_tensor,
    "that requires gradients": lambda: torch.randn(2, 64, BLOCK_SIZE, 2, 16, requires_grad=True),
    "that is a parameter": lambda: torch.nn.Parameter(torch.randn(2, 64, BLOCK_SIZE, 2, 16)),
    "that is a view of one": lambda: torch.nn.Parameter(torch.randn(64, 2, BLOCK_SIZE, 2, 16)).transpose(0, 1),
    "that is a view of an inference tensor": lambda: inference_tensor().permute(0, 1, 3, 2, 4),
}


@pytest.mark.parametrize("codec", ["raw", "bf16"])
@pytest.mark.parametrize("kind", CACHES)
async def test_a_cache_is_served_whatever_autograd_thinks_of_it(kind: str, codec: str) -> None:
    cache = {f"layers.{i}": CACHES[kind]() for i in range(2)}
    with torch.no_grad():
        before = {name: tensor.detach().clone() for name, tensor in cache.items()}
    async with KVortexEngine.create(
        small_config(transfer={"self_test": True}, codec={"name": codec, "max_error": 0.9})
    ) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE, num_blocks=64, block_dim=1)
        for name, tensor in cache.items():
            assert torch.equal(tensor.detach(), before[name]), "the self-test left it as it was"
        assert (await engine.save_blocks(chain(4), range(4))).ok
        assert (await engine.load_blocks(chain(4), range(20, 24))).ok
        for name, tensor in cache.items():
            want = before[name][:, :4]
            assert torch.equal(tensor.detach()[:, 20:24], want if codec == "raw" else want.bfloat16().float())
            assert tensor.requires_grad == (before[name].requires_grad or tensor.requires_grad)


# -- a registration that fails -----------------------------------------------------------------------


class Refused(Exception):
    """What goes wrong in these tests."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs  # the error's traceback would keep them, and views of the pool among them
    raise Refused


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[PinnedPool]:
    """Every pool that is made."""
    made: list[PinnedPool] = []

    def make(*args: Any, **kwargs: Any) -> PinnedPool:
        made.append(PinnedPool(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("kvortex.planes.data.PinnedPool", make)
    return made


def refuse_the_backing_tier(patch: pytest.MonkeyPatch) -> None:
    def memory_tier(_: EngineParts, __: KVortexConfig, namespace: Namespace) -> MemoryTier:
        return MemoryTier(1 << 20, namespace=namespace.digest)

    patch.setattr(EngineParts, "make_tier", memory_tier)
    patch.setattr("kvortex.engine.core.BackingTier", refuse)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "control plane": lambda patch: patch.setattr(ControlPlane, "from_config", refuse),
    "namespace": lambda patch: patch.setattr(DataPlane, "namespace", refuse),
    "executor": lambda patch: patch.setattr(DataPlane, "_make_executor", refuse),
    "self-test": lambda patch: patch.setattr("kvortex.planes.data.run_self_test", refuse),
    "wrapped executor": lambda patch: patch.setattr(EngineParts, "wrap_executor", refuse),
    "tier": lambda patch: patch.setattr(EngineParts, "make_tier", refuse),
    "backing tier": refuse_the_backing_tier,
}


@pytest.mark.parametrize("what", FAILURES)
async def test_a_registration_that_fails_leaves_nothing_behind_and_can_be_tried_again(
    what: str, pools: list[PinnedPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    async with KVortexEngine.create(small_config(transfer={"self_test": True})) as engine:
        with monkeypatch.context() as patch:
            FAILURES[what](patch)
            for _ in range(3):
                with pytest.raises(Refused):
                    engine.register_kv_caches(cache, BLOCK_SIZE)
                assert pools[-1]._mapping.closed, "its memory is given back"
                with pytest.raises(EngineStateError, match="register_kv_caches first"):
                    engine.check_blocks(chain(1))
        assert len(pools) == 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvortex-host")]
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert (await engine.save_blocks(chain(4), range(4))).ok


async def test_memory_that_the_index_cannot_have_is_an_error_and_no_half_made_engine(
    pools: list[PinnedPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr("kvortex.index.cache_index.steps.new_table", refuse)
    async with KVortexEngine.create(small_config()) as engine:
        for _ in range(2):
            with pytest.raises(MemoryError):
                engine.register_kv_caches(make_cache(), BLOCK_SIZE)
            assert pools[-1]._mapping.closed


# -- a shutdown in which something fails ---------------------------------------------------------------


async def test_a_tier_that_cannot_be_closed_does_not_keep_the_pool(pools: list[PinnedPool]) -> None:
    class Stuck(MemoryTier):
        async def aclose(self) -> None:
            await super().aclose()
            raise Refused

    def make_tier(namespace: Namespace) -> Stuck:
        return Stuck(1 << 20, namespace=namespace.digest)

    engine = await KVortexEngine.create(small_config(), Parts(make_tier=make_tier))
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    await engine.save_blocks(chain(4), range(4))
    with pytest.raises(Refused):
        await engine.shutdown()
    assert pools[0].bytes.size == 0
    await engine.shutdown()


async def test_an_executor_that_cannot_be_closed_does_not_keep_the_pool(
    pools: list[PinnedPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await KVortexEngine.create(small_config())
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    assert engine._data is not None
    executor = engine._data._executor
    assert executor is not None
    close = executor.close

    def close_and_complain() -> None:
        close()
        raise Refused

    monkeypatch.setattr(executor, "close", close_and_complain)
    with pytest.raises(Refused):
        await engine.shutdown()
    assert pools[0].bytes.size == 0


@pytest.mark.parametrize("disk", [False, True])
async def test_figures_can_be_had_after_the_end(disk: bool, tmp_path: Path) -> None:
    engine = await KVortexEngine.create(
        small_config(**({"disk": str(tmp_path), "identity": ModelIdentity(model="m")} if disk else {}))
    )
    assert engine.get_stats().hits == 0
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    await engine.save_blocks(chain(8), range(8))
    await engine.load_blocks(chain(10), range(20, 30))
    await engine.flush()
    await engine.shutdown()
    stats = engine.get_stats()
    assert (stats.hits, stats.num_misses, stats.blocks_loaded) == (8, 2, 8)
    assert (stats.pools[0].allocated_bytes, stats.pools[0].pinned_bytes) == (0, 0)
    assert (stats.tiering is not None) == disk
    assert stats.to_prometheus()
    assert str(stats)


# -- one loop ----------------------------------------------------------------------------------------


async def make_engine(config: KVortexConfig) -> KVortexEngine:
    engine = await KVortexEngine.create(config)
    engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    return engine


CALLS: dict[str, Callable[[KVortexEngine], Any]] = {
    "save": lambda engine: engine.save_blocks(chain(2), range(2)),
    "load": lambda engine: engine.load_blocks(chain(2), range(2)),
    "prefetch": lambda engine: engine.prefetch(chain(2)),
    "flush": lambda engine: engine.flush(),
    "drain": lambda engine: engine.drain(),
    "wait_pinned": lambda engine: engine.wait_pinned(),
    "wait_tier": lambda engine: engine.wait_tier(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("disk", [False, True])
def test_a_second_loop_is_told_that_the_engine_lives_on_the_first(call: str, disk: bool, tmp_path: Path) -> None:
    config = small_config(**({"disk": str(tmp_path), "identity": ModelIdentity(model="m")} if disk else {}))
    engine = asyncio.run(make_engine(config))

    async def use() -> None:
        await CALLS[call](engine)

    with pytest.raises(EngineStateError, match="loop that the engine was made on is closed"):
        asyncio.run(asyncio.wait_for(use(), 30))
    assert engine.match_prefix(chain(2)) == 0, "what needs no loop still works"
    asyncio.run(asyncio.wait_for(engine.shutdown(), 30))
    assert engine.get_stats().pools[0].pinned_bytes == 0
    asyncio.run(engine.shutdown())


def test_a_cache_is_not_registered_on_another_loop_than_the_engines() -> None:
    async def create() -> KVortexEngine:
        return await KVortexEngine.create(small_config())

    async def register(engine: KVortexEngine) -> None:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)

    engine = asyncio.run(create())
    with pytest.raises(EngineStateError, match="is closed"):
        asyncio.run(register(engine))
    with pytest.raises(EngineStateError, match="is closed"):
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
    asyncio.run(engine.shutdown())


async def test_another_loop_beside_the_engines_is_sent_to_the_blocking_face() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):

        def elsewhere() -> None:
            with pytest.raises(EngineStateError, match=r"engine\.sync"):
                asyncio.run(engine.drain())
            with pytest.raises(EngineStateError, match=r"engine\.sync"):
                asyncio.run(engine.shutdown())
            assert engine.sync.save_blocks(chain(2), range(2), timeout_s=30).ok

        await asyncio.to_thread(elsewhere)
        assert (await engine.load_blocks(chain(2), range(8, 10))).ok


@pytest.mark.leaves_extents
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_closed_over_calls_under_way_does_not_keep_the_pool(pools: list[PinnedPool]) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> tuple[KVortexEngine, "asyncio.Task[Any]"]:
        engine = await make_engine(small_config())
        task = asyncio.ensure_future(engine.save_blocks(chain(64), range(64)))
        await asyncio.sleep(0)
        return engine, task

    engine, task = loop.run_until_complete(begin())
    loop.close()
    assert not task.done()
    asyncio.run(asyncio.wait_for(engine.shutdown(), 30))
    assert pools[0].bytes.size == 0
    del loop, engine, task  # the call is left hanging, as meant: nobody else's test shall find it
    gc.collect()


def test_a_blocking_face_whose_loop_is_closed_gives_the_pool_back(pools: list[PinnedPool]) -> None:
    engine = asyncio.run(make_engine(small_config()))
    with pytest.raises(EngineStateError, match="closed"):
        engine.sync.save_blocks(chain(2), range(2))
    engine.sync.shutdown()
    assert pools[0].bytes.size == 0
    engine.sync.shutdown()


def test_who_waits_on_a_loop_that_ends_does_not_wait_for_ever() -> None:
    waiting = threading.Event()
    outcome: list[BaseException] = []

    def wait_for_call(engine: KVortexEngine) -> None:
        try:
            waiting.set()
            engine.sync.save_blocks(chain(2), range(2))
        except EngineStateError as error:
            outcome.append(error)

    async def main() -> threading.Thread:
        async with running_engine(make_cache(), fault_of=lambda number, batch: Fault.HOLD) as (engine, executor):
            thread = threading.Thread(target=wait_for_call, args=(engine,))
            thread.start()
            async with asyncio.timeout(30):
                while executor.num_held < 1:
                    await asyncio.sleep(0.001)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            executor.release()
        return thread

    asyncio.run(main()).join(30)
    assert [type(error) for error in outcome] == [EngineStateError]


# -- many threads, and the interpreter's end -----------------------------------------------------------


@pytest.mark.parametrize("others", ["shut it down too", "are in calls"])
def test_threads_that_end_an_engine_at_the_same_time_all_come_back(others: str) -> None:
    for turn in range(60):
        engine = KVortexEngine.create_sync(small_config())
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        errors: list[BaseException] = []
        start = threading.Barrier(4)

        def end(engine: SyncEngine, errors: list[BaseException], start: threading.Barrier) -> None:
            start.wait(30)
            try:
                engine.shutdown()
            except BaseException as error:  # noqa: BLE001 - of any kind
                errors.append(error)

        def call(engine: SyncEngine, errors: list[BaseException], start: threading.Barrier, turn: int = turn) -> None:
            start.wait(30)
            try:
                for n in range(100):
                    engine.save_blocks(chain(2, turn), [2 * n % 64, 2 * n % 64 + 1])
                    engine.wait_tier()
                    engine.drain()
            except EngineStateError:
                pass
            except BaseException as error:  # noqa: BLE001 - of any kind
                errors.append(error)

        work = [end, end, *([end, end] if others == "shut it down too" else [call, call])]
        threads = [threading.Thread(target=part, args=(engine, errors, start)) for part in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not [thread for thread in threads if thread.is_alive()]
        assert not errors
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvortex")]
    assert not left


ENDS: dict[str, str] = {
    "in an exit handler": "atexit.register(engine.shutdown)",
    "when the module goes": "class Holder:\n    def __del__(self): engine.shutdown()\nholder = Holder()",
    "not at all": "pass",
    "with calls under way": (
        "def save():\n"
        "    try:\n"
        "        while True: engine.save_blocks(hashes, range(8))\n"
        "    except EngineStateError: pass\n"
        "threading.Thread(target=save, daemon=True).start()"
    ),
}


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("how", ENDS)
def test_an_interpreter_that_ends_takes_the_engine_along_quietly(how: str, disk: bool, tmp_path: Path) -> None:
    script = f"""
import atexit, threading, torch
from kvortex import KVortexConfig, KVortexEngine, ModelIdentity, hash_blocks
from kvortex.errors import EngineStateError
identity = ModelIdentity(model="m")
config = KVortexConfig(pool=1 << 22, disk={str(tmp_path) if disk else ""!r}, identity=identity)
engine = KVortexEngine.create_sync(config)
engine.register_kv_caches({{"layer": torch.randn(2, 64, 16, 2, 16)}}, 16)
hashes = hash_blocks(range(128))
engine.save_blocks(hashes, range(8))
{ENDS[how]}
"""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_an_engine_is_shut_down_on_a_loop_that_gets_no_threads_any_more() -> None:
    """As `asyncio.run` in an exit handler finds it."""
    script = """
import asyncio, atexit, torch
from kvortex import KVortexConfig, KVortexEngine, hash_blocks

async def main():
    async with KVortexEngine.create(KVortexConfig(pool=1 << 22)) as engine:
        engine.register_kv_caches({"layer": torch.randn(2, 64, 16, 2, 16)}, 16)
        assert (await engine.save_blocks(hash_blocks(range(128)), range(8))).ok

atexit.register(lambda: (asyncio.run(main()), print("done")))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n")
