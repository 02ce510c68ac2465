"""The C kernels of the CPU, on every instruction set that this machine has.

Equal to the dense layer within the bound of their int8 activations; the same for any number of threads.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tqw import kernels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.kernels import cpu
from tqw.weight import QuantizedWeight, dequantize, quantize, rotated_levels, transform

ISAS = cpu.available_isas()
BFLOAT16_FROM = {32: 32, 64: 64, 128: 192}  # chunk: tokens from which on AMX multiplies bfloat16 below 6 bits
ROUND_OFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def test_the_library_was_built_and_is_used():
    assert ISAS, "the development install builds _cpu.so: see setup.py"
    answers = kernels.explain(torch.randn(1, 100), make())
    assert answers["cpu"] == "selected"


def test_without_the_library_torch_computes_and_explain_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "_library", lambda: "_cpu.so was not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qw, x = make(), torch.randn(3, 100)
    gpu = dict.fromkeys(("cuda", "triton", "cutile"), "")
    assert kernels.explain(x, qw) | gpu == gpu | {"cpu": "_cpu.so was not built", "reference": "selected"}
    assert torch.equal(kernels.linear(x, qw), kernels.linear(x, qw, backend="reference"))


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("TQW_CPU_ISA", request.param)
    cpu.settings.cache_clear()
    yield request.param
    monkeypatch.undo()
    cpu.settings.cache_clear()


def make(out_features: int = 17, in_features: int = 100, **settings) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight, QuantConfig(**settings))


def random_input(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(
    y: torch.Tensor, x: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None = None, exact: bool = False
) -> None:
    """q = round(T(x) / sx) is off by at most 1/2, so a chunk c of inputs contributes at most

        |error| <= sum over chunks of (max |T(x)_c| / 254) * sum |V_c|

    (1/254 of that where weights of 6 bits and more have their inputs in two planes) and float32 arithmetic at most
    8 sqrt(n) 2^-24 |x| |w| (see test_kernels.py); the output is rounded to its dtype. AMX rounds T(x) and V of many
    tokens to bfloat16, each off by 2^-9 of itself:

        |error| <= ((1 + 2^-9)^2 - 1) sum |T(x)| |V|
    """
    matrix, wide = qw.matrix(x.float()), x.double()
    chunk = min(qw.block, qw.group_size & -qw.group_size)
    tiles = cpu.settings() == (cpu.ISAS.index("amx"), False) and sum(qw.bits) < 6 and len(x) >= BFLOAT16_FROM[chunk]
    rounding = torch.zeros(x.shape[0], qw.out_features, dtype=torch.float64)
    result = torch.zeros_like(rounding)
    for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
        t = transform(wide, qw.scale_of_pass(index), None if matrix is None else matrix.double())
        v = rotated_levels(packed, scale, qw.padded_in, torch.float64)
        result += t @ v.T
        if tiles:
            rounding += (2.0**-8 + 2.0**-18) * (t.abs() @ v.abs().T)
            continue
        rounding += t.unflatten(-1, (-1, chunk)).abs().amax(-1) / 254 @ v.unflatten(-1, (-1, chunk)).abs().sum(-1).T
    if bias is not None:
        result += bias.double()
    magnitude = wide.norm(dim=-1, keepdim=True) * dequantize(qw).double().norm(dim=-1)
    bound = 2 * ROUND_OFF[x.dtype] * result.abs() + 8 * qw.padded_in**0.5 * 2.0**-24 * magnitude + 1e-30
    planes = 254 if sum(qw.bits) >= 6 else 1
    bound += 0 if exact else rounding / planes * 1.001
    assert y.dtype == x.dtype
    assert y.shape == result.shape
    assert ((y.double() - result).abs() <= bound).all()


@pytest.mark.parametrize("in_features", [576, 100, 11008])
@pytest.mark.parametrize("out_features", [1, 17])
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
def test_linear_is_the_dense_linear(isa, in_features, out_features, dtype):
    qw = make(out_features, in_features)
    bias = random_input(out_features, seed=3).to(dtype)
    for tokens in (0, 1, 3, 17, 512):
        x = random_input(tokens, in_features).to(dtype)
        check(kernels.linear(x, qw, bias, backend="cpu"), x, qw, bias)


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4", "3+2", "2+2+2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_widths_and_groups(isa, bits, group_size):
    for in_features in (768, 1024) if group_size in (-1, 256) else (576, 1000):
        if group_size == 128 and in_features == 576:
            continue  # 128 does not divide 576
        qw = make(83, in_features, bits=bits, group_size=group_size)
        for tokens in (1, 2, 9):
            x = random_input(tokens, in_features)
            check(kernels.linear(x, qw, backend="cpu"), x, qw)


@pytest.mark.parametrize("rotation", ["hadamard", "qr", "none"])
@pytest.mark.parametrize("strategy", ["shared", "different", "alternating"])
def test_rotations_and_strategies(isa, rotation, strategy):
    qw = make(24, 192, bits="4+3", rotation=rotation, rotation_strategy=strategy, group_size=64)
    for tokens in (1, 5):
        x = random_input(tokens, 192)
        check(kernels.linear(x, qw, backend="cpu"), x, qw)


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "3+2", "4+4"])
@pytest.mark.parametrize("rotation", ["hadamard", "qr", "none"])
def test_many_tokens(isa, bits, rotation):
    """Enough for AMX's bfloat16: parts of every tile, several blocks of inputs, passes that transform x differently."""
    for in_features, group_size, tokens in ((200, 32, 33), (1472, 64, 67), (1536, 128, 201), (1536, -1, 550)):
        qw = make(83, in_features, bits=bits, rotation=rotation, group_size=group_size, rotation_strategy="different")
        x, bias = random_input(tokens, in_features), random_input(83, seed=3)
        check(kernels.linear(x, qw, bias, backend="cpu"), x, qw, bias)


