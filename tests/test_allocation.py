"""Widths within a budget: the dynamic program against brute force, the budget against the bytes that are written."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from conftest import tiny, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

import tqw
from tqw.allocation import allocate_bits, best_widths, relative_mse, sensitivities
from tqw.calibrate import input_power
from tqw.config import QuantConfig
from tqw.model import input_name, plan_model, quantize_model

cases = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 1000)), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=150)
@given(cases, st.integers(0, 200))
def test_the_dynamic_program_finds_what_brute_force_finds(items, budget):
    sizes = [[size for size, _ in row] for row in items]
    losses = [[float(loss) for _, loss in row] for row in items]
    every = itertools.product(*(range(len(row)) for row in items))
    fitting = [c for c in every if sum(s[i] for s, i in zip(sizes, c, strict=True)) <= budget]
    found = best_widths(sizes, losses, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None

    def loss(choice):
        return sum(row[i] for row, i in zip(losses, choice, strict=True))

    assert sum(s[i] for s, i in zip(sizes, found, strict=True)) <= budget
    assert loss(found) == min(map(loss, fitting))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(10**6, 10**9), min_size=1, max_size=6), st.floats(2.3, 8.2))
def test_large_sizes_keep_the_budget_and_come_close(weights, target):
    """Sizes without a common step are rounded up to 1/65,536 of the room: six layers lose less than a thousandth."""
    sizes = [[w * bits // 8 for bits in (2, 3, 4, 5, 6, 8)] for w in weights]
    losses = [[4.0**-bits for bits in (2, 3, 4, 5, 6, 8)] for _ in weights]
    budget = int(target * sum(weights) / 8)
    found = best_widths(sizes, losses, budget)
    assert found is not None
    used = sum(row[i] for row, i in zip(sizes, found, strict=True))
    assert used <= budget
    spare = budget - used  # no layer could take the next width
    steps = [row[i + 1] - row[i] for row, i in zip(sizes, found, strict=True) if i + 1 < len(row)]
    assert not steps or spare < min(steps) + len(weights) * budget / 65536 + len(weights)


def test_relative_errors_fall_with_the_width():
    errors = [relative_mse(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert relative_mse(4, 64) == pytest.approx(0.0069, rel=0.03)  # docs/theory.md's row of the searched scale


@pytest.mark.parametrize("name", ["llama", "odd", "mixtral", "qwen3", "gpt2", "bert", "hybrid"])
@pytest.mark.parametrize("target", [3.3, 4.6, 7.1])
def test_no_model_takes_more_than_its_target(name, target):
    model = tiny(name)
    config = allocate_bits(model, target, QuantConfig(group_size=64))
    planned = plan_model(model, config)
    assert target - 0.6 < planned.bits_per_weight() <= target  # 2 layers have few sums; larger models come close
    report = quantize_model(model, config)
    assert report.bits_per_weight() == planned.bits_per_weight()
    widths = {}
    for record in report.quantized:
        widths.setdefault(input_name(record.name.removesuffix(".weight")), set()).add(record.bits)
    assert all(len(found) == 1 for found in widths.values())


def test_many_layers_come_close_to_the_target():
    import transformers as hf

    shape = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(num_hidden_layers=24, vocab_size=64, **shape)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    for target in (3.0, 3.7, 4.6, 5.55, 6.3, 7.9):
        reached = plan_model(model, allocate_bits(model, target, QuantConfig(group_size=64))).bits_per_weight()
        assert target - 0.05 <= reached <= target


def test_overrides_and_embeddings_are_pinned_and_counted():
    model = tiny("llama")
    config = QuantConfig(overrides=(("down_proj", "8"), ("layers.0.*o_proj", "skip")), embedding="8", lm_head="6")
    allocated = allocate_bits(model, 6.0, config)
    report = quantize_model(model, allocated)
    bits = {record.name: record.bits for record in report.quantized}
    assert all(width == "8" for name, width in bits.items() if "down_proj" in name)
    assert "model.layers.0.self_attn.o_proj.weight" not in bits
    assert bits["model.embed_tokens.weight"] == "8"
    assert bits["lm_head.weight"] == "6"
    assert 5.5 < report.bits_per_weight() <= 6.0


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embeddings_may_take_part(name, tmp_path):
    model = tiny(name)
    config = QuantConfig(embedding="8", lm_head="8")
    allocated = allocate_bits(model, 3.5, config, free=("embedding", "lm_head"))
    report = quantize_model(model, allocated)
    assert report.bits_per_weight() <= 3.5
    tqw.save(model, tmp_path / "out", report)
    with torch.no_grad():
        assert torch.equal(tqw.load(tmp_path / "out")(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("target", [1.5, 2.2, 9.0, float("nan")])
def test_a_target_out_of_reach_is_refused(target):
    with pytest.raises(tqw.TqwError, match=r"expected a target of 2.* to 8.* bits per weight"):
        allocate_bits(tiny("llama"), target, QuantConfig(group_size=32))


def test_residual_passes_have_no_target():
    with pytest.raises(tqw.TqwError, match=re.escape("expected one pass with a target")):
        allocate_bits(tiny("llama"), 5, QuantConfig(bits="4+4"))


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize(("name", "factor"), [("llama", 2), ("gpt2", 2), ("tied", 2), ("mixtral", 10)])
def test_sensitivities_predict_the_loss(name, factor):
    """Half the Fisher information times the relative error is the KLD, to second order. Sampled tokens and correlations
    between tokens are what the factor stands for; in a random mixture of experts also tokens that change experts."""
    model = tiny(name)
    ids = token_ids(8, 40)
    power = input_power(model, [ids])
    found = sensitivities(model, ids, power)
    assert all(p.requires_grad for p in model.parameters())
    assert found
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
    report = quantize_model(model, QuantConfig(bits=5, group_size=32), input_power=power)
    with torch.no_grad():
        after = model(ids).logits.log_softmax(-1)
    kld = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = sum(found[name] for name in report.modules) * relative_mse(5, 32)
    assert kld / factor < predicted < kld * factor


def test_sensitive_layers_get_more_bits():
    model = tiny("llama")
    group = [f"model.layers.1.mlp.{leaf}" for leaf in ("gate_proj", "up_proj")]
    everything = {name: 1.0 for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    config = allocate_bits(model, 4.5, sensitivity={**everything, **dict.fromkeys(group, 1e4)})
    widths = {record.name: int(record.bits) for record in plan_model(model, config).quantized}
    assert all(widths[f"{name}.weight"] > widths["model.layers.0.mlp.up_proj.weight"] for name in group)


@pytest.mark.usefixtures("exact_activations")
def test_without_logits_sensitivities_predict_the_error_of_the_hidden_states():
    model, batches = tiny("bert"), [token_ids(8, 40), token_ids(8, 13)]
    power = input_power(model, batches)
    found = sensitivities(model, batches, power)
    with torch.no_grad():
        before = [model(ids).last_hidden_state for ids in batches]
    report = quantize_model(model, QuantConfig(bits=5, group_size=32), input_power=power)
    with torch.no_grad():
        after = [model(ids).last_hidden_state for ids in batches]
    error = 0.5 * sum(float((y - x).square().sum()) for x, y in zip(before, after, strict=True))
    error /= sum(ids.numel() for ids in batches)
    assert set(report.modules) - set(found) == {"pooler.dense"}  # its output is another one
    predicted = sum(found.values()) * relative_mse(5, 32)
    assert error / 2 < predicted < error * 2


def test_layers_that_the_sensitivities_do_not_name_keep_their_width():
    model = tiny("bert")
    power = input_power(model, [token_ids(8, 40)])
    found = sensitivities(model, token_ids(8, 40), power)
    plan = plan_model(model, allocate_bits(model, 4.8, sensitivity=found))
    assert {r.bits for r in plan.quantized if r.name.startswith("pooler")} == {"4"}
