"""Outputs with hits equal outputs without, token for token, and the hits really happened."""

from collections.abc import Iterator

import pytest
from engine_support import BLOCK_SIZE, Engine, flip_a_bit, keys_of, prompt, running
from inside_fixtures import PROMPTS, SHARED, TAILS

from kvortex.errors import DeviceError
from kvortex.types import MissReason


@pytest.fixture(scope="module")
def engine(model: str, expected: object) -> Iterator[Engine]:
    with running(model) as engine:
        yield engine


@pytest.mark.parametrize("name", PROMPTS)
def test_a_repeated_prompt(engine: Engine, expected: dict[str, list[list[int]]], name: str) -> None:
    tokens = PROMPTS[name]
    assert engine.generate([tokens]) == expected[name]
    engine.settle()
    before = engine.loaded_blocks
    for _ in range(2):
        assert engine.generate([tokens]) == expected[name]
    engine.settle()
    assert engine.loaded_blocks - before == 2 * (len(tokens) // BLOCK_SIZE)


def test_a_shared_prefix(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    prompts = [SHARED + tail for tail in TAILS]
    assert engine.generate(prompts[:1]) == expected["shared"][:1]
    engine.settle()
    before = engine.loaded_blocks
    assert engine.generate(prompts[1:]) == expected["shared"][1:]
    engine.settle()
    assert engine.loaded_blocks - before == 3 * (len(SHARED) // BLOCK_SIZE)


def test_a_conversation(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    """The answer of the first turn, saved while it was decoded, is a prefix of the second turn's prompt."""
    assert engine.generate([SHARED], max_tokens=70) == expected["turn 1"]
    engine.settle()
    before = engine.loaded_blocks
    second = SHARED + expected["turn 1"][0] + TAILS[0]
    assert engine.generate([second], max_tokens=20) == expected["turn 2"]
    engine.settle()
    known = (len(SHARED) + 70 - 1) // BLOCK_SIZE
    assert engine.loaded_blocks - before >= known
    assert known > len(SHARED) // BLOCK_SIZE


def test_a_corrupt_block(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    tokens = PROMPTS["long"]
    engine.generate([tokens])
    engine.settle()
    for position in (0, 5, 10):
        request_keys = keys_of(engine, tokens)
        flip_a_bit(engine, request_keys[position])
        before = engine.misses(MissReason.CORRUPT)
        assert engine.generate([tokens]) == expected["long"]
        engine.settle()
        assert engine.misses(MissReason.CORRUPT) == before + 1
        # It was computed and saved again.
        loaded = engine.loaded_blocks
        assert engine.generate([tokens]) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks - loaded == len(tokens) // BLOCK_SIZE


@pytest.mark.parametrize("which", ["first", "later"])
def test_a_failed_load(engine: Engine, expected: dict[str, list[list[int]]], which: str) -> None:
    tokens = PROMPTS["whole blocks"]
    engine.generate([tokens])
    engine.settle()
    data = engine.worker_half._data
    assert data is not None
    executor = data._executor
    original = executor._kernels[0].scatter
    calls = []

    def failing(block_ids: object, offsets: object) -> object:
        calls.append(len(block_ids))
        raise DeviceError("injected")

    executor._kernels[0].scatter = failing
    before = engine.misses(MissReason.TRANSFER_FAILED)
    try:
        assert engine.generate([tokens]) == expected["whole blocks"]
    finally:
        executor._kernels[0].scatter = original
    engine.settle()
    assert calls
    assert engine.misses(MissReason.TRANSFER_FAILED) - before == len(tokens) // BLOCK_SIZE
    assert engine.generate([tokens]) == expected["whole blocks"]


def test_reset(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    tokens = PROMPTS["long"]
    engine.generate([tokens])
    engine.settle()
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    assert len(engine.control.index) == 0
    before = engine.loaded_blocks
    assert engine.generate([tokens]) == expected["long"]
    assert engine.loaded_blocks == before


def test_the_worker_half_always_has_figures(engine: Engine) -> None:
    """Schedulers of 0.15 and 0.23 ask for the scheduler half's figures only if a worker sent some, empty ones too."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    assert get_kv_transfer_group().get_kv_connector_stats().is_empty()


def test_prompt_logprobs_are_complete(engine: Engine) -> None:
    """A hit would leave prompt tokens without logits: such requests compute everything."""
    import vllm

    tokens = PROMPTS["long"]
    engine.generate([tokens])
    engine.settle()
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1, detokenize=False)
    (output,) = engine.llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
    assert sum(entry is not None for entry in output.prompt_logprobs) == len(tokens) - 1


def test_salts_keep_apart(engine: Engine) -> None:
    import vllm

    tokens = prompt(4 * BLOCK_SIZE, 77)
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    for salt, hits in (("a", 0), ("b", 0), ("a", 4)):
        before = engine.loaded_blocks
        engine.llm.generate([{"prompt_token_ids": tokens, "cache_salt": salt}], parameters, use_tqdm=False)
        engine.settle()
        assert engine.loaded_blocks - before == hits
