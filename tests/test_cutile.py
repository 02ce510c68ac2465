"""The cuTile backend: equal to the dense layer, on a GPU where there is one, else with its tiles on numpy; compiles
without a GPU where cuda-tile is installed."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from importlib.util import find_spec

import cutile_on_cpu
import pytest
import torch
from conftest import replayed
from test_triton import check

from tqw import kernels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.kernels import cutile, gpu
from tqw.packing import PLANES
from tqw.weight import QuantizedWeight, quantize

ON_GPU = torch.cuda.is_available() and cutile.installed()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="torch sees no CUDA device, or cuda-tile is not installed")


@pytest.fixture
def linear(monkeypatch):
    """The backend; without a GPU its kernels run on numpy."""
    if ON_GPU:
        yield lambda x, qw, bias=None: kernels.linear(x, qw, bias, backend="cutile")
        return
    fake = cutile_on_cpu.module()
    monkeypatch.setitem(sys.modules, "cuda.tile", fake)
    if find_spec("cuda") is not None:
        monkeypatch.setattr(import_module("cuda"), "tile", fake, raising=False)
    monkeypatch.delitem(sys.modules, "tqw.kernels.cutile_kernels", raising=False)
    monkeypatch.delattr(kernels, "cutile_kernels", raising=False)
    monkeypatch.setattr(cutile, "_launch", cutile_on_cpu.launch)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 4)
    yield lambda x, qw, bias=None: cutile.linear(x, qw, bias)
    sys.modules.pop("tqw.kernels.cutile_kernels", None)


def make(out_features: int, in_features: int, **settings) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight.to(DEVICE), QuantConfig(**settings))


@pytest.mark.parametrize("in_features", [576, 100, 1408])
@pytest.mark.parametrize("out_features", [1, 17, 100])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_is_the_dense_linear(linear, in_features, out_features, tokens, dtype):
    qw = make(out_features, in_features)
    x, bias = torch.randn(tokens, in_features).to(DEVICE, dtype), torch.randn(out_features).to(DEVICE, dtype)
    check(linear(x, qw, bias), x, qw, bias)


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4", "3+2", "2+2+2+2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_widths_and_groups(linear, bits, group_size):
    qw = make(40, 512, bits=bits, group_size=group_size)
    for tokens in (1, 20, 70):
        x = torch.randn(tokens, 512).to(DEVICE, torch.float16)
        check(linear(x, qw), x, qw)


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_not_contiguous_and_more_dimensions(linear, rotation):
    qw = make(24, 192, bits="4+2", rotation=rotation)
    x = torch.randn(192, 6).to(DEVICE, torch.float16).T
    check(linear(x, qw), x, qw)
    check(linear(x.reshape(2, 3, 192), qw).reshape(6, 24), x, qw)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_parts_of_the_inputs_add_up(linear, tokens, bias, monkeypatch):
    """With few programs on a large GPU, parts of the inputs are summed afterwards; here always."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 1000)
    qw = make(40, 2048)
    x, b = torch.randn(tokens, 2048).to(DEVICE, torch.bfloat16), torch.randn(40).to(DEVICE, torch.bfloat16)
    check(linear(x, qw, b if bias else None), x, qw, b if bias else None)


def test_large_and_broken_inputs(linear):
    """The scale of each block keeps T(x) of huge inputs finite in fp16; NaN and Inf reach every output of the token."""
    qw = make(16, 256)
    x = torch.randn(3, 256).to(DEVICE, torch.float16)
    x[0] *= 10000
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    x = x.bfloat16()
    y = linear(x, qw)
    check(y[:1], x[:1], qw)
    assert not torch.isfinite(y[1:]).any()


def test_is_never_chosen_by_itself_and_says_why_not():
    x, qw = torch.randn(1, 64).to(DEVICE), make(8, 64)
    assert kernels.explain(x, qw)["cutile"] != "selected"
    if ON_GPU:
        assert "stored matrix" in (cutile.supports(x, make(8, 64, rotation="qr")) or "")
        assert "float64" in (cutile.supports(x.double(), qw) or "")
    else:
        with pytest.raises(TqwError, match=r"not on a GPU|not installed"):
            kernels.linear(x, qw, backend="cutile")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8"])
def test_a_large_layer(bits):
    qw = make(1000, 4096, bits=bits)
    for tokens in (1, 100, 600):
        x = torch.randn(tokens, 4096).cuda().bfloat16()
        check(kernels.linear(x, qw, backend="cutile"), x, qw)


@pytest.mark.gpu
@needs_gpu
def test_graph_capture():
    qw = make(64, 256)
    x = torch.randn(2, 256).cuda().half()
    y = replayed(lambda x: kernels.linear(x, qw, backend="cutile"), x)
    check(y, x, qw)


@pytest.mark.skipif(not cutile.installed(), reason="cuda-tile is not installed")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_compiles_without_a_gpu(bits, arch):
    ct, compilation = import_module("cuda.tile"), import_module("cuda.tile.compilation")
    code = import_module("tqw.kernels.cutile_kernels")

    def array(dtype, ndim):
        return compilation.ArrayConstraint(
            dtype, ndim, index_dtype=ct.int32, stride_lower_bound_incl=0, alias_groups=(), may_alias_internally=False,
            stride_constant=(*[None] * (ndim - 1), 1), stride_divisible_by=(*[16] * (ndim - 1), 1),
            base_addr_divisible_by=16,
        )  # fmt: skip

    def cubin(kernel, *parameters):
        signature = compilation.KernelSignature(parameters, compilation.CallingConvention.cutile_python_v1())
        file = io.BytesIO()
        compilation.export_kernel(kernel, [signature], file, gpu_code=arch, output_format="cubin")
        return file.getvalue()

    low, high = (*PLANES[bits], 0)[:2]
    each = 2 if bits in (2, 3, 4) else 1
    for x, inner in ((ct.bfloat16, ct.float16), (ct.float32, ct.float32)):
        vectors = array(x, 2), array(ct.uint8, 1), array(ct.float16, 2), array(inner, 2), array(ct.float32, 2)
        assert cubin(code.transform, *vectors, 128, True, 16)[:4] == b"\x7fELF"
        y = compilation.ArrayConstraint(
            x, 3, index_dtype=ct.int64, stride_lower_bound_incl=0, alias_groups=(), may_alias_internally=False,
            stride_constant=(None, None, 1),
        )  # fmt: skip
        tensors = array(inner, 2), array(ct.float32, 2), array(ct.uint8, 3), array(ct.uint8, 3), array(ct.float16, 2)
        tensors = *tensors, array(ct.int32 if each == 2 else ct.float16, 1), array(x, 1), y
        assert cubin(code.product, *tensors, low, high, each, 128, 128, 128, 32, True, 16, 64)[:4] == b"\x7fELF"
