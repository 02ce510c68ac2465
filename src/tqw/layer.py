"""Quantized layers: parameters, one op, a way in from the dense layer, a repr.

All tensors are `nn.Parameter(requires_grad=False)`, named as on disk. Pass 0 is `weight`, `weight_scale`,
`channel_scale`; later passes put `residual_`, `residual_2_`, ... before those names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tqw import kernels
from tqw.config import QuantConfig, format_bits
from tqw.mixture import Experts, Projection, mixture
from tqw.shared_input import SharedInput
from tqw.weight import QuantizedWeight, normal_tensor, quantize

ROTATION_MATRIX = "rotation_matrix"  # the one tensor that layers share; a checkpoint stores it once
STORED_FLOATS = ("scale", ROTATION_MATRIX)  # how names end whose dtype is the format's, not the model's


def _residual(index: int) -> str:
    return "" if index == 0 else "residual_" if index == 1 else f"residual_{index}_"


def parameter_names(prefix: str, index: int) -> tuple[str, str, str]:
    """Names of pass `index`: packed codes, weight scale, channel scale. prefix: "" for a linear, else an expert's."""
    stem = _residual(index)
    if not prefix:
        return f"{stem}weight", f"{stem}weight_scale", f"{stem}channel_scale"
    return f"{prefix}_{stem}".rstrip("_"), f"{prefix}_{stem}scale", f"{prefix}_{stem}channel_scale"


