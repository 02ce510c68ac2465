"""cuTile backend: NVIDIA's tile language, on request only (`backend="cutile"`).

The arithmetic of the Triton backend: one launch for T(x) with a power-of-two scale for each token and block, then one
launch for each pass, tiles of decoded levels times T(x) on the tensor cores, with the same bound on the error. cuTile
has neither byte permutes nor tables in registers: levels are gathered from a small table in global memory, which stays
in the L1 cache.

Needs cuda-tile with tileiras 13.3 or newer: `pip install "tqw[cutile]"`. Launch settings are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tqw.codebook import levels
from tqw.kernels import gpu
from tqw.packing import PLANES
from tqw.rotation import hadamard_matrix
from tqw.weight import QuantizedWeight

_PAIRED = (2, 3, 4)  # widths whose table of pairs is at most 1 KB: half the loads, and asynchronous ones
_ADDED = 512  # outputs that one program adds the parts of


@dataclass(frozen=True)
class Settings:
    """Launch settings of the product: a program computes `rows` outputs of `tokens` tokens over 1 / `split` inputs."""

    tokens: int
    rows: int
    split: int


def settings(tokens: int, out: int, tiles: int, processors: int) -> Settings:
    """Tiles no larger than the tokens need; inputs cut so that about two programs fill every multiprocessor."""
    columns = next((size for size in (16, 32, 64) if tokens <= size), 128)
    rows = 64
    wanted = 2 * processors // (-(-out // rows) * -(-tokens // columns))
    split = next(s for s in (8, 4, 2, 1) if s == 1 or (s <= min(wanted, tiles // 4) and tiles % s == 0))
    return Settings(columns, rows, split)


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the package cuda-tile is there."""
    try:
        return find_spec("cuda.tile") is not None
    except ModuleNotFoundError:  # no package `cuda`
        return False


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or why this call needs another backend."""
    if not installed():
        return 'cuda-tile is not installed (pip install "tqw[cutile]")'
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on a GPU"
    return gpu.supports(x, qw) or gpu.supports_rotation(qw)


@lru_cache(maxsize=16)
def _signs(block: int, device: torch.device) -> Tensor:
    """H without its norm: [block, block] of +-1."""
    return hadamard_matrix(block).sign().to(device, torch.float16)


@lru_cache(maxsize=64)
def _table(bits: int, each: int, device: torch.device) -> Tensor:
    """fp16 levels by code; for 2 each, pairs in an int32 by the bits of both codes, plane by plane."""
    values = torch.tensor(levels(bits), dtype=torch.float16)
    if each == 1:
        return values.to(device)
    low, high = (*PLANES[bits], 0)[:2]
    index = torch.arange(4**bits)
    first = index & (2**low - 1) | (index >> 2 * low & (2**high - 1)) << low
    second = index >> low & (2**low - 1) | index >> (2 * low + high) << low
    return values[torch.stack([first, second], 1)].view(torch.int32).flatten().to(device)


def _planes(packed: Tensor, bits: int, groups: int) -> list[tuple[Tensor, int]]:
    """Views [out, groups, bytes] of the two planes of the codes, and their widths; 0 for none."""
    grouped = packed.unflatten(1, (groups, -1))
    low, high = (*PLANES[bits], 0)[:2]
    cut = grouped.shape[2] * low // bits
    return [(grouped[:, :, :cut], low), (grouped[:, :, cut:] if high else grouped, high)]


def _launch(grid: tuple[int, int, int], kernel: Any, arguments: tuple) -> None:
    import_module("cuda.tile").launch(torch.cuda.current_stream(), grid, kernel, arguments)


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b: [..., in] -> [..., out], in the dtype of x."""
    shape = (*x.shape[:-1], qw.out_features)
    x = x.detach().reshape(-1, x.shape[-1])
    if x.shape[0] == 0:
        return x.new_empty(shape)
    tiles = qw.padded_in // _tile(qw)
    with torch.cuda.device_of(x):
        return _linear(x, qw, bias, settings(x.shape[0], qw.out_features, tiles, gpu.multiprocessors(x.device))).view(
            shape
        )


def _tile(qw: QuantizedWeight) -> int:
    """Inputs decoded at a time: within one rotation block and one group."""
    return min(qw.block, qw.group_size & -qw.group_size)


def _linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None, chosen: Settings) -> Tensor:
    kernels: Any = import_module("tqw.kernels.cutile_kernels")
    tokens, out, padded = x.shape[0], qw.out_features, qw.padded_in
    block, group, tile = qw.block, qw.group_size, _tile(qw)
    inner = torch.float32 if x.dtype == torch.float32 else torch.float16
    transformed = torch.empty(tokens, padded, dtype=inner, device=x.device)
    token_scale = torch.empty(tokens, padded // block, dtype=torch.float32, device=x.device)
    arguments = x, qw.channel_scale[0], _signs(block, x.device), transformed, token_scale
    at_once = 16 if tokens <= 16 else 64
    grid = padded // block, -(-tokens // at_once), 1
    _launch(grid, kernels.transform, (*arguments, block, qw.rotation == "hadamard", at_once))

    passes, split = len(qw.packed), chosen.split
    alone = passes * split == 1
    y = torch.empty(1, tokens, out, dtype=x.dtype, device=x.device)
    parts = y if alone else torch.empty(passes * split, tokens, out, dtype=torch.float32, device=x.device)
    added = y if bias is None else bias.detach()
    grid = -(-out // chosen.rows), -(-tokens // chosen.tokens), split
    for index, (packed, scale, bits) in enumerate(zip(qw.packed, qw.weight_scale, qw.bits, strict=True)):
        (low, low_width), (high, high_width) = _planes(packed, bits, padded // group)
        each = 2 if bits in _PAIRED else 1
        mine = parts[index * split : (index + 1) * split]
        arguments = transformed, token_scale, low, high, scale, _table(bits, each, x.device), added, mine
        constants = low_width, high_width, each, block, group, tile, padded // tile // split
        with_bias = alone and bias is not None
        _launch(grid, kernels.product, (*arguments, *constants, with_bias, chosen.tokens, chosen.rows))
    if not alone:
        grid = tokens, -(-out // _ADDED), 1
        _launch(grid, kernels.add_up, (parts, added, y, passes * split, bias is not None, _ADDED))
    return y[0]
