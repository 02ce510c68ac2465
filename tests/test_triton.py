"""The Triton backend, on a GPU where there is one, else in Triton's interpreter: equal to the dense layer."""

from __future__ import annotations

import pytest
import torch
from conftest import replayed

from tqw import kernels
from tqw.config import QuantConfig
from tqw.kernels import gpu, triton
from tqw.weight import QuantizedWeight, dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND_OFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def make(out_features: int, in_features: int, **settings) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight.to(DEVICE), QuantConfig(**settings))


def check(y: torch.Tensor, x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
    """T(x) is rounded to fp16, u = 2^-11 of each value (2^-25 of the block's largest below), so by Cauchy-Schwarz the
    error is below 2^-11 |x| |w|; float32 sums of k products add k 2^-24 |x| |w|; then y is rounded to its dtype.
    """
    dense = dequantize(qw).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    magnitude = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    rounded = (0 if x.dtype == torch.float32 else 1.1 * 2.0**-11) + x.shape[-1] * 2.0**-24
    bound = 2 * ROUND_OFF[x.dtype] * exact.abs() + rounded * magnitude
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("in_features", [576, 100, 11008])
@pytest.mark.parametrize("out_features", [1, 17])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130, 512])
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
def test_linear_is_the_dense_linear(in_features, out_features, tokens, dtype):
    qw = make(out_features, in_features)
    x, bias = torch.randn(tokens, in_features).to(DEVICE, dtype), torch.randn(out_features).to(DEVICE, dtype)
    check(kernels.linear(x, qw, bias, backend="triton"), x, qw, bias)


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4", "3+2", "2+2+2+2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_widths_and_groups(bits, group_size):
    qw = make(40, 512, bits=bits, group_size=group_size)
    for tokens in (1, 20, 70):
        x = torch.randn(tokens, 512).to(DEVICE, torch.float16)
        check(kernels.linear(x, qw, backend="triton"), x, qw)


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_not_contiguous_and_more_dimensions(rotation):
    qw = make(24, 192, bits="4+2", rotation=rotation)
    x = torch.randn(192, 6).to(DEVICE, torch.float16).T
    check(kernels.linear(x, qw, backend="triton"), x, qw)
    check(kernels.linear(x.reshape(2, 3, 192), qw, backend="triton").reshape(6, 24), x, qw)


@pytest.mark.parametrize("tokens", [1, 40])
def test_parts_of_the_inputs_add_up(tokens, monkeypatch):
    """With few programs on a large GPU, parts of the inputs are summed afterwards; here always."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 1000)
    qw = make(40, 2048)
    x, bias = torch.randn(tokens, 2048).to(DEVICE, torch.bfloat16), torch.randn(40).to(DEVICE, torch.bfloat16)
    check(kernels.linear(x, qw, bias, backend="triton"), x, qw, bias)


def test_large_and_broken_inputs():
    """The scale of each block keeps T(x) of huge inputs finite in fp16; NaN and Inf reach every output of the token."""
    qw = make(16, 256)
    x = torch.randn(3, 256).to(DEVICE, torch.float16)
    x[0] *= 10000
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    x = x.bfloat16()
    y = kernels.linear(x, qw, backend="triton")
    check(y[:1], x[:1], qw)
    assert not torch.isfinite(y[1:]).any()


def test_says_why_not():
    x = torch.randn(1, 64).to(DEVICE)
    assert "stored matrix" in (triton.supports(x, make(8, 64, rotation="qr")) or "")
    assert "float64" in (triton.supports(x.double(), make(8, 64)) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_graph_capture():
    qw = make(64, 256)
    x = torch.randn(2, 256).cuda().half()
    y = replayed(lambda x: kernels.linear(x, qw, backend="triton"), x)
    check(y, x, qw)
