"""Every CUDA kernel once or twice on a small shape, for the checkers of memory and of races:

    python tests/cuda_sanitizer.py
    compute-sanitizer --kernel-regex kns=tqw --report-api-errors no --tool racecheck python tests/cuda_sanitizer.py

The first run, without a checker, compiles. `--tool` memcheck, racecheck, synccheck, initcheck; arguments choose kinds:
few several pairs groups wide middle coarse prompt experts dense. `--every-lane` compiles the kernel for 17 tokens and
more so that racecheck follows it (EVERY_LANE in wgmma.cu); without it, it reports hazards there that are none. Values
are not compared: that is what test_cuda.py does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import torch

from tqw import kernels
from tqw.config import QuantConfig
from tqw.kernels import cuda, cuda_launch, cuda_plan, cuda_variant
from tqw.weight import QuantizedWeight, quantize

DECODE = [
    (40, 512),
    (17, 576),
    (8, 128),
    (300, 4096),
    (40, 9216),
    (2200, 9216),
    (136, 16384),
]  # outputs, inputs: one strip, few, a second set, wide, a second set of wide, wide with shared inputs
TOKENS = (1, 2, 4, 8, 16, 24)
MIDDLE = [(17, 1024, 40), (200, 2048, 130), (136, 9216, 20), (300, 2048, 100)]


def weight(
    out_features: int, in_features: int, bits: Any = "4", experts: int = 0, group_size: int = 128
) -> QuantizedWeight:
    shape = (experts, out_features, in_features) if experts else (out_features, in_features)
    return quantize(torch.randn(shape, device="cuda") * 0.05, QuantConfig(bits=bits, group_size=group_size))


def linear(
    out_features: int,
    in_features: int,
    tokens: int,
    dtype: torch.dtype = torch.float16,
    bits: str = "4",
    group_size: int = 128,
) -> None:
    qw = weight(out_features, in_features, bits, group_size=group_size)
    x = torch.randn(tokens, in_features, device="cuda").to(dtype)
    kernels.linear(x, qw, torch.randn(out_features, device="cuda").to(dtype), backend="cuda")


def experts(tokens: int, bits: str) -> None:
    ids = torch.randint(-1, 6, (tokens, 2), device="cuda")  # some do not exist
    kernels.experts(torch.randn(tokens, 512, device="cuda").bfloat16(), weight(40, 512, bits, experts=5), ids)


def coarse(tokens: int, columns: int, warpgroups: int, split: int, apart: bool, bits: str = "4") -> None:
    """Operands of 8 bits, the inputs divided so."""
    variant = partial(cuda_plan.coarse_of, columns=columns, warpgroups=warpgroups, split=split, apart=apart)
    base = cuda._variant(qw := weight(264, 1152, bits), torch.bfloat16)
    plan = cuda_plan.middle_plan(
        variant(base), tokens, qw.out_features, cuda_launch.device_at(torch.cuda.current_device())
    )
    x = torch.randn(tokens, qw.in_features, device="cuda").bfloat16()
    y = torch.empty(tokens, qw.out_features, dtype=x.dtype, device="cuda")
    cuda._Call(cuda._ready(qw, x), plan, tokens)(x, qw.in_features, y, None)


def prompt(out_features: int, in_features: int, tokens: int, bits: str = "4", group_size: int = 128) -> None:
    """As long prompts of large layers are."""
    x = torch.randn(tokens, in_features, device="cuda").bfloat16()
    qw, y = weight(out_features, in_features, bits, group_size=group_size), x.new_empty(tokens, out_features)
    cuda._Prompt(cuda._ready(qw, x), tokens)(x, in_features, y, None)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for (out_features, in_features), tokens in product(DECODE, TOKENS):
        kind = "wide" if in_features > 8192 else "few" if tokens <= 2 else "several"
        yield kind, partial(linear, out_features, in_features, tokens, torch.bfloat16)
    for bits, (out_features, in_features) in product(("2", "3", "5", "4+4"), ((17, 512), (300, 2816), (136, 16384))):
        for tokens in (1, 3, 16) if bits in "23" else (1,):
            yield "pairs", partial(linear, out_features, in_features, tokens, bits=bits)
    yield "pairs", partial(linear, 4200, 9216, 1)
    for bits in ("2", "3", "5", "6", "3+2"):
        yield "several", partial(linear, 40, 512, 5, bits=bits)
        yield "middle", partial(linear, 40, 512, 40, bits=bits)
    for group_size, bits in product((32, 64), ("3", "4", "8")):
        for tokens in (1, 5, 40):
            kind = "middle" if tokens > 16 else "groups"
            yield kind, partial(linear, 40, 512, tokens, bits=bits, group_size=group_size)
    for out_features, in_features, tokens in MIDDLE:
        for dtype in (torch.float32, torch.bfloat16):
            yield "middle", partial(linear, out_features, in_features, tokens, dtype)
    for warpgroups, (split, apart) in product((1, 2), ((1, False), (3, False), (4, True))):
        for tokens, columns in ((40, 64), (200, 256), (300, 256)):
            yield "coarse", partial(coarse, tokens, columns, warpgroups, split, apart)
    for bits in ("2", "3", "5", "6", "8"):
        yield "coarse", partial(coarse, 40, 64, 1, 2, False, bits)
    for out_features, in_features, tokens in ((40, 512, 17), (523, 1152, 300), (1300, 1024, 1100), (40, 8320, 600)):
        yield "prompt", partial(prompt, out_features, in_features, tokens)
    for bits, group_size in (("2", 32), ("3", 64), ("5", 32), ("6", 64), ("8", 128)):
        yield "prompt", partial(prompt, 264, 640, 140, bits, group_size)
    for tokens in (2, 30, 200):
        yield "experts", lambda t=tokens: experts(t, "4")
    for tokens, bits in ((200, "4+4"), (700, "4")):
        yield "experts", lambda t=tokens, b=bits: experts(t, b)
    for out_features in (40, 41):
        pairs, ids = (
            torch.randn(3, 2, out_features, device="cuda").bfloat16(),
            torch.randint(-1, 6, (3, 2), device="cuda"),
        )
        yield "experts", lambda p=pairs, i=ids: kernels.combine(p, torch.rand(3, 2, device="cuda"), i, 5)
    yield "dense", partial(linear, 40, 512, 2000, torch.bfloat16)
    yield "dense", lambda: kernels.embedding(torch.arange(9, device="cuda"), weight(40, 512), torch.bfloat16)


def main() -> None:
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, torch sees none")
    kinds = [argument for argument in sys.argv[1:] if argument != "--every-lane"]
    if len(kinds) < len(sys.argv) - 1:
        source = cuda_variant.Variant.source
        cuda_variant.Variant.source = lambda self: f"#define EVERY_LANE 1\n{source(self)}"
    checked = "NV_SANITIZER_INJECTION_PORT_BASE" in os.environ
    chosen = [case for kind, case in cases() if kind in kinds or not kinds]
    with torch.inference_mode(), ThreadPoolExecutor(1 if checked else os.cpu_count()) as pool:
        done = list(pool.map(lambda case: case(), chosen))
    torch.cuda.synchronize()
    sys.stdout.write(f"{len(done)} cases\n")


if __name__ == "__main__":
    main()
