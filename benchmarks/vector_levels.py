"""Would pairs of levels (p = 2) be worth their table? The demo model with scalar and with vector levels.

    python benchmarks/vector_levels.py -o benchmarks/results/vector_levels.json

Each group of the rotated, channel-scaled weights is coded in real arithmetic, with the best of 16 scales: by the 16
Lloyd-Max levels, or two weights at a time by 256 points that Lloyd's algorithm places for pairs of Gaussian numbers.
Both take 4 bits a weight and one scale a group. Everything else is the same: signs, channel scales, text. A second set
of rows does the same at 3 bits (8 levels against 64 points).
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tqw.cli import _text
from tqw.codebook import lloyd_max
from tqw.config import QuantConfig, block_size
from tqw.evaluate import evaluate, reference_log_probabilities, windows
from tqw.model import by_input, resolve
from tqw.pretrained import calibration_ids, calibration_power
from tqw.report import document, write_json
from tqw.rotation import matrix_for
from tqw.scaling import activation_scale
from tqw.source import DEMO, find, load_float, load_tokenizer
from tqw.weight import choose_channel_scale, into_rotated, untransform

GROUP = 64
CELLS = 512  # along each axis of the lookup that stands for the search of the nearest point
REACH = 5.0  # standard deviations
MULTIPLES = [0.62 + 0.04 * step for step in range(16)]


def gaussian_points(count: int, samples: int = 1 << 18, rounds: int = 150) -> Tensor:
    """Lloyd's algorithm on pairs of N(0, 1): [count, 2]."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(samples, 2, generator=generator)
    points = data[:count].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, points).argmin(1) for part in data.split(1 << 14)])
        sums = torch.zeros_like(points).index_add_(0, nearest, data)
        sizes = torch.bincount(nearest, minlength=count)
        points = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], data[:count])
    return points


class Levels:
    """Nearest point of each pair, by a table of cells; scalar levels are the pairs of their products."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        axis = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * REACH
        grid = torch.cartesian_prod(axis, axis)
        self.cells = torch.cat([torch.cdist(part, points).argmin(1) for part in grid.split(1 << 14)])

    def __call__(self, pairs: Tensor) -> Tensor:
        index = ((pairs / REACH + 1) * (CELLS / 2)).long().clamp_(0, CELLS - 1)
        return self.points[self.cells[index[..., 0] * CELLS + index[..., 1]]]


def coded(rotated: Tensor, levels: Levels) -> Tensor:
    """Each group by the best of the scales, refitted by least squares and rounded to fp16."""
    result = []
    for rows in rotated.split(max(1, (1 << 20) // rotated.shape[1])):
        groups = rows.unflatten(-1, (-1, GROUP))
        base = groups.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        best, kept = torch.full_like(base, math.inf), torch.zeros_like(groups)
        for multiple in MULTIPLES:
            values = levels((groups / (base * multiple)).unflatten(-1, (-1, 2))).flatten(-2)
            scale = (groups * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp(min=1e-12)
            values = values * scale.half().float()
            error = (groups - values).square().sum(-1, keepdim=True)
            kept = torch.where(error < best, values, kept)
            best = torch.minimum(best, error)
        result.append(kept.flatten(-2))
    return torch.cat(result)


@torch.no_grad()
def measure(coders: dict[str, Callable[[Tensor], Tensor]], seeds: int, max_tokens: int, output: Path | None) -> None:
    """The demo model with its rotated, channel-scaled weights as each coder, "... BITS", leaves them."""
    source = find(DEMO)
    model, tokenizer = load_float(source), load_tokenizer(source)
    ids = windows(tokenizer, _text(None)[0], 1024, max_tokens)
    reference = reference_log_probabilities(model, ids)
    power = calibration_power(model, calibration_ids(model, tokenizer, "self"))
    gauss = torch.randn(4096, GROUP, generator=torch.Generator().manual_seed(1))
    rows = []
    for seed in range(seeds):
        config = QuantConfig(group_size=GROUP, seed=seed)
        decisions = [d for d in resolve(model, config)[1] if d.bits]
        for name, coder in coders.items():
            changed = copy.deepcopy(model)
            for members in by_input(model, decisions).values():
                weights = [model.get_submodule(m.name).weight for m in members]
                scale = activation_scale(power[f"{members[0].name}.weight"])
                channel = choose_channel_scale(weights, config, scale)
                matrix = matrix_for("hadamard", block_size(weights[0].shape[1]), None, weights[0])
                for member, weight in zip(members, weights, strict=True):
                    v = coder(into_rotated(weight.float(), channel, matrix))
                    changed.get_submodule(member.name).weight.copy_(untransform(v, channel, matrix))
            quality = evaluate(changed, ids, reference)
            row = {
                "levels": name,
                "seed": seed,
                "bits_per_weight": float(name.split()[-1]) + 16 / GROUP,  # channel scales add 0.01 to all
                "gaussian_mse": float((gauss - coder(gauss)).square().mean()),
                "mean_kl_divergence": quality.mean_kl_divergence,
                "top1_agreement": quality.top1_agreement,
            }
            rows.append(row)
            print(row, flush=True)  # noqa: T201
            if output:
                write_json(output, document(rows, tokens=ids.numel(), group_size=GROUP))


def arguments(description: str, seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], 3)
    coders = {}
    for bits in (4, 3):
        scalar = lloyd_max(bits).float()
        coders[f"scalar {bits}"] = partial(coded, levels=Levels(torch.cartesian_prod(scalar, scalar)))
        coders[f"pairs {bits}"] = partial(coded, levels=Levels(gaussian_points(4**bits)))
    measure(coders, chosen.seeds, chosen.max_tokens, chosen.output)


if __name__ == "__main__":
    main()
