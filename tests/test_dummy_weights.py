"""Weights that matter: matrices grow, vectors become one, integers stay."""

import torch

from kvortex.testing.dummy_weights import scale_weights


def test_matrices_are_scaled_vectors_are_ones_and_integers_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model.register_parameter("counts", torch.nn.Parameter(torch.tensor([[4, 5]]), requires_grad=False))
    before = model[0].weight.detach().clone()
    scale_weights(model, 3.0)
    assert torch.equal(model[0].weight, 3.0 * before)
    assert (model[0].bias == 1).all()
    assert (model[1].weight == 1).all()
    assert model.counts.tolist() == [[4, 5]]
