"""Triton backend: for GPUs that the CUDA backend does not run on, and its portable cross-check.

Two launches: T(x) with a power-of-two scale for each token and block, then tiles of decoded levels times T(x) on the
tensor cores. T(x) is rounded to fp16 relative to the largest of its block (float32 x: not rounded), levels are exact:

    |y - exact| <= sum over blocks of 2^-11 max |T(x)| * sum |V|  +  float32 accumulation

Launch settings are fixed: nothing is tuned at run time. With TRITON_INTERPRET=1 it runs, slowly, on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tqw.codebook import levels
from tqw.kernels import gpu
from tqw.weight import QuantizedWeight

_TABLE_WIDTHS = (2, 3, 4, 5, 6)  # 8 bits: code - 128


@dataclass(frozen=True)
class Settings:
    """Launch settings of the product: a program computes `rows` outputs of `tokens` tokens."""

    tokens: int
    rows: int
    warps: int
    stages: int


def settings(tokens: int, float32: bool = False) -> Settings:
    """Measured on one H100 by benchmarks/triton_settings.py; small enough for any GPU's shared memory."""
    if tokens <= 16:
        return Settings(16, 64, 4, 4)
    if tokens <= 32:
        return Settings(32, 64, 4, 4)
    if tokens <= 64 or float32:
        return Settings(64, 64, 4, 3)
    return Settings(128, 64, 4, 3)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or why this call needs another backend."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (x.is_cuda or _interpreted()):
        return f"x is on {x.device.type}, not on a GPU"
    return gpu.supports(x, qw) or gpu.supports_rotation(qw)


@lru_cache(maxsize=64)
def _tables(device: torch.device) -> Tensor:
    """The levels of all widths, one after the other: int8."""
    return torch.tensor([level for bits in _TABLE_WIDTHS for level in levels(bits)], dtype=torch.int8, device=device)


def _split(programs: int, tiles: int, device: torch.device) -> int:
    """Equal parts that the inputs are cut into, so that about two programs fill every multiprocessor."""
    wanted = 2 * gpu.multiprocessors(device) // programs
    return next(
        split for split in (8, 4, 2, 1) if split == 1 or (split <= min(wanted, tiles // 4) and tiles % split == 0)
    )


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b: [..., in] -> [..., out], in the dtype of x."""
    shape = (*x.shape[:-1], qw.out_features)
    x = x.reshape(-1, x.shape[-1])
    if x.shape[0] == 0:
        return x.new_empty(shape)
    with torch.cuda.device_of(x):
        return _linear(x, qw, bias, settings(x.shape[0], x.dtype == torch.float32)).view(shape)


def _linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None, chosen: Settings) -> Tensor:
    kernels: Any = import_module("tqw.kernels.triton_kernels")
    tokens, out, padded, block = x.shape[0], qw.out_features, qw.padded_in, qw.block
    exact = x.dtype == torch.float32
    blocks, group = padded // block, qw.group_size
    tile = min(block, group & -group)
    on_cuda_cores = torch.version.cuda is not None and not _interpreted()

    transformed = torch.empty(tokens, padded, dtype=torch.float32 if exact else torch.float16, device=x.device)
    token_scale = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    precision = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}[x.dtype]
    kernels.transform[(blocks, -(-tokens // 16))](
        x, qw.channel_scale[0], transformed, token_scale, tokens, x.stride(0), x.stride(1),
        IN=qw.in_features, PADDED=padded, BLOCK=block, ROTATE=qw.rotation == "hadamard", EXACT=exact,
        PRECISION=precision, M=16,
    )  # fmt: skip

    row_programs, token_programs = -(-out // chosen.rows), -(-tokens // chosen.tokens)
    split = _split(row_programs * token_programs, padded // tile, x.device)
    # Triton's interpreter does not round to bfloat16 (it cuts): there torch does it
    y = torch.empty(tokens, out, dtype=torch.float32 if _interpreted() else x.dtype, device=x.device)
    parts = torch.empty(split, tokens, out, dtype=torch.float32, device=x.device) if split > 1 else y
    passes = len(qw.packed)
    packed = [qw.packed[min(i, passes - 1)] for i in range(4)]
    scales = [qw.weight_scale[min(i, passes - 1)] for i in range(4)]
    bits = [qw.bits[i] if i < passes else 0 for i in range(4)]
    kernels.product[(row_programs, token_programs, split)](
        transformed, token_scale, *packed, *scales, _tables(x.device), parts if bias is None else bias, parts,
        tokens, out, B0=bits[0], B1=bits[1], B2=bits[2], B3=bits[3], PADDED=padded, BLOCK=block, GROUP=group, TILE=tile,
        SPLIT=split, BIAS=bias is not None, EXACT=exact, PERMUTE=on_cuda_cores, M=chosen.tokens, N=chosen.rows,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    if split == 1:
        return y.to(x.dtype)
    total = parts.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)
