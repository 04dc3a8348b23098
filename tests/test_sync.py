"""The blocking face."""

import asyncio
import threading

import pytest

from kvortex import KVortexEngine, MissReason, SyncEngine
from kvortex.errors import EngineStateError, LayoutError
from kvortex.testing import Fault
from tests.engine_support import BLOCK_SIZE, chain, contents, make_cache, running_engine, small_config


def test_an_engine_on_a_thread_of_its_own() -> None:
    cache = make_cache()
    with KVortexEngine.create_sync(small_config()) as engine:
        layout = engine.register_kv_caches(cache, BLOCK_SIZE)
        assert layout.num_blocks == 64
        assert engine.save_blocks(chain(4), range(4)).ok
        assert engine.check_blocks(chain(4)).all()
        assert engine.match_prefix(chain(6)) == 4
        assert engine.load_blocks(chain(4), range(8, 12), timeout_s=5).ok
        assert contents(cache, range(4)) == contents(cache, range(8, 12))
        engine.drain(timeout_s=5)
        engine.clear()
        assert engine.get_stats().pools[0].allocated_bytes == 0
    engine.shutdown()
    with pytest.raises(EngineStateError, match="shut down"):
        engine.save_blocks(chain(4), range(4))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kvortex")]


def test_it_has_all_that_an_engine_has() -> None:
    of_engine = {name for name in dir(KVortexEngine) if not name.startswith("_")}
    of_loops = {"create", "create_sync", "sync", "current_stream", "is_shut_down", "namespace"}
    assert of_engine - {name for name in dir(SyncEngine) if not name.startswith("_")} == of_loops


def test_misses_have_reasons() -> None:
    with KVortexEngine.create_sync(small_config()) as engine:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        engine.wait_pinned()
        hashes = chain(2)
        engine.save_blocks(hashes[:1], [0])
        assert [engine.miss_reason(block_hash) for block_hash in hashes] == [None, MissReason.NEVER_STORED]


def test_errors_come_through() -> None:
    with KVortexEngine.create_sync(small_config()) as engine, pytest.raises(LayoutError):
        engine.register_kv_caches({}, BLOCK_SIZE)


def test_many_threads_at_once() -> None:
    cache = make_cache()
    with KVortexEngine.create_sync(small_config()) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        failures: list[str] = []

        def client(number: int) -> None:
            for turn in range(10):
                hashes = chain(4, salt=number * 100 + turn)
                if not engine.save_blocks(hashes, range(number * 8, number * 8 + 4)).ok:
                    failures.append("save")
                if not engine.load_blocks(hashes, range(number * 8 + 4, number * 8 + 8)).ok:
                    failures.append("load")

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


async def test_the_face_of_an_engine_on_this_loop() -> None:
    cache = make_cache()
    async with running_engine(cache) as (engine, _):
        sync = engine.sync
        with pytest.raises(EngineStateError, match="await the engine's own method"):
            sync.save_blocks(chain(1), [0])
        assert (await asyncio.to_thread(sync.save_blocks, chain(1), [0])).ok


async def test_a_timeout_cancels_the_call() -> None:
    cache = make_cache()
    async with running_engine(cache, fault_of=lambda number, batch: Fault.HOLD) as (engine, executor):
        asyncio.get_running_loop().call_later(0.1, executor.release)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(engine.sync.save_blocks, chain(1), [0], timeout_s=0.02)
        assert executor.num_held == 0
