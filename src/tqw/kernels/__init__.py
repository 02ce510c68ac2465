"""The one op, `linear(x, qw, bias) == F.linear(x, dequantize(qw), bias)`, and the backends that compute it.

A backend is a module with the three names of reference.py: `supports(x, qw)` (None, or the reason why not),
`linear(x, qw, bias)` and, where it can, `linear_backward`. BACKENDS lists them fastest first, up to `reference`, which
runs everywhere and defines what the others must compute; what stands after it runs only when asked for by name.

The torch ops `tqw::linear`, `tqw::linear_backward` and `tqw::embedding` wrap that choice. They are opaque to
torch.compile, functional, and take plain tensors (lists hold one tensor for each residual pass).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from types import ModuleType

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from tqw import weight
from tqw.errors import TqwError
from tqw.kernels import cpu, cuda, cutile, reference, triton
from tqw.weight import QuantizedWeight

BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "cpu": cpu,
    "triton": triton,
    "reference": reference,
    "cutile": cutile,
}

WEIGHT_ARGS = "Tensor[] packed, Tensor[] weight_scale, Tensor[] channel_scale, Tensor? rotation_matrix, str rotation"
torch.library.define("tqw::linear", f"(Tensor x, Tensor? bias, {WEIGHT_ARGS}) -> Tensor")
torch.library.define("tqw::linear_backward", f"(Tensor grad, {WEIGHT_ARGS}) -> Tensor")
torch.library.define("tqw::embedding", f"(Tensor ids, {WEIGHT_ARGS}, ScalarType dtype) -> Tensor")


def from_arguments(
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    channel_scale: Sequence[Tensor],
    rotation_matrix: Tensor | None,
    rotation: str,
) -> QuantizedWeight:
    """The weight that an op was given as `arguments`."""
    return QuantizedWeight(tuple(packed), tuple(weight_scale), tuple(channel_scale), rotation, rotation_matrix)


def arguments(qw: QuantizedWeight) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None, str]:
    """The weight as the ops take it: packed, weight_scale, channel_scale, rotation_matrix, rotation."""
    return list(qw.packed), list(qw.weight_scale), list(qw.channel_scale), qw.rotation_matrix, qw.rotation


def _choose(x: Tensor, qw: QuantizedWeight) -> ModuleType:
    if x.is_cpu and cpu.supports(x, qw) is None:  # without asking the GPU's: that costs as much as a small layer
        return cpu
    return next(backend for backend in BACKENDS.values() if backend.supports(x, qw) is None)


def _automatic(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The op by the first backend that supports it."""
    y = cuda.linear_again(x, qw, bias) if x.is_cuda else None
    return _choose(x, qw).linear(x, qw, bias) if y is None else y


@torch.library.impl("tqw::linear", "CompositeExplicitAutograd")
def _linear_op(x: Tensor, bias: Tensor | None, *tensors) -> Tensor:
    return _automatic(x, from_arguments(*tensors), bias)


@torch.library.register_fake("tqw::linear")
def _linear_fake(x: Tensor, bias: Tensor | None, packed: Sequence[Tensor], *rest) -> Tensor:
    del bias, rest
    return x.new_empty(*x.shape[:-1], packed[0].shape[-2])


@torch.library.impl("tqw::linear_backward", "CompositeExplicitAutograd")
def _linear_backward_op(grad: Tensor, *tensors) -> Tensor:
    return reference.linear_backward(grad, from_arguments(*tensors))


@torch.library.register_fake("tqw::linear_backward")
def _linear_backward_fake(grad: Tensor, packed, weight_scale, channel_scale, *rest) -> Tensor:
    del packed, weight_scale, rest
    return grad.new_empty(*grad.shape[:-1], channel_scale[0].shape[-1])


