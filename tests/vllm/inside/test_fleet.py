"""Servers that share a Redis or a bucket: what one has computed another loads; one goes on with another's prompts."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import vllm
from engine_support import BLOCK_SIZE, Engine, prompt, running, settle_disk
from inside_fixtures import PROMPTS
from model_shapes import engine_options, make_shape

from kvortex.vllm.versions import IS_NEWER, REPORTS_FAILED_LOADS
from tests.tiers.redis_support import RedisServer
from tests.tiers.s3_support import Rclone, keys_in_environment

WHOLE = ["whole blocks", "ends inside a block", "one token over", "long"]
TOKENS = PROMPTS["long"]
NUM_BLOCKS = len(TOKENS) // BLOCK_SIZE
WANTED = {"do_remote_decode": True}
PATIENCE_S = 60.0

newer = pytest.mark.skipif(not IS_NEWER, reason="once is enough: the same for each version")


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def tier(redis: RedisServer) -> str:
    redis.ask("FLUSHALL")
    return redis.url()


def ask(engine: Engine, tokens: list[int], handover: dict[str, Any] | None, max_tokens: int = 8) -> Any:
    """What an engine answers to a prompt whose request says something to connectors."""
    extra = None if handover is None else {"kv_transfer_params": handover}
    options = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    (output,) = engine.llm.generate([{"prompt_token_ids": tokens}], options, use_tqdm=False)
    return output


def answer(output: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids)]


@contextlib.contextmanager
def held_back(redis: RedisServer, interval_s: float) -> Iterator[None]:
    """Nothing that the server has can be found at first; then it comes back, a value each so many seconds."""
    names = sorted(redis.ask("KEYS", "*"))
    values = [(name, redis.raw("DUMP", name)) for name in names]
    redis.ask("FLUSHALL")
    stops = threading.Event()

    def restore() -> None:
        for name, value in values:
            if stops.wait(interval_s):
                return
            redis.ask("RESTORE", name, 0, value)

    thread = threading.Thread(target=restore)
    thread.start()
    try:
        yield
    finally:
        stops.set()
        thread.join()


@pytest.fixture(params=["redis", "s3"])
def any_tier(request: pytest.FixtureRequest, tier: str) -> Iterator[str]:
    """A tier over either kind of server."""
    if request.param == "redis":
        yield tier
        return
    with keys_in_environment(), Rclone() as bucket:
        yield bucket.url()


def test_a_server_loads_what_another_has_computed(
    model: str, expected: dict[str, list[list[int]]], any_tier: str
) -> None:
    tier = any_tier
    for first in (True, False):
        with running(model, options={"tier": tier}) as engine:
            for name in WHOLE:
                assert engine.generate([PROMPTS[name]]) == expected[name]
            settle_disk(engine)
            blocks = sum(len(PROMPTS[name]) // BLOCK_SIZE for name in WHOLE)
            assert engine.loaded_blocks == (0 if first else blocks)


ROPE = {"rope_theta": 12345.0}
OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "position encoding": {"hf_overrides": {**ROPE, "rope_parameters": {"rope_type": "default", **ROPE}}},
    "name": {"options": {"identity": {"model": "another"}}},
    "revision": {"options": {"identity": {"weights_revision": "2"}}},
}


@newer
def test_what_another_model_computes_is_never_loaded(model: str, redis: RedisServer, tier: str) -> None:
    stored = 0
    for number, other in enumerate(({}, *OTHERS.values()), 1):
        settings = {**other, "options": {"tier": tier, **other.get("options", {})}}
        with running(model, **settings) as engine:
            engine.generate([TOKENS])
            settle_disk(engine)
            assert engine.loaded_blocks == 0
        stored = stored or redis.ask("DBSIZE")
        assert redis.ask("DBSIZE") == number * stored >= number * NUM_BLOCKS, other


@newer
def test_a_prompt_with_another_salt_is_another_prompt(
    model: str, expected: dict[str, list[list[int]]], tier: str
) -> None:
    options = vllm.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for salt, hits in (("mine", False), ("yours", False), ("mine", True)):
        with running(model, options={"tier": tier}) as engine:
            inputs = {"prompt_token_ids": TOKENS, "cache_salt": salt}
            (output,) = engine.llm.generate([inputs], options, use_tqdm=False)
            assert answer(output) == expected["long"]
            settle_disk(engine)
            assert engine.loaded_blocks == (NUM_BLOCKS if hits else 0)


@newer
def test_routers_are_told_in_which_tier_blocks_are(model: str, tier: str) -> None:
    told: list[Any] = []
    publishing = vllm.config.KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with running(model, options={"tier": tier}, kv_events_config=publishing) as engine:
        half, take = engine.scheduler_half, engine.scheduler_half.take_events
        half.take_events = lambda: told.extend(events := list(take())) or events  # type: ignore[method-assign]
        engine.generate([TOKENS])
        settle_disk(engine)
        engine.settle()
        half.reset_cache()
        engine.settle()
    for kind in ("BlockStored", "BlockRemoved"):
        of_kind = [event for event in told if type(event).__name__ == kind]
        assert {event.medium for event in of_kind} == {"CPU", "STORAGE"}
        for event in of_kind:
            where = ("redis", "REMOTE") if event.medium == "STORAGE" else (None, None)
            assert (getattr(event, "ownership", where[0]), getattr(event, "locality", where[1])) == where
            assert getattr(event, "group_idx", 0) == 0
    stored = [len(event.block_hashes) for event in told if type(event).__name__ == "BlockStored"]
    assert sum(stored) >= 2 * NUM_BLOCKS


# -- one computes prompts, another goes on with them ---------------------------------------------------


def promise_of(model: str, tier: str, tokens: list[int], settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Have a prompt computed by a server that saves only; what its answer says to the next server."""
    with running(model, options={"tier": tier}, transfer={"kv_role": "kv_producer"}, **(settings or {})) as engine:
        output = ask(engine, tokens, WANTED, max_tokens=1)
        settle_disk(engine)
    promise: dict[str, Any] = output.kv_transfer_params
    return promise


