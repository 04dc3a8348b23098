"""Weights that change under a running engine: what the old ones computed is not served."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_support import BLOCK_SIZE, Engine, prompt, running
from owner_support import serving
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_model
from vllm import SamplingParams
from vllm.v1.worker.worker_base import WorkerBase

from kvortex.vllm.versions import IS_NEWER
from kvortex.vllm.worker.weights import WeightsWatch, weights_checksum

TOKENS = prompt(4 * BLOCK_SIZE + 5, 1)
BLOCKS = len(TOKENS) // BLOCK_SIZE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("weights")
    old, new = make_tiny_model(home / "old", "qwen3"), make_tiny_model(home / "new", "qwen3")
    weights = load_file(new / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in weights:
        if "input_layernorm" in name:
            weights[name] = torch.rand(weights[name].shape, generator=generator) * 2
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    return {"old": old, "new": new}


@pytest.fixture(scope="module")
def answers(models: dict[str, Path]) -> dict[str, list[int]]:
    found = {}
    for name, path in models.items():
        with running(str(path), connector=False) as engine:
            found[name] = engine.generate([TOKENS])[0]
    assert found["old"] != found["new"]
    return found


@pytest.fixture
def engine(models: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """With vLLM's own prefix cache, as servers have it; over a disk or the pool of an owner where that is asked for."""
    over, options = getattr(request, "param", ""), {}
    with contextlib.ExitStack() as stack:
        if over == "disk":
            options = {"disk": {"path": str(tmp_path / "disk"), "capacity_bytes": "1GiB"}}
        elif over == "owner":
            options = {"owner": str(stack.enter_context(serving(tmp_path / "kvortex.sock")).path)}
        yield stack.enter_context(running(str(models["old"]), options=options, enable_prefix_caching=True))


def norms_of(path: Path) -> list[tuple[str, torch.Tensor]]:
    """The weights in which the models differ. vLLM's CPU backend packs others away and cannot take them again."""
    return [(name, tensor) for name, tensor in load_file(path / "model.safetensors").items() if "input_layer" in name]


def loaded(engine: Engine, path: Path) -> None:
    """What reinforcement learning does: each worker's model loads what it is sent."""
    tensors = norms_of(path)
    engine.llm.apply_model(lambda model: bool(model.load_weights(tensors)))


def loaded_twice(engine: Engine, path: Path) -> None:
    """Two changes before anybody asks again."""
    others = [(name, tensor / 2) for name, tensor in norms_of(path)]
    engine.llm.apply_model(lambda model: bool(model.load_weights(others)))
    loaded(engine, path)


def reloaded(engine: Engine, path: Path) -> None:
    """vLLM takes the parameters' memory away, has the model load its weights, and puts them into place."""
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(norms_of(path))})


