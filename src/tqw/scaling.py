"""Weight scales of groups, and the channel scale of a layer's inputs.

Sources: the least-squares scale over a grid of candidates is the searched scale of llama.cpp's k-quants and HQQ; the
per-input-channel scale is AWQ's (arXiv 2306.00978, section 3.2), here folded into the rotation's sign vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqw.codebook import UNITS_PER_SIGMA, levels, nearest_levels
from tqw.errors import TqwError

# Best multiples of the Gaussian scale lie in 0.6 .. 1.25 for groups of 32 to 256; 32 steps are within 0.2 % of 64.
_SEARCH_MULTIPLES = tuple(0.6 + 0.65 * step / 31 for step in range(32))
# At 8 bits clipping is dear: search around the scale that just reaches the largest value.
_SEARCH_MULTIPLES_8 = tuple(0.8 + 0.3 * step / 31 for step in range(32))

CHANNEL_SCALE_DTYPE = torch.float8_e5m2
_CHANNEL_SPREAD = 2.0**5  # channel scales stay within this factor of their geometric mean
_FOLD_LIMIT = 9  # and that mean within 2^-9 .. 2^9: together they use e5m2's normal range 2^-14 .. 2^15
_SMALLEST_RMS, _LARGEST_RMS = 1e-7, 1e7  # beyond these, fp16 weight scales flush to zero or overflow


def _root_mean_square(groups: Tensor) -> Tensor:
    return groups.square().mean(-1, keepdim=True).sqrt_()


def norm_scales(groups: Tensor, bits: int) -> Tensor:
    """s = rms(group) / (level units per standard deviation): the original recipe. [..., g] -> fp16 [..., 1]."""
    return (_root_mean_square(groups) / UNITS_PER_SIGMA[bits]).half()


def search_scales(groups: Tensor, bits: int) -> Tensor:
    """s = argmin_s |v - s level(v / s')|^2, s' over 32 candidates, s the least-squares fit to that candidate's codes.

    With q = level(v / s') the fit is s = <v, q> / <q, q> and leaves |v|^2 - <v, q>^2 / <q, q>; so the candidate with
    the largest <v, q>^2 / <q, q> wins. [..., g] float32 -> fp16 [..., 1].
    """
    if bits == 8:
        base, multiples = groups.abs().amax(-1, keepdim=True) / max(levels(bits)), _SEARCH_MULTIPLES_8
    else:
        base, multiples = _root_mean_square(groups) / UNITS_PER_SIGMA[bits], _SEARCH_MULTIPLES
    inverse = torch.where(base > 0, 1 / base, 0)  # an all-zero group keeps scale 0
    best = scale = torch.zeros_like(base)
    for multiple in multiples:
        nearest = nearest_levels(groups * (inverse / multiple), bits)
        projection = (groups * nearest).sum(-1, keepdim=True)
        energy = nearest.square_().sum(-1, keepdim=True)
        fit = projection / energy.clamp_(min=1)
        explained = fit * projection
        better = explained > best
        best = torch.where(better, explained, best)
        scale = torch.where(better, fit, scale)
    return scale.half()


def group_scales(groups: Tensor, bits: int, method: str) -> Tensor:
    """Scales of `groups` [..., g] by `search` or `norm`: fp16 [..., 1], at least 0."""
    return norm_scales(groups, bits) if method == "norm" else search_scales(groups, bits)


def encode_channel_scale(values: Tensor) -> Tensor:
    """Nearest float8 (e5m2) of each value, as its byte: float [in] -> uint8 [in].

    Any non-zero channel scale gives an exact identity W = (W / a) a; its precision costs nothing, so one byte does.
    Kept as bytes because `.to(dtype)` and collectives must never convert it.
    """
    return values.to(CHANNEL_SCALE_DTYPE).view(torch.uint8)


def decode_channel_scale(stored: Tensor) -> Tensor:
    """uint8 [in] -> float32 [in]."""
    return stored.view(CHANNEL_SCALE_DTYPE).float()


def activation_scale(mean_square: Tensor, exponent: float = 0.5) -> Tensor:
    """s_j = rms(x_j)^-exponent, its geometric mean 1: the error of column j is s_j times that of V, so columns that
    meet large inputs get finer codes.

    mean_square: E x_j^2, float [in]. Channels that are (nearly) dead count as 1/1000 of the mean power.
    Source: AWQ, arXiv 2306.00978, equation 4, with a fixed exponent (docs/theory.md has the ablation).
    """
    power = mean_square.double()
    power = power.clamp(min=max(float(power.mean()) * 1e-3, 1e-30))
    scale = power.pow(-exponent / 2)
    return (scale / scale.log().mean().exp()).float()


def fold_channel_scale(signs: Tensor, scale: Tensor | None, weight_rms: float) -> Tensor:
    """a = signs * scale * 2^k, with 2^k the power of two nearest the weight's root mean square.

    Then V = (W / a) H^T has rms near 1 and its weight scales sit in fp16's comfortable range. Returns uint8 [in].
    """
    if weight_rms and not _SMALLEST_RMS <= weight_rms <= _LARGEST_RMS:
        raise TqwError(
            f"expected weights with a root mean square of {_SMALLEST_RMS:g} to {_LARGEST_RMS:g}, or all zero, "
            f"got {weight_rms:g}: rescale the layer or keep it with an override"
        )
    fold = round(math.log2(weight_rms)) if weight_rms else 0
    power_of_two = 2.0 ** min(max(fold, -_FOLD_LIMIT), _FOLD_LIMIT)
    scale = torch.ones_like(signs) if scale is None else scale.to(signs.device, torch.float32)
    scale = scale.clamp(1 / _CHANNEL_SPREAD, _CHANNEL_SPREAD)
    return encode_channel_scale(signs * scale * power_of_two)