@contextlib.contextmanager
def decoding(model: str, tier: str, wait_s: float = PATIENCE_S, **settings: Any) -> Iterator[Engine]:
    """A server that loads only."""
    options = {"tier": tier, "handover_wait_s": wait_s}
    with running(model, options=options, transfer={"kv_role": "kv_consumer"}, **settings) as engine:
        yield engine


def test_blocks_that_were_promised_are_waited_for(
    model: str, expected: dict[str, list[list[int]]], redis: RedisServer, tier: str
) -> None:
    promise = promise_of(model, tier, TOKENS)
    assert promise == {"kvortex_tokens": NUM_BLOCKS * BLOCK_SIZE}
    with decoding(model, tier) as engine:
        with held_back(redis, 0.1):
            assert answer(ask(engine, TOKENS, promise)) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == NUM_BLOCKS
        stored = redis.ask("DBSIZE")
        engine.generate([prompt(5 * BLOCK_SIZE, 77)])
        settle_disk(engine)
        assert redis.ask("DBSIZE") == stored, "it saves nothing"


@newer
def test_promises_that_are_broken_cost_time_and_nothing_else(
    model: str, expected: dict[str, list[list[int]]], redis: RedisServer, tier: str
) -> None:
    promise = promise_of(model, tier, TOKENS)
    with decoding(model, tier, wait_s=0.3) as engine:
        redis.ask("FLUSHALL")
        assert answer(ask(engine, TOKENS, promise)) == expected["long"]
        for wrong in ({"kvortex_tokens": 10**9}, {"kvortex_tokens": -1}, {"kvortex_tokens": "all"}, {"other": 1}):
            assert answer(ask(engine, TOKENS, wrong)) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == 0


@newer
def test_part_of_what_was_promised_is_used(
    model: str, expected: dict[str, list[list[int]]], redis: RedisServer, tier: str
) -> None:
    first = TOKENS[: 4 * BLOCK_SIZE]
    promise_of(model, tier, first)
    with decoding(model, tier, wait_s=0.3) as engine:
        assert answer(ask(engine, TOKENS, {"kvortex_tokens": NUM_BLOCKS * BLOCK_SIZE})) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == 4


@newer
def test_nothing_is_promised_that_nobody_else_can_find(model: str, tier: str) -> None:
    for options in ({}, {"tier": {"urls": tier, "admission": "second_touch"}}):
        with running(model, options=options) as engine:
            assert ask(engine, TOKENS, WANTED).kv_transfer_params is None
    with running(model, options={"tier": tier}) as engine:
        assert ask(engine, TOKENS, None).kv_transfer_params is None
        assert ask(engine, TOKENS, {"do_remote_decode": False}).kv_transfer_params is None
        assert ask(engine, TOKENS[: BLOCK_SIZE - 1], WANTED, max_tokens=1).kv_transfer_params == {"kvortex_tokens": 0}


@pytest.mark.skipif(not REPORTS_FAILED_LOADS, reason="this version serves full attention alone here")
@pytest.mark.parametrize("shape", ["gemma3", "granite4"])
def test_a_model_that_mixes_kinds_of_kv_is_handed_over(
    tmp_path: Any, redis: RedisServer, tier: str, shape: str
) -> None:
    directory = make_shape(tmp_path / shape, shape)
    settings = engine_options(directory, shape)
    model, tokens = settings.pop("model"), prompt(300, 11)
    with running(model, connector=False, **settings) as engine:
        (right,) = engine.generate([tokens], 12)
    promise = promise_of(model, tier, tokens, settings)
    with decoding(model, tier, **settings) as engine:
        with held_back(redis, 0.05):
            output = ask(engine, tokens, promise, max_tokens=12)
        assert answer(output) == [right]
        assert output.num_cached_tokens == promise["kvortex_tokens"]
        assert promise["kvortex_tokens"] >= 300 - 2 * 64
