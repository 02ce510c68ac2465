"""Which width each layer gets, so that the loss is least within a budget of bits per weight.

    min over widths b of  sum_l sensitivity_l * mse(b_l)     subject to     8 * sum_l bytes_l(b_l) <= target * weights

The loss is linear in the layers' relative errors where these are small (the linearity theorem of HIGGS, arXiv
2411.17525, section 3), and rotated weights have the same relative error mse(b) in every layer. The sensitivity is half
the Fisher information of what the layer writes, on text and tokens that the model samples from itself:

    sensitivity_l = 1/2 E_t sum_n g_nt^2 sum_B r_nB^2 |a x_t|_B^2       KLD = sum_l sensitivity_l mse(b_l) nats a token

with g the gradient of the sampled tokens' log-likelihood by the layer's output, r_nB the root mean square of row n of
W / a in rotation block B, and |a x|_B^2 the energy of the scaled input in it. Layers that share an input get one width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tqw.codebook import nearest_levels
from tqw.config import WIDTHS, QuantConfig, block_size, format_bits, group_size, padded_features
from tqw.errors import TqwError
from tqw.gradients import run_backward
from tqw.model import Decision, Progress, Select, by_input, dense_weights, is_tied, kind_of, resolve, tensor_name
from tqw.scaling import activation_scale, group_scales
from tqw.weight import empty_weight

_STATES = 1 << 16  # sizes that the dynamic program tells apart: rounding up to them costs a few thousandths of a bit
# The loss grows faster than the error: with one width for all layers the demo model's KLD is 0.83, 0.92 and 1.6 times
# the linear prediction at 4, 3 and 2 bits (docs/theory.md).
_CURVATURE = 8.0
_SLACK = 0.25  # bits per weight that a target may lie above what the widest code takes
_TOKENS = 2048  # of calibration text that the sensitivities are measured on
_EMBEDDINGS = ("embedding", "lm_head")


def best_widths(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """argmin over choices c of sum_i losses[i][c_i] with sum_i sizes[i][c_i] <= budget; None when none is that small.

    Exact when the sizes' differences have at most 65,536 common steps in the budget; else sizes are rounded up to steps
    of 1/65,536 of it, so that the budget always holds.
    """
    least = [min(row) for row in sizes]
    room = budget - sum(least)
    if room < 0:
        return None
    step = math.gcd(*(size - low for row, low in zip(sizes, least, strict=True) for size in row)) or 1
    step = max(step, -(-room // _STATES))
    states = room // step + 1
    best = torch.zeros(states, dtype=torch.float64)  # by the room used at most
    choices = []
    for row, low, loss in zip(sizes, least, losses, strict=True):
        totals = torch.full((len(row), states), math.inf, dtype=torch.float64)
        for choice, size in enumerate(row):
            extra = -(-(size - low) // step)
            if extra < states:
                totals[choice, extra:] = best[: states - extra] + loss[choice]
        best, chosen = totals.min(0)
        choices.append(chosen.to(torch.uint8))
    result, state = [], states - 1
    for row, low, chosen in zip(reversed(sizes), reversed(least), reversed(choices), strict=True):
        result.append(int(chosen[state]))
        state -= -(-(row[result[-1]] - low) // step)
    return result[::-1]


@lru_cache(maxsize=64)
def relative_mse(bits: int, group: int, method: str = "search") -> float:
    """E |v - s level|^2 / E |v|^2 of groups of Gaussian numbers: what a width costs in any layer (measured once)."""
    groups = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).unflatten(0, (-1, group))
    scale = group_scales(groups, bits, method).float()
    error = groups - scale * nearest_levels(groups * torch.where(scale > 0, 1 / scale, 0), bits)
    return float(error.square().mean() / groups.square().mean())


def _loss(width: int, group: int, method: str) -> float:
    """What a width costs for each unit of sensitivity: the relative error, and more than that where it is large."""
    error = relative_mse(width, group, method)
    return error * (1 + _CURVATURE * error)


@dataclass(frozen=True)
class _Unit:
    """Modules that must have the same width: their weights, and their bytes and loss at each of `widths`."""

    names: tuple[str, ...]
    widths: tuple[tuple[int, ...], ...]
    weights: int
    sizes: tuple[int, ...]
    losses: tuple[float, ...]


def _unit(
    model: nn.Module,
    config: QuantConfig,
    members: Sequence[Decision],
    pinned: bool,
    sensitivity: Mapping[str, float] | None,
) -> _Unit:
    assert members[0].bits is not None
    widths = (members[0].bits,) if pinned else tuple((width,) for width in WIDTHS)
    counted = members[:1] if any(m.kind in _EMBEDDINGS for m in members) else members  # a tied head is stored once
    shapes = [dense.shape for m in counted for dense in dense_weights(model.get_submodule(m.name), m.kind).values()]
    sizes = tuple(sum(empty_weight(s, config.with_bits(width)).nbytes() for s in shapes) for width in widths)
    weight = 1.0 if sensitivity is None else sum(sensitivity.get(m.name, 0.0) for m in members)
    group = min(group_size(shapes[0][-1], config.group_size), 1 << 12)
    losses = (0.0,) if pinned else tuple(weight * _loss(width, group, config.scale) for (width,) in widths)
    return _Unit(tuple(m.name for m in members), widths, sum(s.numel() for s in shapes), sizes, losses)


def _units(
    model: nn.Module,
    config: QuantConfig,
    select: Select | None,
    free: Collection[str],
    sensitivity: Mapping[str, float] | None,
) -> list[_Unit]:
    decisions = [d for d in resolve(model, config, select)[1] if d.bits]
    groups = list(by_input(model, decisions).values())
    ends = [d for d in decisions if d.kind in _EMBEDDINGS]
    if is_tied(model) and len(ends) == 2 and ends[0].bits == ends[1].bits:
        groups = [g for g in groups if g[0] not in ends] + [ends]

    def pinned(decision: Decision) -> bool:
        if config.override_for(decision.name) is not None:
            return True
        if sensitivity is not None and decision.name not in sensitivity:  # nothing is known of it: BERT's pooler
            return True
        return decision.kind not in free if decision.kind in _EMBEDDINGS else decision.bits != config.bits

    return [_unit(model, config, g, any(map(pinned, g)), sensitivity) for g in groups]


def allocate_bits(
    model: nn.Module,
    target_bpw: float,
    config: QuantConfig | None = None,
    *,
    sensitivity: Mapping[str, float] | None = None,
    select: Select | None = None,
    free: Collection[str] = (),
) -> QuantConfig:
    """The config with a width for every layer, frozen as overrides, that keeps `target_bpw` bits per quantized weight.

    Counted are the bytes of codes, weight scales, channel scales and padding of everything that is quantized, as in
    `QuantizationReport.bits_per_weight`; embedding and output embedding too when the config quantizes them: at the
    width that it names, or at one chosen here for the kinds in `free` ("embedding", "lm_head"). Its overrides stay.
    sensitivity: from `sensitivities`, by module name; None takes all groups of layers that share an input as equally
    important, for which no data and no weights are needed; layers that it does not name keep the config's width.
    Works on the meta device.
    Raises TqwError for a target out of reach.
    """
    config = config or QuantConfig()
    if len(config.bits) > 1:
        raise TqwError(f"expected one pass with a target of bits per weight, got bits {format_bits(config.bits)}")
    units = _units(model, config, select, free, sensitivity)
    weights = sum(unit.weights for unit in units)
    low, high = (8 * sum(f(u.sizes) for u in units) / max(weights, 1) for f in (min, max))
    if not (low <= target_bpw <= high + _SLACK):
        raise TqwError(
            f"expected a target of {math.ceil(1000 * low) / 1000:.3f} to {high:.3f} bits per weight for this model, "
            f"scales and overrides counted, got {target_bpw:g}: change the target, the overrides or the group size"
        )
    choices = best_widths([u.sizes for u in units], [u.losses for u in units], int(target_bpw * weights / 8))
    assert choices is not None
    chosen = {name: u.widths[c] for u, c in zip(units, choices, strict=True) for name in u.names}
    free_names = {name for u in units if len(u.widths) > 1 for name in u.names}
    unknown = {n for n in chosen if n not in (sensitivity or chosen) and config.override_for(n) is None}
    return _with_widths(config, {name: width for name, width in chosen.items() if name in free_names | unknown})


def _with_widths(config: QuantConfig, widths: Mapping[str, tuple[int, ...]]) -> QuantConfig:
    """One override for each width but the most frequent one, which becomes the config's."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, width in widths.items():
        names.setdefault(width, []).append(name)
    overrides = tuple(
        (f"^({'|'.join(map(re.escape, members))})$", format_bits(width)) for width, members in sorted(names.items())
    )
    common = Counter(widths.values()).most_common(1)
    return replace(config, bits=common[0][0] if common else config.bits, overrides=config.overrides + overrides)


