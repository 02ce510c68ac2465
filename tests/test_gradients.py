"""Weights of tokens: the gradients that autograd finds by itself, and moments that count tokens by them."""

from __future__ import annotations

import pytest
import torch
from conftest import inputs_of, tiny, token_ids

from tqw.errors import TqwError
from tqw.gradients import sampled_loss, token_weights
from tqw.moments import LayerMoments


def outputs_and_gradients(model, names, ids):
    """The gradients of the first draw's loss by the outputs of some modules, tokens side by side."""
    outputs = {}

    def keep(name):
        return lambda _, __, output: outputs.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    loss = sampled_loss(model(input_ids=ids, use_cache=False), torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    return [g.flatten(0, -2) for g in torch.autograd.grad(loss, [outputs[name] for name in names])]


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_weights_are_the_energy_of_the_gradients(name, power):
    model, ids = tiny(name), token_ids(3, 11)
    up, gate = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
    energy = sum(g.square().mean(-1) for g in outputs_and_gradients(model, [up, gate], ids)) ** power
    found = token_weights(model, [ids], power)
    (weights,) = found["model.layers.1.mlp.gate_proj|up_proj"]
    torch.testing.assert_close(weights, energy / energy.mean(), rtol=1e-4, atol=1e-5)
    for parts in found.values():
        assert torch.cat(parts).mean() == pytest.approx(1.0, abs=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_moments_count_tokens_by_their_weights():
    model, batches = tiny("llama"), [token_ids(3, 7), token_ids(2, 20)]
    name, key = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj|k_proj|v_proj"
    weights = token_weights(model, batches)
    found = LayerMoments(model, batches, weights=weights)(name)
    every, w = torch.cat([inputs_of(model, name, ids) for ids in batches]), torch.cat(weights[key])
    assert found is not None
    torch.testing.assert_close(found.second, (every * w[:, None]).T @ every / len(every), rtol=1e-3, atol=1e-5)
    assert w.max() > 1.2  # the weights are not all alike


def test_weights_of_other_batches_are_refused():
    model = tiny("llama")
    weights = token_weights(model, [token_ids(3, 7)])
    with pytest.raises(TqwError, match="expected a weight for each of 21 tokens"):
        LayerMoments(model, [token_ids(3, 7)], weights={k: [w[0][:9]] for k, w in weights.items()})(
            "model.layers.0.self_attn.q_proj"
        )


def test_models_without_known_outputs_are_refused():
    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny("llama")

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

        def forward(self, input_ids, use_cache):
            return self.model(input_ids=input_ids, use_cache=use_cache).logits

    with pytest.raises(TqwError, match="found none"):
        token_weights(Silent(), [token_ids(3, 7)])
