"""Channel statistics from the weights alone: mean squares, carried from layer to layer as if channels were independent.

    h = E emb_j^2;  in each decoder layer, for the attention and then the MLP:
    x = gain^2 h / mean(h)                                   what the norm hands to q/k/v, gate/up
    o = W_v^2 x          d = E act(g)^2 * (W_up^2 x),  g ~ N(0, W_gate^2 x)        what o_proj, down_proj read
    h = h + W_out^2 o                                        what the layer leaves in the residual stream

W^2 is elementwise. No token, no text, no forward pass: for `--calibrate none`. Weights that do not fit this picture
(other module names, experts) get no statistics and thus no channel scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tqw.errors import TqwError
from tqw.model import kind_of
from tqw.moments import decoder_layers

_READS_NORM = ("q_proj", "k_proj", "v_proj")
_QUANTILES = 63  # of the Gaussian that stands for the gate's input


def _linear(parent: nn.Module, name: str) -> nn.Linear | None:
    module = getattr(parent, name, None)
    return module if isinstance(module, nn.Linear) and kind_of(module) == "linear" else None


def _carry(linear: nn.Linear, power: Tensor) -> Tensor:
    """E y_n^2 = sum_j W_nj^2 E x_j^2 + bias^2: float32 [in] -> [out]."""
    result = linear.weight.detach().float().square() @ power
    return result if linear.bias is None else result + linear.bias.detach().float().square()


def _through_norm(norm: nn.Module | None, power: Tensor) -> Tensor:
    """The mean squares after a norm: its gain is what it makes of a vector of signs, whatever its formula."""
    power = power / power.mean()
    if norm is None:
        return power
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    signs = torch.ones_like(power, dtype=dtype)
    signs[::2] = -1
    return (norm(signs).float().square() + norm(-signs).float().square()) / 2 * power


def _activation_power(act: Any, deviation: Tensor) -> Tensor:
    """E act(g)^2 for g ~ N(0, deviation^2)."""
    z = torch.special.ndtri((torch.arange(_QUANTILES, device=deviation.device) + 0.5) / _QUANTILES)
    return act(deviation[:, None] * z).square().mean(-1)


class _Propagation:
    def __init__(self) -> None:
        self.power: dict[str, Tensor] = {}

    def _record(self, name: str, power: Tensor) -> None:
        self.power[f"{name}.weight"] = power.cpu().clone()  # each its own: they are saved for --resume

    def attention(self, name: str, module: nn.Module, x: Tensor) -> Tensor | None:
        """What the attention adds to the residual stream; None when it is not of the known shape."""
        for leaf in _READS_NORM:
            if _linear(module, leaf) is not None:
                self._record(f"{name}.{leaf}", x)
        v, out = _linear(module, "v_proj"), _linear(module, "o_proj")
        if v is None or out is None:
            return None
        value = _carry(v, x)
        if len(value) != out.in_features:  # heads of keys and values serve several queries
            size = getattr(module, "head_dim", 0)
            if not size or len(value) % size or out.in_features % len(value):
                return None
            value = value.unflatten(0, (-1, size)).repeat_interleave(out.in_features // len(value), 0).flatten()
        self._record(f"{name}.o_proj", value)
        return _carry(out, value)

    def mlp(self, name: str, module: nn.Module, x: Tensor) -> Tensor | None:
        """What the MLP adds to the residual stream; None when it is not gate, up, down."""
        gate, up, down = (_linear(module, leaf) for leaf in ("gate_proj", "up_proj", "down_proj"))
        act = getattr(module, "act_fn", None)
        if gate is None or up is None or down is None or act is None:
            return None
        self._record(f"{name}.gate_proj", x)
        self._record(f"{name}.up_proj", x)
        inner = _activation_power(act, _carry(gate, x).sqrt()) * _carry(up, x)
        self._record(f"{name}.down_proj", inner)
        return _carry(down, inner)


@torch.no_grad()
def weight_only_power(model: nn.Module) -> dict[str, Tensor]:
    """E x_j^2 of the layers' inputs by weight name, float32 [in] on the CPU, as far as the weights alone tell it.

    For decoders of the Llama kind (q/k/v/o_proj, gate/up/down_proj, a norm before each part, perhaps one after it).
    Layers of other kinds are left out.
    """
    getter = getattr(model, "get_input_embeddings", None)
    try:
        prefix, layers = decoder_layers(model)
        embedding: Any = getter() if getter is not None else None
    except (NotImplementedError, TqwError):
        return {}
    if not isinstance(embedding, nn.Embedding):
        return {}
    found = _Propagation()
    residual = embedding.weight.detach().float().square().mean(0) * float(getattr(embedding, "embed_scale", 1.0)) ** 2
    for index, layer in enumerate(layers):
        attention = next((name for name, m in layer.named_children() if _linear(m, "q_proj") is not None), "")
        mlp = next((name for name, m in layer.named_children() if _linear(m, "down_proj") is not None), "")
        four_norms = hasattr(layer, "pre_feedforward_layernorm")  # before and after each part
        before_mlp = "pre_feedforward_layernorm" if four_norms else "post_attention_layernorm"
        for part, norm, after in (
            (attention, "input_layernorm", "post_attention_layernorm"),
            (mlp, before_mlp, "post_feedforward_layernorm"),
        ):
            gain = getattr(layer, norm, None)
            if not part or gain is None or len(residual) != next(gain.parameters(), residual).numel():
                continue
            x = _through_norm(gain, residual)
            name = f"{prefix}.{index}.{part}"
            carry = found.attention if part == attention else found.mlp
            added = carry(name, layer.get_submodule(part), x)
            if added is not None:
                residual = residual + (_through_norm(getattr(layer, after, None), added) if four_norms else added)
    return found.power