class _Watch:
    """Accumulates the sensitivity of one layer in a forward and a backward pass."""

    def __init__(self, weight: Tensor | None, power: Tensor | None) -> None:
        self.total = 0.0
        self.reached = False  # by a gradient
        self.weight = weight
        self.scale: Tensor | None = None
        if weight is not None and power is not None:
            self.scale = activation_scale(power).to(weight.device)

    def _blocks(self, x: Tensor) -> Tensor:
        """Energy in each rotation block: [..., in] -> float32 [..., blocks]."""
        size = x.shape[-1]
        padded = nn.functional.pad(x.float().square(), (0, padded_features(size) - size))
        return padded.unflatten(-1, (-1, block_size(size))).sum(-1)

    def forward(self, module: nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if not y.requires_grad:
            return
        if self.weight is None:  # embeddings and experts: an error in proportion to what they write
            noise = y.detach().float().square().mean(-1, keepdim=True)
        else:
            x = args[0].detach()
            noise = self._blocks(x if self.scale is None else x * self.scale)

        def backward(gradient: Tensor) -> None:
            error = noise
            if self.weight is not None:
                w = self.weight.float() if self.scale is None else self.weight.float() / self.scale
                error = noise @ (self._blocks(w) / block_size(w.shape[-1])).T
            self.reached = True
            self.total += 0.5 * float((gradient.float().square() * error).sum())

        y.register_hook(backward)


def sensitivities(
    model: nn.Module,
    ids: Tensor | Sequence[Tensor],
    power: Mapping[str, Tensor],
    progress: Progress | None = None,
) -> dict[str, float]:
    """KLD in nats a token per unit of relative error of a layer's weights, by module name: see the top of this file.

    ids: int64 [sequences, tokens], of which at most 2,048 tokens are used, one sequence at a time; or batches, all
    used. power: E x_j^2 by weight name (`tqw.calibrate.input_power`). One forward and one backward pass. For models
    without logits the squared error of the last hidden states stands in for the KLD: g is then the gradient of
    <h, r>, r Gaussian. Without layers that the output does not depend on.
    """
    watches = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind and name:
            weight = dense_weights(module, kind)[""] if kind in ("linear", "conv1d") else None
            watches[name] = _Watch(weight, power.get(tensor_name(name, "")))
    batches = ids[: max(1, _TOKENS // ids.shape[1])].split(1) if isinstance(ids, Tensor) else ids

    def report(count: int) -> None:
        if progress is not None:
            progress("measure sensitivities", count, len(batches))

    run_backward(model, batches, {name: watch.forward for name, watch in watches.items()}, report)
    tokens = sum(batch.numel() for batch in batches)
    return {name: watch.total / tokens for name, watch in watches.items() if watch.reached}
