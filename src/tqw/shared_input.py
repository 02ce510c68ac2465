"""Layers that read the same input (q, k and v; gate and up), computed together when the first of them is called.

For a few tokens a layer costs less than the way to it: one call for the family transforms x once, enters the backend
once and starts the threads once. On a GPU their codes are put side by side in memory, so that one kernel reads them as
one weight. The layers stay where they are, with parameters of their own.

torch.compile sees one op, `tqw::linear_family`, for a family on a GPU: y = [T(x) V_1^T, T(x) V_2^T, ...].
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack  # pyright: ignore

from tqw import kernels
from tqw.kernels import cpu
from tqw.weight import QuantizedWeight, normal_tensor

_MOST_TOKENS = {"cpu": 8, "cuda": 64}  # with more, the products outweigh everything else
_MOST_MISSES = 8  # then the layers do not really share their inputs
_TRACED = ("cuda",)  # devices on which a compiled family is one op
_JOINED: weakref.WeakValueDictionary[int, JoinedWeight] = weakref.WeakValueDictionary()  # by where the codes begin

torch.library.define(
    "tqw::linear_family",
    "(Tensor x, Tensor[] packed, Tensor[] weight_scale, Tensor[] channel_scale, str rotation) -> Tensor",
)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _moment(x: Tensor) -> object:
    """Equal for two calls on x between which nothing can have changed: its version; on a GPU the same stream, too."""
    if not x.is_cuda:
        return _version(x)
    return _version(x), torch._C._cuda_getCurrentRawStream(x.get_device()), torch._C._cuda_isCurrentStreamCapturing()


class JoinedWeight:
    """Several weights as one: their rows follow each other in memory."""

    def __init__(self, weight: QuantizedWeight, parts: Sequence[QuantizedWeight]) -> None:
        self.weight = weight
        self.out_features = [qw.out_features for qw in parts]
        self.parts = _state(parts)
        self.channel_scales = [qw.channel_scale[0].detach() for qw in parts]  # nothing else comes to lie there

    def holds(self, weights: Sequence[QuantizedWeight]) -> bool:
        """Whether the weights still lie there, with the channel scales that were compared."""
        return _state(weights) == self.parts


def _stacked(qw: QuantizedWeight) -> tuple[Tensor, ...]:
    """The tensors with one row for each output."""
    return (*qw.packed, *qw.weight_scale)


def _state(weights: Sequence[QuantizedWeight]) -> list[int]:
    """Where the tensors of the weights are, and the versions of their channel scales."""
    tensors = [tensor for qw in weights for tensor in (*qw.packed, *qw.weight_scale, *qw.channel_scale)]
    scales = [qw.channel_scale[0] for qw in weights]
    return [*map(Tensor.data_ptr, tensors), *map(_version, scales)]


def _alike(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether they could be the rows of one weight: all but their channel scales, which take a look at the values."""
    kinds = {(qw.bits, qw.group_size, qw.rotation) for qw in weights}
    return len(kinds) == 1 and all(qw.rotation != "qr" and qw.shares_rotation for qw in weights)


def _apart(rows: Tensor) -> Tensor:
    """The same memory as a storage of its own: of views of one storage accelerate saves the first alone, as if tied."""
    return from_dlpack(to_dlpack(rows))


@torch.no_grad()
def join(weights: Sequence[QuantizedWeight]) -> JoinedWeight | None:
    """Move the rows of weights that share their input into one piece of memory, in which their tensors lie then.

    None, and nothing moved, where they cannot be computed as one: other widths, groups or channel scales.
    """
    first = weights[0]
    if not _alike(weights):
        return None
    for qw in weights:
        if qw.packed[0].stride(0) % 16:
            return None
        if not torch.equal(qw.channel_scale[0], first.channel_scale[0]):
            return None
    with torch.inference_mode(False):
        stacks = [torch.cat([t.data for t in tensors]) for tensors in zip(*map(_stacked, weights), strict=True)]
        row = 0
        for qw in weights:
            for stack, tensor in zip(stacks, _stacked(qw), strict=True):
                tensor.data = _apart(stack[row : row + qw.out_features])
            row += qw.out_features
    passes = len(first.packed)
    weight = replace(first, packed=tuple(stacks[:passes]), weight_scale=tuple(stacks[passes:]))
    joined = _JOINED[weight.packed[0].data_ptr()] = JoinedWeight(weight, weights)
    return joined


@torch.library.impl("tqw::linear_family", "CompositeExplicitAutograd")
def _family_op(x: Tensor, packed: list[Tensor], weight_scale: list[Tensor], channel_scale: list[Tensor], rotation: str):
    """The outputs of weights that have one channel scale each, side by side: [..., in] -> [..., sum of out]."""
    passes = len(packed) // len(channel_scale)
    parts = [slice(passes * i, passes * (i + 1)) for i in range(len(channel_scale))]
    weights = [
        QuantizedWeight(tuple(packed[part]), tuple(weight_scale[part]), (channel,), rotation, None)
        for part, channel in zip(parts, channel_scale, strict=True)
    ]
    joined = _JOINED.get(packed[0].data_ptr())
    if joined is not None and joined.holds(weights):
        return kernels.linear(x, joined.weight)
    return torch.cat([kernels.linear(x, qw) for qw in weights], -1)


