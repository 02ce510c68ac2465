"""The slow equation in plain torch: correct on every device, the yardstick of every other backend.

    y = T(x) V^T + b,   dx = (dy V) transformed back,   rows of an embedding = untransform(V[ids])

Everything is computed in float32 over slices of V, so peak memory above the packed weight is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tqw.weight import QuantizedWeight, dequantize, rotated_levels, transform, untransform

_SLICE_ELEMENTS = 1 << 18  # 1 MiB of float32: stays in the cache


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None: it runs everywhere."""
    del x, qw
    return None


def _row_slices(qw: QuantizedWeight) -> Iterator[slice]:
    step = max(1, _SLICE_ELEMENTS // qw.padded_in)
    for start in range(0, qw.out_features, step):
        yield slice(start, min(start + step, qw.out_features))


def _slice_of_pass(qw: QuantizedWeight, index: int, rows: slice) -> Tensor:
    return rotated_levels(qw.packed[index][rows], qw.weight_scale[index][rows], qw.padded_in)


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b: [..., in] -> [..., out], in the dtype of x."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    matrix = qw.matrix(tokens)
    transformed = [transform(tokens, channel_scale, matrix) for channel_scale in qw.channel_scale]
    y = torch.empty(tokens.shape[0], qw.out_features, dtype=torch.float32, device=x.device)
    for rows in _row_slices(qw):
        if qw.shares_rotation:
            values = _slice_of_pass(qw, 0, rows)
            for index in range(1, len(qw.packed)):
                values += _slice_of_pass(qw, index, rows)
            y[:, rows] = transformed[0] @ values.T
        else:
            y[:, rows] = sum(t @ _slice_of_pass(qw, index, rows).T for index, t in enumerate(transformed))
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], qw.out_features)


def linear_backward(grad: Tensor, qw: QuantizedWeight) -> Tensor:
    """dx = sum over passes of ((dy V) H) * a: [..., out] -> [..., in], in the dtype of grad."""
    tokens = grad.reshape(-1, grad.shape[-1]).float()
    matrix = qw.matrix(tokens)
    dx = torch.zeros(tokens.shape[0], qw.in_features, dtype=torch.float32, device=grad.device)
    for index in range(len(qw.packed)):
        dv = torch.zeros(tokens.shape[0], qw.padded_in, dtype=torch.float32, device=grad.device)
        for rows in _row_slices(qw):
            dv += tokens[:, rows] @ _slice_of_pass(qw, index, rows)
        dx += untransform(dv, qw.scale_of_pass(index), matrix)
    return dx.to(grad.dtype).view(*grad.shape[:-1], qw.in_features)


def combine(pairs: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """y[t] = sum_k weights[t, k] pairs[t, k] over 0 <= ids[t, k] < experts: [tokens, choices, out] -> [tokens, out]."""
    present = (ids >= 0) & (ids < experts)
    return torch.where(present[..., None], pairs * weights[..., None], 0).sum(1, dtype=torch.float32).to(pairs.dtype)


def embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dense[ids]: integer [...] -> [..., in] in `dtype`."""
    flat = ids.flatten()
    rows = QuantizedWeight(
        tuple(functional.embedding(flat, packed) for packed in qw.packed),
        tuple(functional.embedding(flat, scale) for scale in qw.weight_scale),
        qw.channel_scale,
        qw.rotation,
        qw.rotation_matrix,
    )
    return dequantize(rows, dtype).view(*ids.shape, qw.in_features)
