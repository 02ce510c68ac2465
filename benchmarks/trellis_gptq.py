"""The trellis of trellis.py under error feedback: `--method gptq` with 16 levels and with the trellis, demo model.

    python benchmarks/trellis_gptq.py -o benchmarks/results/trellis_gptq.json

The trellis chooses among the 32 levels of the format's table of 5 bits, so that the 5-bit format can hold its result;
it begins anew with every group, 4 bits a weight. Each survivor of Viterbi's algorithm feeds its own errors back to the
columns of the group that follow (per-survivor processing, Raheli et al. 1995); then scales and paths are refitted in
turns as gptq.py does, a group's path given all other groups.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from trellis import STATES, trellis

from tqw import gptq
from tqw.cli import _text
from tqw.codebook import level_table, lloyd_max
from tqw.compare import Comparison, parse_recipe
from tqw.evaluate import windows
from tqw.report import document, write_json
from tqw.source import DEMO, find, load_float, load_tokenizer

GROUP = 64
MULTIPLES = (0.88, 0.96, 1.04, 1.12, 1.2)  # of the scale that fits a group's root mean square
_U = torch.arange(STATES) & 1, torch.arange(STATES) >> 1 & 1, torch.arange(STATES) >> 2 & 1
# [state after, u3]: the state before. A state after begins with the u of the branch that leads to it.
_BEFORE = torch.stack([_U[1] + 2 * _U[2] + 4 * u3 for u3 in range(2)], 1)


def survivors(wanted: Tensor, scale: Tensor, influence: Tensor, weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The path that errs least: sum over j of weight_j d_j^2, d_j = wanted_j - scale * level_j, where d_j adds
    influence[j, k] d_j to wanted_k.  wanted [group, rows], scale [rows] -> (levels, d), both [group, rows]."""
    group, rows = wanted.shape
    branch, row = _U[0][:, None], torch.arange(rows)
    mine = wanted.expand(STATES, group, rows).clone()  # of each survivor
    cost = torch.full((STATES, rows), math.inf)
    cost[0] = 0
    choices = table.view(-1, 4).T
    flips = (_U[0] ^ _U[2]).tolist()
    levels, errors, ways = torch.empty(STATES, group, rows), torch.empty(STATES, group, rows), []
    for j in range(group):
        units = mine[:, j] / scale.clamp(min=1e-30)
        near = torch.empty(STATES, 2, rows)  # [state before, u]
        for low in range(2):
            states = [s for s in range(STATES) if s >> 1 & 1 == low]
            pair = [c[torch.bucketize(units[states], (c[1:] + c[:-1]) / 2)] for c in (choices[low], choices[2 + low])]
            for i, state in enumerate(states):
                near[state, 0], near[state, 1] = pair[flips[state]][i], pair[1 - flips[state]][i]
        error = mine[:, j].unsqueeze(1) - near * scale
        cost, which = (cost.unsqueeze(1) + error.square() * weight[j])[_BEFORE, branch].min(1)
        way = _BEFORE[torch.arange(STATES)[:, None], which]
        ways.append(way)
        levels[:, j], errors[:, j] = near[way, branch, row], error[way, branch, row]
        if j + 1 < group:
            later = mine[:, j + 1 :].gather(0, way.unsqueeze(1).expand(STATES, group - j - 1, rows))
            mine[:, j + 1 :] = later + influence[j, j + 1 :, None] * errors[:, j].unsqueeze(1)
    state, path = cost.argmin(0), []
    for j in reversed(range(group)):
        path.append((levels[state, j, row], errors[state, j, row]))
        state = ways[j][state, row]
    chosen, left = zip(*path[::-1], strict=True)
    return torch.stack(chosen), torch.stack(left)