def attach(module: nn.Module, qw: QuantizedWeight, prefix: str = "") -> None:
    """Register the tensors of `qw` as frozen parameters of `module`."""

    def put(name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(normal_tensor(tensor), requires_grad=False)
        module.register_parameter(name, tensor)

    for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
        packed_name, scale_name, channel_name = parameter_names(prefix, index)
        put(packed_name, packed)
        put(scale_name, scale)
        if index < len(qw.channel_scale):
            put(channel_name, qw.channel_scale[index])
    if qw.rotation_matrix is not None:
        put(f"{prefix}_{ROTATION_MATRIX}".lstrip("_"), qw.rotation_matrix)


def attached(module: nn.Module, rotation: str, prefix: str = "") -> QuantizedWeight:
    """Read back what `attach` registered."""
    parameters = module._parameters
    packed, scales, channel_scales = [], [], []
    for index in range(len(parameters)):
        names = parameter_names(prefix, index)
        if names[0] not in parameters:
            break
        packed.append(parameters[names[0]])
        scales.append(parameters[names[1]])
        if names[2] in parameters:
            channel_scales.append(parameters[names[2]])
    matrix = parameters.get(f"{prefix}_{ROTATION_MATRIX}".lstrip("_"))
    return QuantizedWeight(tuple(packed), tuple(scales), tuple(channel_scales), rotation, matrix)


class _KeptWeights:
    """The weights that a module keeps, by their prefixes, and the parameters that they were read from."""

    def __init__(self, parameters: tuple[Tensor | None, ...]) -> None:
        self.parameters, self.identities = parameters, [*map(id, parameters)]
        self.weights: dict[str, QuantizedWeight] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy has parameters of its own


def kept_weight(module: nn.Module, rotation: str, prefix: str = "") -> QuantizedWeight:
    """`attached`, made once and kept until a parameter is replaced: it costs more than a small layer on the CPU."""
    return (attached if torch.compiler.is_compiling() else _kept)(module, rotation, prefix)


def is_lent(module: nn.Module) -> bool:
    """Whether accelerate brings the module's tensors for each call and takes them away after it (offload)."""
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def _kept(module: nn.Module, rotation: str, prefix: str = "") -> QuantizedWeight:
    if is_lent(module):
        module.__dict__.pop("_kept_weights", None)
        return attached(module, rotation, prefix)
    parameters, kept = module._parameters.values(), module.__dict__.get("_kept_weights")
    if kept is None or kept.identities != [*map(id, parameters)]:
        kept = module.__dict__["_kept_weights"] = _KeptWeights(tuple(parameters))
    qw = kept.weights.get(prefix)
    if qw is None:
        qw = kept.weights[prefix] = attached(module, rotation, prefix)
    return qw


def _describe(qw: QuantizedWeight) -> str:
    return f"bits={format_bits(qw.bits)}, group_size={qw.group_size}, rotation={qw.rotation}"


class QuantizedLinear(nn.Linear):
    """y = x dequantize(weight)^T + bias. An `nn.Linear` for whoever asks, but `weight` holds packed codes.

    x: [..., in_features] in any floating dtype; returns [..., out_features] in that dtype.
    """

    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism: hand over local tensors, not DTensors

    def __init__(self, qw: QuantizedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = qw.in_features, qw.out_features
        self.rotation = qw.rotation
        attach(self, qw)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig, **options: Any) -> QuantizedLinear:
        """Quantize a dense layer; `options` go to `quantize`."""
        return cls(quantize(linear.weight.detach(), config, **options), _detached(linear.bias))

    @property
    def quantized_weight(self) -> QuantizedWeight:
        return kept_weight(self, self.rotation)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense layer that this one computes."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(kernels.dequantize(self.quantized_weight, dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return dense

    def reset_parameters(self) -> None:
        """Nothing: codes have no random initialisation."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(keeping_format(self, fn), recurse)
        if "_shared_input" in self.__dict__:
            self.__dict__["_shared_input"].release()
        return self

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced(input)
        shared, bias = self.__dict__.get("_shared_input"), self._parameters["bias"]
        if shared is not None and is_lent(self):
            shared.forget()
            shared = None
        if not kernels.plain_eager(input, bias):
            return kernels.linear(input, self.quantized_weight, bias)
        output = None if shared is None else shared.output(self, input)
        return kernels.linear_plain(input, _kept(self, self.rotation), bias) if output is None else output

    def _traced(self, input: Tensor) -> Tensor:
        """`forward` while torch.compile looks."""
        shared = self.__dict__.get("_shared_input")
        output = None if shared is None else shared.traced_output(self, input)
        return kernels.linear(input, self.quantized_weight, self.bias) if output is None else output

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, " + _describe(
            self.quantized_weight
        )


def keeping_format(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `Module._apply`, but stored scales and matrices only change their device, never their dtype."""
    stored = {id(p) for name, p in module._parameters.items() if name.endswith(STORED_FLOATS)}

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        changed = id(tensor) in stored and result.dtype != tensor.dtype
        return tensor.to(result.device) if changed else result

    return apply


def share_input(layers: Sequence[QuantizedLinear]) -> None:
    """Let layers that read the same input be computed together."""
    shared = SharedInput(layers)
    for layer in layers:
        layer.__dict__["_shared_input"] = shared


def is_scaled_embedding(module: nn.Module) -> bool:
    """transformers' embeddings that multiply what they look up by one number (Gemma's, say)."""
    named = type(module).__name__.endswith("ScaledWordEmbedding")
    return named and isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")


def embedding_scale(module: nn.Module, dtype: torch.dtype) -> float:
    """That number; a tensor is rounded to the dtype of the rows, as its class does."""
    scale = getattr(module, "embed_scale", 1.0)
    if not isinstance(scale, Tensor):
        return float(scale)
    exact = getattr(module, "scalar_embed_scale", None)  # the tensor may have no value yet
    return float(torch.tensor(float(scale if exact is None else exact), dtype=dtype, device="cpu"))


class ScaledEmbedding(nn.Embedding):
    """weight[ids] embed_scale."""

    embed_scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class QuantizedEmbedding(nn.Embedding):
    """dequantize(weight)[ids] embed_scale in `output_dtype`: integer [...] -> [..., embedding_dim]."""

    def __init__(
        self,
        qw: QuantizedWeight,
        padding_idx: int | None = None,
        output_dtype: torch.dtype = torch.float32,
        embed_scale: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = qw.out_features, qw.in_features
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.rotation = qw.rotation
        self.output_dtype, self.embed_scale = output_dtype, embed_scale
        attach(self, qw)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        return kept_weight(self, self.rotation)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """The dense layer that this one computes."""
        table = nn.Parameter(kernels.dequantize(self.quantized_weight, dtype), requires_grad=False)
        kind = nn.Embedding if self.embed_scale == 1 else ScaledEmbedding
        dense = kind(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=table, _freeze=True)
        if isinstance(dense, ScaledEmbedding):
            dense.embed_scale = self.embed_scale
        return dense

    def reset_parameters(self) -> None:
        """Nothing: codes have no random initialisation."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_format(self, fn), recurse)

    def forward(self, input: Tensor) -> Tensor:
        y = kernels.embedding(input, self.quantized_weight, self.output_dtype)
        return y if self.embed_scale == 1 else y * self.embed_scale

    def extra_repr(self) -> str:
        scaled = "" if self.embed_scale == 1 else f"embed_scale={self.embed_scale:.6g}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {scaled}" + _describe(self.quantized_weight)


def is_fused_experts(module: nn.Module) -> bool:
    """True for transformers 5's stacked experts: 3-D parameters `down_proj` and `gate_up_proj` or `up_proj`, a rule for
    the gate (LongCat's have none), called with hidden states, ids and weights (Llama 4's are not)."""
    gated = hasattr(module, "gate_up_proj")
    parameters = [getattr(module, name, None) for name in ("down_proj", "gate_up_proj" if gated else "up_proj")]
    if not all(isinstance(p, nn.Parameter) and p.ndim == 3 and p.is_floating_point() for p in parameters):
        return False
    return (hasattr(module, "_apply_gate") or not gated) and len(signature(module.forward).parameters) >= 3


def expert_projections(experts: nn.Module) -> tuple[str, str]:
    """Names of the two stacked projections: what reads the hidden state, what reads the activation."""
    return ("gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"), "down_proj"


def expert_weight(experts: nn.Module, name: str) -> Tensor:
    """A dense stacked projection as [experts, out, in], whichever way the model stores it."""
    weight = getattr(experts, name).detach()
    return weight.transpose(1, 2) if getattr(experts, "is_transposed", False) else weight


def gate(experts: nn.Module, projected: Tensor) -> Tensor:
    """The activation between the two projections, by the rule of the model's own class."""
    if hasattr(experts, "gate_up_proj"):
        return experts._apply_gate(projected)  # type: ignore[operator]
    return experts.act_fn(projected)  # type: ignore[operator]


class QuantizedExperts(nn.Module):
    """Fused experts of a mixture-of-experts layer: y_t = sum_e p_te down_e(gate(up_e(x_t))).

    Stands in for transformers 5 classes with 3-D expert parameters; the two projections become packed
    [experts, out, in] weights, everything else (activation, biases, limits) is taken over from the dense module.
    """

    def __init__(self, dense: nn.Module, weights: dict[str, QuantizedWeight]) -> None:
        super().__init__()
        self.experts_class = type(dense)
        self.projections = expert_projections(dense)
        self.num_experts = weights["down_proj"].packed[0].shape[0]
        self.rotation = weights["down_proj"].rotation
        for name, value in vars(dense).items():  # activation settings the class's own gate reads
            if not name.startswith("_") and name not in ("training", "is_transposed"):
                setattr(self, name, value)
        for name, child in dense.named_children():
            self.add_module(name, child)
        for name in (f"{projection}_bias" for projection in self.projections):
            bias = getattr(dense, name, None)
            self.register_parameter(name, None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        for name, weight in weights.items():
            attach(self, weight, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_format(self, fn), recurse)

    def _apply_gate(self, projected: Tensor) -> Tensor:
        return self.experts_class._apply_gate(self, projected)  # type: ignore[attr-defined]

    def quantized_weight(self, name: str) -> QuantizedWeight:
        return kept_weight(self, self.rotation, name)

    def _projection(self, name: str) -> Projection:
        return self.quantized_weight(name), getattr(self, f"{name}_bias")

    def _finish(self, y: Tensor) -> Tensor:
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y  # type: ignore[operator]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up, down = map(self._projection, self.projections)
        experts = Experts(up, down, partial(gate, self), self._finish)
        return mixture(hidden_states, top_k_index, top_k_weights, experts)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, " + _describe(self.quantized_weight("down_proj"))


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
