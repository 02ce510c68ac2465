"""Codes chosen with error feedback: what one column gets wrong, the columns after it make up for.

    min over codes, scales of  tr(E S E^T),   E = V - weight_scale * level[code],   S = E[T(x) T(x)^T]

Columns are coded in order; the error of column j, divided by U[j, j], is taken off the later columns along U[j, :],
with U^T U = S^-1. Sources: OBQ and GPTQ (arXiv 2210.17323, section 3), here in the rotated and channel-scaled domain,
as QuIP# (arXiv 2402.04396) does; scales and codes are then refitted in turns (coordinate descent, same objective).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tqw import config as configuration
from tqw.codebook import level_table, nearest_codes
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.packing import pack
from tqw.rotation import rotate
from tqw.scaling import decode_channel_scale, group_scales
from tqw.weight import QuantizedWeight, empty_weight, into_rotated

DAMPING = 0.01  # of the mean of S's diagonal: keeps the factorisation stable where inputs were never seen
REFITS = 2
DRIFT_SHARE = 0.25  # measured on the demo model: docs/theory.md
_REFIT_ELEMENTS = 1 << 26


@dataclass
class Moments:
    """Of the inputs of one layer, float32 [in, in]: second = E[x x^T], cross = E[x0 x^T] or None.

    x: what the quantized layers before it produce; x0: what the float model's layers do. drift: how much of the step
    from x to x0 is made up for.
    """

    second: Tensor
    cross: Tensor | None = None
    drift: float = DRIFT_SHARE

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Both, and nothing is left here: 14,336 inputs are 0.8 GB each, and the caller still holds this object."""
        second, cross = self.second, self.cross
        self.second, self.cross = second.new_empty(0), None
        return second, cross


def rotated_moment(moment: Tensor, channel_scale: Tensor, matrix: Tensor | None) -> Tensor:
    """S = H diag(a) M diag(a) H^T of the second moment M = E[x x^T]: float [in, in] -> float32 [padded, padded]."""
    a = decode_channel_scale(channel_scale.to(moment.device))
    padding = configuration.padded_features(len(a)) - len(a)
    result = functional.pad(a[:, None] * moment.float() * a, (0, padding, 0, padding))
    for _ in range(2):  # by one name: each step frees what it has read
        result = rotate(result, matrix).T
    return result.contiguous()


def feedback_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = (S + damping mean(diag S) I)^-1, computed in float64."""
    damped = moment.double()
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp(min=1e-30))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise TqwError("expected a positive definite second moment of the inputs, got none: calibrate on more text")
    del damped
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True).float()


def drift_correction(second: Tensor, cross: Tensor, share: float) -> Tensor:
    """D = share (S + ridge mean(diag S) I)^-1 (C - S)^T: with share 1, V + (D V^T)^T would make V x0 of x.

    The ridge keeps what is noise in few tokens, and what drifts at random, out of it: the larger, the smaller the
    share, ridge = 1 / (4 share).
    Source: asymmetric calibration (GPTAQ, arXiv 2504.02692).
    """
    damped = second.clone()
    damped.diagonal().add_(0.25 / share * damped.diagonal().mean().clamp(min=1e-30))
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    return torch.zeros_like(second) if failed else torch.cholesky_solve((cross - second).T, lower).mul_(share)


# Inside this file matrices are transposed, [padded, rows]: a column of the weight is then contiguous memory.


def _code_group(
    wanted: Tensor, reference: Tensor | None, scale: Tensor, influence: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Code the columns of one group in order, each shifting what is wanted of those after it.

    d_j = reference_j - scale * level_j,   wanted_k += influence[j, k] d_j  for k > j.
    wanted [group, rows] is changed. reference None stands for `wanted` itself. Returns (levels, d), both [group, rows].
    """
    inverse = torch.where(scale > 0, 1 / scale, 0)
    table = level_table(bits, wanted.device, wanted.dtype)
    boundaries = (table[1:] + table[:-1]) / 2
    levels, differences = torch.empty_like(wanted), torch.empty_like(wanted)
    units = torch.empty_like(scale)
    for j in range(len(wanted)):  # few and contiguous operations: on a GPU the launches are what this loop costs
        torch.mul(wanted[j], inverse, out=units)
        torch.index_select(table, 0, torch.bucketize(units, boundaries, out_int32=True, right=True), out=levels[j])
        old = wanted[j] if reference is None else reference[j]
        torch.addcmul(old, levels[j], scale, value=-1, out=differences[j])
        wanted[j + 1 :].addr_(influence[j, j + 1 :], differences[j])
    return levels, differences


