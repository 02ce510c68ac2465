"""The CUDA backend: equal to the dense layer within the bound of its fixed-point inputs; compiles without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import replayed, tiny, token_ids

from tqw import kernels
from tqw.codebook import UNITS_PER_SIGMA, levels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.kernels import cuda, cuda_launch, cuda_plan, cuda_variant
from tqw.model import quantize_model
from tqw.weight import QuantizedWeight, dequantize, empty_weight, quantize

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
ROUND_OFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def make(out_features: int, in_features: int, **settings) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight.cuda(), QuantConfig(**settings))


def check(
    y: torch.Tensor,
    x: torch.Tensor,
    qw: QuantizedWeight,
    bias: torch.Tensor | None = None,
    middle: bool = False,
    eight: bool | None = None,
) -> None:
    """Few tokens: inputs are rounded to 2^-16 of their tile's largest, at most |T(x)| of the tile, so by Cauchy-Schwarz
    the error is below 2^-13 |x| |w|. Dozens to hundreds: T(x) and V are rounded to fp16, 2^-12 each, so 2^-11 |x| |w|.
    More: dense weights are rounded to the dtype, 2 u |x| |w|. middle: any number is rounded as dozens are.
    5 tokens and more by the decode kernel, weights below 6 bits, 16-bit inputs: these are rounded to steps of 1/127 of
    their tile's largest, some 5 deviations; by Hoeffding's inequality their sum is beyond 3.5 steps |w| once in
    10^10, 3.5 5/127 |x| |w| / sqrt(in), here doubled for tiles of unequal norms: a third of what an output is.
    From 13 or 17 tokens on (in_8_bits, or `eight`) these steps are of the token's largest, and V is rounded to 9/16
    of a step of 1/127 of its row's largest level, d deviations: 3.5 d/127 9/16 |x| |w| / sqrt(in) more, doubled for
    scales.
    """
    dense = dequantize(qw).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    magnitude = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    unit = ROUND_OFF[x.dtype]
    tokens = magnitude.shape[0]
    rounded = 2.0**-11 if middle or 16 < tokens <= 1024 else 2.0**-13
    several = qw.block == 128 and qw.group_size in (32, 64)
    tile = 128 if several else min(qw.block, qw.group_size & -qw.group_size)
    most = 63 if tile < 128 else 32 if qw.padded_in <= 8192 else 16
    if not middle and 5 <= tokens <= most and rounds_inputs(qw, x):
        rounded = 0.28 / qw.padded_in**0.5
    if eight or (eight is None and in_8_bits(qw, x)):
        deviations = levels(qw.bits[0])[-1] / UNITS_PER_SIGMA[qw.bits[0]]
        rounded = (0.28 + 3.5 * deviations / 127 * 9 / 8) / qw.padded_in**0.5
    bound = 2 * unit * exact.abs() + (rounded + 2 * unit) * magnitude
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


def check_nan(x: torch.Tensor, qw: QuantizedWeight) -> None:
    """A token with a NaN or an infinity has only NaN outputs, the others are as they were."""
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    y = kernels.linear(x, qw, backend="cuda")
    assert y[1:3].isnan().all()
    assert y[3:].isfinite().all()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is asked for comes full of NaN: what a kernel leaves out, or reads before it is written, shows."""

    def poisoning(make):
        def empty(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

        return empty

    def borrow(size, stream):
        address = original(size, stream)
        cuda_launch.checked(cuda_launch.driver_module().cuMemsetD8Async(address, 255, size, stream), "cuMemsetD8Async")
        return address

    original = cuda_launch.borrow
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
    monkeypatch.setattr(cuda, "borrow", borrow)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("middle.cu needs sm_90")


def rounds_inputs(qw: QuantizedWeight, x: torch.Tensor) -> bool:
    """Whether inputs may have 8 bits."""
    return x.dtype != torch.float32 and (sum(qw.bits) < 6 or cuda._activations() == "int8")


def for_8_bits(qw: QuantizedWeight, x: torch.Tensor) -> bool:
    """Whether both operands may have 8 bits on Hopper."""
    groups = qw.group_size % 128 == 0 or qw.group_size in (32, 64)
    rotated = qw.rotation == "hadamard" and qw.block == 128 and groups and qw.padded_in >= 512
    return rotated and len(qw.bits) == 1 and rounds_inputs(qw, x)


def in_8_bits(qw: QuantizedWeight, x: torch.Tensor) -> bool:
    """Whether middle.cu takes the call on Hopper so."""
    least = cuda_plan.decode_tokens(cuda._variant(qw, x.dtype), qw.out_features, cuda_launch.device_at(x.device.index))
    return for_8_bits(qw, x) and x.shape[:-1].numel() > least


def forget_plans() -> None:
    cuda_plan.linear_plan.cache_clear()
    cuda.forget()


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """No plan of this test, or of one before, made with other constants, is left for the next."""
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def int8(monkeypatch, fresh_plans) -> None:
    """Inputs of 8 bits for every width."""
    monkeypatch.setattr(cuda, "_activations", lambda: "int8")


@pytest.fixture(params=[cuda_plan.MIDDLE_TOKENS, 128], ids=["middle", "dense"])
def many_tokens(request, monkeypatch, fresh_plans) -> None:
    """Hundreds of tokens both ways that 16 bits of T(x) have: by middle.cu, and by dense rows."""
    monkeypatch.setattr(cuda_plan, "_NEVER_DENSE", request.param)
    monkeypatch.setattr(cuda_plan, "MIDDLE_TOKENS", request.param)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_features", [576, 100, 11008])
@pytest.mark.parametrize("out_features", [1, 17])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130, 512])
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
def test_linear_is_the_dense_linear(in_features, out_features, tokens, dtype, many_tokens):
    qw = make(out_features, in_features)
    x, bias = torch.randn(tokens, in_features).cuda().to(dtype), torch.randn(out_features).cuda().to(dtype)
    check(kernels.linear(x, qw, bias, backend="cuda"), x, qw, bias)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5"])
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize(("out_features", "in_features"), [(3, 128), (264, 2048), (700, 9216), (17100, 384)])
def test_dozens_of_tokens_in_8_bits(bits, group_size, out_features, in_features):
    qw = make(out_features, in_features, bits=bits, group_size=group_size)
    for tokens, dtype in product((17, 33, 70, 128), (torch.float16, torch.bfloat16)):
        x, bias = torch.randn(tokens, in_features).cuda().to(dtype), torch.randn(out_features).cuda().to(dtype)
        check(kernels.linear(x, qw, bias, backend="cuda"), x, qw, bias)
    check_nan(x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize(
    ("out_features", "in_features", "tokens"),
    [(8, 640, 129), (264, 1152, 257), (1032, 2048, 700), (523, 20480, 150), (4096, 512, 3000)],
)
def test_hundreds_of_tokens_in_8_bits(poisoned, int8, bits, group_size, out_features, in_features, tokens):
    """An odd number of tiles, inputs shared by several CTAs, inputs that are read twice, several blocks of tokens."""
    needs_hopper()
    qw = make(out_features, in_features, bits=bits, group_size=group_size)
    for dtype in (torch.float16, torch.bfloat16):
        x, bias = torch.randn(in_features, tokens).cuda().to(dtype).T, torch.randn(out_features).cuda().to(dtype)
        assert cuda._ready(qw, x.contiguous()).call(tokens) is not None
        y = kernels.linear(x, qw, bias, backend="cuda")
        check(y, x, qw, bias)
        assert (y.double() - x.double() @ dequantize(qw).double().T - bias.double()).norm() < 0.02 * y.double().norm()
    check_nan(x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("columns", "tokens", "split", "apart"),
    [
        (columns, tokens, *how)
        for columns, tokens in ((32, 24), (128, 100), (256, 250), (256, 600))
        for how in ((1, False), (2, False), (5, False), (2, True), (3, True), (12, True))
    ]
    + [
        (columns, tokens, *how)
        for columns, tokens in ((64, 150), (96, 96), (160, 600), (176, 170), (192, 400), (224, 450))
        for how in ((1, False), (2, False), (3, True))
    ],
)
@pytest.mark.parametrize("warpgroups", [1, 2])
def test_divisions_in_8_bits(poisoned, fresh_plans, monkeypatch, columns, tokens, split, apart, warpgroups):
    """Each way to share tokens and inputs, the same result again and again."""
    needs_hopper()

    def chosen(base, tokens, out, device):
        return cuda_plan.coarse_of(base, columns, warpgroups, split, apart)

    monkeypatch.setattr(cuda_plan, "middle_variant", chosen)
    for out_features, group_size in ((17, 128), (700, 32), (2064, 256)):
        qw, x = make(out_features, 3328, group_size=group_size), torch.randn(tokens, 3328).cuda().bfloat16()
        bias = torch.randn(out_features).cuda().bfloat16()
        y = kernels.linear(x, qw, bias, backend="cuda")
        check(y, x, qw, bias, eight=True)
        for _ in range(5):
            assert torch.equal(kernels.linear(x, qw, bias, backend="cuda"), y)


@pytest.fixture
def prompts(monkeypatch, fresh_plans) -> None:
    """Any number of tokens as long prompts of large layers are."""
    needs_hopper()
    monkeypatch.setattr(cuda_plan, "PROMPT_TOKENS", 0)
    monkeypatch.setattr(cuda_plan, "is_prompt", lambda base, tokens, out, device: cuda_plan.takes_8_bits(base, device))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize(
    ("out_features", "in_features", "tokens"),
    [(1, 512, 1), (17, 640, 130), (264, 1152, 257), (1030, 2048, 700), (523, 20480, 150), (4100, 512, 3000)],
)
def test_prompts(poisoned, prompts, int8, bits, group_size, out_features, in_features, tokens):
    """Rows and tokens that end within a block, few inputs, inputs that are read twice, outputs at any address."""
    qw = make(out_features, in_features, bits=bits, group_size=group_size)
    for dtype in (torch.float16, torch.bfloat16):
        x, bias = torch.randn(in_features, tokens).cuda().to(dtype).T, torch.randn(out_features).cuda().to(dtype)
        assert cuda._ready(qw, x.contiguous()).prompt(tokens) is not None
        y = kernels.linear(x, qw, bias, backend="cuda")
        check(y, x, qw, bias, eight=True)
        for _ in range(5):
            assert torch.equal(kernels.linear(x, qw, bias, backend="cuda"), y)
    if tokens > 3:
        check_nan(x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("in_features", "tokens"), [(9000, 1500), (8196, 700), (14336, 3), (40000, 300), (60000, 40)])
def test_prompts_of_many_inputs(poisoned, prompts, in_features, tokens):
    """Several tokens for each CTA that transforms them, rows too long to be kept or to be fetched, at any address."""
    qw = make(264, in_features)
    wide = torch.randn(tokens, in_features + 8).cuda().bfloat16()
    for x in (wide[:, :in_features], wide[:, 3 : in_features + 3]):
        check(kernels.linear(x, qw, backend="cuda"), x, qw, eight=True)


@pytest.mark.gpu
@needs_gpu
def test_prompts_in_turns_and_rows_in_slices(poisoned, prompts, monkeypatch):
    monkeypatch.setattr(cuda, "_PROMPT_BYTES", 1 << 20)
    monkeypatch.setattr(cuda, "_ROWS_BYTES", 1 << 20)
    qw, x = make(3080, 1024), torch.randn(2500, 1024).cuda().bfloat16()
    prompt = cuda._ready(qw, x).prompt(2500)
    assert prompt is not None
    assert [len(prompt.turns), len(prompt.slices)] == [3, 4]
    check(kernels.linear(x, qw, backend="cuda"), x, qw, eight=True)


@pytest.mark.gpu
@needs_gpu
def test_prompts_on_two_streams_at_once():
    """Neither kernel has all its CTAs on the GPU while both run: none may wait for one that is not."""
    needs_hopper()
    qw, inputs = make(4096, 4096), [torch.randn(2304, 4096).cuda().bfloat16() for _ in range(2)]
    expected = [kernels.linear(x, qw, backend="cuda") for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, x, result in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(kernels.linear(x, qw, backend="cuda"))
    torch.cuda.synchronize()
    for result, y in zip(results, expected, strict=True):
        assert all(torch.equal(one, y) for one in result)


@pytest.mark.gpu
@needs_gpu
def test_a_prompt_in_a_graph(prompts):
    qw, x = make(520, 1024), torch.randn(300, 1024).cuda().bfloat16()
    check(replayed(lambda x: kernels.linear(x, qw), x), x, qw, eight=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["6", "8", "4+4"])
@pytest.mark.parametrize(("out_features", "in_features"), [(17, 576), (264, 2048), (700, 9216)])
def test_every_width_with_inputs_of_8_bits(int8, bits, out_features, in_features):
    qw = make(out_features, in_features, bits=bits)
    for tokens in (3, 5, 16, 17, 40, 100):
        x = torch.randn(tokens, in_features).cuda().bfloat16()
        check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "3+2"])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("out_features", "in_features"), [(3, 1024), (264, 2048), (40, 9216)])
