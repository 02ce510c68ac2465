"""CUDA backend: the kernels of the .cu files beside this one, compiled at run time (cuda_launch.py).

Few tokens: one launch or two that transform x, decode and multiply (decode.cu). Dozens and more, on
Hopper: the tensor cores' larger products (middle.cu). Where V must not be rounded to 8 bits, hundreds and more: y = x
dense^T by slices of rows, dense from one kernel, the product from cuBLAS; never more than one slice in memory.
T(x) is rounded to fixed point with one scale per token and tile of at most 128 inputs, to 16 bits or, for 5 tokens and
more of 16-bit inputs and weights below 6 bits, to 8:

    |y - exact| <= sum over tiles of (max |T(x)| / 65024, or 254) * sum |V|  +  float32 accumulation

From 17 tokens on, weights of up to 5 bits, one scale serves a token or a large part of it, and V is rounded to 8 bits,
too (see the head of int8.cu); for prompts it is decoded so once for all tokens, some rows at a time (prompt.cu).
TQW_CUDA_ACTIVATIONS=exact keeps to 16 bits, int8 rounds so with every width; docs/kernels.md states what 8 cost.
Nothing here asks the GPU anything before the first call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tqw.errors import TqwError
from tqw.kernels import cuda_plan, cuda_variant, gpu
from tqw.kernels.cuda_launch import Device, Launch, borrow, cubin, device_at, enter, give_back, launch_all
from tqw.weight import QuantizedWeight, transform

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PROMPT_BYTES = 256 << 20  # of T(x) in 8 bits at once, half of what x takes; more tokens come in turns
_ROWS_BYTES = 128 << 20  # of V in 8 bits at once; more rows come in slices
_DENSE_TOKENS = 64  # without middle.cu: from here on dequantize + cuBLAS
_SLICE_BYTES = (
    64 << 20
)  # of the dense slice; smaller ones stay in the L2 cache but leave the last wave of a product thin
_PAIRS_PER_EXPERT = 4  # (token, expert) pairs of one decode launch; with more, each expert's product comes cheaper
_MOST_PAIRS = 1 << 16  # of one call: the outputs of all its pairs are in memory at once
_KEPT_CALLS = 64  # numbers of tokens that a weight remembers: to look a plan up by its variant takes longer


class _Params(ctypes.Structure):
    """`struct Params` of common.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("channel", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("packed", ctypes.c_void_p * 4),
        ("scale", ctypes.c_void_p * 4),
        ("planes", ctypes.c_void_p),
        ("plane_scale", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("tokens", ctypes.c_int),
        ("out", ctypes.c_int),
        ("in_", ctypes.c_int),
        ("vectors", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("experts", ctypes.c_int),
        ("choices", ctypes.c_int),
        ("arrivals", ctypes.c_int),
        ("arrived", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("slice", ctypes.c_int64),
        ("blocks", ctypes.c_int),
        ("block", ctypes.c_void_p),
        ("pair", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
    ]


class _CombineParams(ctypes.Structure):
    """`struct Params` of combine.cu."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("choices", ctypes.c_int),
        ("out", ctypes.c_int),
        ("experts", ctypes.c_int),
    ]


# ---------------------------------------------------------------------------------------------------------- the op


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why this installation cannot compile kernels, or None. Asks no GPU."""
    for name in ("cuda.bindings.nvrtc", "cuda.bindings.driver"):
        try:
            found = find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed (pip install cuda-bindings)"
    return None


@lru_cache(maxsize=64)
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return f"its GPU is sm_{major}{minor}, older than sm_80" if major < 8 else None


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or why this call needs another backend."""
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on a CUDA device"
    reason = gpu.supports(x, qw)
    if reason is not None:
        return reason
    if any(tensor.data_ptr() % 16 for tensor in qw.packed):
        return "the packed codes do not start at a multiple of 16 bytes"
    if any(tensor.data_ptr() % 4 for tensor in qw.weight_scale):
        return "the weight scales do not start at a multiple of 4 bytes"
    return _missing() or _too_old(x.device.index)


def _variant(qw: QuantizedWeight, dtype: torch.dtype) -> cuda_variant.Variant:
    block, group = qw.block, qw.group_size
    rotated = qw.rotation == "hadamard"
    tile = min(block, group & -group, 128)
    if block == 128 and group in (32, 64):
        tile = 128  # several groups: as fast as one
    rounded = {"auto": sum(qw.bits) < 6, "int8": True, "exact": False}[_activations()]
    planes = 1 if rounded and dtype != torch.float32 else 2
    return cuda_variant.Variant(
        qw.bits, qw.padded_in, group, tile, block, rotated, qw.rotation != "qr", _TYPES[dtype], planes
    )


def _params(qw: QuantizedWeight, in_features: int) -> _Params:
    """Everything that the weight decides; in_features: of the x that the kernel reads (padded for `qr`)."""
    params = _Params(out=qw.out_features, in_=in_features, channel=qw.channel_scale[0].data_ptr())
    params.experts = qw.packed[0].shape[0] if qw.packed[0].ndim == 3 else 0
    for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
        params.packed[index], params.scale[index] = packed.data_ptr(), scale.data_ptr()
    return params


class _Scratch:
    """Memory that a call borrows: the bytes of each part, which its parameters name."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.size = sum(sizes.values())
        self.places = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))

    def borrow(self, params: _Params, stream: int) -> int:
        """Points `params` at the parts; the address to give back."""
        address = borrow(self.size, stream)
        for name, place in self.places.items():
            setattr(params, name, address + place)
        return address


class _Call:
    """A plan for a weight and a number of tokens, to which a call adds only the addresses of its tensors."""

    def __init__(self, ready: _Ready, plan: cuda_plan.Plan, tokens: int, choices: int = 0) -> None:
        """choices: experts of each token; 0: the weight is not stacked."""
        self.launches, self.size, self.vectors = plan.launches, ready.size, ready.vectors
        self.outputs, self.choices = ready.out * (choices or 1), choices  # of a token
        pairs = tokens * choices
        self.params = params = _Params.from_buffer_copy(ready.params)
        params.batch, params.arrivals, params.blocks, params.choices = plan.batch, plan.arrivals, plan.blocks, choices
        params.tokens = tokens if not choices else pairs if plan.blocks else 1
        self.scratch = _Scratch(plan.scratch(pairs))

    def __call__(
        self, x: Tensor, stride: int, y: Tensor, bias: Tensor | None, ids: Tensor | None = None, first: int = 0
    ) -> None:
        """y = T(x) V^T + b for tokens from `first` on, `stride` inputs apart; with ids by the experts they name."""
        params = _Params.from_buffer_copy(self.params)  # threads share self
        params.x = start = x.data_ptr() + first * stride * self.size
        params.vectors = self.vectors and start % 16 == 0 and stride * self.size % 16 == 0
        params.x_stride, params.y = stride, y.data_ptr() + first * self.outputs * self.size
        if bias is not None:
            params.bias = bias.data_ptr()
        if ids is not None:
            params.ids = ids.data_ptr() + first * self.choices * ids.element_size()
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        if not self.scratch.size:
            return launch_all(self.launches, params, stream)
        address = self.scratch.borrow(params, stream)
        try:
            launch_all(self.launches, params, stream)
        finally:
            give_back(address)


class _Prompt:
    """Calls of prompt.cu for a weight and a number of tokens: T(x) of so many at once, V of so many rows."""

    def __init__(self, ready: _Ready, tokens: int) -> None:
        self.ready, out, padded = ready, ready.out, ready.padded
        turn, rows = (-(-n // -(-n * padded // most)) for n, most in ((tokens, _PROMPT_BYTES), (out, _ROWS_BYTES)))
        turn, rows = -(-turn // 128) * 128, -(-rows // 256) * 256
        parts = -(-padded // (128 * ready.base.strip_tiles()))
        counts = 1 + rows // 256 * (1 + parts)  # of strips of V that are decoded (prompt.cu)
        slices = range(0, out, rows)
        self.params = _Params.from_buffer_copy(ready.params)
        self.params.arrivals, self.count_bytes = counts * len(slices), 4 * counts
        self.turns = [(first, min(turn, tokens - first)) for first in range(0, tokens, turn)]
        self.slices = [(row, min(rows, out - row)) for row in slices]
        self.scratch = _Scratch({
            "planes": turn * padded, "rows": rows * padded, "plane_scale": 4 * turn, "row_scale": 4 * out,
            "arrived": self.count_bytes * len(slices),
        })  # fmt: skip

    def __call__(self, x: Tensor, stride: int, y: Tensor, bias: Tensor | None) -> None:
        """y = T(x) V^T + b for tokens `stride` inputs apart."""
        ready, params, size = self.ready, _Params.from_buffer_copy(self.params), self.ready.size
        params.x_stride, params.bias = stride, None if bias is None else bias.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        address = self.scratch.borrow(params, stream)
        arrived = params.arrived
        try:
            for first, params.tokens in self.turns:
                params.x, params.y = x.data_ptr() + first * stride * size, y.data_ptr() + first * ready.out * size
                params.vectors = ready.vectors and params.x % 16 == 0 and stride * size % 16 == 0
                params.arrived = arrived
                for params.first_row, params.slice in self.slices:
                    spread, product = cuda_plan.prompt_launches(
                        ready.base, params.tokens, params.slice, ready.out, ready.device
                    )
                    launch_all((product,) if params.first_row else (spread, product), params, stream)
                    params.arrived += self.count_bytes
        finally:
            give_back(address)


class _Ready:
    """What all calls on one weight share: the parameters that it decides, and a call for each number of tokens."""

    def __init__(self, qw: QuantizedWeight, dtype: torch.dtype, in_features: int, device: Device) -> None:
        self.base, self.params, self.device = _variant(qw, dtype), _params(qw, in_features), device
        self.out, self.padded, self.in_features = qw.out_features, qw.padded_in, in_features
        self.dense = cuda_plan.dense_variant(self.base)
        self.size = dtype.itemsize
        self.vectors = self.params.channel % 8 == 0 and (in_features % 8 == 0 or in_features >= self.padded)
        kept = lru_cache(maxsize=_KEPT_CALLS)
        self.call, self.prompt = kept(self._call), kept(self._prompt)
        self.turn, self.dequantize = kept(self._turn), kept(self._dequantize)

    def _call(self, tokens: int, choices: int = 0) -> _Call | None:
        """None: no kernel takes so many at once. choices: experts of each token, of a stacked weight."""
        if choices:
            plan = cuda_plan.expert_plan(self.base, tokens, choices, self.params.experts, self.out, self.device)
        else:
            plan = cuda_plan.linear_plan(self.base, tokens, self.out, self.device)
        return None if plan is None else _Call(self, plan, tokens, choices)

    def _prompt(self, tokens: int) -> _Prompt | None:
        return _Prompt(self, tokens) if cuda_plan.is_prompt(self.base, tokens, self.out, self.device) else None

    def _turn(self, tokens: int, choices: int) -> tuple[int, int]:
        """Of tokens with `choices` experts each: up to how many pairs a product for each expert is slower, and how
        many tokens are computed at once."""
        count = self.params.experts
        grouped = cuda_plan.grouped_variant(self.base, tokens * choices, count, self.out, self.device) is not None
        most = min(cuda_plan.MIDDLE_TOKENS * count, _MOST_PAIRS) if grouped else _PAIRS_PER_EXPERT * count
        return most, cuda_plan.expert_tokens(self.base, tokens, choices, count, self.out, self.device)

    def _dequantize(self, rows: int) -> Launch:
        return cuda_plan.dequantize_launch(self.dense, rows, self.device)


_READY: dict[tuple, _Ready] = {}


def forget() -> None:
    """Prepare all weights anew: what they are prepared for has changed (TQW_CUDA_ACTIVATIONS, a plan)."""
    global _READY
    _READY = {}


def _key(qw: QuantizedWeight, x: Tensor) -> tuple:
    """All that a prepared weight is made from, so that reused memory cannot make it wrong."""
    tensors = (*qw.packed, *qw.weight_scale, *qw.channel_scale)
    return (
        x.dtype, x.shape[-1], x.get_device(), qw.rotation,
        *map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors), *map(Tensor.is_contiguous, tensors),
    )  # fmt: skip


def _ready(qw: QuantizedWeight, x: Tensor) -> _Ready:
    """The prepared weight."""
    enter(x.device.index)
    key = _key(qw, x)
    ready = _READY.get(key)
    if ready is None:
        if len(_READY) >= 8192:
            _READY.clear()
        ready = _READY[key] = _Ready(qw, x.dtype, x.shape[-1], device_at(x.device.index))
    return ready


def _dense_rows(ready: _Ready, first: int, rows: int, out: Tensor, ids: Tensor | None = None) -> None:
    """out[r] = dense[first + r], or dense[ids[r]]: [rows, in]; for `qr` rows of V, [rows, padded_in]."""
    params = _Params.from_buffer_copy(ready.params)
    params.y, params.first_row, params.tokens = out.data_ptr(), first, rows
    params.ids = None if ids is None else ids.data_ptr()
    params.vectors = out.shape[1] % 8 == 0 and params.y % 16 == 0 and params.channel % 8 == 0
    launch_all((ready.dequantize(rows),), params, torch._C._cuda_getCurrentRawStream(out.get_device()))


def _many(x: Tensor, y: Tensor, ready: _Ready, bias: Tensor | None) -> None:
    """y = x dense^T + b by slices of rows: for many tokens cuBLAS is the best user of the tensor cores."""
    step = max(256, _SLICE_BYTES // (x.shape[1] * x.element_size()) // 256 * 256)
    slices = -(-ready.out // step)
    step = -(-ready.out // slices // 256) * 256
    dense = torch.empty(min(step, ready.out), x.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, ready.out, step):
        rows = min(step, ready.out - first)
        _dense_rows(ready, first, rows, dense)
        torch.mm(x, dense[:rows].T, out=y[:, first : first + rows])
    if bias is not None:
        y += bias


@lru_cache(maxsize=1)
def _activations() -> str:
    activations = os.environ.get("TQW_CUDA_ACTIVATIONS", "auto")
    if activations not in ("auto", "exact", "int8"):
        raise TqwError(f"expected TQW_CUDA_ACTIVATIONS to be auto, exact or int8, got {activations!r}")
    return activations


_NOTHING = nullcontext()


def _on(x: Tensor) -> AbstractContextManager:
    """With the device of x as torch's current one, which to set costs as much as a launch."""
    return _NOTHING if torch._C._cuda_getDevice() == x.get_device() else torch.cuda.device(x.device)


def _product(x: Tensor, ready: _Ready, bias: Tensor | None) -> Tensor:
    """The op for passes that share a rotation: [..., in] -> [..., out]."""
    y = x.new_empty((*x.shape[:-1], ready.out))
    tokens, stride = x.numel() // ready.in_features, ready.in_features
    if tokens == 0:
        return y
    if not x.is_contiguous():
        x = x.reshape(-1, stride)
        x = x if x.stride(1) == 1 else x.contiguous()
        stride = x.stride(0)
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    call = (ready.prompt(tokens) if tokens >= cuda_plan.PROMPT_TOKENS else None) or ready.call(tokens)
    if call is not None:
        call(x, stride, y, bias)
        return y
    chunk = _chunk(ready, tokens)
    if chunk is None:
        _many(x.reshape(-1, x.shape[-1]), y.view(-1, ready.out), ready, bias)
        return y
    for first in range(0, tokens, chunk):
        call = ready.call(min(chunk, tokens - first))
        assert call is not None, "fewer tokens need less shared memory"
        call(x, stride, y, bias, first=first)
    return y


def _chunk(ready: _Ready, tokens: int) -> int | None:
    """Tokens of one turn when all do not fit in one: the most that fit, shared out evenly. None: by dense rows."""
    if tokens >= _DENSE_TOKENS:
        return None
    chunk = next((chunk for chunk in (32, 16, 8, 4, 2, 1) if chunk < tokens and ready.call(chunk)), None)
    return chunk and -(-tokens // -(-tokens // chunk))


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b: [..., in] -> [..., out], in the dtype of x."""
    with _on(x):
        return _by_pass(x, qw, bias) if gpu.supports_rotation(qw) else _product(x, _ready(qw, x), bias)


def compile_ahead(qw: QuantizedWeight, dtype: torch.dtype, tokens: Iterable[int], choices: int = 0) -> None:
    """Compile what `linear` will need for x of this dtype and so many tokens, or `experts` for so many with `choices`
    experts each, on all cores. A server that captures graphs of dozens of numbers of tokens would compile one kernel
    after the other."""
    if gpu.supports_rotation(qw) is None:
        experts, device = qw.packed[0].shape[0] if choices else 0, device_at(qw.packed[0].get_device())
        _compile_modules(_variant(qw, dtype), frozenset(tokens), choices, experts, qw.out_features, device)


@lru_cache(maxsize=512)
def _compile_modules(
    base: cuda_variant.Variant, tokens: frozenset[int], choices: int, experts: int, out: int, device: Device
) -> None:
    if choices:
        modules = {cuda_plan.expert_module(base, count, choices, experts, out, device) for count in tokens}
    else:
        modules = {cuda_plan.linear_module(base, count, out, device) for count in tokens}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda module: cubin(module.source(), device.arch), modules - {None}))


def _prepared(x: Tensor, qw: QuantizedWeight) -> _Ready | None:
    """What `linear` prepared, if it did, for one product."""
    ready = _READY.get(_key(qw, x))
    return None if ready is None or ready.params.experts or qw.rotation == "qr" else ready


def linear_again(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """`linear` for a weight that has been through it, without asking again whether it can be; else None."""
    ready = _prepared(x, qw)
    return None if ready is None else _product_on(x, ready, bias)


def _product_on(x: Tensor, ready: _Ready, bias: Tensor | None) -> Tensor:
    """`_product` in any thread, whichever device is the current one."""
    index = x.get_device()
    enter(index)
    if torch._C._cuda_getDevice() == index:
        return _product(x, ready, bias)
    with torch.cuda.device(index):
        return _product(x, ready, bias)


class _Kept:
    """What a QuantizedWeight keeps of its last call, valid while its tensors stay where they were."""

    def __init__(self, x: Tensor, qw: QuantizedWeight, ready: _Ready) -> None:
        self.among, self.ready = _READY, ready
        self.dtype, self.in_features, self.device = x.dtype, x.shape[-1], x.get_device()
        self.tensors = [*qw.packed, *qw.weight_scale, *qw.channel_scale]
        self.addresses = [*map(Tensor.data_ptr, self.tensors)]

    def suits(self, x: Tensor) -> bool:
        return (
            self.among is _READY
            and x.dtype is self.dtype
            and x.shape[-1] == self.in_features
            and x.get_device() == self.device
            and [*map(Tensor.data_ptr, self.tensors)] == self.addresses
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy or in another process


def linear_kept(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """`linear_again` for a QuantizedWeight that lives on from call to call: in Python, to look at its tensors one by
    one takes as long as a small product."""
    kept = qw.__dict__.get("_cuda_kept")
    if kept is None or not kept.suits(x):
        ready = _prepared(x, qw)
        if ready is None:
            return None
        kept = qw.__dict__["_cuda_kept"] = _Kept(x, qw, ready)  # not a field: equality and replace() do not see it
    return _product_on(x, kept.ready, bias)


def experts(x: Tensor, qw: QuantizedWeight, ids: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """y[t, k] = T(x_t) V_e^T + b_e, e = ids[t, k]: [tokens, in] -> [tokens, choices, out], in the dtype of x.

    qw: stacked [experts, out, in]; bias: [experts, out] or None. Nothing waits for the ids, so that a CUDA graph can
    hold it. Ids out of range: any finite y. None where no kernel can, or a product for each expert is faster.
    """
    if bias is not None and bias.dtype != x.dtype:
        return None
    ready = _READY.get(_key(qw, x))
    if ready is None:
        if not takes_stack(x, qw):
            return None
        ready = _ready(qw, x)
    y = x.new_empty(*ids.shape, qw.out_features)
    if ids.numel() == 0:
        return y
    tokens, choices = ids.shape
    most, turn = ready.turn(tokens, choices)
    if tokens * choices > most and not torch.cuda.is_current_stream_capturing():
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, bias = ids.to(torch.int64).contiguous(), bias if bias is None else bias.contiguous()
    enter(x.get_device())
    with _on(x):
        for first in range(0, tokens, turn):
            call = ready.call(min(turn, tokens - first), choices)
            if call is None:  # one token's inputs do not fit in shared memory
                return None
            call(x, x.stride(0), y, bias, ids, first)
    return y


def takes_stack(x: Tensor, qw: QuantizedWeight) -> bool:
    """Whether `experts` can compute with this weight, where each expert's codes start at a multiple of 16 bytes."""
    if qw.packed[0].ndim != 3 or gpu.supports_rotation(qw) is not None:
        return False
    return not any(packed[0].numel() % 16 for packed in qw.packed) and supports(x, qw[0]) is None


def combine(pairs: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """y[t] = sum_k weights[t, k] pairs[t, k] over 0 <= ids[t, k] < experts: [tokens, choices, out] -> [tokens, out].

    Summed in float32 in one pass over the pairs; y in their dtype, float32, float16 or bfloat16.
    """
    weights = weights if weights.dtype in _TYPES else weights.float()
    pairs, weights, ids = pairs.contiguous(), weights.contiguous(), ids.to(torch.int64).contiguous()
    tokens, choices, out = pairs.shape
    y = pairs.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    params = _CombineParams(pairs.data_ptr(), weights.data_ptr(), ids.data_ptr(), y.data_ptr(), choices, out, experts)
    wide = out * y.element_size() % 16 == 0 and params.pairs % 16 == 0 and params.y % 16 == 0
    index = pairs.get_device()
    with _on(pairs):
        enter(index)
        variant = cuda_variant.Combine(_TYPES[y.dtype], _TYPES[weights.dtype], 16 // y.element_size() if wide else 1)
        launch = cuda_plan.combine_launch(variant, tokens, out, device_at(index))
        launch_all((launch,), params, torch._C._cuda_getCurrentRawStream(index))
    return y


def _passes(qw: QuantizedWeight) -> list[QuantizedWeight]:
    """Weights that each have one rotation and sum to `qw`."""
    if qw.shares_rotation:
        return [qw]
    parts = zip(qw.packed, qw.weight_scale, qw.channel_scale, strict=True)
    return [replace(qw, packed=(p,), weight_scale=(s,), channel_scale=(c,)) for p, s, c in parts]


def _by_pass(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The slower way for passes with different rotations and for `qr`: a float32 product for each rotation."""
    wide = x.float()
    total = wide.new_zeros(*x.shape[:-1], qw.out_features)
    for part in _passes(qw):
        transformed = transform(wide, part.channel_scale[0], part.matrix(wide)) if qw.rotation == "qr" else wide
        total += _product(transformed, _ready(part, transformed), None)
    return (total if bias is None else total + bias).to(x.dtype)


def embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dense[ids]: integer [...] -> [..., in] in `dtype`, for passes that share a Hadamard rotation or have none."""
    flat = ids.reshape(-1).long()
    y = torch.empty(flat.shape[0], qw.in_features, dtype=dtype, device=qw.device)
    if flat.shape[0]:
        with _on(y):
            _dense_rows(_ready(qw, y), 0, flat.shape[0], y, flat)
    return y.view(*ids.shape, qw.in_features)


def supports_embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """None, or why this lookup needs another backend."""
    return gpu.supports_rotation(qw) or supports(ids.new_empty(0, dtype=dtype), qw)
