"""Weight scales refined one decoder layer at a time, codes fixed: gradient steps on what the whole layer gets wrong.

    min over s of  |layer(h; dequantize(codes, s)) - dense layer(h_float)|^2 / |dense layer(h_float) - h_float|^2

h_float are the hidden states of the float model on the calibration sequences, h those that the quantized layers so far
make of the same sequences, so that a layer also learns to make up for the layers before it. Steps are Adam's on log s.
The block-wise reconstruction of BRECQ (arXiv 2102.05426), on the scales alone.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tqw.layer import QuantizedLinear
from tqw.model import Progress, kind_of
from tqw.moments import LayerInputs
from tqw.weight import rotated_levels, untransform

STEPS = 24
LENGTH = 128  # of each sequence: shorter steps, more of them
RATE = 2e-3  # of log s: a scale moves by some percent


def _levels(layer: QuantizedLinear) -> list[Tensor]:
    """Levels of each pass as integers in float32, [out, groups, group]."""
    qw = layer.quantized_weight
    ones = [torch.ones_like(scale) for scale in qw.weight_scale]
    return [
        rotated_levels(packed, one, qw.padded_in).unflatten(-1, (one.shape[-1], -1))
        for packed, one in zip(qw.packed, ones, strict=True)
    ]


def _dense(layer: QuantizedLinear, levels: list[Tensor], scales: list[Tensor]) -> Tensor:
    """`dequantize` with other scales, differentiable in them."""
    qw = layer.quantized_weight
    total = sum((level * scale.unsqueeze(-1)).flatten(-2) for level, scale in zip(levels, scales, strict=True))
    assert isinstance(total, Tensor)
    return untransform(total, qw.channel_scale[0], qw.matrix(total))


def _trainable(block: nn.Module) -> dict[str, QuantizedLinear]:
    return {
        name: module
        for name, module in block.named_modules()
        if type(module) is QuantizedLinear and module.quantized_weight.shares_rotation
    }


def _refine_block(
    inputs: LayerInputs, dense: nn.Module, targets: list[Tensor], weights: list[float], steps: int
) -> None:
    """Fit the current layer's scales to `targets`; its weight_scale parameters are changed in place."""
    layers = _trainable(inputs.layers[inputs.current])
    if not layers:
        return
    levels = {name: _levels(layer) for name, layer in layers.items()}
    start = {name: [s.float() for s in layer.quantized_weight.weight_scale] for name, layer in layers.items()}
    logs = {name: [torch.zeros_like(s, requires_grad=True) for s in scales] for name, scales in start.items()}
    flat = [log for several in logs.values() for log in several]
    optimizer = torch.optim.Adam(flat, lr=RATE, betas=(0.9, 0.95))

    def scales(name: str) -> list[Tensor]:
        return [s * log.exp() for s, log in zip(start[name], logs[name], strict=True)]

    def call(*args: Any, **kwargs: Any) -> Any:
        stand_in = {}
        for name, layer in layers.items():
            shell: Any = dense.get_submodule(name)
            weight = _dense(layer, levels[name], scales(name)).to(shell.weight.dtype)
            stand_in[f"{name}.weight"] = weight.T if kind_of(shell) == "conv1d" else weight
        return functional_call(dense, stand_in, args, kwargs)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = step % len(targets)
        with torch.enable_grad():
            error = (inputs.output(batch, call).float() - targets[batch].float()).square().mean() / weights[batch]
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    for name, layer in layers.items():
        for stored, refined in zip(layer.quantized_weight.weight_scale, scales(name), strict=True):
            stored.copy_(refined.detach().half())


@torch.no_grad()
def refine(
    model: nn.Module, reference: nn.Module, ids: Tensor, steps: int = STEPS, progress: Progress | None = None
) -> None:
    """Refine the weight scales of `model`, quantized from `reference`, in place: same codes, same size, same speed.

    ids: int64 [sequences, tokens], of which the first 128 tokens are used. Memory: both models, and one dense decoder
    layer in float32 with its gradients.
    Layers that are not QuantizedLinear (experts, embeddings) stay as they are.
    """
    ids = ids[:, :LENGTH]
    ours, theirs = LayerInputs(model, ids), LayerInputs(reference, ids)
    for index in range(len(ours.layers)):
        before = list(theirs.hidden)
        dense = copy.deepcopy(theirs.layers[index]).requires_grad_(False)
        theirs.advance()
        added = [float((y.float() - x.float()).square().mean()) for x, y in zip(before, theirs.hidden, strict=True)]
        _refine_block(ours, dense, theirs.hidden, [max(a, 1e-30) for a in added], steps)
        ours.advance()
        if progress is not None:
            progress("refine", index + 1, len(ours.layers))
