"""Codes chosen with error feedback: what one column gets wrong, the columns after it make up for.

    min over codes, scales of  tr(E S E^T),   E = V - weight_scale * level[code],   S = E[T(x) T(x)^T]

Columns are coded in order; the error of column j, divided by U[j, j], is taken off the later columns along U[j, :],
with U^T U = S^-1. Sources: OBQ and GPTQ (arXiv 2210.17323, section 3), here in the rotated and channel-scaled domain,
as QuIP# (arXiv 2402.04396) does; scales and codes are then refitted in turns (coordinate descent, same objective).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tqw import config as configuration
from tqw.codebook import nearest_codes, nearest_levels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.packing import pack
from tqw.rotation import rotate
from tqw.scaling import decode_channel_scale, group_scales
from tqw.weight import QuantizedWeight, empty_weight, into_rotated

DAMPING = 0.01  # of the mean of S's diagonal: keeps the factorisation stable where inputs were never seen
REFITS = 2


def rotated_moment(moment: Tensor, channel_scale: Tensor, matrix: Tensor | None) -> Tensor:
    """S = H diag(a) M diag(a) H^T of the second moment M = E[x x^T]: float [in, in] -> float32 [padded, padded]."""
    a = decode_channel_scale(channel_scale.to(moment.device))
    padding = configuration.padded_features(len(a)) - len(a)
    scaled = functional.pad(a[:, None] * moment.float() * a, (0, padding, 0, padding))
    return rotate(rotate(scaled, matrix).T, matrix).T.contiguous()


def feedback_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = (S + damping mean(diag S) I)^-1, computed in float64."""
    damped = moment.double()
    ridge = damping * damped.diagonal().mean().clamp(min=1e-30)
    damped = damped + ridge * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise TqwError("expected a positive definite second moment of the inputs, got none: calibrate on more text")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def output_error(difference: Tensor, moment: Tensor) -> float:
    """tr(D S D^T): the squared error of the outputs that a weight error D [out, padded] causes."""
    return float(((difference @ moment) * difference).sum())


def _sweep(
    target: Tensor, factor: Tensor, bits: int, group: int, method: str, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One pass of error feedback: (levels [out, padded], scales [out, groups]); given scales are kept."""
    work = target.clone()
    found = torch.empty_like(work)
    chosen = torch.empty(len(work), work.shape[1] // group, device=work.device) if scales is None else scales
    for index, start in enumerate(range(0, work.shape[1], group)):
        columns = slice(start, start + group)
        if scales is None:
            chosen[:, index] = group_scales(work[:, columns], bits, method).squeeze(-1).float()
        scale = chosen[:, index]
        inverse = torch.where(scale > 0, 1 / scale, 0)
        block, local = work[:, columns], factor[columns, columns]
        errors = torch.empty_like(block)
        for j in range(group):
            level = nearest_levels(block[:, j] * inverse, bits)
            found[:, start + j] = level
            errors[:, j] = (block[:, j] - level * scale) / local[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * local[j, j + 1 :]
        work[:, start + group :] -= errors @ factor[columns, start + group :]
    return found, chosen


def _refit_scales(target: Tensor, levels: Tensor, moment: Tensor, group: int) -> Tensor:
    """The scales of each row that minimise tr(E S E^T) for given codes: a small linear system for each row."""
    rows, padded = levels.shape
    groups = padded // group
    spread = torch.zeros(rows, groups, padded, device=levels.device)
    for g in range(groups):
        columns = slice(g * group, (g + 1) * group)
        spread[:, g] = levels[:, columns] @ moment[columns]
    normal = (spread * levels[:, None]).unflatten(-1, (groups, group)).sum(-1)
    right = (spread * target[:, None]).sum(-1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1)[:, None].clamp(min=1e-30)
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    return torch.linalg.solve(normal, right)


def _descend(target: Tensor, levels: Tensor, scales: Tensor, moment: Tensor, bits: int, group: int) -> Tensor:
    """Coordinate descent: each column's best level given all the others. Never raises the error."""
    values = levels * scales.repeat_interleave(group, 1)
    for start in range(0, values.shape[1], group):
        columns = slice(start, start + group)
        scale = scales[:, start // group]
        inverse = torch.where(scale > 0, 1 / scale, 0)
        gradient = (target - values) @ moment[:, columns]  # of the columns of this group
        local = moment[columns, columns]
        for j in range(group):
            old = values[:, start + j]
            level = nearest_levels((old + gradient[:, j] / local[j, j].clamp(min=1e-30)) * inverse, bits)
            change = level * scale - old
            gradient -= change[:, None] * local[j]
            levels[:, start + j] = level
            values[:, start + j] = level * scale
    return levels


def _code(target: Tensor, moment: Tensor, factor: Tensor, bits: int, group: int, method: str) -> tuple[Tensor, Tensor]:
    """(levels, fp16-valued scales) of one pass."""
    levels, scales = _sweep(target, factor, bits, group, method, None)
    for _ in range(REFITS):
        refitted = _refit_scales(target, levels, moment, group)
        scales = torch.where(refitted > 0, refitted, scales).half().float()
        levels = _descend(target, levels, scales, moment, bits, group)
    return levels, scales


def quantize_with_feedback(
    weight: Tensor,
    moment: Tensor,
    config: QuantConfig,
    channel_scale: Tensor,
    rotation_matrix: Tensor | None = None,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """Quantize a dense weight so that its *outputs* err least: the codes of `quantize`, chosen with error feedback.

    weight: floating [out, in]. moment: E[x x^T] of its inputs, float [in, in]. channel_scale: uint8 [in]. Passes
    share one rotation; each later pass codes what the earlier ones left. Same type, size and speed as `quantize`.
    """
    if config.rotation_strategy != "shared":
        raise TqwError("expected rotation_strategy 'shared' with method gptq: use --method rtn for the others")
    in_features = weight.shape[-1]
    layout = empty_weight(weight.shape, config, weight.device)
    layout = replace(
        layout, channel_scale=(channel_scale.to(weight.device, copy=True),), rotation_matrix=rotation_matrix
    )
    matrix = layout.matrix(torch.empty(0, device=weight.device))
    group = configuration.group_size(in_features, config.group_size)
    second = rotated_moment(moment, channel_scale, matrix)
    second.diagonal().add_(damping * second.diagonal().mean().clamp(min=1e-30))
    factor = feedback_factor(second, 0.0)
    target = into_rotated(weight.float(), layout.channel_scale[0], matrix)
    packed, scales = [], []
    for bits in config.bits:
        levels, scale = _code(target, second, factor, bits, group, config.scale)
        scales.append(scale.half())
        packed.append(pack(nearest_codes(levels, bits), bits, group))
        target = target - levels * scale.repeat_interleave(group, 1)
    return replace(layout, packed=tuple(packed), weight_scale=tuple(scales))
