"""Layers of one family: the outputs of each alone, bit for bit, whatever the order of calls."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import safetensors.torch
import torch
from torch import nn

import tqw
from tqw import shared_input
from tqw.kernels import cpu
from tqw.layer import QuantizedLinear
from tqw.model import share_inputs
from tqw.shared_input import join
from tqw.weight import dequantize


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(128, 96), nn.Linear(128, 32), nn.Linear(128, 32, bias=False)


def family(**settings) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    tqw.quantize_model(model, tqw.QuantConfig(**settings))
    return model


def alone(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    return cpu.linear(x, layer.quantized_weight, layer.bias)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of layers of every call for a family."""
    counts: list[int] = []
    original = cpu.linears

    def counting(x, weights, biases):
        counts.append(len(weights))
        return original(x, weights, biases)

    monkeypatch.setattr(cpu, "linears", counting)
    return counts


@pytest.mark.parametrize("bits", ["4", "3", "4+4"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_layers_one_call(computed, bits, tokens, dtype):
    model, x = family(bits=bits), torch.randn(1, tokens, 128).to(dtype)
    with torch.inference_mode():
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            assert torch.equal(layer(x), alone(layer, x))
    assert computed == [3]


def test_an_output_serves_only_the_tensor_it_was_made_of(computed):
    model, x = family(), torch.randn(1, 128)
    with torch.no_grad():
        model.q_proj(x)
        other = torch.randn(1, 128)
        assert torch.equal(model.k_proj(other), alone(model.k_proj, other))
        model.q_proj(x)
        x.mul_(2)
        assert torch.equal(model.k_proj(x), alone(model.k_proj, x))
        assert torch.equal(model.k_proj(x), alone(model.k_proj, x))


def test_layers_that_never_share_stop_trying(computed):
    model = family()
    with torch.no_grad():
        for _ in range(30):
            for layer in (model.q_proj, model.k_proj):
                x = torch.randn(1, 128)
                assert torch.equal(layer(x), alone(layer, x))
    assert len(computed) < 12


def test_gradients_long_inputs_and_wrong_shapes_go_the_usual_way(computed):
    model = family()
    x = torch.randn(1, 128, requires_grad=True)
    model.q_proj(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        model.q_proj(torch.randn(64, 128))
        with pytest.raises(tqw.TqwError, match=r"expected an input \[..., 128\]"):
            model.q_proj(torch.randn(1, 64))
    assert computed == []


def test_replaced_parameters_are_seen():
    model, x = family(), torch.randn(1, 128)
    with torch.no_grad():
        model.q_proj(x)
        old = model.k_proj.channel_scale
        model.k_proj.channel_scale = nn.Parameter(old + 4, requires_grad=False)
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            x = torch.randn(1, 128)
            model.q_proj(x)
            assert torch.equal(layer(x), alone(layer, x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_families_of_their_own(computed, duplicate):
    model, x = family(), torch.randn(1, 128)
    with torch.no_grad():
        expected = model.q_proj(x)
        other = duplicate(model)
        computed.clear()
        assert torch.equal(other.q_proj(x), expected)
        other.k_proj(x), other.v_proj(x)
    assert computed == [3]
    assert other.q_proj.__dict__["_shared_input"].layers[0] is other.q_proj


def test_different_widths_are_not_computed_together(computed):
    model = family()
    model.k_proj = QuantizedLinear.from_linear(nn.Linear(128, 32), tqw.QuantConfig(bits=5))
    share_inputs(model)
    x = torch.randn(1, 128)
    with torch.no_grad():
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            assert torch.equal(layer(x), alone(layer, x))
    assert computed == []


@pytest.mark.parametrize("bits", ["4", "3", "4+4"])
def test_joined_weights_stay_what_they_were(bits):
    model = family(bits=bits)
    layers = [model.q_proj, model.k_proj, model.v_proj]
    before, state = [dequantize(layer.quantized_weight) for layer in layers], copy.deepcopy(model.state_dict())
    joined = join([layer.quantized_weight for layer in layers])
    assert joined is not None
    assert torch.equal(dequantize(joined.weight), torch.cat(before))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    weights = [layer.quantized_weight for layer in layers]
    assert joined.holds(weights)
    model.load_state_dict(state)  # in place: the joined weight follows, but its channel scales must be compared again
    assert torch.equal(dequantize(joined.weight), torch.cat(before))
    assert not joined.holds(weights)
    moved = copy.deepcopy(model)
    assert not joined.holds([moved.q_proj.quantized_weight, *weights[1:]])
    with torch.inference_mode():  # a tensor without a version
        moved = copy.deepcopy(model)
    assert not joined.holds([weights[0], moved.k_proj.quantized_weight, weights[2]])


def test_joined_weights_are_saved_one_by_one(tmp_path):
    """Nobody takes them for tied weights, of which all but one need not be written."""
    model = family()
    state = copy.deepcopy(model.state_dict())
    assert join([layer.quantized_weight for layer in (model.q_proj, model.k_proj, model.v_proj)]) is not None
    safetensors.torch.save_file(model.state_dict(), tmp_path / "file")
    safetensors.torch.save_model(model, str(tmp_path / "model"))
    torch.save(model.state_dict(), tmp_path / "pickle")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    files = [tmp_path / "file", tmp_path / "model", tmp_path / "accelerate" / "model.safetensors"]
    for again in (*map(safetensors.torch.load_file, files), torch.load(tmp_path / "pickle")):
        assert again.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
    for file in (*files, tmp_path / "pickle"):
        assert file.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in state.values()) + 6000


def test_joined_weights_keep_their_memory():
    model = family()
    layers = (model.q_proj, model.k_proj, model.v_proj)
    before = [dequantize(layer.quantized_weight) for layer in layers]
    assert join([layer.quantized_weight for layer in layers]) is not None  # and gone at once
    del model.q_proj, layers
    torch.full((1 << 16,), 255, dtype=torch.uint8)
    assert torch.equal(dequantize(model.k_proj.quantized_weight), before[1])
    assert torch.equal(dequantize(model.v_proj.quantized_weight), before[2])


def test_weights_that_differ_are_not_joined():
    model = family()
    weights = [model.q_proj.quantized_weight, model.k_proj.quantized_weight]
    other = QuantizedLinear.from_linear(nn.Linear(128, 32), tqw.QuantConfig(bits=5)).quantized_weight
    seed = QuantizedLinear.from_linear(nn.Linear(128, 32), tqw.QuantConfig(seed=3)).quantized_weight
    assert join([weights[0], other]) is None
    assert join([weights[0], seed]) is None


@pytest.mark.parametrize("joining", [False, True], ids=["outside", "inside"])
def test_layers_made_in_inference_mode_are_joined(monkeypatch, joining):
    """Their tensors have no versions; those that could change unnoticed get one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.inference_mode():
        model = copy.deepcopy(family())
        share_inputs(model)
    assert model.q_proj.channel_scale.is_inference()
    state = copy.deepcopy(model.state_dict())
    shared = model.q_proj.__dict__["_shared_input"]
    with torch.inference_mode(joining):
        joined = shared._join(torch.device("cpu"))
    assert joined is not None
    assert torch.equal(dequantize(joined.weight)[:96], dequantize(model.q_proj.quantized_weight))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.k_proj.channel_scale.mul_(2)
    assert shared._join(torch.device("cpu")) is None


def test_weights_on_different_devices_are_not_joined():
    """As accelerate offloads them: one layer at a time has tensors with values."""
    model = family()
    shared = model.q_proj.__dict__["_shared_input"]
    model.k_proj.to("meta")
    assert shared._join(torch.device("cpu")) is None
    assert shared.misses == 0


def test_the_joined_weight_follows_its_layers(monkeypatch):
    """What a call on a GPU looks at, with the product of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = family()
    layers, shared = [model.q_proj, model.k_proj, model.v_proj], model.q_proj.__dict__["_shared_input"]

    def joined():
        x = torch.randn(2, 128)
        outputs = shared._on_gpu(x)
        if outputs is not None:
            for layer, y in zip(layers, outputs, strict=True):
                torch.testing.assert_close(y, alone(layer, x), rtol=1e-5, atol=1e-5)
        return outputs and shared.joined

    with torch.no_grad():
        first = joined()
        assert first is not None
        assert joined() is first
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["k_proj.weight"] = state["k_proj.weight"].flip(0)
        model.load_state_dict(state)
        second = joined()
        assert second is not None
        assert joined() is second
        model.v_proj.bias = nn.Parameter(torch.randn(32))
        assert joined() is second
        model.k_proj.weight_scale.data = model.k_proj.weight_scale * 2
        third = joined()
        assert third not in (None, second)
        model.v_proj.weight = nn.Parameter(model.v_proj.weight.flip(0), requires_grad=False)
        last = joined()
        assert last not in (None, third)
        model.k_proj.channel_scale.add_(4)
        assert joined() is None
        model.k_proj.channel_scale.sub_(4)
        assert joined() not in (None, last)


def test_a_model_that_moves_leaves_no_joined_memory_behind():
    model = family()
    shared = model.q_proj.__dict__["_shared_input"]
    joined = shared.joined = join([layer.quantized_weight for layer in shared.layers])
    assert model.half().q_proj.__dict__["_shared_input"].joined is joined  # codes and scales stay where they are
    model.to("meta")
    assert shared.joined is None


class Joined(nn.Module):
    """What of a decoder layer matters here: three layers read one tensor, another reads what becomes of it."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention, self.out = family(**settings), nn.Linear(96, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.attention
        return self.out(a.q_proj(x).relu()) + torch.cat([a.k_proj(x), a.v_proj(x)], -1).repeat(1, 2).sin()


@pytest.fixture
def families(monkeypatch) -> list[str]:
    """The ops of every graph that torch.compile makes, families in one op on the CPU, too."""
    monkeypatch.setattr(shared_input, "_TRACED", ("cpu",))
    torch.compiler.reset()
    return []


def compiled(model: nn.Module, seen: list[str]):
    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "tqw" in str(node.target))
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("bits", ["4", "4+4"])
@pytest.mark.parametrize("joining", [False, True])
def test_a_compiled_family_is_one_op(families, bits, joining):
    model = Joined(bits=bits)
    layers = [model.attention.q_proj, model.attention.k_proj, model.attention.v_proj]
    shared = layers[0].__dict__["_shared_input"]
    if joining:
        shared.joined = join([layer.quantized_weight for layer in layers])
        assert shared.joined is not None
    step = compiled(model, families)
    with torch.no_grad():
        for tokens in (2, 5, 2):
            x = torch.randn(tokens, 128)
            expected = model.out(layers[0](x).relu()) + torch.cat([layers[1](x), layers[2](x)], -1).repeat(1, 2).sin()
            torch.testing.assert_close(step(x), expected, rtol=1e-5, atol=1e-5)
    assert set(families) == {"tqw.linear_family"}
    assert shared.traced is None


def test_the_op_of_a_family():
    model = family()
    weights = [layer.quantized_weight for layer in (model.q_proj, model.k_proj)]
    tensors = [[getattr(qw, name)[0] for qw in weights] for name in ("packed", "weight_scale", "channel_scale")]
    torch.library.opcheck(torch.ops.tqw.linear_family.default, (torch.randn(3, 128), *tensors, weights[0].rotation))


def test_a_compiled_family_that_cannot_be_one_op(families):
    """An input that needs a gradient; layers of other widths; a layer that is not called."""
    model = Joined()
    x = torch.randn(2, 128, requires_grad=True)
    compiled(model, families)(x).sum().backward()
    assert set(families) == {"tqw.linear"}
    families.clear()
    model.attention.k_proj = QuantizedLinear.from_linear(nn.Linear(128, 32), tqw.QuantConfig(bits=5))
    share_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, families)(x), model(x))
        assert set(families) == {"tqw.linear"}
        single = family()
        for _ in range(3):
            x = torch.randn(2, 128)
            torch.testing.assert_close(compiled(single.k_proj, families)(x), single.k_proj(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_one_kernel_for_the_family_on_a_gpu(monkeypatch, tokens):
    from tqw import kernels

    model = family().cuda().half()
    rounded = 2e-3 if tokens == 1 else 1e-2  # outputs to fp16; of several tokens inputs to 8 bits: 0.7 %
    rows: list[int] = []
    original = kernels.linear_plain
    monkeypatch.setattr(
        kernels, "linear_plain", lambda x, qw, bias: rows.append(qw.out_features) or original(x, qw, bias)
    )
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(1, tokens, 128, device="cuda", dtype=torch.half)
            for layer in (model.q_proj, model.k_proj, model.v_proj):
                dense = torch.nn.functional.linear(x.double(), dequantize(layer.quantized_weight).double())
                exact = dense if layer.bias is None else dense + layer.bias.double()
                assert ((layer(x).double() - exact).norm() / exact.norm()) < rounded
        x = torch.randn(1, 1, 128, device="cuda", dtype=torch.half)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = [layer(x) for layer in (model.q_proj, model.k_proj, model.v_proj)]
        x.copy_(torch.randn(1, 1, 128))
        graph.replay()
        for layer, output in zip((model.q_proj, model.k_proj, model.v_proj), y, strict=True):
            exact = torch.nn.functional.linear(x.double(), dequantize(layer.quantized_weight).double())
            exact = exact if layer.bias is None else exact + layer.bias.double()
            assert ((output.double() - exact).norm() / exact.norm()) < 2e-3
    assert rows == [160] * 4