def test_several_groups_in_a_tile(bits, group_size, out_features, in_features):
    qw = make(out_features, in_features, bits=bits, group_size=group_size)
    for tokens in (1, 2, 7, 16, 30, 130):
        x = torch.randn(tokens, in_features).cuda().bfloat16()
        check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8", "4+4", "3+2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_widths_and_groups(bits, group_size, many_tokens):
    qw = make(40, 1024, bits=bits, group_size=group_size)
    for tokens in (1, 9, 300):
        x = torch.randn(tokens, 1024).cuda().half()
        check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_features", [9728, 14336, 16384, 25600, 28672, 32768])
@pytest.mark.parametrize("out_features", [40, 1056, 4232])
@pytest.mark.parametrize("bits", ["4", "5", "8", "3+2"])
def test_one_token_of_many_inputs(poisoned, in_features, out_features, bits):
    """Transformed as the product goes on, where each warp does it for itself; x at any address."""
    qw = make(out_features, in_features, bits=bits, scale="norm")
    for dtype in ROUND_OFF:
        x = torch.randn(1, in_features + 1).cuda().to(dtype)
        for inputs in (x[:, :-1], x[:, 1:]):
            check(kernels.linear(inputs, qw, backend="cuda"), inputs, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_features", [576, 2560, 4096, 5504, 8192, 9728, 11008, 13824, 14336, 18944])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 40])
def test_many_rows(in_features, tokens):
    """Several strips for each CTA, among them widths whose tiles the warps cannot share evenly."""
    qw = make(16 * 132 * 2 + 8, in_features, scale="norm")
    x = torch.randn(tokens, in_features).cuda().half()
    check(kernels.linear(x, qw, backend="cuda"), x, qw)
    few = make(2 * 1056 + 16, in_features, bits="3+2", scale="norm")
    check(kernels.linear(x, few, backend="cuda"), x, few)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_features", [8320, 14336, 18944])
@pytest.mark.parametrize("bits", [3, 4])
def test_many_inputs_of_an_even_share_of_rows(poisoned, in_features, bits):
    """Up to 16 tokens by the decode kernel, in which pairs of CTAs share so many inputs."""
    qw = make(16 * 132 * 2 - 8, in_features, bits=bits, scale="norm")
    for tokens in (9, 13, 16):
        for dtype in (torch.half, torch.bfloat16):
            x = torch.randn(tokens, in_features).cuda().to(dtype)
            check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "5", "6", "8", "4+4", "3+2"])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 512), (17, 768), (264, 5888), (6600, 2048), (136, 16384), (4264, 9216)]
)
def test_two_tiles_in_a_turn(poisoned, bits, out_features, in_features):
    """Even numbers of tiles, which the warps share evenly or not; several tokens of 2 and 3 bits."""
    qw = make(out_features, in_features, bits=bits)
    device = cuda_launch.device_at(torch.cuda.current_device())
    for tokens in (1, 3, 9, 16):
        for dtype in ROUND_OFF if tokens == 1 else (torch.half,):
            x = torch.randn(tokens, in_features + 8).cuda().to(dtype)[:, :-8]
            variant = cuda_plan.decode_variant(cuda._variant(qw, dtype), tokens, out_features, device)
            assert (variant.turn_tiles == 2) == (tokens == 1 or bits in "23")
            check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("out_features", "in_features"), [(6600, 2048), (4200, 9216), (4104, 14336)])
