"""Models that mix kinds of KV: tokens as without a connector, and hits as long as vLLM's own prefix cache gives.

`SHAPES` has what people serve, tiny: sliding windows, chunks, states, drafts, and one kind alone. vLLM's hybrid manager
is on.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from engine_support import Engine, prompt, running, settle_disk
from model_shapes import SHAPES, engine_options, make_shape

from kvortex.index import pack_keys
from kvortex.vllm.versions import REPORTS_FAILED_LOADS

pytestmark = pytest.mark.skipif(not REPORTS_FAILED_LOADS, reason="this version serves full attention alone here")

IN_THE_NEWEST = ("gemma3", "gpt_oss", "llama4", "exaone_mtp", "qwen3_next", "granite4_tails")
"""One of each kind. The other shapes run in the version from which `model_shapes` has its stand-ins."""
HERE = [shape for shape in SHAPES if (shape in IN_THE_NEWEST) != vllm.__version__.startswith("0.32")]
MOST = os.environ["KVORTEX_SHAPES"].split(",") if os.environ.get("KVORTEX_SHAPES") else HERE
OLD, LONG, SHORT, LATER = prompt(321, 1), prompt(320, 2), prompt(97, 3), prompt(45, 4)
FIRST_TURN = 70
CROWD = [prompt(130 + 17 * n, 20 + n) for n in range(6)]
CHUNK = 128
"""Tokens of a step: prompts take several."""
DEVICE_BLOCKS = 100
"""Few enough that a crowd is preempted."""


class Answers:
    """What an engine without a connector says.

    Args:
        engine: one with many device blocks, which takes a prompt in one step.
    """

    def __init__(self, engine: Engine) -> None:
        self.alone = [engine.generate([tokens], 20)[0] for tokens in (OLD, LONG, SHORT)]
        self.turn = engine.generate([OLD], FIRST_TURN)[0]
        self.next_turn: list[int] | None = engine.generate([OLD + self.turn + LATER], 20)[0]
        self.crowd: list[list[int]] | None = [engine.generate([tokens], 40)[0] for tokens in CROWD]

    def check(self, tight: Engine) -> None:
        """Forget answers that kernels make depend on how a prompt is cut or batched: they would prove nothing."""
        assert self.next_turn is not None
        if tight.generate([OLD + self.turn + LATER], 20) != [self.next_turn]:
            self.next_turn = None
        if any(tight.generate(CROWD, 40) != self.crowd for _ in range(2)):
            self.crowd = None


@pytest.fixture(scope="module", params=MOST)
def shape(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if SHAPES[name].needs_stand_ins:
        import cpu_ops_mamba

        cpu_ops_mamba.install()
    return name


@pytest.fixture(scope="module")
def options(shape: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = make_shape(tmp_path_factory.mktemp("shape") / shape, shape)
    found = engine_options(directory, shape)
    return found | {"num_gpu_blocks_override": 512}


@pytest.fixture(scope="module")
def answers(options: dict[str, Any]) -> Answers:
    with running(connector=False, **options) as engine:
        found = Answers(engine)
    with running(connector=False, **tightened(options)) as engine:
        found.check(engine)
    return found


def tightened(options: dict[str, Any]) -> dict[str, Any]:
    """Few device blocks, and several steps a prompt."""
    steps = min(options["max_num_batched_tokens"], CHUNK)
    return options | {"num_gpu_blocks_override": DEVICE_BLOCKS, "max_num_batched_tokens": steps}


def hit(engine: Engine, tokens: Sequence[int], max_tokens: int = 20) -> tuple[list[int], int]:
    """What the engine says, and how many tokens of the prompt it did not compute."""
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    (output,) = engine.llm.generate([{"prompt_token_ids": list(tokens)}], parameters, use_tqdm=False)
    return list(output.outputs[0].token_ids), int(output.num_cached_tokens)


def own_hits(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that vLLM's own prefix cache serves, with KVortex's look-ups off."""
    half = engine.scheduler_half
    half._may_load = False
    try:
        return [hit(engine, tokens, 1)[1] for tokens in prompts]
    finally:
        half._may_load = True


