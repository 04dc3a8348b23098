"""Models whose KV says nothing of another prompt with the same beginning: they run as without a connector."""

import logging
from typing import Any

import pytest
import vllm
from engine_support import BLOCK_SIZE, Engine, make_model, prompt, running
from inside_fixtures import PROMPTS
from vllm.config import KVTransferConfig, PoolerConfig

from kvortex.vllm import connector as connector_module
from kvortex.vllm.passive import PassiveScheduler, PassiveWorker
from kvortex.vllm.scheduler.half import SchedulerHalf
from kvortex.vllm.worker.half import WorkerHalf

TOKENS = prompt(4 * BLOCK_SIZE + 5, 1)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = make_model(tmp_path_factory.mktemp("model"))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{str(number): number for number in range(3, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


def embeddings(embedder: str, pooling: str, connector: bool) -> tuple[list[list[float]], Any]:
    """Of the same prompt three times, and the connector's scheduler half."""
    name = "seq_pooling_type" if hasattr(PoolerConfig, "seq_pooling_type") else "pooling_type"
    transfer = KVTransferConfig(
        kv_connector="KVortexConnector",
        kv_connector_module_path="kvortex.vllm",
        kv_role="kv_both",
        kv_connector_extra_config={"pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}},
    )
    llm = vllm.LLM(
        model=embedder,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        enable_prefix_caching=False,
        runner="pooling",
        pooler_config=PoolerConfig(**{name: pooling}),
        **({"kv_transfer_config": transfer} if connector else {}),
    )
    engine = Engine(llm)
    try:
        answers = []
        for _ in range(3):
            (output,) = llm.embed([{"prompt_token_ids": TOKENS}], use_tqdm=False)
            answers.append(list(output.outputs.embedding))
            llm.embed([{"prompt_token_ids": prompt(3, seed=99)}], use_tqdm=False)  # brings the last outcomes in
        return answers, engine.scheduler_half if connector else None
    finally:
        engine.core.shutdown()


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_pooling_over_all_tokens(embedder: str, pooling: str, caplog: pytest.LogCaptureFixture) -> None:
    answers, _ = embeddings(embedder, pooling, connector=False)
    with caplog.at_level(logging.WARNING, "kvortex"):
        with_connector, half = embeddings(embedder, pooling, connector=True)
    assert with_connector == answers
    assert isinstance(half, PassiveScheduler)
    said = [record for record in caplog.records if record.getMessage().startswith("KVortex stores nothing")]
    assert len(said) == 1


def test_pooling_over_the_last_token_hits(embedder: str) -> None:
    answers, _ = embeddings(embedder, "LAST", connector=False)
    with_connector, half = embeddings(embedder, "LAST", connector=True)
    assert with_connector == [pytest.approx(answer, abs=1e-4) for answer in answers]
    assert half.stats.snapshot().hits == 2 * (len(TOKENS) // BLOCK_SIZE)


def test_attention_that_looks_ahead(
    model: str, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: the halves of a connector that stores nothing serve a whole engine."""
    monkeypatch.setattr(connector_module, "why_not_reused", lambda config, cache: "its tokens see those behind them")
    with running(model, stores=False) as engine:
        for _ in range(3):
            assert engine.generate([PROMPTS["long"]]) == expected["long"]
            engine.settle()
        assert isinstance(engine.scheduler_half, PassiveScheduler)
        assert isinstance(engine.worker_half, PassiveWorker)
        assert engine.llm.reset_prefix_cache()


def test_the_passive_halves_have_every_method_of_the_others() -> None:
    for passive, full in ((PassiveScheduler, SchedulerHalf), (PassiveWorker, WorkerHalf)):
        wanted = {name for name in vars(full) if not name.startswith("_") and callable(getattr(full, name))}
        assert wanted <= set(vars(passive))