def test_two_tiles_of_4_bits_in_a_turn(poisoned, out_features, in_features):
    qw = make(out_features, in_features)
    device = cuda_launch.device_at(torch.cuda.current_device())
    for dtype in ROUND_OFF:
        x = torch.randn(1, in_features).cuda().to(dtype)
        assert cuda_plan.decode_variant(cuda._variant(qw, dtype), 1, out_features, device).turn_tiles == 2
        check(kernels.linear(x, qw, backend="cuda"), x, qw)


@pytest.mark.parametrize(
    ("out_features", "in_features", "tokens"),
    [(4096, 4096, 16), (4096, 14336, 16), (12288, 12288, 16), (3584, 18944, 12), (5120, 17408, 12), (2048, 11008, 12)],
)
def test_how_many_tokens_are_decoded(out_features, in_features, tokens):
    """What was measured to be faster on an H100."""
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((4,), in_features, 128, 128, 128, True, True, 2, 1)
    assert cuda_plan.decode_tokens(base, out_features, h100) == tokens


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
    y = replayed(lambda x: kernels.linear(x, qw), x)
    check(y, x, qw)
    ids = torch.tensor([[0, 63], [7, 7]]).cuda()
    torch.testing.assert_close(kernels.embedding(ids, qw, torch.float32), dequantize(qw)[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [5, 6])
def test_polynomials_round_to_the_levels(bits):
    """In fp16, each fused multiply-add rounded once, as codes.cu has them: exact for every code on every GPU."""
    code = torch.arange(2**bits, dtype=torch.float64)
    u = (2 * code + 1) / 2**bits - 1
    z = (u * u - 0.5).half().double()
    *rest, g = cuda_variant.POLYNOMIALS[bits]
    for coefficient in reversed(rest):
        g = (g * z + coefficient).half().double()
    expected = torch.tensor(levels(bits), dtype=torch.float64)
    assert (u * g - expected).abs().max() < 0.49  # 1536 + u g is rounded to an integer
    assert torch.equal((1536 + u * g).half().double() - 1536, expected)


def check_compiles(variant: cuda_variant.Variant, *kernels: str, arch: str = "sm_90a") -> None:
    """A module of these kernels, without spills; the compiler says so where it has to serialise wgmma."""
    cubin, log = cuda_launch.compile_with_log(variant.source(), arch)
    assert cubin[:4] == b"\x7fELF"
    assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == log.count("spill stores"), log
    assert sorted(re.findall(r"entry function 'tqw_(\w+)'", log)) == sorted(kernels)
    assert "wgmma" not in log, log


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_compiles_without_a_gpu(arch):
    variant = cuda_variant.Variant(
        (3, 4), 512, 128, 128, 128, True, True, 1, column_tiles=2, fused=False, warps=4, share=4
    )
    check_compiles(variant, "transform", "decode", arch=arch)
    for bits in ((3, 4), (4,), (6,)):
        check_compiles(replace(variant, bits=bits, dense=True), "dequantize", arch=arch)


@pytest.mark.parametrize(("arch", "clusters"), [("sm_80", False), ("sm_90a", True), ("sm_120", True)])
@pytest.mark.parametrize(
    ("padded_in", "tokens", "planes", "bits"),
    [
        (4096, 1, 1, 4), (4096, 2, 2, 4), (4096, 16, 2, 4), (4096, 32, 1, 4), (14336, 1, 1, 4), (14336, 8, 2, 4),
        (14336, 16, 1, 4), (14336, 1, 1, 3), (4096, 16, 1, 3), (4096, 1, 2, 5), (4096, 1, 2, 6), (14336, 1, 2, 8),
    ],
)  # fmt: skip
def test_decode_kernels_compile_without_spills(arch, clusters, padded_in, tokens, planes, bits):
    device = cuda_launch.Device(0, arch, 132, 232448, clusters)
    base = cuda_variant.Variant((bits,), padded_in, 128, 128, 128, True, True, 2, planes)
    variant = cuda_plan.decode_variant(base, tokens, 4096, device)
    assert clusters or variant.split == variant.cluster == 1
    check_compiles(variant, *["transform"] * (not variant.fused), "decode", arch=arch)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_shares_of_a_cta_are_whole(tile, bits):
    device = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    for padded_in in range(tile, 1 << 15, tile):
        base = cuda_variant.Variant((bits,), padded_in, tile, tile, 128, True, True, 2)
        for tokens, out_features in ((1, 17), (1, 4096), (2, 4096), (4, 200), (16, 50000)):
            v = cuda_plan.decode_variant(base, tokens, out_features, device)
            assert padded_in // tile % (v.split * v.turn_tiles) == 0
            assert v.warps % v.share == 0
            assert v.warps // v.share % v.split == 0
            assert v.share <= padded_in // tile // v.split // v.turn_tiles
            assert v.warps <= 20
            assert v.shared_bytes(1, 1) <= device.shared_bytes


@pytest.mark.parametrize(
    ("padded_in", "tokens"),
    [(4096, t) for t in (20, 60, 90, 128, 200, 256, 512)] + [(14336, t) for t in (8, 16, 32, 64)],
)
@pytest.mark.parametrize("planes", [1, 2])
def test_middle_kernels_compile_without_spills(padded_in, tokens, planes):
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((4,), padded_in, 128, 128, 128, True, True, 2, planes)
    variant = cuda_plan.middle_variant(base, tokens, 4096, h100)
    assert variant is not None
    assert variant.ring_bytes() * variant.min_ctas <= h100.shared_bytes
    check_compiles(variant, "spread", "middle")


@pytest.mark.parametrize(
    ("bits", "group"),
    [(2, 128), (3, 128), (4, 128), (5, 128), (6, 128), (8, 128), (2, 32), (4, 64), (4, 32), (5, 32), (6, 64), (8, 32)],
)
@pytest.mark.parametrize(
    ("padded_in", "out_features", "tokens"),
    [(4096, 4096, t) for t in (17, 64, 128, 160, 256, 448, 512, 768)] + [(4096, 28672, 256), (1152, 4096, 130)],
)
def test_kernels_in_8_bits_compile_without_spills(bits, group, padded_in, out_features, tokens):
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((bits,), padded_in, group, 128, 128, True, True, 2, planes=1)
    variant = cuda_plan.middle_variant(base, tokens, out_features, h100)
    assert variant is not None
    assert variant.coarse
    assert variant.ring_bytes() * variant.min_ctas <= h100.shared_bytes
    check_compiles(variant, "spread", "middle")


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (4, 1152), (5, 32), (6, 128), (8, 64)])
@pytest.mark.parametrize("padded_in", [512, 1152, 14336, 28672, 65536])
def test_prompt_kernels_compile_without_spills(bits, group, padded_in):
    base = cuda_variant.Variant((bits,), padded_in, min(group, padded_in), 128, 128, True, True, 2, planes=1)
    variant = cuda_plan.prompt_variant(base)
    assert variant.prompt_bytes() <= 232448
    check_compiles(variant, "spread", "prompt")


