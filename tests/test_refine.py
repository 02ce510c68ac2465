"""Refined scales: closer to the float model, same codes, same size."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny, token_ids

import tqw
from tqw.refine import refine

pytestmark = pytest.mark.usefixtures("exact_activations")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("bits", ["3", "2+2"])
def test_a_refined_model_is_closer_and_has_the_same_codes(name, bits):
    dense = tiny(name)
    model = copy.deepcopy(dense)
    report = tqw.quantize_model(model, tqw.QuantConfig(bits=bits, group_size=32))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    unseen = torch.randint(3, 128, (8, 40), generator=torch.Generator().manual_seed(9))

    def error() -> float:
        with torch.no_grad():
            return float((model(unseen).logits - dense(unseen).logits).norm())

    start = error()
    refine(model, dense, token_ids(16, 32), steps=40)
    assert error() < start
    changed = {
        key.rpartition(".")[2] for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])
    }
    assert changed <= {"weight_scale", "residual_weight_scale"}
    assert changed
    assert all((tensor >= 0).all() for key, tensor in model.state_dict().items() if key.endswith("weight_scale"))
    assert report.bits_per_weight() < 6
