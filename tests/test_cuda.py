"""The CUDA backend: equal to the dense layer within the bound of its fixed-point inputs; compiles without a GPU."""

from __future__ import annotations

import pytest
import torch

from tqw import kernels
from tqw.config import QuantConfig
from tqw.kernels import cuda
from tqw.weight import QuantizedWeight, dequantize, quantize

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
ROUND_OFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def make(out_features: int, in_features: int, **settings) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight.cuda(), QuantConfig(**settings))


def check(y: torch.Tensor, x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
    """Few tokens: inputs are rounded to 2^-16 of their tile's largest, at most |T(x)| of the tile, so by Cauchy-Schwarz
    the error is below 2^-13 |x| |w|. Dozens to hundreds: T(x) and V are rounded to fp16, 2^-12 each, so 2^-11 |x| |w|.
    More: dense weights are rounded to the dtype, 2 u |x| |w|.
    """
    dense = dequantize(qw).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    magnitude = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    unit = ROUND_OFF[x.dtype]
    rounded = 2.0**-11 if 16 < magnitude.shape[0] <= 1024 else 2.0**-13
    bound = 2 * unit * exact.abs() + (rounded + 2 * unit) * magnitude
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_features", [576, 100, 11008])
@pytest.mark.parametrize("out_features", [1, 17])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130, 512])
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
def test_linear_is_the_dense_linear(in_features, out_features, tokens, dtype):
    qw = make(out_features, in_features)
    x, bias = torch.randn(tokens, in_features).cuda().to(dtype), torch.randn(out_features).cuda().to(dtype)
    check(kernels.linear(x, qw, bias, backend="cuda"), x, qw, bias)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4", "3+2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_widths_and_groups(bits, group_size):
    qw = make(40, 1024, bits=bits, group_size=group_size)
    for tokens in (1, 9, 300):
        x = torch.randn(tokens, 1024).cuda().half()
        check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rotation", ["hadamard", "qr", "none"])
@pytest.mark.parametrize("strategy", ["shared", "different", "alternating"])
def test_rotations(rotation, strategy):
    qw = make(24, 192, bits="4+2", rotation=rotation, rotation_strategy=strategy)
    x = torch.randn(192, 5).cuda().half().T  # not contiguous
    check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
def test_graph_capture_and_embedding():
    qw = make(64, 256)
    x = torch.randn(2, 256).cuda().half()
    kernels.linear(x, qw)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.linear(x, qw)
    x.copy_(torch.randn(2, 256))
    y.fill_(float("nan"))
    graph.replay()
    check(y, x, qw)
    ids = torch.tensor([[0, 63], [7, 7]]).cuda()
    torch.testing.assert_close(kernels.embedding(ids, qw, torch.float32), dequantize(qw)[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_compiles_without_a_gpu(arch):
    variant = cuda.Variant((3, 4), 512, 128, 128, 128, True, True, 1, column_tiles=2, fused=False, warps=4)
    cubin, log = cuda.compile_with_log(variant.source(), arch)
    assert cubin[:4] == b"\x7fELF"
    assert log.count("bytes spill stores") == 3
    assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == 3


@pytest.mark.parametrize("tokens", [20, 60, 90, 128, 200, 256, 512])
def test_middle_kernels_compile_without_spills(tokens):
    h100 = cuda._Device(0, "sm_90a", 132, 232448, True)
    base = cuda.Variant((4,), 4096, 128, 128, 128, True, True, 2)
    variant = cuda._middle_variant(base, tokens, 4096, h100)
    assert variant is not None
    assert variant.ring_bytes() * variant.min_ctas <= h100.shared_bytes
    _, log = cuda.compile_with_log(variant.source(), "sm_90a")
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert "wgmma" not in log  # the compiler says so where it has to serialise them


def test_says_why_not_without_a_gpu():
    qw = quantize(torch.randn(8, 64), QuantConfig())
    assert "not on a CUDA device" in (cuda.supports(torch.randn(1, 64), qw) or "")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("bits", "out_features", "in_features"), [("4", 528, 1024), ("3+2", 48, 4096), ("8", 64, 544)])
def test_fp8_activations(monkeypatch, bits, out_features, in_features):
    """e4m3 rounds T(x) and V by at most 2^-4 of each value, so |y - exact| < 2^-3 (1 + 2^-4) |x| |w|."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need sm_89")
    monkeypatch.setattr(cuda, "_fp8_wanted", lambda: True)
    qw = make(out_features, in_features, bits=bits)
    x, bias = torch.randn(600, in_features).cuda().bfloat16(), torch.randn(out_features).cuda().bfloat16()
    x[5] *= 1000
    called = []
    original = cuda._many_fp8
    monkeypatch.setattr(cuda, "_many_fp8", lambda *args: called.append(1) or original(*args))
    y = kernels.linear(x, qw, bias, backend="cuda")
    dense = dequantize(qw).double()
    exact = x.double() @ dense.T + bias.double()
    magnitude = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    assert ((y.double() - exact).abs() <= 2.0**-3 * 1.1 * magnitude + 2.0**-8 * exact.abs()).all()
    assert (y.double() - exact).norm() / exact.norm() < 0.05
    assert called == [1]
    check(kernels.linear(x[:20], qw, bias, backend="cuda"), x[:20], qw, bias)  # few tokens: exact
    assert called == [1]