def test_prompts_are_many_tokens_of_large_layers():
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((4,), 4096, 128, 128, 128, True, True, 2, planes=1)
    asked = ((1024, 4096), (1792, 4096), (2048, 4096), (1024, 28672), (1 << 13, 512), (1 << 15, 1024))
    assert [cuda_plan.is_prompt(base, *each, h100) for each in asked] == [False, False, True, True, False, True]
    assert not cuda_plan.is_prompt(replace(base, planes=2), 4096, 4096, h100)
    assert not cuda_plan.is_prompt(base, 4096, 4096, replace(h100, arch="sm_100"))


def test_dense_rows_are_for_16_bits_and_few_weights_or_wide_codes():
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    few, large = (cuda_variant.Variant((4,), inputs, 128, 128, 128, True, True, 2) for inputs in (1024, 4096))

    def dense(base, tokens, out):
        return cuda_plan.middle_variant(base, tokens, out, h100) is None

    assert [dense(few, tokens, 1024) for tokens in (192, 256)] == [False, True]
    assert [dense(large, tokens, 4096) for tokens in (512, 1024, 1025)] == [False, False, True]
    assert dense(replace(large, bits=(6,)), 1024, 4096)
    assert not dense(replace(few, x_type=0), 256, 1024)  # float32
    assert not dense(replace(few, planes=1), 256, 1024)  # both operands in 8 bits


