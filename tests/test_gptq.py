"""Error feedback: less output error than coding each weight by itself, in the same format; moments of the prefix."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import inputs_of, tiny, token_ids

import tqw
from tqw import gptq
from tqw.calibrate import whole_texts
from tqw.codebook import levels
from tqw.config import QuantConfig
from tqw.gptq import Moments
from tqw.moments import LayerMoments, decoder_layers
from tqw.packing import unpack
from tqw.pretrained import quantize_pretrained
from tqw.weight import choose_channel_scale, dequantize, quantize


def correlated(tokens: int, features: int) -> torch.Tensor:
    """Inputs of a layer as they are: few directions with most of the power, some channels large."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(features // 4, features, generator=generator)
    x = torch.randn(tokens, features // 4, generator=generator) @ basis + torch.randn(
        tokens, features, generator=generator
    )
    return x * torch.linspace(0.2, 3, features)


def case(out_features: int = 48, in_features: int = 160, **settings):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(6)) * 0.05
    x = correlated(600, in_features)
    config = QuantConfig(**settings)
    return weight, x, config, choose_channel_scale([weight], config)


def error(weight: torch.Tensor, qw: tqw.QuantizedWeight, x: torch.Tensor) -> float:
    return float(((dequantize(qw) - weight) @ x.T).square().sum())


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "3+2"])
@pytest.mark.parametrize("rotation", ["hadamard", "qr", "none"])
def test_outputs_err_less(bits, rotation):
    weight, x, config, scale = case(bits=bits, rotation=rotation, group_size=32)
    moments = Moments(x.T @ x / len(x))
    plain = quantize(weight, config, channel_scale=scale)
    fed_back = gptq.quantize_with_feedback(weight, moments, config, scale, plain.rotation_matrix)
    assert error(weight, fed_back, x) < 0.8 * error(weight, plain, x)
    assert fed_back.nbytes() == plain.nbytes()
    assert fed_back.bits == plain.bits
    assert fed_back.group_size == plain.group_size


@pytest.mark.parametrize("in_features", [100, 576])
@pytest.mark.parametrize("out_features", [1, 17])
def test_odd_shapes(in_features, out_features):
    weight, x, config, scale = case(out_features, in_features)
    qw = gptq.quantize_with_feedback(weight, Moments(x.T @ x / len(x)), config, scale)
    assert qw.shape == weight.shape
    assert error(weight, qw, x) < error(weight, quantize(weight, config, channel_scale=scale), x)


def test_a_part_of_the_drift_is_made_up_for():
    """x = x0 A: the target moves a quarter of the way to what a least-squares fit of the float outputs would be."""
    weight, x0, config, scale = case(bits="8")
    x = x0 @ (torch.eye(160) + 0.02 * torch.randn(160, 160, generator=torch.Generator().manual_seed(8)))
    second, cross = x.T @ x / len(x), x0.T @ x / len(x)
    plain, corrected = (
        gptq.quantize_with_feedback(weight, moments, config, scale)
        for moments in (Moments(second), Moments(second, cross))
    )

    def off(qw: tqw.QuantizedWeight) -> float:
        return float((x @ dequantize(qw).T - x0 @ weight.T).square().sum())

    assert off(corrected) < 0.8 * off(plain)
    same = gptq.quantize_with_feedback(weight, Moments(second, second.clone()), config, scale)  # x = x0: no drift
    assert (dequantize(same) - dequantize(plain)).norm() < 1e-5 * weight.norm()


def test_with_white_inputs_there_is_nothing_to_feed_back():
    """S = I: columns do not meet, so without refits the codes are those of `quantize` itself."""
    weight, _, config, scale = case(rotation="none")
    scale = torch.full_like(scale, 0x3C)  # 1.0
    before, gptq.REFITS = gptq.REFITS, 0
    try:
        qw = gptq.quantize_with_feedback(weight, Moments(torch.eye(160)), config, scale)
    finally:
        gptq.REFITS = before
    assert torch.equal(qw.packed[0], quantize(weight, config, channel_scale=scale).packed[0])


