"""Layers that read the same input (q, k and v; gate and up), computed together when the first of them is called.

For a few tokens a layer costs less than the way to it: one call for the family transforms x once, enters the backend
once and starts the threads once. On a GPU their codes are put side by side in memory, so that one kernel reads them as
one weight. The layers stay where they are, with parameters of their own.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tqw import kernels
from tqw.kernels import cpu
from tqw.weight import QuantizedWeight

_MOST_TOKENS = {"cpu": 8, "cuda": 64}  # with more, the products outweigh everything else
_MOST_MISSES = 8  # then the layers do not really share their inputs


def _moment(x: Tensor) -> object:
    """Equal for two calls on x between which nothing can have changed: its version; on a GPU the same stream, too."""
    version = 0 if x.is_inference() else x._version
    if not x.is_cuda:
        return version
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    return version, stream, torch.cuda.is_current_stream_capturing()


class JoinedWeight:
    """Several weights as one: their rows follow each other in memory, and they are views of it."""

    def __init__(self, weight: QuantizedWeight, parts: Sequence[QuantizedWeight]) -> None:
        self.weight = weight
        self.out_features = [qw.out_features for qw in parts]
        self.parts = _state(parts)
        self.channel_scales = [qw.channel_scale[0].detach() for qw in parts]  # nothing else comes to lie there

    def holds(self, weights: Sequence[QuantizedWeight]) -> bool:
        """Whether the weights are still those views, with the channel scales that were compared."""
        return _state(weights) == self.parts


def _stacked(qw: QuantizedWeight) -> tuple[Tensor, ...]:
    """The tensors with one row for each output."""
    return (*qw.packed, *qw.weight_scale)


def _state(weights: Sequence[QuantizedWeight]) -> list[int]:
    """Where the tensors of the weights are, and the versions of their channel scales."""
    tensors = [tensor for qw in weights for tensor in (*qw.packed, *qw.weight_scale, *qw.channel_scale)]
    scales = [qw.channel_scale[0] for qw in weights]
    return [*map(Tensor.data_ptr, tensors), *[-1 if scale.is_inference() else scale._version for scale in scales]]


@torch.no_grad()
def join(weights: Sequence[QuantizedWeight]) -> JoinedWeight | None:
    """Move the rows of weights that share their input into one piece of memory; their tensors become views of it.

    None, and nothing moved, where they cannot be computed as one: other widths, groups or channel scales.
    """
    first = weights[0]
    if first.rotation == "qr" or not first.shares_rotation:
        return None
    for qw in weights:
        alike = (qw.bits, qw.group_size, qw.rotation) == (first.bits, first.group_size, first.rotation)
        if not alike or not qw.shares_rotation or qw.packed[0].stride(0) % 16:
            return None
        if not torch.equal(qw.channel_scale[0], first.channel_scale[0]):
            return None
        if qw.channel_scale[0].is_inference():  # it could change unnoticed
            return None
    with torch.inference_mode(False):
        stacks = [torch.cat([t.data for t in tensors]) for tensors in zip(*map(_stacked, weights), strict=True)]
        row = 0
        for qw in weights:
            for stack, tensor in zip(stacks, _stacked(qw), strict=True):
                tensor.data = stack[row : row + qw.out_features]
            row += qw.out_features
    passes = len(first.packed)
    weight = replace(first, packed=tuple(stacks[:passes]), weight_scale=tuple(stacks[passes:]))
    return JoinedWeight(weight, weights)


class SharedInput:
    """One family of quantized linears.

    Outputs computed ahead wait here for their layers, and only for the very tensor they were made of.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self._forget()

    def _forget(self) -> None:
        self.misses = 0
        self.compared: list[QuantizedWeight] = []
        self.usable = False
        self.joined: JoinedWeight | None = None
        self.ahead: tuple[weakref.ref[Tensor] | None, object, dict[int, Tensor]] = (None, None, {})

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles start anew: what waits here belongs to this process and these tensors."""
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._forget()

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output for a plain tensor x, or None where the layer must compute by itself."""
        made_of, moment, waiting = self.ahead
        if made_of is not None and made_of() is x and id(layer) in waiting and moment == _moment(x):
            return waiting.pop(id(layer))
        most = _MOST_TOKENS["cpu"] if x.is_cpu else _MOST_TOKENS.get(x.device.type, 0)
        if self.misses > _MOST_MISSES or x.numel() > most * x.shape[-1]:
            return None
        self.misses += bool(waiting)
        computed = self._on_cpu(x) if x.is_cpu else self._on_gpu(x)
        if computed is None:
            return None
        outputs = dict(zip(map(id, self.layers), computed, strict=True))
        mine = outputs.pop(id(layer))
        self.ahead = weakref.ref(x), _moment(x), outputs
        return mine

    def _on_cpu(self, x: Tensor) -> Sequence[Tensor] | None:
        weights = [member.quantized_weight for member in self.layers]
        if (
            x.shape[-1] != weights[0].in_features
            or not self._still_alike(weights)
            or cpu.supports(x, weights[0]) is not None
        ):
            return None
        return cpu.linears(x, weights, [member.bias for member in self.layers])

    def _on_gpu(self, x: Tensor) -> Sequence[Tensor] | None:
        weights = [member.quantized_weight for member in self.layers]
        if x.shape[-1] != weights[0].in_features or weights[0].device != x.device:
            return None
        if self.joined is None or not self.joined.holds(weights):
            if torch.cuda.is_current_stream_capturing():
                return None  # memory from inside a capture belongs to the graph
            self.misses += 1
            self.joined = join(weights)
            if self.joined is None:
                return None
        parts = kernels.linear(x, self.joined.weight).split_with_sizes(self.joined.out_features, -1)
        biases = [member.bias for member in self.layers]
        return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]

    def _still_alike(self, weights: list[QuantizedWeight]) -> bool:
        """Compared again only when a parameter was replaced: until then a layer keeps its weight."""
        if len(weights) != len(self.compared) or not all(map(operator.is_, weights, self.compared)):
            self.compared = weights
            self.usable = all(cpu.supports_rows(qw, torch.float32) is None for qw in weights) and all(
                cpu.same_transform(weights[0], qw) for qw in weights[1:]
            )
        return self.usable
