"""Mixtures of experts by pairs and by expert: the same sum, compiled, exported, with a gradient, in a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import tiny, token_ids
from torch import Tensor
from torch.nn import functional

import tqw
from tqw import kernels, mixture
from tqw.weight import dequantize, quantize

NAMES = ("mixtral", "qwen3_moe", "gpt_oss")
EXPERTS = 4


@torch.no_grad()
def logits(model: Callable) -> Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def quantized(name: str) -> torch.nn.Module:
    model = tiny(name)
    tqw.quantize_model(model, tqw.QuantConfig(group_size=32))
    return model


def gated(projected: Tensor) -> Tensor:
    gate, linear = projected.chunk(2, -1)
    return functional.silu(gate) * linear


def made(**settings) -> mixture.Experts:
    generator = torch.Generator().manual_seed(0)

    def projection(out_features: int, in_features: int) -> mixture.Projection:
        weight = torch.randn(EXPERTS, out_features, in_features, generator=generator) * 0.1
        qw = quantize(weight, tqw.QuantConfig(bits="8", group_size=64, **settings))
        return qw, torch.randn(EXPERTS, out_features, generator=generator)

    return mixture.Experts(projection(128, 64), projection(64, 64), gated)


def tokens(count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights; some ids are those of other ranks' experts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, EXPERTS + 1, (count, 2), generator=generator)
    ids[0] = 2
    return torch.randn(count, 64, generator=generator), ids, torch.rand(count, 2, generator=generator)


def defined(x: Tensor, ids: Tensor, weights: Tensor, experts: mixture.Experts) -> Tensor:
    """The sum, pair by pair, with dense weights."""
    (up, up_bias), (down, down_bias) = ((dequantize(qw), bias) for qw, bias in (experts.up, experts.down))
    assert up_bias is not None
    assert down_bias is not None
    y = torch.zeros_like(x)
    for token, row in enumerate(ids.tolist()):
        for position, e in enumerate(row):
            if 0 <= e < EXPERTS:
                inner = gated((up[e] @ x[token] + up_bias[e])[None])[0]
                y[token] += weights[token, position] * (down[e] @ inner + down_bias[e])
    return y


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_sum_by_its_definition(count):
    """The CPU kernels round activations to int8; by pairs or by expert, they round the same."""
    x, ids, weights = tokens(count) if count else (a[:0] for a in tokens())
    experts = made()
    y = mixture.mixture(x, ids, weights, experts)
    assert y.shape == x.shape
    together = mixture._together(x, ids, weights, experts, opaque=True)
    assert together is not None
    torch.testing.assert_close(together, y, rtol=1e-5, atol=1e-5)
    if count:
        assert relative(y, defined(x, ids, weights, experts)) < 0.01


def test_the_ops():
    up, bias = made().up
    x, ids, weights = tokens()
    pairs, weight = torch.randn(7, 2, 64, requires_grad=True), kernels.arguments(up)
    for op, arguments in (
        (torch.ops.tqw.experts, (x.requires_grad_(), ids, bias, *weight)),
        (torch.ops.tqw.experts, (x, ids, None, *weight)),
        (torch.ops.tqw.experts_backward, (torch.randn(7, 2, 128), ids, 7, *weight)),
        (torch.ops.tqw.combine, (pairs, weights.requires_grad_(), ids, EXPERTS)),
    ):
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_pairs_of_every_expert_need_no_look_at_the_ids():
    projection = made().up
    x, ids, _ = tokens()
    found = mixture._pairs_of_every_expert(x, projection, ids)
    torch.testing.assert_close(found, mixture._pairs_by_expert(x, projection, ids), rtol=1e-5, atol=1e-5)
    assert (found[(ids < 0) | (ids >= EXPERTS)] == 0).all()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_module_by_pairs_is_the_module_by_expert(monkeypatch, name):
    """With the model's own gate and biases; ids of another rank add nothing either way."""
    module = next(m for m in quantized(name).modules() if isinstance(m, tqw.QuantizedExperts))
    x, ids, weights = torch.randn(3, 64), torch.tensor([[0, 3], [2, 4], [1, -1]]), torch.rand(3, 2)
    with torch.no_grad():
        expected = module(x, ids, weights)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(module(x, ids, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_is_compiled_whole(name):
    torch.compiler.reset()
    model = quantized(name)
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_is_exported(name):
    model = quantized(name)
    program = torch.export.export(model, (), {"input_ids": token_ids(), "use_cache": False}, strict=False)
    assert {"tqw.experts.default", "tqw.combine.default"} <= {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(logits(program.module()), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_goes_through(compiled):
    """To the inputs, the router's weights and the biases; codes have none."""
    torch.compiler.reset()
    x, ids, weights = tokens()
    experts = made()
    leaves = [x, weights, *(bias for _, bias in (experts.up, experts.down) if bias is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    call = partial(mixture.mixture, ids=ids, experts=experts)
    call = torch.compile(call, fullgraph=True) if compiled else call
    found = torch.autograd.grad(call(x, weights=weights).square().sum(), leaves)
    exact = torch.autograd.grad(defined(x, ids, weights, experts).square().sum(), leaves)
    assert all(relative(mine, other) < 0.05 for mine, other in zip(found, exact, strict=True))


def moved(projection: mixture.Projection) -> mixture.Projection:
    """On the GPU."""

    def to(tensors):
        return tuple(tensor.cuda() for tensor in tensors)

    qw, bias = projection
    assert bias is not None
    passes = to(qw.packed), to(qw.weight_scale), to(qw.channel_scale)
    return type(qw)(*passes, qw.rotation, qw.rotation_matrix), bias.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("rotation", ["hadamard", "qr"])
def test_a_graph_of_a_mixture(rotation):
    """Also where there is no kernel for all experts (qr). Captured with other ids than it is replayed with."""
    cpu = made(rotation=rotation)
    experts = mixture.Experts(moved(cpu.up), moved(cpu.down), gated)
    x, ids, weights = (tensor.cuda() for tensor in tokens())
    other = torch.full_like(ids, 1)

    def call(x: Tensor) -> Tensor:
        return mixture.mixture(x, other, weights, experts)

    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        call(x)
        with torch.cuda.graph(graph):
            y = call(x)
        other.copy_(ids)
        graph.replay()
        assert relative(y.cpu(), defined(x.cpu(), ids.cpu(), weights.cpu(), cpu)) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_mixture_on_a_gpu(name, mode):
    torch.compiler.reset()
    model = copy.deepcopy(quantized(name)).cuda().half()
    ids = token_ids().cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for _ in range(4):  # captured at the second call or the third
            found = compiled(input_ids=ids, use_cache=False).logits
            assert relative(found, expected) < 2e-2
