"""Sleep mode: nothing touches the paged cache while its memory is gone, and what other weights computed is a miss."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from engine_support import BLOCK_SIZE, Engine, running
from inside_fixtures import PROMPTS

from kvortex.errors import ConfigError
from kvortex.types import MissReason
from kvortex.vllm import versions

TOKENS = PROMPTS["whole blocks"]
BLOCKS = len(TOKENS) // BLOCK_SIZE


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    with running(model) as engine:
        yield engine


def loads_of(engine: Engine) -> int:
    """Blocks that a hit loads now."""
    before = engine.loaded_blocks
    engine.generate([TOKENS])
    engine.settle()
    return engine.loaded_blocks - before


def test_a_save_under_way_ends_before_the_memory_goes(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    data = engine.worker_half._data
    assert data is not None
    kernels = data._executor._kernels[0]
    gather, begun, gate = kernels.gather, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert gate.wait(30)
        return gather(*arguments)

    kernels.gather = slow
    try:
        assert engine.generate([TOKENS]) == expected["whole blocks"]
        assert begun.wait(30)
        sleeping = threading.Thread(target=engine.worker_half.fall_asleep, args=(True,))
        sleeping.start()
        sleeping.join(0.3)
        assert sleeping.is_alive()
        gate.set()
        sleeping.join(30)
        assert not sleeping.is_alive()
        assert engine.worker_half._jobs.num_transfers == 0
    finally:
        gate.set()
        kernels.gather = gather
    engine.worker_half.wake()
    engine.settle()
    assert loads_of(engine) == BLOCKS


def test_asleep_every_job_fails_and_nothing_moves(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    engine.generate([TOKENS])
    engine.settle()
    data = engine.worker_half._data
    assert data is not None
    kernels = data._executor._kernels[0]
    originals = kernels.gather, kernels.scatter
    touched: list[str] = []
    kernels.gather = lambda *_: touched.append("gather")
    kernels.scatter = lambda *_: touched.append("scatter")
    failed = engine.misses(MissReason.TRANSFER_FAILED)
    engine.worker_half.fall_asleep(True)
    try:
        # vLLM runs nothing while it sleeps; here it is awake, and asks for both a load and saves.
        assert engine.generate([TOKENS, PROMPTS["long"]]) == [*expected["whole blocks"], *expected["long"]]
        engine.settle()
    finally:
        kernels.gather, kernels.scatter = originals
        engine.worker_half.wake()
    assert touched == []
    assert engine.misses(MissReason.TRANSFER_FAILED) - failed == BLOCKS
    engine.generate([TOKENS])
    engine.settle()
    assert loads_of(engine) == BLOCKS


def test_what_other_weights_computed_is_not_loaded(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    engine.generate([TOKENS])
    engine.settle()
    assert loads_of(engine) == BLOCKS
    engine.worker_half.fall_asleep(False)
    engine.worker_half.wake()
    corrupt = engine.misses(MissReason.CORRUPT)
    assert engine.generate([TOKENS]) == expected["whole blocks"]
    engine.settle()
    assert engine.misses(MissReason.CORRUPT) - corrupt == BLOCKS
    engine.generate([TOKENS])
    engine.settle()
    assert loads_of(engine) == BLOCKS


class Allocator:
    """Stands for vLLM's, which needs a GPU."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def sleep(self, offload_tags: Any = None) -> None:
        self.log.append(("unmap", offload_tags))

    def wake_up(self, tags: Any = None) -> None:
        self.log.append(("map", tags))

    def discard(self, tags: Any) -> None:
        self.log.append(("discard", tags))


@pytest.mark.skipif(versions.HAS_SLEEP_HOOKS, reason="this version tells the connector by itself")
def test_the_allocator_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    log: list[Any] = []
    allocator = Allocator(log)
    monkeypatch.setattr(CuMemAllocator, "get_instance", lambda: allocator)
    for method in ("sleep", "wake_up"):
        assert callable(getattr(CuMemAllocator, method))
    sleep_mode = SimpleNamespace(enable_sleep_mode=True)
    end = versions.watch_sleep(sleep_mode, lambda kept: log.append(("asleep", kept)), lambda: log.append("awake"))
    allocator.sleep(offload_tags=("weights",))
    allocator.wake_up(["weights"])
    allocator.wake_up(["kv_cache"])
    assert log == [("asleep", True), ("unmap", ("weights",)), ("map", ["weights"]), ("map", ["kv_cache"]), "awake"]
    log.clear()
    allocator.sleep(offload_tags=())
    allocator.wake_up()
    assert log == [("asleep", False), ("unmap", ()), ("map", None), "awake"]
    log.clear()
    allocator.discard(("weights",))
    allocator.discard(("kv_cache",))
    assert log == [("discard", ("weights",)), ("asleep", True), ("discard", ("kv_cache",))]
    log.clear()
    end()
    end()
    allocator.sleep()
    assert log == [("unmap", None)]


@pytest.mark.skipif(versions.HAS_SLEEP_HOOKS, reason="this version tells the connector by itself")
def test_another_mechanism_is_refused_and_none_is_no_matter() -> None:
    other = SimpleNamespace(enable_sleep_mode=True, sleep_mode_backend="criu")
    with pytest.raises(ConfigError, match="criu"):
        versions.watch_sleep(other, lambda kept: None, lambda: None)
    versions.watch_sleep(SimpleNamespace(enable_sleep_mode=False), lambda kept: None, lambda: None)()


def test_the_hooks_of_newer_versions(engine: Engine) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    connector.unregister_kv_caches()
    assert engine.worker_half._asleep
    connector.restore_kv_caches()
    assert not engine.worker_half._asleep
