"""Layers that read the same input (q, k and v; gate and up), computed together when the first of them is called.

For a few tokens a layer costs less than the way to it: one call for the family transforms x once, enters the backend
once and starts the threads once. The layers stay where they are, with parameters of their own.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tqw.kernels import cpu
from tqw.weight import QuantizedWeight

_MOST_TOKENS = 8  # with more, the products outweigh everything else
_MOST_MISSES = 8  # then the layers do not really share their inputs


class SharedInput:
    """One family of quantized linears.

    Outputs computed ahead wait here for their layers, and only for the very tensor they were made of.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.misses = 0
        self.channel_scales: tuple[Tensor, ...] = ()
        self.usable = False
        self.ahead: tuple[weakref.ref[Tensor] | None, int, dict[int, Tensor]] = (None, 0, {})

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles start anew: what waits here belongs to this process and these tensors."""
        return {**vars(self), "misses": 0, "channel_scales": (), "usable": False, "ahead": (None, 0, {})}

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output for a plain CPU tensor x, or None where the layer must compute by itself."""
        if self.misses > _MOST_MISSES or x.device.type != "cpu" or x.shape.numel() > _MOST_TOKENS * x.shape[-1]:
            return None
        made_of, version, waiting = self.ahead
        now = 0 if x.is_inference() else x._version
        if made_of is not None and made_of() is x and version == now and id(layer) in waiting:
            return waiting.pop(id(layer))
        self.misses += bool(waiting)
        weights = [member.quantized_weight for member in self.layers]
        if (
            x.shape[-1] != weights[0].in_features
            or not self._still_alike(weights)
            or cpu.supports(x, weights[0]) is not None
        ):
            return None
        outputs = dict(
            zip(map(id, self.layers), cpu.linears(x, weights, [member.bias for member in self.layers]), strict=True)
        )
        mine = outputs.pop(id(layer))
        self.ahead = weakref.ref(x), now, outputs
        return mine

    def _still_alike(self, weights: list[QuantizedWeight]) -> bool:
        """Compared again only when a parameter was replaced."""
        scales = tuple(scale for qw in weights for scale in qw.channel_scale)
        if len(scales) != len(self.channel_scales) or not all(map(operator.is_, scales, self.channel_scales)):
            self.channel_scales = scales
            self.usable = all(cpu.supports_rows(qw, torch.float32) is None for qw in weights) and all(
                cpu.same_transform(weights[0], qw) for qw in weights[1:]
            )
        return self.usable
