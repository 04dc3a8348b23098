"""Multi-head latent attention on a CPU: left alone there, as vLLM computes differently behind cached KV than without;
what KVortex brings back is as good as what vLLM's own prefix cache, forced on, had kept.
"""

from collections.abc import Iterator

import pytest
from engine_support import prompt, running
from tiny_model import force_prefix_caching, lacks_float32_latent, make_tiny_model

from kvortex.vllm.passive import PassiveScheduler
from kvortex.vllm.versions import IS_NEWER

BLOCK_SIZE = 16  # vLLM's CPU kernel takes no other
BLOCKS = 10
PREFIXES = [prompt(BLOCKS * BLOCK_SIZE, 50 + i) for i in range(6)]
PROMPTS = [prefix + prompt(left, left) for prefix, left in zip(PREFIXES, (1, 2, 5, 17, 33, 49), strict=True)]

pytestmark = [
    pytest.mark.skipif(not IS_NEWER, reason="the older version has no latent attention on CPUs"),
    pytest.mark.skipif(lacks_float32_latent(), reason="vLLM's latent attention takes no float32 on this processor"),
]


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), "deepseek_v2"))


@pytest.fixture
def prefix_caching() -> Iterator[None]:
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]
    force_prefix_caching()
    yield
    CpuPlatform.check_and_update_config = original


def answers_behind_vllms_own_prefix(model: str) -> list[list[list[int]]]:
    with running(model, connector=False, block_size=BLOCK_SIZE) as engine:
        for prefix in PREFIXES:
            engine.generate([prefix], max_tokens=1)
        return [engine.generate([tokens]) for tokens in PROMPTS]


@pytest.mark.usefixtures("prefix_caching")
def test_hits_are_what_vllms_own_cache_had_kept(latent_model: str) -> None:
    answers = answers_behind_vllms_own_prefix(latent_model)
    assert len({tuple(answer) for (answer,) in answers}) == len(answers)
    with running(latent_model, block_size=BLOCK_SIZE) as engine:
        for prefix in PREFIXES:
            engine.generate([prefix], max_tokens=1)
        engine.settle()
        for tokens, answer in zip(PROMPTS, answers, strict=True):
            engine.llm.reset_prefix_cache()
            assert engine.generate([tokens]) == answer
        engine.settle()
        assert engine.loaded_blocks == BLOCKS * len(PROMPTS)


def test_nothing_is_stored_where_vllm_reuses_nothing(latent_model: str) -> None:
    tokens = PROMPTS[0]
    with running(latent_model, connector=False, block_size=BLOCK_SIZE) as engine:
        answer = engine.generate([tokens])
    with running(latent_model, block_size=BLOCK_SIZE, stores=False) as engine:
        for _ in range(2):
            assert engine.generate([tokens]) == answer
        assert isinstance(engine.scheduler_half, PassiveScheduler)