def abandon_loads(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Requests that are aborted while the pool gives them their KV, or soon after; they hold nothing then."""
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    vllm_engine, hits = engine.llm.llm_engine, engine.loaded_blocks
    for steps in range(3):
        names = [f"abandoned {steps} {number}" for number in range(len(prompts))]
        known = [
            vllm_engine.add_request(name, {"prompt_token_ids": list(tokens)}, parameters)
            for name, tokens in zip(names, prompts, strict=True)
        ]
        for _ in range(steps + 1):
            vllm_engine.step()
        vllm_engine.abort_request([name for name in known if name is not None] or names)
        while vllm_engine.has_unfinished_requests():
            vllm_engine.step()
        engine.settle()
    assert engine.loaded_blocks > hits


@pytest.fixture
def engine(options: dict[str, Any]) -> Iterator[Engine]:
    with running(**options | {"num_gpu_blocks_override": DEVICE_BLOCKS}) as made:
        yield made


def test_hits_are_as_long_as_vllms_own(engine: Engine, answers: Answers, shape: str) -> None:
    prompts = (OLD, LONG, SHORT)
    assert [hit(engine, tokens)[0] for tokens in prompts] == answers.alone
    engine.settle()
    own = own_hits(engine, prompts)
    assert all(own)
    engine.settle()
    for repeat in range(2):
        assert engine.llm.reset_prefix_cache()
        found = [hit(engine, tokens) for tokens in prompts]
        assert [tokens for tokens, _ in found] == answers.alone, repeat
        ours = [num_tokens for _, num_tokens in found]
        print(f"{shape}: hits of {own} tokens in vLLM's own cache, {ours} in KVortex")  # noqa: T201
        assert [mine >= theirs for mine, theirs in zip(ours, own, strict=True)] == [True] * 3, (ours, own)
        engine.settle()


def test_turns_crowds_and_a_restart(shape: str, options: dict[str, Any], answers: Answers, tmp_path: Path) -> None:
    disk = {"path": str(tmp_path), "capacity_bytes": "1GiB"}
    # Kernels in bfloat16 tell KV of decoding from that of a prompt, and here and there toss a coin between two tokens.
    exact = SHAPES[shape].dtype == torch.float32
    with running(options={"disk": disk}, **tightened(options)) as engine:
        (turn,) = engine.generate([OLD], FIRST_TURN)
        assert turn == answers.turn or not exact
        engine.settle()
        assert engine.llm.reset_prefix_cache()
        said, num_tokens = hit(engine, OLD + turn + LATER)
        assert answers.next_turn in (None, said) or not exact
        assert num_tokens >= len(OLD) - 64
        for _ in range(2):
            said_to_all = engine.generate(CROWD, 40)
            assert answers.crowd in (None, said_to_all)
        engine.settle()
        assert engine.llm.reset_prefix_cache()
        abandon_loads(engine, CROWD)
        assert engine.llm.reset_prefix_cache()
        again, longest = hit(engine, OLD + turn + LATER)
        assert answers.next_turn in (None, again) or not exact
        settle_disk(engine)
    with running(options={"disk": disk}, **tightened(options)) as engine:
        said, num_tokens = hit(engine, OLD + turn + LATER)
        assert said == again
        assert num_tokens == longest


def test_a_damaged_block_of_any_group_costs_a_computation(engine: Engine, answers: Answers) -> None:
    assert hit(engine, OLD)[0] == answers.alone[0]
    engine.settle()
    rows = engine.control.index._table.rows
    for form in sorted({int(form) for form in rows["form"][rows["state"] == 3]}):
        keys = [row["key"].copy() for row in rows if row["state"] == 3 and row["form"] == form]
        data = engine.worker_half._data
        assert data is not None
        for key in keys:
            pins = engine.control.index.hold(pack_keys([key.tobytes()]))
            data.pool.bytes[int(pins.offsets[0]) + 7] ^= 16
            engine.control.release(pins.hits)
        assert engine.llm.reset_prefix_cache()
        said, _ = hit(engine, OLD)
        assert said == answers.alone[0], form
        engine.settle()