def searched_scale(wanted: Tensor, table: Tensor) -> Tensor:
    """The best of some scales without feedback, refitted by least squares: [group, rows] -> [rows], fp16 values."""
    base = wanted.square().mean(0).sqrt().clamp(min=1e-12) * float(lloyd_max(5).max() / table.max())
    best, scale = torch.full_like(base, math.inf), base
    for multiple in MULTIPLES:
        error = (wanted - trellis((wanted / (base * multiple)).T, table).T * (base * multiple)).square().sum(0)
        scale = torch.where(error < best, base * multiple, scale)
        best = torch.minimum(best, error)
    values = trellis((wanted / scale).T, table).T
    fitted = (wanted * values).sum(0) / values.square().sum(0).clamp(min=1e-12)
    return torch.where(fitted > 0, fitted, scale).half().float()


def sweep(target: Tensor, influence: Tensor, weight: Tensor, table: Tensor, group: int) -> tuple[Tensor, Tensor]:
    wanted, levels = target.clone(), torch.empty_like(target)
    scales = torch.empty(len(wanted) // group, wanted.shape[1])
    for index, start in enumerate(range(0, len(wanted), group)):
        here = slice(start, start + group)
        scales[index] = searched_scale(wanted[here], table)
        levels[here], error = survivors(wanted[here], scales[index], influence[here, here], weight[here], table)
        wanted[start + group :].addmm_(influence[here, start + group :].T, error)
    return levels, scales


def descend(target: Tensor, levels: Tensor, scales: Tensor, moment: Tensor, table: Tensor, group: int) -> Tensor:
    """Each group's path given all the others, kept where it lowers the error of the row."""
    values = levels * scales.repeat_interleave(group, 0)
    error = target - values
    for index, start in enumerate(range(0, len(values), group)):
        here = slice(start, start + group)
        block, pull = moment[here, here], moment[here] @ error
        factor = gptq.feedback_factor(block, 0.0)
        wanted = values[here] + torch.cholesky_solve(pull, torch.linalg.cholesky(block))
        influence, weight = factor / -factor.diagonal()[:, None], factor.diagonal().square().reciprocal()
        new, _ = survivors(wanted, scales[index], influence, weight, table)
        change = new * scales[index] - values[here]
        better = 2 * (change * pull).sum(0) > (change * (block @ change)).sum(0)
        levels[here] = torch.where(better, new, levels[here])
        change = torch.where(better, change, 0)
        error[here] -= change
        values[here] += change
    return levels


def code(
    target: Tensor, moment: Tensor, influence: Tensor, bits: int, group: int, method: str
) -> tuple[Tensor, Tensor]:
    """`gptq._code` with the trellis; bits is 5 here."""
    table = level_table(bits, target.device, target.dtype)
    weight = gptq.feedback_factor(moment, 0.0).diagonal().square().reciprocal()
    levels, scales = sweep(target, influence, weight, table, group)
    for _ in range(gptq.REFITS):
        refitted = gptq._refit_scales(target, levels, moment, group)
        scales = torch.where(refitted > 0, refitted, scales).half().float()
        levels = descend(target, levels, scales, moment, table, group)
    return levels, scales


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    source = find(DEMO)
    model, tokenizer = load_float(source), load_tokenizer(source)
    ids = windows(tokenizer, _text(None)[0], 1024, arguments.max_tokens)
    comparison = Comparison(copy.deepcopy(model), tokenizer, ids, measure_footprint=False)
    comparison.float_row()
    rows = []
    for name, recipe, coder in (("16 levels", "4", gptq._code), ("trellis of 8 states", "5", code)):
        with mock.patch.object(gptq, "_code", coder):
            row = comparison.recipe_row(parse_recipe(f"{recipe}:method=gptq", GROUP))
        rows.append({
            "coder": name, "bits_per_weight": row.bits_per_weight - (recipe == "5"), "seconds": row.quantize_seconds,
            "mean_kl_divergence": row.mean_kl_divergence, "top1_agreement": row.top1_agreement,
            "perplexity": row.perplexity,
        })  # fmt: skip
        print(rows[-1], flush=True)  # noqa: T201
        if arguments.output:
            write_json(arguments.output, document(rows, tokens=ids.numel(), group_size=GROUP, states=STATES))


if __name__ == "__main__":
    main()