def written(engine: Engine, path: Path) -> None:
    """A function that writes parameters."""
    fresh = dict(norms_of(path))

    def change(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in fresh:
                parameter.data.copy_(fresh[name])

    engine.llm.apply_model(change)


def behind_its_back(engine: Engine, path: Path) -> None:
    """Through no method of vLLM: only a look at the weights sees it."""
    fresh = dict(norms_of(path))
    for name, parameter in worker_of(engine).get_model().named_parameters():
        if name in fresh:
            parameter.data.copy_(fresh[name])


def worker_of(engine: Engine) -> Any:
    return engine.core.model_executor.driver_worker.worker


WAYS: dict[str, Callable[[Engine, Path], None]] = {
    "loaded": loaded,
    "loaded twice": loaded_twice,
    "reloaded": reloaded,
    "written": written,
    "behind its back": behind_its_back,
}


@pytest.mark.parametrize(
    ("engine", "way"),
    [("", way) for way in WAYS] + [(over, way) for over in ("disk", "owner") for way in ("loaded", "reloaded")],
    indirect=["engine"],
    ids=[*WAYS, "loaded with a disk", "reloaded with a disk", "loaded with an owner", "reloaded with an owner"],
)
def test_old_blocks_are_not_served_after_a_plain_reset(
    engine: Engine, models: dict[str, Path], answers: dict[str, list[int]], way: str
) -> None:
    if way == "reloaded" and not IS_NEWER:
        pytest.skip("the older version's workers reload from files alone")
    assert engine.generate([TOKENS])[0] == answers["old"]
    engine.settle()
    WAYS[way](engine, models["new"])
    assert engine.llm.reset_prefix_cache()
    before = engine.loaded_blocks
    assert engine.generate([TOKENS])[0] == answers["new"]
    engine.settle()
    assert engine.loaded_blocks == before
    # What the new ones compute is kept as ever, from the first prompt on.
    engine.llm.reset_prefix_cache()
    assert engine.generate([TOKENS])[0] == answers["new"]
    engine.settle()
    assert engine.loaded_blocks == before + BLOCKS


def test_weights_that_come_before_the_first_prompt_cost_nothing(
    engine: Engine, models: dict[str, Path], answers: dict[str, list[int]]
) -> None:
    """Trainers start engines with weights of no meaning, and send those that count."""
    written(engine, models["new"])
    for loaded_blocks in (0, BLOCKS):
        assert engine.generate([TOKENS])[0] == answers["new"]
        engine.settle()
        assert engine.loaded_blocks == loaded_blocks
        assert engine.llm.reset_prefix_cache()


def test_weights_that_stay_cost_nothing(engine: Engine, answers: dict[str, list[int]]) -> None:
    """A reset or a function that only reads is no reason to forget."""
    engine.generate([TOKENS])
    engine.settle()
    engine.llm.apply_model(lambda model: sum(p.numel() for p in model.parameters()))
    assert engine.llm.reset_prefix_cache()
    assert engine.generate([TOKENS])[0] == answers["old"]
    engine.settle()
    assert engine.loaded_blocks == BLOCKS


def test_what_is_computed_across_a_change_is_not_stored(
    engine: Engine, models: dict[str, Path], answers: dict[str, list[int]]
) -> None:
    """Half with the old weights, half with the new ones: such KV is nobody's."""
    request = engine.llm.llm_engine
    parameters = SamplingParams(temperature=0.0, max_tokens=3 * BLOCK_SIZE, ignore_eos=True)
    request.add_request("across", {"prompt_token_ids": TOKENS}, parameters)
    for _ in range(BLOCK_SIZE):
        request.step()
    loaded(engine, models["new"])
    mixed: list[int] = []
    while request.has_unfinished_requests():
        for output in request.step():
            mixed = list(output.outputs[0].token_ids)
    assert len(mixed) == 3 * BLOCK_SIZE
    engine.llm.reset_prefix_cache()
    engine.settle()
    before = engine.loaded_blocks
    again = [*TOKENS, *mixed]
    engine.generate([again])
    engine.settle()
    assert engine.loaded_blocks == before


class PlayedWorker(WorkerBase):
    """Has whatever method some version has to replace weights."""

    def __init__(self, config: Any) -> None:
        self.vllm_config, self.model = config, torch.nn.Linear(4, 4)

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self) -> None: ...

    def update_weights(self, update: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None:
        raise RuntimeError("half of them came")

    def apply_model(self, function: Callable[[torch.nn.Module], Any]) -> Any:
        return function(self.model)


def test_every_method_that_replaces_weights_is_watched() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace())
    worker, stranger = PlayedWorker(config), PlayedWorker(SimpleNamespace(model_config=SimpleNamespace()))
    changes: list[str] = []
    watch = WeightsWatch(config, lambda: changes.append("changed"))
    stranger.reload_weights()
    assert not changes
    worker.reload_weights()
    worker.update_weights({})
    assert len(changes) == 2
    with pytest.raises(RuntimeError):  # what it left behind is not what was there
        worker.finish_weight_update()
    assert len(changes) == 3
    assert worker.apply_model(lambda model: model.weight.sum().item()) == worker.model.weight.sum().item()
    assert len(changes) == 3
    worker.apply_model(lambda model: model.bias.data.add_(1))
    assert len(changes) == 4
    watch.end()
    worker.reload_weights()
    assert len(changes) == 4


def test_a_method_within_another_is_one_change() -> None:
    """Halfway through an update some parameters have no memory, and a look at them would end it."""

    class Model(torch.nn.Linear):
        def load_weights(self) -> None:
            self.to("meta")

    class Worker(PlayedWorker):
        def reload_weights(self) -> None:
            self.model.load_weights()
            self.model.to_empty(device="cpu")

    config = SimpleNamespace(model_config=SimpleNamespace())
    worker, changes = Worker(config), list[str]()
    worker.model = Model(4, 4)
    watch = WeightsWatch(config, lambda: changes.append("changed"))
    worker.reload_weights()
    assert changes == ["changed"]
    worker.model.load_weights()
    assert changes == ["changed", "changed"]
    watch.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_the_checksum_sees_one_bit(dtype: torch.dtype) -> None:
    model = torch.nn.ParameterList(
        [torch.nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False) for shape in ((3, 5), (8,), ())]
    )
    for parameter in model:
        before = weights_checksum([model])
        parameter.data.view(-1).view(torch.uint8)[-1] ^= 1
        assert weights_checksum([model]) != before
