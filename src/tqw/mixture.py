"""Routed experts: y_t = sum_k p_tk finish(down_e(activate(up_e(x_t)))), e = ids[t, k], over 0 <= e < experts.

All pairs (token, expert) of a projection together, where a kernel can and it is faster; else one expert after the
other. torch.compile, torch.export and CUDA graphs always see the former, whose shapes do not depend on the ids: as two
opaque ops, `tqw::experts` (y[t, k] = linear(x_t, qw[e], bias[e])) and `tqw::combine` (the weighted sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tqw import kernels
from tqw.weight import QuantizedWeight

Projection = tuple[QuantizedWeight, Tensor | None]  # [experts, out, in], biases [experts, out]


class Experts(NamedTuple):
    """What each of them computes for a row: finish(down(activate(up(x)))); the functions take any number of rows."""

    up: Projection
    down: Projection
    activate: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor] = lambda y: y

    @property
    def number(self) -> int:
        return self.up[0].packed[0].shape[0]


torch.library.define("tqw::experts", f"(Tensor x, Tensor ids, Tensor? bias, {kernels.WEIGHT_ARGS}) -> Tensor")
torch.library.define("tqw::experts_backward", f"(Tensor grad, Tensor ids, int tokens, {kernels.WEIGHT_ARGS}) -> Tensor")
torch.library.define("tqw::combine", "(Tensor pairs, Tensor weights, Tensor ids, int experts) -> Tensor")


def routed_tokens(ids: Tensor, experts: int) -> Iterable[tuple[int, Tensor, Tensor]]:
    """(expert, token rows, positions among the token's choices) for every expert that was chosen."""
    for expert in torch.unique(ids).tolist():
        if 0 <= expert < experts:
            tokens, positions = torch.where(ids == expert)
            yield expert, tokens, positions


def _one(projection: Projection, expert: int) -> Projection:
    qw, bias = projection
    return qw[expert], None if bias is None else bias[expert]


def _pairs_by_expert(x: Tensor, projection: Projection, ids: Tensor) -> Tensor:
    """[tokens, choices, out]; 0 for experts that do not exist."""
    qw = projection[0]
    y = x.new_zeros(*ids.shape, qw.out_features)
    for expert, tokens, positions in routed_tokens(ids, qw.packed[0].shape[0]):
        y[tokens, positions] = kernels.linear(x[tokens], *_one(projection, expert))
    return y


def _pairs_of_every_expert(x: Tensor, projection: Projection, ids: Tensor) -> Tensor:
    """The same without a look at the ids, so that a CUDA graph can be captured: every expert computes every token."""
    qw = projection[0]
    y = x.new_zeros(*ids.shape, qw.out_features)
    for expert in range(qw.packed[0].shape[0]):
        product = kernels.linear(x, *_one(projection, expert))
        y = torch.where((ids == expert)[..., None], product[:, None], y)
    return y


@torch.library.impl("tqw::experts", "CompositeExplicitAutograd")
def _experts_op(x: Tensor, ids: Tensor, bias: Tensor | None, *tensors) -> Tensor:
    projection = kernels.from_arguments(*tensors), bias
    y = kernels.experts(x, projection[0], ids, bias)
    if y is not None:
        return y
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return (_pairs_of_every_expert if capturing else _pairs_by_expert)(x, projection, ids)


@torch.library.register_fake("tqw::experts")
def _experts_fake(x: Tensor, ids: Tensor, bias: Tensor | None, packed: list[Tensor], *rest) -> Tensor:
    del bias, rest
    return x.new_empty(*ids.shape, packed[0].shape[-2])


@torch.library.impl("tqw::experts_backward", "CompositeExplicitAutograd")
def _experts_backward_op(grad: Tensor, ids: Tensor, tokens: int, *tensors) -> Tensor:
    """dx[t] = sum_k grad[t, k] dequantize(qw[e]): [tokens, choices, out] -> [tokens, in]."""
    qw = kernels.from_arguments(*tensors)
    dx = grad.new_zeros(tokens, qw.in_features, dtype=torch.float32)
    for expert, rows, positions in routed_tokens(ids, qw.packed[0].shape[0]):
        part = torch.ops.tqw.linear_backward(grad[rows, positions], *kernels.arguments(qw[expert]))
        dx.index_add_(0, rows, part.float())
    return dx.to(grad.dtype)


@torch.library.register_fake("tqw::experts_backward")
def _experts_backward_fake(
    grad: Tensor, ids: Tensor, tokens: int, packed, weight_scale, channel_scale, *rest
) -> Tensor:
    del ids, packed, weight_scale, rest
    return grad.new_empty(tokens, channel_scale[0].shape[-1])


def _keep_for_experts(ctx, inputs, output) -> None:
    del output
    x, ids, bias, packed, weight_scale, channel_scale, rotation_matrix, ctx.rotation = inputs
    ctx.tokens, ctx.counts = x.shape[0], (len(packed), len(weight_scale), len(channel_scale))
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*packed, *weight_scale, *channel_scale, rotation_matrix, ids)