def _looked_up(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    if ids.is_cuda and cuda.supports_embedding(ids, qw, dtype) is None:
        return cuda.embedding(ids, qw, dtype)
    if ids.device.type == "cpu" and cpu.supports_rows(qw, dtype) is None:
        return cpu.dense_rows(qw, ids, dtype)
    return reference.embedding(ids, qw, dtype)


@torch.library.impl("tqw::embedding", "CompositeExplicitAutograd")
def _embedding_op(ids: Tensor, packed, weight_scale, channel_scale, rotation_matrix, rotation, dtype) -> Tensor:
    return _looked_up(ids, from_arguments(packed, weight_scale, channel_scale, rotation_matrix, rotation), dtype)


@torch.library.register_fake("tqw::embedding")
def _embedding_fake(ids: Tensor, packed, weight_scale, channel_scale, rotation_matrix, rotation, dtype) -> Tensor:
    return channel_scale[0].new_empty(*ids.shape, channel_scale[0].shape[-1], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    del output
    _, bias, packed, weight_scale, channel_scale, rotation_matrix, rotation = inputs
    ctx.counts = len(packed), len(weight_scale), len(channel_scale)
    ctx.rotation = rotation
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*packed, *weight_scale, *channel_scale, rotation_matrix)


def in_lists(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Lists of so many tensors each."""
    rest = iter(tensors)
    return [list(islice(rest, count)) for count in counts]


def _backward(ctx, grad: Tensor):
    *tensors, rotation_matrix = ctx.saved_tensors
    lists = in_lists(tensors, ctx.counts)
    dx = torch.ops.tqw.linear_backward(grad, *lists, rotation_matrix, ctx.rotation) if ctx.needs_input_grad[0] else None
    db = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return dx, db, *([None] * count for count in ctx.counts), None, None


torch.library.register_autograd("tqw::linear", _backward, setup_context=_setup_context)


def plain_eager(x: Tensor, bias: Tensor | None) -> bool:
    """True where nobody looks at the op: no graph, no gradient, no mode, no subclass. There the dispatcher, which costs
    more than a small layer, is left out."""
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or torch._C._len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _check_inputs(x: Tensor, qw: QuantizedWeight) -> None:
    if x.shape[-1] != qw.in_features:
        raise TqwError(f"expected an input [..., {qw.in_features}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TqwError(
            f"expected a floating input, got {x.dtype}: a model that casts to a layer's weight.dtype needs that layer "
            "dense (override it with skip)"
        )


def linear_plain(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`linear` where `plain_eager(x, bias)`."""
    y = cuda.linear_kept(x, qw, bias) if x.is_cuda else None
    if y is None:
        _check_inputs(x, qw)
        y = _automatic(x, qw, bias)
    return y


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """y = x dequantize(qw)^T + bias.

    x: floating [..., in]; bias: [out] or None; returns [..., out] in the dtype of x, differentiable in x and bias.
    backend: "auto" (the first of BACKENDS that supports this call) or a name (raises TqwError with its reason).
    """
    _check_inputs(x, qw)
    if backend == "auto":
        if plain_eager(x, bias):
            return linear_plain(x, qw, bias)
        return torch.ops.tqw.linear(x, bias, *arguments(qw))
    if backend not in BACKENDS:
        raise TqwError(f"expected a backend of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = BACKENDS[backend].supports(x, qw)
    if reason is not None:
        raise TqwError(f"expected a call that backend {backend!r} supports, but {reason}")
    return BACKENDS[backend].linear(x, qw, bias)


def embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dequantize(qw)[ids]: integer [...] -> [..., in] in `dtype`."""
    if plain_eager(ids, None):
        return _looked_up(ids, qw, dtype)
    return torch.ops.tqw.embedding(ids, *arguments(qw), dtype)


def experts(x: Tensor, qw: QuantizedWeight, ids: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """y[t, k] = linear(x_t, qw[e], bias[e]), e = ids[t, k], with the ids left on the GPU; None where no backend can.

    x: [tokens, in]; qw: [experts, out, in]; ids: integer [tokens, choices]; returns [tokens, choices, out].
    """
    return cuda.experts(x, qw, ids, bias) if x.is_cuda else None


def combine(pairs: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """y[t] = sum_k weights[t, k] pairs[t, k] over 0 <= ids[t, k] < experts: [tokens, choices, out] -> [tokens, out]."""
    return (cuda if pairs.is_cuda else reference).combine(pairs, weights, ids, experts)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight.dequantize` by the fastest backend: dense [..., out, in] in `dtype`."""
    if cpu.supports_rows(qw, dtype) is None:
        return cpu.dense_rows(qw, None, dtype)
    return weight.dequantize(qw, dtype)


def compile_ahead(qw: QuantizedWeight, dtype: torch.dtype, tokens: Iterable[int], choices: int = 0) -> None:
    """Compile what `linear` will need for inputs of this dtype and so many tokens, or `experts` for so many with
    `choices` experts each, if it is compiled at first use."""
    x = torch.empty(1, qw.in_features, dtype=dtype, device=qw.device)
    if x.is_cuda and (cuda.takes_stack(x, qw) if choices else cuda.supports(x, qw) is None):
        cuda.compile_ahead(qw, dtype, tokens, choices)


def explain(x: Tensor, qw: QuantizedWeight) -> dict[str, str]:
    """Why each backend is or is not used for this call: name -> "selected", "available" or the reason against it."""
    answers: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        reason = backend.supports(x, qw)
        answers[name] = reason or ("available" if "selected" in answers.values() else "selected")
    return answers