def test_8_bits_only_where_they_cost_little():
    """Not for tiles of fewer inputs, passes, inputs that are not rotated, 32-bit inputs, other GPUs."""
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((4,), 4096, 128, 128, 128, True, True, 2, planes=1)
    assert cuda_plan.takes_8_bits(base, h100)
    for change in ({"group": 192}, {"bits": (2, 2)}, {"rotate": False}, {"planes": 2}, {"tile": 64}):
        assert not cuda_plan.takes_8_bits(replace(base, **change), h100)
    assert not cuda_plan.takes_8_bits(base, replace(h100, arch="sm_100"))


def test_which_inputs_have_8_bits(monkeypatch):
    """By default those of weights below 6 bits; float32 inputs never."""
    expected = {"auto": [1, 1, 2, 2], "int8": [1, 1, 1, 1], "exact": [2, 2, 2, 2]}
    for value, planes in expected.items():
        monkeypatch.setenv("TQW_CUDA_ACTIVATIONS", value)
        cuda._activations.cache_clear()
        weights = [empty_weight((8, 512), QuantConfig(bits=b), torch.device("cpu")) for b in (4, 5, 6, (4, 4))]
        assert [cuda._variant(qw, torch.bfloat16).planes for qw in weights] == planes
        assert {cuda._variant(qw, torch.float32).planes for qw in weights} == {2}
    monkeypatch.setenv("TQW_CUDA_ACTIVATIONS", "fp8")
    cuda._activations.cache_clear()
    with pytest.raises(TqwError, match="to be auto, exact or int8, got 'fp8'"):
        cuda._activations()
    monkeypatch.undo()
    cuda._activations.cache_clear()