def _experts_gradient(ctx, grad: Tensor):
    *tensors, matrix, ids = ctx.saved_tensors
    lists, dx, db = kernels.in_lists(tensors, ctx.counts), None, None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tqw.experts_backward(grad, ids, ctx.tokens, *lists, matrix, ctx.rotation)
    if ctx.needs_input_grad[2]:
        each = torch.arange(lists[0][0].shape[0], device=ids.device)
        db = torch.einsum("tke,tko->eo", (ids[..., None] == each).to(grad.dtype), grad).to(ctx.bias_dtype)
    return dx, None, db, *([None] * count for count in ctx.counts), None, None


torch.library.register_autograd("tqw::experts", _experts_gradient, setup_context=_keep_for_experts)


@torch.library.impl("tqw::combine", "CompositeExplicitAutograd")
def _combine_op(pairs: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    return kernels.combine(pairs, weights, ids, experts)


@torch.library.register_fake("tqw::combine")
def _combine_fake(pairs: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    del weights, ids, experts
    return pairs.new_empty(pairs.shape[0], pairs.shape[2])


def _keep_for_combine(ctx, inputs, output) -> None:
    del output
    pairs, weights, ids, ctx.experts = inputs
    ctx.save_for_backward(pairs, weights, ids)


def _combine_gradient(ctx, grad: Tensor):
    pairs, weights, ids = ctx.saved_tensors
    present = ((ids >= 0) & (ids < ctx.experts))[..., None]
    share = torch.where(present, weights[..., None] * grad[:, None], 0).to(pairs.dtype)
    inner = torch.where(present, pairs * grad[:, None], 0).sum(-1).to(weights.dtype)
    return share, inner, None, None


torch.library.register_autograd("tqw::combine", _combine_gradient, setup_context=_keep_for_combine)


def _pairs(x: Tensor, projection: Projection, ids: Tensor, opaque: bool) -> Tensor | None:
    qw, bias = projection
    if opaque:
        return torch.ops.tqw.experts(x, ids, bias, *kernels.arguments(qw))
    return kernels.experts(x, qw, ids, bias)


def _together(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, opaque: bool) -> Tensor | None:
    """All pairs of a projection at once; None where that is not possible or not faster."""
    projected = _pairs(x, experts.up, ids, opaque)
    if projected is None:
        return None
    y = _pairs(experts.activate(projected.flatten(0, 1)), experts.down, ids.reshape(-1, 1), opaque)
    if y is None:
        return None
    pairs = experts.finish(y.flatten(0, 1)).view(*ids.shape, y.shape[-1])
    combine = torch.ops.tqw.combine if opaque else kernels.combine
    return combine(pairs, weights, ids, experts.number).to(x.dtype)


def _one_by_one(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Each expert computes its tokens."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert, tokens, positions in routed_tokens(ids, experts.number):
        inner = experts.activate(kernels.linear(x[tokens], *_one(experts.up, expert)))
        part = experts.finish(kernels.linear(inner, *_one(experts.down, expert)))
        y.index_add_(0, tokens, (part * weights[tokens, positions, None]).float())
    return y.to(x.dtype)


def mixture(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """The sum above: x [tokens, in], ids and weights [tokens, choices]; returns [tokens, out] in the dtype of x."""
    ids = ids.to(torch.int64)  # once, not in each kernel's call
    opaque = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if opaque or (x.is_cuda and kernels.plain_eager(x, weights)):
        y = _together(x, ids, weights, experts, opaque)
        if y is not None:
            return y
    return _one_by_one(x, ids, weights, experts)
