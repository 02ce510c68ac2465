"""Adapters on a quantized base, their merge, and training that feels the quantization; each on real text."""

from __future__ import annotations

import copy
import io
import pickle
from pydoc_data import topics

import peft
import pytest
import torch
from conftest import WordTokenizer, tiny, token_ids
from torch.nn import functional

import tqw
from tqw.layer import QuantizedLinear
from tqw.training import FakeQuantizedLinear, fake_quantize_model, merge_lora


def quantized(name: str = "llama", **settings):
    model = tiny(name)
    tqw.quantize_model(model, tqw.QuantConfig(**{"group_size": 32, **settings}))
    return model


def batches(count: int, length: int = 48) -> torch.Tensor:
    text = topics.topics["assignment"]
    ids = WordTokenizer()(text)["input_ids"][: count * length]
    return torch.tensor(ids).view(count, length)


def train(model, steps: int, rate: float = 5e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses, data = [], batches(8)
    for _ in range(steps):
        loss = functional.cross_entropy(model(input_ids=data).logits[:, :-1].flatten(0, 1), data[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def adapter(model, **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_lora_learns_and_the_base_stays(name, tmp_path):
    base = quantized(name)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = adapter(base)
    losses = train(model, 25)
    assert losses[-1] < 0.8 * losses[0]
    after = {key.replace(".base_layer", ""): t for key, t in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    model.eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, expected)


def test_merge_keeps_what_was_learned():
    """At 8 bits one more quantization costs little beside what the adapter changed."""
    model = adapter(quantized(bits=8))
    train(model, 25)
    model.eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
        with model.disable_adapter():
            base = model(token_ids()).logits
        merged = merge_lora(model)
        found = merged(token_ids()).logits
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert (found - expected).norm() < 0.1 * (base - expected).norm()
    size = sum(m.quantized_weight.nbytes() for m in quantized(bits=8).modules() if isinstance(m, QuantizedLinear))
    assert sum(m.quantized_weight.nbytes() for m in merged.modules() if isinstance(m, QuantizedLinear)) == size


def test_merge_needs_an_adapter_and_one_rotation():
    with pytest.raises(tqw.TqwError, match="expected a model with LoRA layers, found none"):
        merge_lora(quantized())
    with pytest.raises(tqw.TqwError, match="expected passes that share one rotation"):
        merge_lora(adapter(quantized(bits="4+4", rotation_strategy="different")))


def test_straight_through_training_lowers_the_loss_of_the_quantized_model():
    config = tqw.QuantConfig(bits=2, group_size=32)

    def loss_after(model) -> float:
        model = copy.deepcopy(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, FakeQuantizedLinear):
                dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                dense.weight, dense.bias = module.weight, module.bias
                model.set_submodule(name, dense)
        tqw.quantize_model(model, config)
        data = batches(8)
        with torch.no_grad():
            logits = model(input_ids=data).logits
        return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:].flatten()))

    plain, felt = tiny("llama"), fake_quantize_model(tiny("llama"), config)
    assert sum(isinstance(m, FakeQuantizedLinear) for m in felt.modules()) == 14
    train(plain, 20, 2e-3)
    losses = train(felt, 20, 2e-3)
    assert losses[-1] < losses[0]
    assert loss_after(felt) < loss_after(plain)


def test_fake_quantization_computes_the_quantized_layer():
    linear = torch.nn.Linear(96, 40)
    config = tqw.QuantConfig(bits=3, group_size=32)
    x = torch.randn(5, 96)
    fake = FakeQuantizedLinear.from_linear(linear, config)(x)
    real = QuantizedLinear.from_linear(linear, config).dequantize()(x)
    assert (fake - real).abs().max() < 1e-4
    fake.sum().backward()
    assert torch.allclose(linear.weight.grad, x.sum(0).expand(40, 96), atol=1e-4)


def test_copy_pickle_and_moves():
    """`.to(dtype)` leaves codes alone; a copy and a pickle compute the same."""
    model = quantized()
    with torch.no_grad():
        expected = model(token_ids()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(token_ids()).logits, expected)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = quantized()
        fresh.load_state_dict(torch.load(buffer))
        assert torch.equal(fresh(token_ids()).logits, expected)
        half = copy.deepcopy(model).to(torch.bfloat16)
        layer = half.get_submodule("model.layers.0.self_attn.q_proj")
        assert layer.weight.dtype == torch.uint8
        assert layer.channel_scale.dtype == torch.uint8
        assert torch.equal(layer.weight_scale, model.get_submodule("model.layers.0.self_attn.q_proj").weight_scale)
        assert half.model.norm.weight.dtype == torch.bfloat16
        assert (half(token_ids()).logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
