"""The op `tqw::linear`: equal to the dense layer, differentiable, compilable, exportable."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch.nn import functional

from tqw import kernels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.weight import QuantizedWeight, dequantize, quantize

# Unit round-off of each dtype, for the bound below.
ROUND_OFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def make(out_features: int = 17, in_features: int = 100, **settings) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight, QuantConfig(**settings))


def check(y: torch.Tensor, x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
    """|y - x W^T| <= u |y| for the output's rounding, plus float32 accumulation of the transform and the product.

    The transform sums at most 128 terms and the product in_features terms, each with error 2^-24 relative to the sum of
    magnitudes |T(x)| |V|^T; errors of random sign grow like the square root of the count, for which 4 sqrt(n) is ample.
    """
    dense = dequantize(qw).double()
    exact = functional.linear(x.double(), dense, None if bias is None else bias.double())
    magnitude = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    bound = 2 * ROUND_OFF[x.dtype] * exact.abs() + 4 * qw.padded_in**0.5 * 2.0**-24 * magnitude + 1e-30
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("in_features", [576, 100, 11008])
@pytest.mark.parametrize("out_features", [1, 17])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_the_dense_linear(in_features, out_features, tokens, dtype):
    qw = make(out_features, in_features)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(3)).to(dtype)
    check(kernels.linear(x, qw, bias, backend="reference"), x, qw, bias)


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4", "3+2", "2+2+2"])
@pytest.mark.parametrize("rotation", ["hadamard", "qr", "none"])
@pytest.mark.parametrize("strategy", ["shared", "different", "alternating"])
def test_all_forms_of_weight(bits, rotation, strategy):
    qw = make(24, 192, bits=bits, rotation=rotation, rotation_strategy=strategy, group_size=64)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(4))
    check(kernels.linear(x, qw, backend="reference"), x, qw)


def test_non_contiguous_and_many_dimensional_inputs():
    qw = make(17, 100)
    x = torch.randn(100, 4, 3).permute(2, 1, 0)
    check(kernels.linear(x, qw, backend="reference"), x, qw)
    wide = torch.randn(6, 200)[::2, ::2]
    check(kernels.linear(wide, qw, backend="reference"), wide, qw)
    vector = torch.randn(100)
    check(kernels.linear(vector, qw, backend="reference"), vector, qw)


@pytest.mark.parametrize("bits", ["4", "3+2"])
@pytest.mark.parametrize("strategy", ["shared", "different"])
def test_gradients_are_the_dense_ones(bits, strategy):
    qw = make(bits=bits, rotation_strategy=strategy)
    dense = dequantize(qw)
    x = torch.randn(3, 5, 100, requires_grad=True)
    bias = torch.randn(17, requires_grad=True)
    grad = torch.randn(3, 5, 17)
    ours = torch.autograd.grad(kernels.linear(x, qw, bias), (x, bias), grad)
    theirs = torch.autograd.grad(functional.linear(x, dense, bias), (x, bias), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bits": "4+4"}, {"bits": "3+2", "rotation_strategy": "different"},
                                      {"rotation": "qr"}])  # fmt: skip
def test_opcheck(settings):
    qw = make(**settings)
    x, bias = torch.randn(3, 100, requires_grad=True), torch.randn(17, requires_grad=True)
    weight = kernels.arguments(qw)
    for op, arguments in (
        (torch.ops.tqw.linear, (x, bias, *weight)),
        (torch.ops.tqw.linear, (x, None, *weight)),
        (torch.ops.tqw.linear_backward, (torch.randn(3, 17), *weight)),
        (torch.ops.tqw.embedding, (torch.tensor([[0, 5], [16, 1]]), *weight, torch.bfloat16)),
    ):
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_compiles_in_one_dynamic_graph_and_exports():
    qw = make()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernels.linear(x, qw).relu(), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 8, 1):
        x = torch.randn(tokens, 100)
        torch.testing.assert_close(compiled(x), kernels.linear(x, qw).relu())

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kernels.linear(x, qw)

    tokens = torch.export.Dim("tokens", min=1, max=64)
    program = torch.export.export(Layer(), (torch.randn(4, 100),), dynamic_shapes={"x": {0: tokens}})
    x = torch.randn(9, 100)
    torch.testing.assert_close(program.module()(x), kernels.linear(x, qw))


def test_explain_names_every_backend_and_selects_one():
    answers = kernels.explain(torch.randn(1, 100), make())
    assert set(answers) == set(kernels.BACKENDS)
    assert list(answers.values()).count("selected") == 1


def test_wrong_calls_are_explained():
    qw = make()
    with pytest.raises(TqwError, match=r"input \[..., 100\], got \[2, 99\]"):
        kernels.linear(torch.randn(2, 99), qw)
    with pytest.raises(TqwError, match="a backend of auto"):
        kernels.linear(torch.randn(2, 100), qw, backend="cublas")


def test_embedding_returns_dense_rows():
    qw = make(50, 96, bits="8")
    ids = torch.tensor([[0, 49], [7, 7]])
    torch.testing.assert_close(kernels.embedding(ids, qw, torch.float32), dequantize(qw)[ids], rtol=1e-5, atol=1e-6)
    assert kernels.embedding(ids, qw, torch.float16).dtype == torch.float16
    assert kernels.embedding(ids[:0], qw, torch.float32).shape == (0, 2, 96)


def test_whoever_watches_sees_the_op():
    """Eager calls skip the dispatcher, but never one that a mode, a trace or a transform looks at."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    qw, x = make(), torch.randn(3, 100)
    with torch.no_grad():
        plain = kernels.linear(x, qw)
        with Watch():
            watched = kernels.linear(x, qw)
        graph = make_fx(lambda t: kernels.linear(t, qw))(x)
    assert "tqw.linear.default" in seen
    assert torch.equal(plain, watched)
    assert any("tqw.linear" in str(node.target) for node in graph.graph.nodes)