def test_dead_inputs_and_few_samples_are_damped():
    weight, x, config, scale = case()
    x = x[:20]
    x[:, 40:60] = 0
    qw = gptq.quantize_with_feedback(weight, Moments(x.T @ x / len(x)), config, scale)
    assert torch.isfinite(dequantize(qw)).all()
    assert (dequantize(qw) - weight).norm() < 0.5 * weight.norm()


def test_moment_in_the_rotated_domain():
    weight, x, config, scale = case()
    qw = quantize(weight, config, channel_scale=scale)
    transformed = tqw.weight.transform(x.double(), scale, qw.matrix(x.double()))
    expected = transformed.T @ transformed / len(x)
    rotated = gptq.rotated_moment(x.T @ x / len(x), scale, qw.matrix(x))
    assert (rotated - expected).abs().max() < 1e-4 * expected.abs().max()


def test_feedback_factor_is_the_cholesky_factor_of_the_inverse():
    x = correlated(300, 64).double()
    moment = x.T @ x / len(x)
    upper = gptq.feedback_factor(moment.float(), 0.0).double()
    assert torch.equal(upper, upper.triu())
    assert (upper.T @ upper @ moment - torch.eye(64)).abs().max() < 1e-3


def test_scales_and_codes_stay_in_the_format():
    weight, x, config, scale = case(bits="3")
    qw = gptq.quantize_with_feedback(weight, Moments(x.T @ x / len(x)), config, scale)
    codes = unpack(qw.packed[0], 3, qw.group_size)
    assert codes.max() < len(levels(3))
    assert (qw.weight_scale[0] >= 0).all()
    assert torch.isfinite(qw.weight_scale[0]).all()


def test_different_rotations_are_refused():
    weight, x, config, scale = case(bits="4+4", rotation_strategy="different")
    with pytest.raises(tqw.TqwError, match="expected rotation_strategy 'shared' with method gptq"):
        gptq.quantize_with_feedback(weight, Moments(x.T @ x), config, scale)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_moments_are_those_of_the_quantized_prefix(name):
    """Layer 0 reads what the float model gives it; layer 1 what the *quantized* layer 0 gives it."""
    model, dense = tiny(name), tiny(name)
    ids = token_ids(4, 20)
    prefix, layers = decoder_layers(model)
    moments = LayerMoments(model, ids)
    target = {"gpt2": "attn.c_attn"}.get(name, "self_attn.q_proj")
    for index in range(len(layers)):
        x = inputs_of(model, f"{prefix}.{index}.{target}", ids)
        expected = x.T @ x / len(x)
        found = moments(f"{prefix}.{index}.{target}")
        assert found is not None
        assert found.cross is not None
        assert (found.second - expected).abs().max() < 1e-4 * expected.abs().max()
        x0 = inputs_of(dense, f"{prefix}.{index}.{target}", ids)
        expected = x0.T @ x / len(x)
        assert (found.cross - expected).abs().max() < 1e-4 * expected.abs().max()
        tqw.quantize_model(layers[index], QuantConfig(bits=3, group_size=32))
    assert moments("lm_head") is None


def test_batches_of_different_lengths_count_by_their_tokens():
    model, batches = tiny("llama"), [token_ids(3, 7), token_ids(2, 20)]
    prefix, _ = decoder_layers(model)
    x = torch.cat([inputs_of(model, f"{prefix}.0.self_attn.q_proj", ids) for ids in batches])
    found = LayerMoments(model, batches)(f"{prefix}.0.self_attn.q_proj")
    assert found is not None
    assert torch.allclose(found.second, x.T @ x / len(x), atol=1e-5)


@pytest.mark.parametrize("drift", [0.25, 1.0])
def test_moments_are_those_of_what_is_quantized_before_in_the_same_layer(drift):
    model, dense = tiny("llama"), tiny("llama")
    ids = token_ids(4, 20)
    moments = LayerMoments(model, ids, drift)
    assert moments("model.layers.0.self_attn.q_proj") is not None
    tqw.quantize_model(model.model.layers[0].self_attn, QuantConfig(bits=2, group_size=32))
    name = "model.layers.0.mlp.up_proj"
    found, x, x0 = moments(name), inputs_of(model, name, ids), inputs_of(dense, name, ids)
    assert found is not None
    assert found.cross is not None
    assert found.drift == drift
    assert torch.allclose(found.second, x.T @ x / len(x), atol=1e-4)
    assert torch.allclose(found.cross, x0.T @ x / len(x), atol=1e-4)
    assert (x - x0).norm() > 0.05 * x0.norm()


