"""Caches in FP8: the bytes are uint8 to KVortex, and hits give the tokens that the same cache gave without."""

import pytest
import torch
from engine_support import BLOCK_SIZE, running
from inside_fixtures import PROMPTS, SHARED, TAILS

from kvortex.vllm.versions import IS_NEWER

pytestmark = [
    pytest.mark.skipif(not IS_NEWER, reason="the older version has no FP8 cache on CPUs"),
    pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache needs AVX-512 on CPUs"),
]
WHOLE = ["whole blocks", "ends inside a block", "one token over", "long"]


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_hits_in_an_fp8_cache(model: str, expected: dict[str, list[list[int]]], dtype: str) -> None:
    prompts = [PROMPTS[name] for name in WHOLE]
    shared = [SHARED + tail for tail in TAILS]
    with running(model, connector=False, kv_cache_dtype=dtype) as engine:
        answers = [engine.generate([tokens])[0] for tokens in prompts]
        on_shared = [engine.generate([tokens])[0] for tokens in shared]
    assert answers != [expected[name][0] for name in WHOLE], "the cache was not in FP8"
    with running(model, kv_cache_dtype=dtype) as engine:
        data = engine.worker_half._data
        assert data is not None
        assert {tensor.element_size() for tensor in data._tensors.values()} == {1}
        for _ in range(2):
            assert [engine.generate([tokens])[0] for tokens in prompts] == answers
            engine.settle()
        assert engine.loaded_blocks == sum(len(tokens) // BLOCK_SIZE for tokens in prompts)
        before = engine.loaded_blocks
        for tokens, answer in zip(shared, on_shared, strict=True):
            assert engine.generate([tokens]) == [answer]
            engine.settle()
        assert engine.loaded_blocks - before == 3 * (len(SHARED) // BLOCK_SIZE)
