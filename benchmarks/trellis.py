"""Would a trellis be worth its decoder? The demo model with 16 levels, and with trellis-coded quantization at 4 bits.

    python benchmarks/trellis.py -o benchmarks/results/trellis.json

Trellis-coded quantization (Marcellin and Fischer 1990, Ungerboeck's convolutional code of 8 states): 32 levels in
four subsets, of which the low bits of this code u[t] and of the three before it choose one, and its other three bits
a level:

    subset = 2 (u[t] ^ u[t-1] ^ u[t-3]) + u[t-2],    level = levels[4 (code >> 1) + subset]

so that all codes of a row depend on each other and are found by Viterbi's algorithm. 4 bits a weight, as with 16
levels; scales of groups, signs, channel scales and text are the same. Levels are trained on Gaussian numbers.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from vector_levels import GROUP, Levels, arguments, coded, measure

from tqw.codebook import lloyd_max

STATES = 8
MULTIPLES = [0.80 + 0.08 * step for step in range(7)]  # of a group's root mean square


def _branches() -> tuple[Tensor, Tensor]:
    """[state after, which of two before]: the state before, the subset on the way. State: u1 + 2 u2 + 4 u3."""
    before, subset = torch.zeros(STATES, 2, dtype=torch.long), torch.zeros(STATES, 2, dtype=torch.long)
    for after in range(STATES):
        u, u1, u2 = after & 1, after >> 1 & 1, after >> 2 & 1
        for u3 in range(2):
            before[after, u3] = u1 + 2 * u2 + 4 * u3
            subset[after, u3] = 2 * (u ^ u1 ^ u3) + u2
    return before, subset


def trellis(values: Tensor, levels: Tensor) -> Tensor:
    """The path of least squared error through the levels: [rows, n] -> [rows, n]."""
    before, subset = _branches()
    choices = levels.view(-1, 4).T  # of each subset
    nearest = torch.stack([c[torch.bucketize(values, (c[1:] + c[:-1]) / 2)] for c in choices], -1)  # [rows, n, 4]
    error = (values.unsqueeze(-1) - nearest).square().transpose(0, 1).contiguous()
    cost, decided = torch.full((values.shape[0], STATES), math.inf), []
    cost[:, 0] = 0
    for step in error:
        cost, which = (cost[:, before] + step[:, subset]).min(-1)
        decided.append(which)
    state, path = cost.argmin(-1, keepdim=True), []
    for which in reversed(decided):
        way = which.gather(1, state)
        path.append(subset[state, way])
        state = before[state, way]
    return nearest.gather(-1, torch.stack(path[::-1], 1)).squeeze(-1)


def trained_levels(rounds: int = 12) -> Tensor:
    """32 levels for N(0, 1): centroids of what the trellis assigns to each, from Lloyd-Max levels of 5 bits on."""
    data = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    levels = lloyd_max(5).float()
    for _ in range(rounds):
        index = torch.bucketize(trellis(data, levels), (levels[1:] + levels[:-1]) / 2).flatten()
        sums = torch.zeros(32).index_add_(0, index, data.flatten())
        sizes = torch.bincount(index, minlength=32)
        levels = torch.where(sizes > 0, sums / sizes.clamp(min=1), levels).sort().values
    return levels


def coded_by_trellis(rotated: Tensor, levels: Tensor) -> Tensor:
    """Each group with the best of some scales (all groups of a row try the same one at a time), refitted twice by least
    squares; the last one rounded to fp16."""
    groups = rotated.unflatten(-1, (-1, GROUP))
    base = groups.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)

    def through(scale: Tensor) -> Tensor:
        return trellis((groups / scale).flatten(-2), levels).view_as(groups)

    best, scale = torch.full_like(base, math.inf), base
    for multiple in MULTIPLES:
        error = (groups - through(base * multiple) * (base * multiple)).square().sum(-1, keepdim=True)
        scale = torch.where(error < best, base * multiple, scale)
        best = torch.minimum(best, error)
    for _ in range(2):
        values = through(scale)
        scale = (groups * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp(min=1e-12)
        scale = torch.where(scale > 0, scale, base)
    scale = scale.half().float()
    return (through(scale) * scale).flatten(-2)


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], 2)
    scalar = lloyd_max(4).float()
    coders = {
        "scalar 4": partial(coded, levels=Levels(torch.cartesian_prod(scalar, scalar))),
        "trellis of 8 states, 4": partial(coded_by_trellis, levels=trained_levels()),
    }
    measure(coders, chosen.seeds, chosen.max_tokens, chosen.output)


if __name__ == "__main__":
    main()
