"""The integer tables against the exact theory of Lloyd-Max quantization of N(0, 1)."""

from __future__ import annotations

import pytest
import torch

from tqw.codebook import UNITS_PER_SIGMA, gaussian_mse, levels, lloyd_max, nearest_codes, nearest_levels
from tqw.config import WIDTHS

# Lloyd-Max distortions of N(0, 1): Max (1960), table I, to the digits printed there and in later tables.
_CLASSICAL = {2: 0.1175, 3: 0.03454, 4: 0.009501, 5: 0.002505, 6: 0.000644}
# What snapping to int8 may cost (measured exactly below): module docstring of tqw.codebook.
_INTEGER_COST = {2: 0.0001, 3: 0.0001, 4: 0.0006, 5: 0.006, 6: 0.029}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_lloyd_max_solves_the_known_problem(bits):
    # The fixed point is reached slowly at 6 bits; 1e-9 is far below the digits compared.
    assert gaussian_mse(lloyd_max(bits, tolerance=1e-9)) == pytest.approx(_CLASSICAL[bits], rel=5e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_integer_levels_cost_what_the_docs_say(bits):
    table = torch.tensor(levels(bits), dtype=torch.float64) / UNITS_PER_SIGMA[bits]
    assert gaussian_mse(table) <= _CLASSICAL[bits] * (1 + _INTEGER_COST[bits]) * 1.0005


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_ascending_int8(bits):
    table = levels(bits)
    assert len(table) == 2**bits
    assert table == tuple(sorted(set(table)))
    assert min(table) >= -128
    assert max(table) <= 127
    if bits != 8:
        assert table == tuple(-level for level in reversed(table))


@pytest.mark.parametrize("bits", WIDTHS)
def test_measured_gaussian_mse_is_the_exact_integral(bits):
    """2^24 samples: the standard error of the estimate is below 0.1 % up to 6 bits and about 0.6 % at 8 bits, where the
    rare values beyond the last level matter most. Bound 1 %."""
    x = torch.randn(1 << 24, generator=torch.Generator().manual_seed(bits))
    units = UNITS_PER_SIGMA[bits]
    measured = float((x - nearest_levels(x * units, bits) / units).square().double().mean())
    exact = gaussian_mse(torch.tensor(levels(bits), dtype=torch.float64) / units)
    assert measured == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("bits", WIDTHS)
def test_nearest_codes_are_nearest(bits):
    table = torch.tensor(levels(bits), dtype=torch.float32)
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-1e30, 1e30, 0.0])])
    codes = nearest_codes(x, bits)
    assert codes.dtype == torch.uint8
    best = (x[:, None] - table).abs().amin(1)
    torch.testing.assert_close((x - table[codes.long()]).abs(), best, rtol=0, atol=0)
    torch.testing.assert_close(nearest_levels(x, bits), table[codes.long()], rtol=0, atol=0)


def test_optimal_step_of_the_8_bit_grid():
    grid = torch.tensor(levels(8), dtype=torch.float64)
    best = gaussian_mse(grid / UNITS_PER_SIGMA[8])
    assert all(best <= gaussian_mse(grid / (UNITS_PER_SIGMA[8] * factor)) for factor in (0.98, 0.995, 1.005, 1.02))
