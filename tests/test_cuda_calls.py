"""What the CUDA backend asks of the driver, one that only takes notes: on any machine, with tensors on the CPU."""

from __future__ import annotations

import copy
import ctypes
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tqw.config import QuantConfig
from tqw.kernels import cuda, cuda_launch, cuda_plan
from tqw.weight import quantize

SCRATCH = 1 << 40  # address of all borrowed memory


class Driver:
    """The functions of cuda.bindings.driver that the backend uses."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1
    )
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4
    )
    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []  # kernel, configuration, parameters

    def __getattr__(self, name: str) -> Any:
        answers = {
            "cuOccupancyMaxActiveClusters": 60, "cuModuleLoadData": "module", "cuFuncGetAttribute": 128,
            "cuOccupancyMaxActiveBlocksPerMultiprocessor": 2,
        }  # fmt: skip
        return lambda *_: (0, answers.get(name, 1))

    def CUlaunchAttribute(self) -> Any:
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, str]:
        return 0, name.decode()

    def cuLaunchKernelEx(self, config: Any, function: str, arguments: int, extra: int) -> tuple[int]:
        kind = cuda._CombineParams if function == "tqw_combine" else cuda._Params
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        self.calls.append((function.removeprefix("tqw_"), config, kind.from_buffer_copy(kind.from_address(address))))
        return (extra,)

    def taken(self) -> list[tuple[str, Any, Any]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def driver(monkeypatch):
    """An H100 that notes what it is asked for."""
    noted = Driver()
    h100 = cuda_launch.Device(0, "sm_90a", 132, 227 << 10, True)
    for name, value in {"driver_module": lambda: noted, "cubin": lambda source, arch: source.encode()}.items():
        monkeypatch.setattr(cuda_launch, name, value)
    for name, value in {
        "device_at": lambda index: h100, "enter": lambda index: None,
        "borrow": lambda size, stream: SCRATCH, "give_back": lambda address: None, "takes_stack": lambda x, qw: True,
    }.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # as a CPU tensor's get_device says
    monkeypatch.setattr(torch.cuda, "device", lambda device: cuda._NOTHING)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 3, raising=False)

    def forget() -> None:
        cuda.forget()
        for cached in (
            cuda_plan.linear_plan, cuda_plan.expert_plan, cuda_plan.expert_tokens, cuda_plan.prompt_launches,
            cuda_plan.dequantize_launch, cuda_plan.combine_launch, cuda_plan._function, cuda_launch.resident,
            cuda_launch.ctas_at_once, cuda._compile_modules,
        ):  # fmt: skip
            cached.cache_clear()

    forget()
    yield noted
    forget()


@pytest.mark.parametrize("bits", ["4", "6"])
def test_what_is_compiled_ahead(driver, monkeypatch, bits):
    """All that calls compile later, and nothing else."""
    compiled: list[str] = []
    for module in (cuda, cuda_launch):
        monkeypatch.setattr(module, "cubin", lambda source, arch: compiled.append(source) or b"")
    tokens = [1, 2, 3, 8, 16, 24, 64, 256, 2048]
    qw = quantize(torch.randn(1536, 2048) * 0.05, QuantConfig(bits=bits))
    for _ in range(2):
        cuda.compile_ahead(qw, torch.bfloat16, tokens)
    ahead = sorted(compiled)
    assert len(ahead) == len(set(ahead)) >= 6
    compiled.clear()
    for count in tokens:
        cuda.linear(torch.randn(count, 2048).bfloat16(), qw, None)
    assert set(compiled) == set(ahead)
    different = quantize(torch.randn(16, 256), QuantConfig(bits="3+2", rotation_strategy="different"))
    compiled.clear()
    cuda.compile_ahead(different, torch.bfloat16, tokens)
    assert compiled == []


@pytest.mark.parametrize("shape", [(8, 256, 512), (64, 1536, 2048), (4, 512, 4096)])
def test_what_is_compiled_ahead_for_a_mixture(driver, monkeypatch, shape):
    """All that `experts` compiles later, and nothing else."""
    compiled: list[str] = []
    for module in (cuda, cuda_launch):
        monkeypatch.setattr(module, "cubin", lambda source, arch: compiled.append(source) or b"")
    tokens, choices = [1, 2, 3, 8, 16, 24, 64, 256, 2048], 2
    stack = quantize(torch.randn(shape) * 0.05, QuantConfig())
    cuda.compile_ahead(stack, torch.bfloat16, tokens, choices)
    ahead = sorted(compiled)
    assert len(ahead) == len(set(ahead)) >= 3
    compiled.clear()
    for count in tokens:
        assert (
            cuda.experts(torch.randn(count, shape[2]).bfloat16(), stack, torch.zeros(count, choices).long()) is not None
        )
    assert set(compiled) == set(ahead)


def names(calls: list[tuple[str, Any, Any]]) -> list[str]:
    return [name for name, _, _ in calls]


def expected(x: Tensor, y: Tensor, params: Any, first: int = 0) -> bool:
    """Whether the parameters name row `first` of x and of y."""
    row = x.shape[-1] * x.element_size()
    return params.x == x.data_ptr() + first * row and params.y == y.data_ptr() + first * y.shape[-1] * y.element_size()


@pytest.mark.parametrize(
    ("tokens", "kernels"),
    [(0, []), (1, ["decode"]), (5, ["transform", "decode"]), (40, ["spread", "middle"]), (2000, ["spread", "middle"])],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_of_a_call(driver, tokens, kernels, dtype):
    qw, bias = quantize(torch.randn(1536, 2048) * 0.05, QuantConfig()), torch.randn(1536).to(dtype)
    for x in (torch.randn(tokens, 2048).to(dtype), torch.randn(1, tokens, 2048).to(dtype)):
        for call in (cuda.linear, cuda.linear_again, cuda.linear_kept, cuda.linear_kept):
            y, calls = call(x, qw, bias), driver.taken()
            assert y is not None
            assert (y.shape, y.dtype) == ((*x.shape[:-1], 1536), dtype)
            assert names(calls) == kernels
            for _, config, params in calls:
                assert expected(x, y, params)
                assert (params.bias, params.tokens, params.x_stride, params.vectors) == (
                    bias.data_ptr(),
                    tokens,
                    2048,
                    1,
                )
                assert config.hStream == 3
                if len(kernels) == 2:
                    assert params.planes == SCRATCH < params.plane_scale


def test_rows_far_apart_are_not_copied_and_columns_are(driver):
    qw, wide = quantize(torch.randn(64, 512), QuantConfig()), torch.randn(3, 1024).bfloat16()
    cuda.linear(wide[:, 100:612], qw, None)
    for _, _, params in driver.taken():
        assert (params.x, params.x_stride, params.vectors) == (wide.data_ptr() + 200, 1024, 0)
    columns = torch.randn(512, 3).bfloat16().T
    cuda.linear(columns, qw, None)
    for _, _, params in driver.taken():
        assert params.x != columns.data_ptr()
        assert params.x_stride == 512


def test_turns_and_slices_of_a_prompt_follow_each_other(driver, monkeypatch):
    monkeypatch.setattr(cuda_plan, "is_prompt", lambda *_: True)
    monkeypatch.setattr(cuda, "_PROMPT_BYTES", 1 << 20)
    monkeypatch.setattr(cuda, "_ROWS_BYTES", 2 << 20)
    qw, x = quantize(torch.randn(3080, 1024) * 0.05, QuantConfig()), torch.randn(2500, 1024).bfloat16()
    bias = torch.randn(3080).bfloat16()
    y, calls = cuda.linear(x, qw, bias), driver.taken()
    assert names(calls) == ["spread", "prompt", "prompt"] * 3
    firsts = [first for first in (0, 896, 1792) for _ in range(3)]
    assert all(expected(x, y, params, first) for first, (_, _, params) in zip(firsts, calls, strict=True))
    assert [params.tokens for _, _, params in calls] == [896] * 6 + [708] * 3
    for name, config, params in calls:
        clusters = -(-params.tokens // 256) * -(-params.slice // 256)
        ctas = params.tokens + 193 if name == "spread" else 2 * min(60, clusters)  # 193: of 16 rows each
        assert (config.gridDimX, config.gridDimY, params.bias) == (ctas, 1, bias.data_ptr())
    rows = [(params.first_row, params.slice) for _, _, params in calls]
    assert rows == [(0, 1792), (0, 1792), (1792, 1288)] * 3
    counts = [(params.arrived - calls[0][2].arrived) // 4 for _, _, params in calls]
    assert counts == [0, 0, 22] * 3  # 7 blocks of rows, of two parts of the inputs each
    assert calls[0][2].arrivals == 44
    places = ("planes", "rows", "plane_scale", "row_scale", "arrived")
    assert [getattr(calls[0][2], name) - SCRATCH for name in places] == [
        0,
        896 * 1024,
        (896 + 1792) * 1024,
        (896 + 1792) * 1024 + 4 * 896,
        (896 + 1792) * 1024 + 4 * (896 + 3080),
    ]


@pytest.mark.parametrize("again", [cuda.linear_again, cuda.linear_kept])
def test_only_what_was_prepared_is_taken_again(driver, again):
    qw, x = quantize(torch.randn(64, 512), QuantConfig()), torch.randn(3, 512).bfloat16()
    assert again(x, qw, None) is None
    cuda.linear(x, qw, None)
    for _ in range(2):
        assert again(x, qw, None) is not None
    assert again(x.half(), qw, None) is None
    assert again(x[:, :256], qw, None) is None
    qw.packed[0].data = qw.packed[0].clone()
    assert again(x, qw, None) is None
    cuda.linear(x, qw, None)
    again(x, qw, None), driver.taken()
    again(x, qw, None)
    assert {params.packed[0] for _, _, params in driver.taken()} == {qw.packed[0].data_ptr()}
    cuda.forget()
    assert again(x, qw, None) is None
    qr = quantize(torch.randn(64, 512), QuantConfig(rotation="qr"))
    assert cuda.linear(x, qr, None).shape == (3, 64)
    assert again(x, qr, None) is None
    stack = quantize(torch.randn(5, 64, 512), QuantConfig())
    cuda.experts(x, stack, torch.zeros(3, 2, dtype=torch.int64))
    assert again(x, stack, None) is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda qw: pickle.loads(pickle.dumps(qw))])
def test_a_copy_keeps_nothing_of_the_original(driver, duplicate):
    qw, x = quantize(torch.randn(64, 512), QuantConfig()), torch.randn(3, 512).bfloat16()
    cuda.linear(x, qw, None)
    assert cuda.linear_kept(x, qw, None) is not None
    other = duplicate(qw)
    assert cuda.linear_kept(x, other, None) is None
    cuda.linear(x, other, None), driver.taken()
    for weight in (other, qw):
        cuda.linear_kept(x, weight, None)
        assert {params.packed[0] for _, _, params in driver.taken()} == {weight.packed[0].data_ptr()}


@pytest.mark.parametrize(("tokens", "kernels"), [(1, ["decode"]), (40, ["route", "spread", "middle"])])
def test_kernels_of_a_mixture(driver, tokens, kernels):
    stack, x = quantize(torch.randn(5, 256, 512), QuantConfig()), torch.randn(tokens, 512).bfloat16()
    ids, weights = torch.randint(-1, 6, (tokens, 2)), torch.rand(tokens, 2)
    for _ in range(2):
        y, calls = cuda.experts(x, stack, ids), driver.taken()
        assert y is not None
        assert names(calls) == kernels
        for _, _, params in calls:
            assert (params.x, params.y, params.ids) == (x.data_ptr(), y.data_ptr(), ids.data_ptr())
            assert (params.choices, params.experts) == (2, 5)
            assert params.tokens == (2 * tokens if len(kernels) > 1 else 1)
    total, calls = cuda.combine(y, weights, ids, 5), driver.taken()
    assert names(calls) == ["combine"]
    _, config, params = calls[0]
    assert (params.pairs, params.y, params.out) == (y.data_ptr(), total.data_ptr(), 256)
    assert (config.gridDimX, config.gridDimY) == (tokens, 1)


def test_turns_of_pairs_follow_each_other(driver, monkeypatch):
    monkeypatch.setattr(cuda_plan, "_PLANE_BYTES", 600 << 10)
    stack, x = quantize(torch.randn(5, 264, 512), QuantConfig()), torch.randn(350, 512).bfloat16()
    ids = torch.randint(0, 5, (350, 2))
    y, calls = cuda.experts(x, stack, ids), driver.taken()
    assert y is not None
    first = [(params.x - x.data_ptr()) // 1024 for name, _, params in calls if name == "middle"]
    assert len(first) > 1
    assert [(params.y - y.data_ptr()) // (4 * 264) for name, _, params in calls if name == "middle"] == first
    assert [(params.ids - ids.data_ptr()) // 16 for name, _, params in calls if name == "middle"] == first


def test_calls_of_many_lengths_are_not_all_kept(driver, monkeypatch):
    monkeypatch.setattr(cuda, "_KEPT_CALLS", 3)
    qw = quantize(torch.randn(64, 512), QuantConfig())
    for tokens in range(1, 10):
        x = torch.randn(tokens, 512).bfloat16()
        cuda.linear(x, qw, None)
        assert cuda._ready(qw, x).call.cache_info().currsize <= 3
    assert all(params.tokens == tokens for _, _, params in driver.taken()[-1:])