@pytest.mark.parametrize("out_features", [1, 17, 1024, 4096, 28672])
@pytest.mark.parametrize("in_features", [512, 1152, 4096, 14336])
def test_divisions_take_all_tokens_and_fit(out_features, in_features):
    """From as many tokens as fill a block to one more: no columns that a smaller block would not need."""
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((4,), in_features, 128, 128, 128, True, True, 2, planes=1)
    for tokens in (9, 16, 17, 64, 65, 128, 160, 161, 256, 257, 512, 1000, 4096):
        divisions = cuda_plan.divisions(base, tokens, out_features, h100)
        assert divisions
        for columns, warpgroups, split, apart in divisions:
            variant = cuda_plan.coarse_of(base, columns, warpgroups, split, apart)
            assert variant.ring_bytes() <= h100.shared_bytes
            assert 256 * split <= in_features or split == 1
            assert columns < tokens + 64


def test_expert_kernel_compiles_without_spills():
    base = cuda_variant.Variant((4,), 2048, 128, 128, 128, True, True, 2, warps=16, split=2, share=8, experts=True)
    check_compiles(base, "decode")


@pytest.mark.parametrize(
    ("bits", "pairs"),
    [((4,), pairs) for pairs in (40, 100, 200, 400, 600, 800, 1200, 2000)] + [((3,), 800), ((4, 4), 2000), ((6,), 200)],
)
def test_grouped_kernels_compile_without_spills(bits, pairs):
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    variant = cuda_plan.grouped_variant(
        cuda_variant.Variant(bits, 2048, 128, 128, 128, True, True, 2), pairs, 8, 2048, h100
    )
    assert variant is not None
    assert variant.ring_bytes() * variant.min_ctas <= h100.shared_bytes
    check_compiles(variant, "route", "spread", "middle")


@pytest.mark.parametrize(("padded_in", "choices", "count"), [(14336, 2, 8), (2048, 8, 128), (128, 1, 1)])
def test_pairs_come_in_turns_that_fit(padded_in, choices, count):
    h100 = cuda_launch.Device(0, "sm_90a", 132, 232448, True)
    base = cuda_variant.Variant((4,), padded_in, 128, 128, 128, True, True, 2)
    for tokens in (1, 100, 4096, 100_000):
        step = cuda_plan.expert_tokens(base, tokens, choices, count, 4096, h100)
        assert 1 <= step <= tokens
        variant = cuda_plan.grouped_variant(base, step * choices, count, 4096, h100)
        if variant is not None:
            columns = cuda_plan._most_blocks(step * choices, count, variant.columns) * variant.columns
            assert 2 * columns * padded_in <= cuda_plan._PLANE_BYTES
    assert cuda_plan.expert_tokens(base, 100, choices, count, 4096, h100) == 100


