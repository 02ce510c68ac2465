"""Scalar codebooks: a width in bits names a table of int8 integers, and a table names the nearest-code rule.

Sources: Lloyd (1982) and Max (1960) for the quantizer; the integer grid costs 0.0 / 0.0 / 0.05 / 0.6 / 2.8 % of
mean squared error at 2 / 3 / 4 / 5 / 6 bits (tests/test_codebook.py computes it) and lets every backend decode with
integer instructions.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# Positive halves of the symmetric tables. They are part of the format: docs/format.md lists the same integers.
_POSITIVE_LEVELS: dict[int, tuple[int, ...]] = {
    2: (6, 20),
    3: (10, 31, 55, 88),
    4: (5, 15, 25, 36, 48, 62, 79, 104),
    5: (2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 69, 80, 97),
    6: (
        *(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 32),
        *(34, 37, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71, 77, 84, 93, 108),
    ),
}

# Level units for one standard deviation: the Gaussian-optimal size of each table (8 bits: optimal uniform step).
UNITS_PER_SIGMA: dict[int, float] = {2: 13.2414, 3: 40.9026, 4: 38.1398, 5: 29.7495, 6: 28.8830, 8: 32.4675}


def levels(bits: int) -> tuple[int, ...]:
    """level[code] for code = 0 .. 2^bits - 1, ascending int8 integers. 8 bits: code - 128."""
    if bits == 8:
        return tuple(range(-128, 128))
    positive = _POSITIVE_LEVELS[bits]
    return tuple(-level for level in reversed(positive)) + positive


@lru_cache(maxsize=64)
def level_table(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`levels(bits)` as a tensor [2^bits]."""
    return torch.tensor(levels(bits), device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _cells(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Nearest code (uint8) or nearest level (floating dtype) for each half-integer cell [k/2 - 128, (k+1)/2 - 128).

    Levels are integers, so the boundaries between them are multiples of 1/2 and 512 cells hold the rule exactly.
    """
    table = torch.tensor(levels(bits), dtype=torch.float64)
    centres = (torch.arange(512, dtype=torch.float64) + 0.5) / 2 - 128
    codes = torch.bucketize(centres, (table[1:] + table[:-1]) / 2)
    return (codes if dtype == torch.uint8 else table[codes]).to(device=device, dtype=dtype)


def _cell_index(units: Tensor) -> Tensor:
    return (units * 2).floor_().clamp_(-256, 255).add_(256).to(torch.int32).flatten()


def nearest_codes(units: Tensor, bits: int) -> Tensor:
    """argmin_c |units - level[c]| (the upper code on a tie). units: float32, any shape. Returns uint8."""
    return _cells(bits, units.device, torch.uint8).index_select(0, _cell_index(units)).view(units.shape)


def nearest_levels(units: Tensor, bits: int) -> Tensor:
    """level[nearest_codes(units)] in the dtype of `units`."""
    return _cells(bits, units.device, units.dtype).index_select(0, _cell_index(units)).view(units.shape)


def _gaussian_moments(boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Integrals of phi(x) and x phi(x) between neighbouring boundaries (float64)."""
    density = torch.exp(-boundaries.square() / 2) / math.sqrt(2 * math.pi)
    cumulative = torch.special.ndtr(boundaries)
    return cumulative.diff(), -density.diff()


def _with_infinities(inner: Tensor) -> Tensor:
    edge = torch.tensor([math.inf], dtype=inner.dtype)
    return torch.cat([-edge, inner, edge])


def lloyd_max(bits: int, tolerance: float = 1e-12, max_iterations: int = 20_000) -> Tensor:
    """Lloyd-Max levels of N(0, 1): each level is the mean of its nearest-neighbour cell.

    c_i = E[x | b_i < x < b_(i+1)],  b_i = (c_(i-1) + c_i) / 2.     Returns float64 [2^bits], ascending.
    """
    count = 2**bits
    table = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count) * math.sqrt(3)
    for _ in range(max_iterations):
        mass, first = _gaussian_moments(_with_infinities((table[1:] + table[:-1]) / 2))
        new = first / mass
        new = (new - new.flip(0)) / 2
        change = (new - table).abs().max()
        table = new
        if change < tolerance:
            break
    return table


def gaussian_mse(table: Tensor) -> float:
    """Exact mean squared error of nearest-level coding of N(0, 1).

    E (x - c(x))^2 = 1 - 2 sum_i c_i m1_i + sum_i c_i^2 m0_i,   m0, m1 = integrals of phi and x phi over cell i.
    """
    table = table.double()
    mass, first = _gaussian_moments(_with_infinities((table[1:] + table[:-1]) / 2))
    return float(1 - 2 * (table * first).sum() + (table.square() * mass).sum())