def test_whole_texts_are_batches_of_one_length():
    class Words:
        def __call__(self, texts, return_tensors, truncation):
            return {"input_ids": torch.tensor([[len(word) for word in texts[0].split()]])}

    batches = whole_texts(Words(), ["a bb", "a", "ccc d", "bb a", "a bb ccc"], size=2)
    assert [batch.tolist() for batch in batches] == [[[1]], [[1, 2], [3, 1]], [[2, 1]], [[1, 2, 3]]]


def test_a_model_quantized_with_feedback_is_closer(tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "float")
    outputs = {}
    for method in ("rtn", "gptq"):
        config = QuantConfig(bits=3, group_size=32)
        quantize_pretrained(str(tmp_path / "float"), tmp_path / method, config, method=method, calibrate="random")
        with torch.no_grad():
            outputs[method] = tqw.load(tmp_path / method)(token_ids(8, 32)).logits
    with torch.no_grad():
        exact = dense(token_ids(8, 32)).logits
    assert (outputs["gptq"] - exact).norm() < 0.95 * (outputs["rtn"] - exact).norm()


def test_resuming_gives_the_same_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    source, config = str(tmp_path / "float"), QuantConfig(group_size=32)
    quantize_pretrained(source, tmp_path / "whole", config, method="gptq", calibrate="random")

    def interrupt(stage: str, done: int, total: int) -> None:
        if "layers.1" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_pretrained(
            source, tmp_path / "parts", config, method="gptq", calibrate="random", progress=interrupt, shard_bytes=4096
        )
    quantize_pretrained(
        source, tmp_path / "parts", config, method="gptq", calibrate="random", resume=True, shard_bytes=4096
    )
    whole, parts = (dict(tqw.load(tmp_path / name).named_parameters()) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq"}, "expected a method of rtn or gptq, got 'awq'"),
        ({"method": "gptq", "workers": 2}, "expected workers=1 with moments"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(tqw.TqwError, match=message):
        quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", **{"calibrate": "random", **options})
    assert not (tmp_path / "out").exists()


def test_without_sequences_the_moments_are_those_of_the_weights(tmp_path):
    """No text, no forward pass: feedback on what the weights tell of the inputs. Same size, other codes than rtn's."""
    tiny("llama").save_pretrained(tmp_path / "float")
    sizes, codes = set(), []
    for method in ("rtn", "gptq"):
        report = quantize_pretrained(str(tmp_path / "float"), tmp_path / method, method=method, calibrate="none")
        sizes.add(report.bits_per_weight())
        codes.append(tqw.load(tmp_path / method).get_submodule("model.layers.1.mlp.down_proj").weight)
    assert len(sizes) == 1
    assert not torch.equal(*codes)


def test_a_model_without_layers_is_refused():
    with pytest.raises(tqw.TqwError, match="expected a model with a list of layers"):
        decoder_layers(copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(4, 4))))


def test_refitted_scales_are_stationary_row_by_row(monkeypatch):
    """At the least-squares scales the gradient of tr(E S E^T) is zero; rows in parts give the same scales."""
    weight, x, _, _ = case(12, 96)
    moment, levels_ = x[:, :96].T @ x[:, :96] / len(x), torch.randint(-9, 9, (96, 12)).float()
    scales = gptq._refit_scales(weight.T.contiguous(), levels_, moment, 32)
    error = weight.T - levels_ * scales.repeat_interleave(32, 0)
    gradient = (levels_ * (moment @ error)).unflatten(0, (3, 32)).sum(1)
    assert gradient.abs().max() < 1e-3 * (levels_ * (moment @ weight.T)).unflatten(0, (3, 32)).sum(1).abs().max()
    monkeypatch.setattr(gptq, "_REFIT_ELEMENTS", 1)
    parts = gptq._refit_scales(weight.T.contiguous(), levels_, moment, 32)
    assert torch.allclose(parts, scales, rtol=1e-4)