def stack(out_features: int, in_features: int, experts: int = 5, **settings) -> QuantizedWeight:
    weight = torch.randn(experts, out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    return quantize(weight.cuda(), QuantConfig(**settings))


@pytest.mark.gpu
@needs_gpu
def test_a_thread_that_has_not_used_the_gpu():
    """Kernels already loaded, memory already in torch's cache: nothing else gives the thread a context."""
    qw = make(40, 256)
    x = torch.randn(3, 256).cuda().half()
    kernels.linear(x, qw, backend="cuda")
    for tokens in (3, 40):  # 40: compiled in the thread
        x = torch.randn(tokens, 256).cuda().half()
        with ThreadPoolExecutor(1) as pool:
            check(pool.submit(kernels.linear, x, qw, backend="cuda").result(), x, qw)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "6", "4+4"])
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 512), (17, 128), (8, 96), (2048, 5504)])
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
def test_experts_are_the_dense_experts(bits, out_features, in_features, dtype):
    qw = stack(out_features, in_features, bits=bits)
    ids = torch.tensor([[0, 4], [3, 3], [-1, 1], [2, 5], [1, 0]]).cuda()  # -1 and 5: another rank's
    x, bias = torch.randn(5, in_features).cuda().to(dtype), torch.randn(5, out_features).cuda().to(dtype)
    y = kernels.experts(x, qw, ids, bias)
    assert y is not None
    assert y.isfinite().all()
    middle, eight = qw.block == 128, for_8_bits(qw[0], x)  # two pairs an expert: blocks of them, on Hopper
    for token, choices in enumerate(ids.tolist()):
        for choice, expert in enumerate(choices):
            if 0 <= expert < 5:
                check(y[token, choice][None], x[token][None], qw[expert], bias[expert], middle, eight)


def skewed_ids(tokens: int, choices: int = 2) -> torch.Tensor:
    """Of 5 experts: half of all pairs to expert 3, none to expert 1, some to experts that do not exist."""
    each = torch.tensor([3, 3, 3, 3, 3, 0, 2, 4, -1, 5])
    return each[torch.randint(0, 10, (tokens, choices), generator=torch.Generator().manual_seed(tokens))].cuda()


