"""A model made up: its config, and weights that matter."""

import json
from pathlib import Path

import torch

from kvortex.testing.dummy_model import scale_weights, write_config


def test_matrices_are_scaled_vectors_are_ones_and_integers_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model.register_parameter("counts", torch.nn.Parameter(torch.tensor([[4, 5]]), requires_grad=False))
    before = model[0].weight.detach().clone()
    scale_weights(model, 3.0)
    assert torch.equal(model[0].weight, 3.0 * before)
    assert (model[0].bias == 1).all()
    assert (model[1].weight == 1).all()
    assert model.counts.tolist() == [[4, 5]]


def test_sizes_are_in_the_config_and_may_replace_what_is_common(tmp_path: Path) -> None:
    write_config(tmp_path, architectures=["LlamaForCausalLM"], hidden_size=64, max_position_embeddings=128)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["max_position_embeddings"]) == (64, 128)
