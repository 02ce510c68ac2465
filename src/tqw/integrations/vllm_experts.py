"""Routed experts as one op that torch.compile does not look into: y_t = sum_k p_tk down_e(act(gate_up_e(x_t))).

e = ids[t, k]; ids outside 0 <= e < experts (experts of another rank) add nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tqw import kernels
from tqw.layer import mixture_by_pairs, routed_tokens
from tqw.weight import QuantizedWeight

_WEIGHT = "Tensor[] {0}_packed, Tensor[] {0}_scale, Tensor[] {0}_channel_scale, Tensor? {0}_matrix"
torch.library.define(
    "tqw::routed_experts",
    f"(Tensor x, Tensor weights, Tensor ids, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}, str rotation, "
    "str activation) -> Tensor",
)

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def _activate(projected: Tensor, activation: str) -> Tensor:
    gate, linear = projected.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * linear


def _expert(x: Tensor, up: QuantizedWeight, down: QuantizedWeight, activation: str) -> Tensor:
    return kernels.linear(_activate(kernels.linear(x, up), activation), down)


def routed_experts(
    x: Tensor, weights: Tensor, ids: Tensor, up: QuantizedWeight, down: QuantizedWeight, activation: str
) -> Tensor:
    """x: [tokens, in]; weights, ids: [tokens, k]; up: [experts, 2 * middle, in], gate rows first; down: [experts, in,
    middle]; activation: a key of ACTIVATIONS. Only the experts that were chosen compute."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert, tokens, positions in routed_tokens(ids, up.shape[0]):
        part = _expert(x[tokens], up[expert], down[expert], activation)
        y.index_add_(0, tokens, (part * weights[tokens, positions, None]).float())
    return y.to(x.dtype)


def every_expert(
    x: Tensor, weights: Tensor, ids: Tensor, up: QuantizedWeight, down: QuantizedWeight, activation: str
) -> Tensor:
    """The same sum with every expert computing every token: nothing depends on the ids but numbers, so that a CUDA
    graph can be captured."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(up.shape[0]):
        share = (weights * (ids == expert)).sum(-1, keepdim=True)
        y += (_expert(x, up[expert], down[expert], activation) * share).float()
    return y.to(x.dtype)


@torch.library.impl("tqw::routed_experts", "CompositeExplicitAutograd")
def _op(x: Tensor, weights: Tensor, ids: Tensor, *rest) -> Tensor:
    up_tensors, down_tensors, (rotation, activation) = rest[:4], rest[4:8], rest[8:]
    up, down = (kernels.from_arguments(*tensors, rotation=rotation) for tensors in (up_tensors, down_tensors))
    together = mixture_by_pairs(
        x, ids, weights, (up, None), (down, None), lambda projected: _activate(projected, activation)
    )
    if together is not None:
        return together
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return (every_expert if capturing else routed_experts)(x, weights, ids, up, down, activation)


@torch.library.register_fake("tqw::routed_experts")
def _fake(x: Tensor, *rest) -> Tensor:
    del rest
    return torch.empty_like(x)


def routed_experts_op(
    x: Tensor, weights: Tensor, ids: Tensor, up: QuantizedWeight, down: QuantizedWeight, activation: str
) -> Tensor:
    """`routed_experts` through the opaque op `tqw::routed_experts`."""
    *up_tensors, rotation = kernels.arguments(up)
    *down_tensors, _ = kernels.arguments(down)
    return torch.ops.tqw.routed_experts(x, weights, ids, *up_tensors, *down_tensors, rotation, activation)
