"""Statistics from weights alone: exact where the picture is exact, else close to what random tokens show."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny, token_ids

import tqw
from tqw.calibrate import input_power
from tqw.pretrained import calibration_power
from tqw.propagation import weight_only_power


def test_the_first_layer_reads_the_embeddings_mean_squares():
    """Every token once: the norm hands on gain^2 E (emb_j / rms)^2, up to the spread of the rows' own norms."""
    model = tiny("llama")
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table /= table.square().mean(-1, keepdim=True).sqrt()  # rows of equal norm: then it is exact
        model.model.layers[0].input_layernorm.weight.uniform_(0.2, 3)
    found = weight_only_power(model)["model.layers.0.self_attn.q_proj.weight"]
    seen = input_power(model, [torch.arange(128)[:, None]])["model.layers.0.self_attn.q_proj.weight"]
    assert (found / found.mean() - seen / seen.mean()).abs().max() < 1e-3 * (seen / seen.mean()).max()


@pytest.mark.parametrize(
    ("name", "layers", "least"),
    [("llama", 2, 0.6), ("qwen3", 2, 0.6), ("tied", 2, 0.6), ("odd", 2, 0.6), ("hybrid", 1, 0.3)],
)
def test_statistics_follow_those_of_random_tokens(name, layers, least):
    """With gains and rows of unequal size, channels rank as they do on tokens, in all layers. The hybrid's linear
    attention adds to the residual stream what is not known here, hence its lower bound."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module_name, parameter in model.named_parameters():
            if "layernorm" in module_name and "linear_attn" not in module_name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.3, 3, generator=generator))
            elif parameter.ndim == 2 and ("up_proj" in module_name or "v_proj" in module_name):
                parameter.mul_(torch.empty(len(parameter), 1).uniform_(0.3, 3, generator=generator))
    found = weight_only_power(model)
    assert sum(key.endswith("o_proj.weight") for key in found) == layers
    assert sum(key.endswith("down_proj.weight") for key in found) == 2
    seen = input_power(model, [token_ids(16, 32)])
    for key, power in found.items():
        pair = torch.stack([power.log(), seen[key].log()])
        assert power.shape == seen[key].shape
        assert torch.corrcoef(pair)[0, 1] > least, key


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_other_kinds_of_layers_have_none(name):
    assert weight_only_power(tiny(name)) == {}


def test_experts_have_none_but_the_attention_has():
    found = weight_only_power(tiny("mixtral"))
    assert any("o_proj" in key for key in found)
    assert not any("experts" in key for key in found)


def test_gemma_counts_its_gains_from_one_and_norms_twice():
    import transformers as hf

    config = hf.Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layernorm" in key:
                parameter.uniform_(-0.7, 2)
    found, seen = weight_only_power(model), input_power(model, [token_ids(16, 32)])
    for key in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.corrcoef(torch.stack([found[key].log(), seen[key].log()]))[0, 1] > 0.8


def test_it_is_what_calibrate_none_uses(tmp_path):
    model = tiny("llama")
    assert calibration_power(model, None).keys() == weight_only_power(model).keys()
    model.save_pretrained(tmp_path / "float")
    report = tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none")
    assert any(record.relative_output_error for record in report.quantized)
