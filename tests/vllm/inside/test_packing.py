"""Packed blocks: hits out of a quarter of the memory, and the exact bytes where packing would lose too much."""

import pytest
from engine_support import BLOCK_SIZE, LIKELY, Engine, count_stats, running
from inside_fixtures import PROMPTS

WHOLE = ["whole blocks", "ends inside a block", "one token over", "long"]


def num_blocks(name: str) -> int:
    return len(PROMPTS[name]) // BLOCK_SIZE


def stored_nbytes(engine: Engine) -> float:
    index = engine.control.index
    return index.committed_bytes / len(index)


@pytest.mark.parametrize(("codec", "share"), [("fp8", 0.26), ("bf16", 0.5)])
def test_hits_out_of_packed_blocks(model: str, expected: dict[str, list[list[int]]], codec: str, share: float) -> None:
    with running(model, options={"codec": codec}) as engine:
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]  # computed: packing is not in the way
        engine.settle()
        # Packing loses a little: what is likely stays, though an answer may go another way.
        others = [[7, *PROMPTS[name][1:]] for name in WHOLE]
        computed = [engine.likely_first(tokens) for tokens in others]
        engine.settle()
        before = engine.loaded_blocks
        loaded = [engine.likely_first(tokens) for tokens in others]
        engine.settle()
        assert engine.loaded_blocks - before == sum(num_blocks(name) for name in WHOLE)
        assert all(len(likely & again) > LIKELY / 2 for likely, again in zip(computed, loaded, strict=True))
        assert all(len(computed[0] & likely) < LIKELY / 2 for likely in computed[1:])  # other blocks would tell
        assert stored_nbytes(engine) <= share * BLOCK_SIZE * 4096
        before = engine.loaded_blocks
        answers = [engine.generate([PROMPTS[name]])[0] for name in WHOLE]
        engine.settle()
        assert engine.loaded_blocks - before == sum(num_blocks(name) for name in WHOLE)
        assert [len(answer) for answer in answers] == [8] * len(WHOLE)


def end_saves_within_their_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a request may have ended before it is told what became of its blocks."""
    half = engine.worker_half
    start_saves = half.start_saves

    def save_and_wait() -> None:
        start_saves()
        half._settle(half._thread)

    monkeypatch.setattr(half, "start_saves", save_and_wait)


def test_what_packing_would_hurt_is_saved_again_as_it_is(
    model: str, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model, options={"codec": {"name": "fp8", "max_error": 1e-9}}) as engine:
        end_saves_within_their_step(engine, monkeypatch)
        counted = count_stats(engine)
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
            engine.settle()
        assert stored_nbytes(engine) == BLOCK_SIZE * 4096
        assert counted()["kept_as_is_blocks"] == len(engine.control.index)
        assert counted()["failed_saves"] == 0
        before = engine.loaded_blocks
        for name in WHOLE:
            assert engine.generate([PROMPTS[name]]) == expected[name]
        engine.settle()
        assert engine.loaded_blocks - before == sum(num_blocks(name) for name in WHOLE)