def _sweep(target: Tensor, influence: Tensor, bits: int, group: int, method: str) -> tuple[Tensor, Tensor]:
    """One pass of error feedback: (levels [padded, rows], scales [groups, rows]). influence: -U_jk / U_jj."""
    wanted = target.clone()
    levels = torch.empty_like(wanted)
    scales = torch.empty(len(wanted) // group, wanted.shape[1], device=wanted.device)
    for index, start in enumerate(range(0, len(wanted), group)):
        columns = slice(start, start + group)
        scales[index] = group_scales(wanted[columns].T.contiguous(), bits, method).squeeze(-1).float()
        local = influence[columns, columns]
        levels[columns], differences = _code_group(wanted[columns], None, scales[index], local, bits)
        wanted[start + group :].addmm_(influence[columns, start + group :].T, differences)
    return levels, scales


def _refit_scales(target: Tensor, levels: Tensor, moment: Tensor, group: int) -> Tensor:
    """The scales [groups, rows] that minimise tr(E S E^T) for given codes: a small linear system for each row.

    0 for rows whose system is singular.
    """
    groups = len(levels) // group
    step = max(1, _REFIT_ELEMENTS // groups**2)  # bounds the memory of the systems
    parts = [
        _refit_rows(target[:, start : start + step], levels[:, start : start + step], moment, group)
        for start in range(0, levels.shape[1], step)
    ]
    return torch.cat(parts, 1)


def _refit_rows(target: Tensor, levels: Tensor, moment: Tensor, group: int) -> Tensor:
    padded, rows = levels.shape
    groups = padded // group
    normal = torch.zeros(rows, groups, groups, device=levels.device)
    for g in range(groups):
        columns = slice(g * group, (g + 1) * group)
        spread = moment[g * group :, columns] @ levels[columns]  # one group at a time, for the memory too
        normal[:, g:, g] = spread.mul_(levels[g * group :]).unflatten(0, (-1, group)).sum(1).T
    right = (moment @ target).mul_(levels).unflatten(0, (groups, group)).sum(1).T
    normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1)[:, None].clamp(min=1e-30))
    lower, failed = torch.linalg.cholesky_ex(normal)  # reads the lower triangle
    solved = torch.cholesky_solve(right[..., None], lower)[..., 0]
    return torch.where(failed[:, None] == 0, solved, 0).T.contiguous()


def _descend(target: Tensor, levels: Tensor, scales: Tensor, moment: Tensor, bits: int, group: int) -> Tensor:
    """Coordinate descent: each column's best level given all the others. Never raises the error."""
    values = levels * scales.repeat_interleave(group, 0)
    error = target - values
    diagonal = moment.diagonal().clamp(min=1e-30)
    for index, start in enumerate(range(0, len(values), group)):
        columns = slice(start, start + group)
        # Wanted of column j is its value + (S e)_j / S_jj; a change by -d_j moves that of column k by S_jk d_j / S_kk.
        wanted = torch.addmm(values[columns], moment[columns] / diagonal[columns, None], error)
        influence = moment[columns, columns] / diagonal[columns]
        levels[columns], differences = _code_group(wanted, values[columns], scales[index], influence, bits)
        error[columns] += differences
    return levels


def _code(
    target: Tensor, moment: Tensor, influence: Tensor, bits: int, group: int, method: str
) -> tuple[Tensor, Tensor]:
    """(levels, fp16-valued scales) of one pass."""
    levels, scales = _sweep(target, influence, bits, group, method)
    for _ in range(REFITS):
        refitted = _refit_scales(target, levels, moment, group)
        scales = torch.where(refitted > 0, refitted, scales).half().float()
        levels = _descend(target, levels, scales, moment, bits, group)
    return levels, scales


def quantize_with_feedback(
    weight: Tensor,
    moments: Moments,
    config: QuantConfig,
    channel_scale: Tensor,
    rotation_matrix: Tensor | None = None,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """Quantize a dense weight so that its *outputs* err least: the codes of `quantize`, chosen with error feedback.

    weight: floating [out, in]. moments: of its inputs, given up. channel_scale: uint8 [in]. Passes
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
    second, cross = moments.take()
    second = rotated_moment(second, channel_scale, matrix)
    target = into_rotated(weight.float(), layout.channel_scale[0], matrix).T.contiguous()
    if cross is not None and moments.drift > 0:
        cross = rotated_moment(cross, channel_scale, matrix)
        target += drift_correction(second, cross, moments.drift) @ target
    del cross  # as large as the moment, and the factorisation comes
    second.diagonal().add_(damping * second.diagonal().mean().clamp(min=1e-30))
    influence = feedback_factor(second, 0.0)
    influence.div_(-influence.diagonal().clone()[:, None])
    packed, scales = [], []
    for bits in config.bits:
        levels, scale = _code(target, second, influence, bits, group, config.scale)
        scales.append(scale.T.half().contiguous())
        packed.append(pack(nearest_codes(levels.T.contiguous(), bits), bits, group))
        target = target - levels * scale.repeat_interleave(group, 0)
    return replace(layout, packed=tuple(packed), weight_scale=tuple(scales))