def test_float_activations_are_exact(isa, monkeypatch):
    monkeypatch.setenv("TQW_CPU_ACTIVATIONS", "float")
    cpu.settings.cache_clear()
    for bits in ("4", "6", "4+4"):
        qw, x = make(40, 576, bits=bits, group_size=64), random_input(5, 576)
        check(kernels.linear(x, qw, backend="cpu"), x, qw, exact=True)


def test_results_do_not_depend_on_the_number_of_threads(isa):
    before = torch.get_num_threads()
    qw, wide = make(300, 1024), make(300, 1024, group_size=32)
    try:
        for tokens in (1, 7, 70, 300, 1100):
            x, results = random_input(tokens, 1024), []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(torch.cat([kernels.linear(x, w, backend="cpu") for w in (qw, wide)]))
            assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


def test_more_tokens_than_a_panel_holds(isa):
    qw, x = make(70, 256), random_input(600, 256)
    check(kernels.linear(x, qw, backend="cpu"), x, qw)


def test_non_contiguous_inputs_and_views_of_weights(isa):
    qw = make()
    x = random_input(5, 200)[:, ::2]
    check(kernels.linear(x, qw, backend="cpu"), x, qw)
    shifted = torch.empty(qw.packed[0].numel() + 1, dtype=torch.uint8)[1:].view_as(qw.packed[0]).copy_(qw.packed[0])
    check(kernels.linear(x, replace(qw, packed=(shifted,)), backend="cpu"), x, qw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_comes_through(isa, value):
    qw, x = make(), random_input(3, 100)
    x[1, 7] = value
    y = kernels.linear(x, qw, backend="cpu")
    assert y[1].isnan().all()
    check(y[::2], x[::2], qw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_comes_through_among_many_tokens(isa, value):
    """bfloat16 knows infinities, so outputs may be infinite, too."""
    qw, x = make(group_size=32), random_input(40, 100)
    x[1, 7] = value
    y = kernels.linear(x, qw, backend="cpu")
    others = torch.arange(40) != 1
    assert not y[1].isfinite().any()
    check(y[others], x[others], qw)


def test_zero_and_tiny_inputs(isa):
    qw = make()
    assert torch.equal(kernels.linear(torch.zeros(2, 100), qw, backend="cpu"), torch.zeros(2, 17))
    tiny = torch.full((2, 100), 1e-36)
    assert kernels.linear(tiny, qw, backend="cpu").abs().max() < 1e-33


@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4"])
@pytest.mark.parametrize("rotation", ["hadamard", "qr", "none"])
@pytest.mark.parametrize(("in_features", "group_size"), [(200, 32), (576, 64), (1024, 128), (100, -1)])
def test_dense_rows_are_the_rows_of_the_reference(isa, bits, rotation, in_features, group_size):
    """The same float32 sums in another order: sqrt(128) roundings of the row's largest weight."""
    settings = {"rotation": rotation, "group_size": group_size, "rotation_strategy": "different"}
    qw = make(40, in_features, bits=bits, **settings)
    ids = torch.tensor([[3, 39], [0, 3]])
    dense = dequantize(qw)
    for chosen, expected in ((None, dense), (ids, dense[ids])):
        rows = cpu.dense_rows(qw, chosen, torch.float32)
        assert rows.shape == expected.shape
        assert (rows - expected).abs().max() <= 16 * 2.0**-24 * dense.norm(dim=-1).max()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(cpu.dense_rows(qw, ids, dtype), cpu.dense_rows(qw, ids, torch.float32).to(dtype))


def test_embedding_rejects_ids_outside():
    with pytest.raises(IndexError, match="expected ids from 0 to 16, got -1 to 3"):
        kernels.embedding(torch.tensor([3, -1]), make(), torch.float32)


def test_weights_that_move_copy_and_pickle():
    """The C view of a weight is kept with it; it must not outlive the memory."""
    qw, x = make(), random_input(3, 100)
    expected = kernels.linear(x, qw, backend="cpu")
    for other in (copy.deepcopy(qw), pickle.loads(pickle.dumps(qw)), replace(qw)):
        assert torch.equal(kernels.linear(x, other, backend="cpu"), expected)
    qw.packed[0].data = qw.packed[0].clone()
    assert torch.equal(kernels.linear(x, qw, backend="cpu"), expected)


SCRIPT = """
import os, torch
from tqw import kernels
from tqw.config import QuantConfig
from tqw.weight import quantize
torch.set_num_threads(2)
qw, x = quantize(torch.randn(300, 1024), QuantConfig()), torch.randn(70, 1024)
before = kernels.linear(x, qw)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.linear(x, qw), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(kernels.linear(x, qw), before)
import threading
results = [None] * 4
def run(i):
    results[i] = kernels.linear(x, qw)
threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert all(torch.equal(r, before) for r in results)
"""


def test_forks_and_python_threads():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_unknown_instruction_set_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("TQW_CPU_ISA", "mmx")
    cpu.settings.cache_clear()
    try:
        with pytest.raises(TqwError, match=r"expected TQW_CPU_ISA to be one of portable, .* got 'mmx'"):
            kernels.linear(torch.randn(1, 100), make())
    finally:
        monkeypatch.undo()
        cpu.settings.cache_clear()
