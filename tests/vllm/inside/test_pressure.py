"""Little room: preemption on the device, eviction from the cache. Each engine starts after the last has ended."""

from engine_support import BLOCK_SIZE, running
from inside_fixtures import CROWD, PROMPTS


def test_concurrent_requests_with_preemption(model: str, expected: dict[str, list[list[int]]]) -> None:
    with running(model, num_gpu_blocks_override=20) as engine:
        assert engine.generate(CROWD, max_tokens=40) == expected["crowd"]
        engine.settle()
        before = engine.loaded_blocks
        assert engine.generate(CROWD, max_tokens=40) == expected["crowd"]
        engine.settle()
        assert engine.loaded_blocks > before


def test_eviction_under_load(model: str, expected: dict[str, list[list[int]]]) -> None:
    block_nbytes = BLOCK_SIZE * 4096
    options = {"pool": {"bytes": 16 * block_nbytes, "pin_piece_bytes": 4 * block_nbytes}}
    with running(model, options=options) as engine:
        for _ in range(2):
            assert engine.generate(CROWD, max_tokens=40) == expected["crowd"]
        for name, tokens in PROMPTS.items():
            assert engine.generate([tokens]) == expected[name]
            assert engine.generate([tokens]) == expected[name]
        engine.settle()
        assert engine.control.index.evicted_blocks > 16
        assert engine.loaded_blocks > 0