@torch.library.register_fake("tqw::linear_family")
def _family_fake(x: Tensor, packed, weight_scale, channel_scale, rotation) -> Tensor:
    del weight_scale, rotation
    passes = len(packed) // len(channel_scale)
    return x.new_empty(*x.shape[:-1], sum(codes.shape[-2] for codes in packed[::passes]))


def _make_normal(layer: nn.Module) -> None:
    """The parameters of a layer loaded under torch.inference_mode: without versions, a channel scale could change
    unnoticed, and their memory cannot be moved."""
    for name, parameter in layer._parameters.items():
        if parameter is not None and parameter.is_inference():
            layer._parameters[name] = nn.Parameter(normal_tensor(parameter), requires_grad=False)


class SharedInput:
    """One family of quantized linears.

    Outputs computed ahead wait here for their layers, and only for the very tensor they were made of.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.forget()
        weights = [layer.quantized_weight for layer in layers]
        self.one_op, device = _alike(weights), weights[0].device
        if device.type == "cuda":  # for calls that are all compiled or captured
            self._join(device)

    def forget(self) -> None:
        """Begin anew, and keep no tensor."""
        self.misses = 0
        self.compared: list[QuantizedWeight] = []
        self.usable = False
        self.joined: JoinedWeight | None = None
        self.place: list[int] = []  # `_place` when the joined weight was last compared
        self.ahead: tuple[weakref.ref[Tensor] | None, object, dict[int, Tensor]] = (None, None, {})
        self.traced: tuple[Tensor, list[Tensor | None]] | None = None  # only while torch.compile looks

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles start anew: what waits here belongs to this process and these tensors."""
        return {"layers": self.layers, "one_op": self.one_op}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.one_op = state["layers"], state["one_op"]
        self.forget()

    def release(self) -> None:
        """Keep no memory that the layers have left."""
        if self.joined is not None and not self.joined.holds([member.quantized_weight for member in self.layers]):
            self.joined = None

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output for a plain tensor x, or None where the layer must compute by itself."""
        made_of, moment, waiting = self.ahead
        if made_of is not None and made_of() is x and id(layer) in waiting and moment == _moment(x):
            return waiting.pop(id(layer))
        most = _MOST_TOKENS["cpu"] if x.is_cpu else _MOST_TOKENS.get(x.device.type, 0)
        if self.misses > _MOST_MISSES:
            return None
        if x.numel() > most * x.shape[-1]:
            if x.is_cuda and self.joined is None:  # the next call may be compiled or captured
                self._join(x.device)
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

    def _join(self, device: torch.device) -> JoinedWeight | None:
        """The layers' weights as one, if all are on the device (offloaded layers come one by one) and plain tensors."""
        weights = [member.quantized_weight for member in self.layers]
        if any(qw.device != device or hasattr(qw.packed[0], "to_local") for qw in weights):
            self.joined = None
            return None
        if self.joined is None or not self.joined.holds(weights):
            if torch.cuda.is_current_stream_capturing():
                return None  # memory from inside a capture belongs to the graph
            self.misses += 1
            for member in self.layers:
                _make_normal(member)
            self.joined = join([member.quantized_weight for member in self.layers])
        self.place = self._place()
        return self.joined

    def _place(self) -> list[int]:
        """Where the layers' parameters are, and the versions of their channel scales."""
        parameters = [member._parameters for member in self.layers]
        places = [tensor.data_ptr() for of in parameters for tensor in of.values() if tensor is not None]
        return places + [_version(of["channel_scale"]) for of in parameters]

    def _on_gpu(self, x: Tensor) -> Sequence[Tensor] | None:
        joined = self.joined
        if joined is None or self._place() != self.place:
            joined = self._join(x.device)
        if joined is None:
            return None
        y = kernels.linear_plain(x, joined.weight, None)
        return self._with_biases(y.split_with_sizes(joined.out_features, -1))

    def _with_biases(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        biases = [member._parameters["bias"] for member in self.layers]
        if all(bias is None for bias in biases):
            return parts
        return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]

    def traced_output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """`output` while torch.compile looks: what one layer's call computes waits for the calls of the others."""
        if not self.one_op or x.device.type not in _TRACED or (torch.is_grad_enabled() and x.requires_grad):
            return None
        mine = next(i for i, member in enumerate(self.layers) if member is layer)
        if self.traced is None or self.traced[0] is not x or self.traced[1][mine] is None:
            self.traced = x, [*self._as_one_op(x)]
        outputs = self.traced[1]
        output, outputs[mine] = outputs[mine], None
        if all(waiting is None for waiting in outputs):
            self.traced = None
        return output

    def _as_one_op(self, x: Tensor) -> Sequence[Tensor]:
        weights = [member.quantized_weight for member in self.layers]
        packed, weight_scale, channel_scale = (
            [tensor for qw in weights for tensor in getattr(qw, name)]
            for name in ("packed", "weight_scale", "channel_scale")
        )
        y = torch.ops.tqw.linear_family(x, packed, weight_scale, channel_scale, weights[0].rotation)
        return self._with_biases(y.split_with_sizes([member.out_features for member in self.layers], -1))

    def _still_alike(self, weights: list[QuantizedWeight]) -> bool:
        """Compared again only when a parameter was replaced: until then a layer keeps its weight."""
        if len(weights) != len(self.compared) or not all(map(operator.is_, weights, self.compared)):
            self.compared = weights
            self.usable = all(cpu.supports_rows(qw, torch.float32) is None for qw in weights) and all(
                cpu.same_transform(weights[0], qw) for qw in weights[1:]
            )
        return self.usable