def check_pairs(
    y: torch.Tensor | None, x: torch.Tensor, qw: QuantizedWeight, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Every pair of an expert that exists; the others are finite."""
    assert y is not None
    assert y[(ids < 0) | (ids >= 5)].isfinite().all()
    eight = for_8_bits(qw[0], x)
    for expert in range(5):
        tokens, choices = torch.where(ids == expert)
        check(y[tokens, choices], x[tokens], qw[expert], None if bias is None else bias[expert], True, eight)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 512), (17, 128), (264, 1024)])
@pytest.mark.parametrize("pairs", [21, 40, 130, 340, 500, 700, 1400])
def test_many_pairs_in_blocks_of_an_expert(poisoned, out_features, in_features, pairs):
    """Blocks of 8 to 256 columns."""
    needs_hopper()
    qw, choices = stack(out_features, in_features), 1 if pairs % 2 else 2
    ids, x = skewed_ids(pairs // choices, choices), torch.randn(pairs // choices, in_features).cuda().bfloat16()
    bias = torch.randn(5, out_features).cuda().bfloat16()
    check_pairs(kernels.experts(x, qw, ids, bias), x, qw, ids, bias)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["2", "3", "4", "5", "6", "8"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 512), (264, 1152), (2056, 640)])
@pytest.mark.parametrize("pairs", [646, 1100, 4000])
def test_hundreds_of_pairs_in_8_bits(poisoned, int8, bits, group_size, out_features, in_features, pairs):
    """Blocks of 192 and 256 columns."""
    needs_hopper()
    qw = stack(out_features, in_features, bits=bits, group_size=group_size)
    ids, x = skewed_ids(pairs // 2), torch.randn(pairs // 2, in_features).cuda().bfloat16()
    bias = torch.randn(5, out_features).cuda().bfloat16()
    variant = cuda_plan.grouped_variant(cuda._variant(qw[0], x.dtype), pairs, 5, out_features, cuda_launch.device_at(0))
    assert variant is not None
    assert variant.coarse
    check_pairs(kernels.experts(x, qw, ids, bias), x, qw, ids, bias)
    nobody = kernels.experts(x, qw, torch.full_like(ids, -1), bias)
    assert nobody is not None
    assert (nobody == 0).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", ["4", "3", "4+4", "8"])
@pytest.mark.parametrize(("out_features", "in_features"), [(17, 256), (264, 1024)])
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
def test_blocks_of_an_expert_in_all_types(poisoned, bits, out_features, in_features, dtype):
    needs_hopper()
    qw, ids = stack(out_features, in_features, bits=bits), skewed_ids(65)
    x = torch.randn(in_features, 65).cuda().to(dtype).T  # not contiguous
    check_pairs(kernels.experts(x, qw, ids.int()), x, qw, ids)


@pytest.mark.gpu
@needs_gpu
def test_pairs_in_turns(poisoned, monkeypatch):
    needs_hopper()
    qw, ids, x = stack(264, 512), skewed_ids(350), torch.randn(350, 512).cuda().half()
    cuda_plan.expert_tokens.cache_clear()
    monkeypatch.setattr(cuda_plan, "_PLANE_BYTES", 600 << 10)
    base, device = cuda._variant(qw, x.dtype), cuda_launch.device_at(x.device.index)
    assert cuda_plan.expert_tokens(base, 350, 2, 5, 264, device) < 175
    y = kernels.experts(x, qw, ids)
    cuda_plan.expert_tokens.cache_clear()
    check_pairs(y, x, qw, ids)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_of_experts_follows_the_ids():
    """More pairs than one launch of the decode kernel is meant for."""
    qw, ids = stack(64, 256), torch.zeros(30, 2, dtype=torch.int64).cuda()
    x = torch.randn(30, 256).cuda().half()
    kernels.experts(x[:1], qw, ids[:1])
    assert kernels.experts(x.repeat(100, 1), qw, ids.repeat(100, 1)) is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.experts(x, qw, ids)
    assert y is not None
    for new in (torch.randint(0, 5, (30, 2)), torch.full((30, 2), 2), skewed_ids(30), torch.full((30, 2), -1)):
        ids.copy_(new)
        x.copy_(torch.randn(30, 256))
        y.fill_(float("nan"))
        graph.replay()
        check_pairs(y, x, qw, ids)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_mixture_by_one_kernel_is_the_mixture_by_expert(monkeypatch, name):
    """Both round activations to at most 2^-16 of a tile; the outputs, to fp16 twice in each of two layers."""
    model = quantize_model_of(name)
    ids = token_ids(1, 3).cuda()
    asked = []
    original = cuda.experts
    monkeypatch.setattr(cuda, "experts", lambda *args: asked.append(1) or original(*args))
    together = model(ids).logits
    assert len(asked) == 4  # two layers, two projections
    monkeypatch.setattr(kernels, "experts", lambda *args: None)
    torch.testing.assert_close(together, model(ids).logits, rtol=2e-2, atol=2e-3)


def quantize_model_of(name: str) -> torch.nn.Module:
    model = tiny(name).cuda().half()
    quantize_model(model, QuantConfig(bits=4, group_size=32))
    return model.requires_grad_(False).eval()


def test_says_why_not_without_a_gpu():
    qw = quantize(torch.randn(8, 64), QuantConfig())
    assert "not on a CUDA device" in (cuda.supports(torch.randn(1, 64), qw) or "")


@pytest.mark.gpu
@needs_gpu
def test_what_an_earlier_call_prepared_serves_only_its_own_tensors():
    def rows(qw, which):
        return replace(qw, packed=(qw.packed[0][which],), weight_scale=(qw.weight_scale[0][which],))

    x = torch.randn(3, 512).cuda().bfloat16()
    qw, other = make(64, 512), quantize(torch.randn(64, 512).cuda(), QuantConfig())
    for weight in (rows(qw, slice(32)), rows(qw, slice(None, None, 2))):  # the same addresses and shapes
        for _ in range(2):
            check(kernels.linear(x, weight), x, weight)
    qw.packed[0].data, qw.weight_scale[0].data = other.packed[0], other.weight_scale[0]
    qw.channel_scale[0].copy_(other.channel_scale[0])
    for _ in range(2):
        assert torch.equal(kernels.linear(x, qw), kernels.linear(x, other))
    for weight in (make(64, 512, rotation="qr"), make(64, 512, bits="4+4", rotation_strategy="different")):
        first = kernels.linear(x, weight)
        check(first, x, weight, middle=True)
        assert torch.equal(kernels.linear(x, weight), first)
    stack = quantize(torch.randn(5, 64, 512).cuda(), QuantConfig())
    assert kernels.experts(x, stack, torch.zeros(3, 2, dtype=torch.int64, device="cuda")) is not None
    assert cuda.linear_again(x, stack, None) is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", list(ROUND_OFF))
@pytest.mark.parametrize("weight_dtype", [torch.float64, *ROUND_OFF])
@pytest.mark.parametrize(
    ("tokens", "choices", "out_features"), [(0, 2, 8), (1, 1, 17), (5, 8, 64), (33, 3, 2056), (70000, 1, 8)]
)
def test_combined_pairs_are_the_weighted_sum(poisoned, dtype, weight_dtype, tokens, choices, out_features):
    """float32 sums: 2^-24 of the absolute sum for each term, then one rounding to the dtype."""
    pairs = torch.randn(tokens, choices, out_features, device="cuda").to(dtype)
    ids = torch.randint(-1, 6, (tokens, choices), device="cuda")
    missing = (ids < 0) | (ids >= 5)
    pairs[missing] = float("nan")
    weights = torch.rand(choices, tokens, device="cuda").to(weight_dtype).T  # not contiguous
    terms = torch.where(missing[..., None], 0, pairs.double() * weights.double()[..., None])
    y = kernels.combine(pairs, weights, ids, 5)
    assert y.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * terms.sum(1).abs() + (choices + 2) * 2**-24 * terms.abs().sum(1) + 1e-7
    assert ((y.double() - terms.sum(1)).abs() <= bound).all()
