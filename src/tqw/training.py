"""Training around quantized weights: adapters merged into the codes, and quantization felt during training.

    merge_lora       dense = dequantize(base) + (alpha / r) B A, quantized again with the base's own settings
    fake quantize    y = x (W + stop_gradient(dequantize(quantize(W)) - W))^T: the straight-through estimator
                     (arXiv 1308.3432, section 5)

LoRA itself needs nothing from here: PEFT takes a QuantizedLinear for the nn.Linear that it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tqw import kernels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.layer import QuantizedLinear
from tqw.model import Select, resolve, share_inputs
from tqw.weight import choose_channel_scale, dequantize, quantize


def _requantized(layer: QuantizedLinear, change: Tensor) -> QuantizedLinear:
    qw = layer.quantized_weight
    if not qw.shares_rotation:
        raise TqwError("expected passes that share one rotation to merge an adapter into: others cannot be merged")
    config = QuantConfig(qw.bits, -1 if qw.group_size == qw.padded_in else qw.group_size, qw.rotation)
    dense = kernels.dequantize(qw) + change.to(qw.device, torch.float32)
    merged = quantize(dense, config, channel_scale=qw.channel_scale[0], rotation_matrix=qw.rotation_matrix)
    return QuantizedLinear(merged, layer.bias)


@torch.no_grad()
def merge_lora(model: Any) -> nn.Module:
    """The base model of a PEFT model with its active LoRA adapters merged and requantized, in place.

    The result has the base's format and size. Adds the rounding of one quantization to what the adapter learned.
    Raises TqwError when there is no adapter, or an adapter of another kind.
    """
    adapted = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    ]
    if not adapted:
        raise TqwError(f"expected a model with LoRA layers, found none in {type(model).__name__}")
    for name, module in adapted:
        base = module.base_layer
        changes = [module.get_delta_weight(adapter) for adapter in module.active_adapters if adapter in module.lora_A]
        if not isinstance(base, QuantizedLinear):
            module.merge()
            model.set_submodule(name, base)
        else:
            model.set_submodule(name, _requantized(base, torch.stack(changes).sum(0)) if changes else base)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    share_inputs(whole)
    return whole


class FakeQuantizedLinear(nn.Linear):
    """A dense, trainable linear layer that computes with its weight as it would be after quantization."""

    config: QuantConfig
    channel_scale: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig) -> FakeQuantizedLinear:
        """The same parameters, felt through `config`; the channel scale is fixed from the weight as it is now."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.config = linear.weight, linear.bias, config
        layer.register_buffer("channel_scale", choose_channel_scale([linear.weight.detach()], config))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        exact = self.weight.detach()
        rounded = dequantize(quantize(exact, self.config, channel_scale=self.channel_scale), exact.dtype)
        return functional.linear(input, self.weight + (rounded - exact), self.bias)


def fake_quantize_model(model: nn.Module, config: QuantConfig | None = None, select: Select | None = None) -> nn.Module:
    """Put FakeQuantizedLinear in place of the linears that `quantize_model` would quantize; train, then quantize."""
    config, decisions = resolve(model, config or QuantConfig(), select)
    for decision in decisions:
        module = model.get_submodule(decision.name)
        if decision.bits and decision.kind == "linear" and isinstance(module, nn.Linear):
            layer = FakeQuantizedLinear.from_linear(module, config.with_bits(decision.bits))
            model.set_submodule(decision.name, layer)
    return model
